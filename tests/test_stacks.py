"""Mixtures of experts under calibrated methods: the linear layers calibrated, the experts rounded, all of it stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_experts import FAMILIES, mixtures_of, sixteen_bit_stacks, stream
from tiny_models import build, equal_states, load, prompt, saved

from flute import QuantSpec
from flute.config import ModelSpec
from flute.errors import IntegrationError
from flute.integrations import folders
from flute.methods import higgs_spec, quantize_model

SPEC = QuantSpec(3, 24, "nf3")


def windows() -> torch.Tensor:
    return torch.randint(97, (12, 24), generator=torch.Generator().manual_seed(0))


def quantized(source: str, method: str, spec: QuantSpec, text: Any) -> tuple[Any, Any]:
    model = load(source)
    return model, quantize_model(model, ModelSpec(spec, experts=True), text, method=method)


@pytest.mark.parametrize(
    ("family", "method", "spec"),
    [
        ("Mixtral", "gptq", higgs_spec(3, 24)),
        ("Mixtral", "best", QuantSpec(3, 24, "custom", 2)),
        ("Qwen2Moe", "awq+gptq", SPEC),
    ],
    ids=str,
)
def test_calibrated_around_rounded_experts(family: str, method: str, spec: QuantSpec, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", family, **FAMILIES[family])
    model, report = quantized(source, method, spec, windows())
    assert len(mixtures_of(model)) == 2 and not sixteen_bit_stacks(model)
    notes = {layer.name: layer.note for layer in report.layers}
    assert (
        len(notes) == len(report.layers) and sum("experts are not calibrated" in note for note in notes.values()) == 4
    )
    assert all(layer.error is not None for layer in report.layers if "experts." not in layer.name)
    model.save_pretrained(tmp_path / "out")
    folders.validate(tmp_path / "out")
    again = load(tmp_path / "out")
    assert equal_states(model, again)
    torch.testing.assert_close(
        model(prompt()).logits, again(prompt()).logits
    )  # layers that are joined add up otherwise


def test_without_calibration_it_is_what_streaming_writes(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", "Mixtral", torch.float16, **FAMILIES["Mixtral"])
    model = load(source, dtype=torch.float16)
    quantize_model(model, ModelSpec(SPEC, experts=True), method="rtn")
    model.save_pretrained(tmp_path / "one")
    stream(source, tmp_path / "two", ModelSpec(SPEC, experts=True))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_calibration_makes_up_for_what_rounded_experts_do(tmp_path: Path) -> None:
    """Layers of the second block see the rounded experts of the first: their inputs are not the dense model's."""
    source = saved(tmp_path / "dense", "Mixtral", **FAMILIES["Mixtral"])
    kept = [quantized(source, "gptq", SPEC, windows())[0]]
    dense = load(source)
    quantize_model(dense, ModelSpec(SPEC), windows(), method="gptq")
    kept.append(dense)
    first, second = (model.model.layers[1].self_attn.q_proj.weight for model in kept)
    assert not torch.equal(first, second)


def test_scales_of_experts_cannot_be_learned() -> None:
    with pytest.raises(IntegrationError, match="stack of experts, whose scales cannot be learned"):
        quantize_model(build("Mixtral", **FAMILIES["Mixtral"]), ModelSpec(SPEC, experts=True), windows(), method="nfl")
