"""Tables: exact values, and custom tables refused unless they fit."""

import math
from statistics import NormalDist

import pytest
import torch

from flute.errors import SpecError
from flute.spec import NAMED_TABLES, QuantSpec
from flute.tables import named_table, resolve_table

# The published constants of QLoRA's NormalFloat-4, and the values the same rule gives for 2 and 3 bits.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_named_tables_are_finite_and_ascending() -> None:
    for name in NAMED_TABLES:
        table = named_table(name)
        assert table.dtype == torch.float32
        assert table.shape == (2 ** int(name[-1]),)
        assert bool((table[1:] >= table[:-1]).all())
        assert bool((table == 0).any()) != name.startswith("gauss")


def test_nf4_is_bit_exact() -> None:
    assert torch.equal(named_table("nf4"), torch.tensor(NF4, dtype=torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_follows_the_quantile_rule(bits: int) -> None:
    delta = 0.5 * (1 / 32 + 1 / 30)
    half = 2 ** (bits - 1)
    low = [-NormalDist().inv_cdf(1 - delta - i * (0.5 - delta) / (half - 1)) for i in range(half)]
    high = [NormalDist().inv_cdf(0.5 + i * (0.5 - delta) / half) for i in range(1, half + 1)]
    rule = torch.tensor([value / max(high) for value in low + high], dtype=torch.float64)
    tolerance = 1e-6 if bits == 4 else 0.0
    assert torch.allclose(named_table(f"nf{bits}").double(), rule.float().double(), rtol=0, atol=tolerance)


def test_nf3_and_nf2_to_seven_digits() -> None:
    nf3 = [-1, -0.4786291, -0.2171418, 0, 0.1609301, 0.3379151, 0.5626169, 1]
    assert torch.allclose(named_table("nf3"), torch.tensor(nf3, dtype=torch.float32), rtol=0, atol=6e-8)
    assert torch.allclose(named_table("nf2"), torch.tensor([-1, 0, 0.3379151, 1]), rtol=0, atol=6e-8)
    assert math.copysign(1, float(named_table("nf3")[3])) == 1  # zero, not minus zero


def test_small_floats_and_integers() -> None:
    assert named_table("fp4").tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert named_table("fp3").tolist() == [-4, -2, -1, 0, 0, 1, 2, 4]
    assert named_table("fp2").tolist() == [-1, 0, 0, 1]
    assert named_table("int4").tolist() == list(range(-8, 8))
    assert named_table("int2").tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize(
    "table",
    [
        None,
        torch.zeros(15),
        torch.zeros(16),
        torch.arange(16),
        torch.full((16,), float("nan")),
        torch.full((16,), float("inf")),
        torch.randn(256, 2),
    ],
)
def test_custom_tables_that_do_not_fit_are_refused(table: torch.Tensor | None) -> None:
    with pytest.raises(SpecError):
        resolve_table(QuantSpec(4, 64, "custom"), table)


def test_a_named_spec_takes_no_tensor() -> None:
    with pytest.raises(SpecError, match="named table"):
        resolve_table(QuantSpec(), torch.randn(16))
    with pytest.raises(SpecError, match="unknown"):
        named_table("zf4")
