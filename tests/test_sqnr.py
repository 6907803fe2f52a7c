"""SQNR of layers from files: by hand, for rotated, headed and stacked weights, and what cannot be compared."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import flute
from tiny_models import build, dense_linears, load

from flute.checkpoint import streaming
from flute.checkpoint.plan import make_plan
from flute.config import ModelSpec
from flute.errors import CheckpointError
from flute.evaluate import sqnr
from flute.integrations import folders
from flute.linear import LutLinear
from flute.methods import higgs_spec
from flute.spec import QuantSpec

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    build("Llama", torch.float16).save_pretrained(folder)
    return folder


def quantized(dense: Path, record: ModelSpec, table: torch.Tensor | None = None) -> Path:
    out = dense.parent / "quantized"
    streaming.run(make_plan(dense, folders.architecture(dense, record), record), out, table=table)
    return out


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def by_definition(weight: torch.Tensor, made: torch.Tensor) -> float:
    weight = weight.detach().double()
    return float(10 * torch.log10(weight.square().sum() / (weight - made.double()).square().sum()))


def test_decibels() -> None:
    assert sqnr.decibels(100, 1) == 20 and sqnr.decibels(1, 1) == 0 and sqnr.decibels(1, 1000) == -30
    assert sqnr.decibels(0, 0) == sqnr.decibels(1, 0) == math.inf


def test_by_hand(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1, 0.5, 1, 0.5, ... with the table -1, -0.25, 0.25, 1: scale 1, and 0.5 is stored as 0.25. In each pair
    the signal is 1 + 0.25 and the noise 0.25^2, twenty times less."""
    change(dense, DOWN + ".weight", torch.tensor([1.0, 0.5]).repeat(72, 60))
    out = quantized(dense, ModelSpec(QuantSpec(2, 24, "custom")), torch.tensor([-1.0, -0.25, 0.25, 1.0]))
    monkeypatch.setattr(sqnr, "_WEIGHTS_AT_ONCE", 1000)  # nine slices of rows
    calls: list[tuple[str, int]] = []
    found = sqnr.distances(folders.validate(out), dense, lambda *call: calls.append(call))
    assert found.sqnr[DOWN] == pytest.approx(10 * math.log10(20), abs=1e-12)
    assert (DOWN, 72 * 120) in calls and len(calls) == len(found.sqnr) == 14
    assert list(found.sqnr.values()) == sorted(found.sqnr.values()) and not found.left and not found.changed


def test_weights_on_the_grid_have_no_noise(dense: Path) -> None:
    change(dense, DOWN + ".weight", torch.tensor([1.0, -0.25]).repeat(72, 60))
    out = quantized(dense, ModelSpec(QuantSpec(2, 24, "custom")), torch.tensor([-1.0, -0.25, 0.25, 1.0]))
    assert list(sqnr.distances(folders.validate(out), dense).sqnr.items())[-1] == (DOWN, math.inf)


@pytest.mark.parametrize("spec", [higgs_spec(3, 24, hadamard_size=24), QuantSpec(4, 64, "nf4")], ids=str)
def test_rotated_or_not_it_is_what_the_layer_computes_with(spec: QuantSpec, dense: Path) -> None:
    out = quantized(dense, ModelSpec(spec, lm_head=True))
    found = sqnr.distances(folders.validate(out), dense).sqnr
    made = {name: layer for name, layer in load(out, dtype=torch.float32).named_modules() if type(layer) is LutLinear}
    source = dense_linears(load(dense))
    assert found.keys() == made.keys() and "lm_head" in found
    for name, value in found.items():
        assert value == pytest.approx(by_definition(source[name].weight, made[name].dequantize()), abs=1e-4)
        assert 3 < value < 30


def test_a_head_that_was_tied(tmp_path: Path) -> None:
    model = build("Llama", torch.float16, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    out = quantized(tmp_path / "dense", ModelSpec(lm_head=True))
    head = load(out, dtype=torch.float32).lm_head.dequantize()
    found = sqnr.distances(folders.validate(out), tmp_path / "dense").sqnr
    assert found["lm_head"] == pytest.approx(by_definition(model.lm_head.weight, head), abs=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec(3, 24, "nf3"), higgs_spec(3, 24, hadamard_size=8)], ids=str)
def test_stacked_experts(spec: QuantSpec, tmp_path: Path) -> None:
    model = build("Mixtral", torch.float16, num_local_experts=5, num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "dense")
    out = quantized(tmp_path / "dense", ModelSpec(spec, experts=True))
    found = sqnr.distances(folders.validate(out), tmp_path / "dense")
    made = load(out, dtype=torch.float32).model.layers[1].mlp.experts
    name = "model.layers.1.mlp.experts."
    for part in ("gate_up_proj", "down_proj"):
        dense_part = getattr(model.model.layers[1].mlp.experts, part)
        expected = by_definition(dense_part, torch.stack(list(made.dequantize(part.removesuffix("_proj")))))
        assert found.sqnr[name + part] == pytest.approx(expected, abs=1e-4)
    assert not found.left


def test_folded_norms_are_named(dense: Path) -> None:
    out = quantized(dense, ModelSpec())
    change(dense, "model.layers.1.input_layernorm.weight", torch.full((72,), 0.5))
    assert sqnr.distances(folders.validate(out), dense).changed == ("model.layers.1.input_layernorm.weight",)


def test_another_model_is_refused(dense: Path, tmp_path: Path) -> None:
    out = quantized(dense, ModelSpec())
    build("Llama", torch.float16, intermediate_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no weight \(120, 72\) of layer 'model.layers.0.mlp.gate_proj'"):
        sqnr.distances(folders.validate(out), tmp_path / "other")
    with pytest.raises(CheckpointError, match="quantized itself"):
        sqnr.distances(folders.validate(out), out)


def test_inspect_against(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quantized(dense, ModelSpec())
    change(dense, "model.norm.weight", torch.full((72,), 0.5))
    found = sqnr.distances(folders.validate(out), dense).sqnr
    code, text, err = flute("inspect", out, "--against", dense, capsys=capsys)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("model.layers")]
    assert code == 0 and [(row[0], row[-1]) for row in rows] == [(n, f"{value:.2f}") for n, value in found.items()]
    (worst, low), *_, (best, high) = found.items()
    mean = sum(found.values()) / 14
    assert f"min {low:.2f} dB ({worst}), mean {mean:.2f}, max {high:.2f} ({best})" in text
    assert "1 norms or biases" in err and "model.norm.weight" in err
    code, text, _ = flute("inspect", out, "--against", dense, "--json", capsys=capsys)
    figures: dict[str, Any] = json.loads(text)
    assert figures["sqnr_db"] == found and figures["changed"] == ["model.norm.weight"] and len(figures["layers"]) == 14
