"""QuantSpec: every limit is checked once, when the record is made, and JSON brings it back."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flute.errors import FluteError, SpecError
from flute.spec import NAMED_TABLES, QuantSpec

specs = st.one_of(
    st.builds(
        lambda name, group: QuantSpec(int(name[-1]), group, name),
        st.sampled_from(NAMED_TABLES),
        st.one_of(st.just(-1), st.integers(1, 4096)),
    ),
    st.builds(
        lambda bits, group, vector: QuantSpec(bits, group * vector, "custom", vector),
        st.sampled_from([2, 3, 4]),
        st.integers(1, 2048),
        st.sampled_from([1, 2]),
    ),
)


@given(specs)
def test_json_round_trip(spec: QuantSpec) -> None:
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 5},
        {"bits": 0},
        {"bits": -1},
        {"bits": 10**9},
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"bits": None},
        {"group_size": 0},
        {"group_size": -2},
        {"group_size": 2**31},
        {"group_size": "64"},
        {"group_size": False},
        {"bits": 3, "table": "nf4"},
        {"table": "nf5"},
        {"table": 4},
        {"table": ["nf4"]},
        {"vector_size": 3},
        {"vector_size": 2, "table": "nf4"},
        {"vector_size": 2, "table": "custom", "group_size": 33},
        {"num_sms": 108},
    ],
)
def test_every_limit_is_refused_in_one_line(values: dict) -> None:
    with pytest.raises(SpecError) as refusal:
        QuantSpec.from_dict(values)
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, FluteError)


@given(
    st.dictionaries(st.text(max_size=12), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
)
def test_any_json_object_is_a_spec_or_a_spec_error(values: dict) -> None:
    with contextlib.suppress(SpecError):
        QuantSpec.from_dict(values)


def test_derived_numbers() -> None:
    spec = QuantSpec(3, 64, "nf3")
    assert spec.row_bytes(100) == 38
    assert spec.num_groups(100) == 2
    assert QuantSpec(4, -1, "nf4").group(100) == 100
    assert QuantSpec(4, 256, "nf4").group(100) == 100
    assert QuantSpec().bits_per_weight(4096) == 4.25
    with pytest.raises(SpecError, match="down_proj"):
        QuantSpec(4, 64, "custom", 2).check_layer("down_proj", 8, 7)
