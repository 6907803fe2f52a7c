"""``flute inspect`` of FlatQuant checkpoints: every byte counted once, and folders that are damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from flat_models import save
from safetensors.torch import load_file, save_file
from test_cli import flute

from flute.flatquant.matrices import Matrices
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flat_report import report
from flute.integrations.flatblocks import blocks_of
from flute.integrations.flatquant import mark_flat
from flute.methods.flatquant import apply


def saved(folder: Path, spec: FlatSpec, family: str = "Qwen3") -> Path:
    model = tiny_models.build(family).half()
    save(folder, model, spec, [Matrices() for _ in blocks_of(model)[1]])
    return folder


SPECS = [
    PRESETS["w4a4kv4-down8"], FlatSpec(w_asym=True, q_bits=4), replace(PRESETS["w3a16"], w_groupsize=24),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=["down8", "w_asym", "groups"])
def test_every_byte_is_counted_once(spec: FlatSpec, tmp_path: Path) -> None:
    found = report(saved(tmp_path, spec))
    tensors = load_file(tmp_path / "model.safetensors")
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values()) and len(found.layers) == 14
    layer = next(each for each in found.layers if each.name == "model.layers.1.mlp.down_proj")
    assert layer.shape == (72, 120) and layer.transform == (10, 12)
    parts = [tensor for name, tensor in tensors.items() if name.startswith(layer.name) and "bias" not in name]
    assert layer.nbytes == sum(part.nbytes for part in parts) and layer.weight_bits == spec.weight_bits("down_proj")
    factors = ("transform", "self_attn.heads")
    assert found.transform_bytes == sum(t.nbytes for name, t in tensors.items() if any(one in name for one in factors))
    assert found.head_transform == (12 if spec.turns_keys else 0)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, PRESETS["w4a4kv4-down8"])
    code, out, _ = flute("inspect", tmp_path, capsys=capsys)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip().startswith("model")}
    assert code == 0 and len(rows) == 14
    assert rows["model.layers.0.mlp.down_proj"][:9] == ["72", "x", "120", "8", "8", "10", "x", "12", "8,928"]
    assert rows["model.layers.0.self_attn.o_proj"][3:6] == ["4", "4", "6"]
    assert "keys 4 bits, asymmetric, values 4 bits, asymmetric; keys and queries behind a transform of 12 x 12" in out
    code, out, _ = flute("inspect", tmp_path, "--json", capsys=capsys)
    figures = json.loads(out)
    assert figures["quantization_config"] == PRESETS["w4a4kv4-down8"].to_dict()
    assert figures["bytes"] == figures["layer_bytes"] + figures["transform_bytes"] + figures["dense_bytes"]
    code, _, err = flute("inspect", tmp_path, "--against", "tiny", capsys=capsys)
    assert code == 1 and "flute eval" in err and len(err.splitlines()) == 1


def config(change: dict[str, Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"] |= change
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def without(name: str) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (config({"k_bits": 17}), "config.json: k_bits=17"),
        (config({"version": 2}), "version=2"),
        (config({"a_bits": [4]}), "a_bits=[4]"),
        (config({"new": 1}), "unknown key 'new'"),
        (config({"a_asym": True, "w_asym": True}), "evaluated, not saved"),
        (config({"w_bits": 8}), "self_attn.q_proj.weight"),
        (config({"q_bits": 4}), "self_attn.heads.q_clip' is missing"),
        (without("model.layers.0.mlp.input_transform.left"), "input_transform.left' is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_bad_folders_are_refused_in_one_line(
    damage: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved(tmp_path, FlatSpec(), "Llama"))
    code, out, err = flute("inspect", tmp_path, capsys=capsys)
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and words in err, err


def test_the_head_is_tied(tmp_path: Path) -> None:
    model = tiny_models.build("Qwen2", tie_word_embeddings=True).half()
    apply(model, FlatSpec(), [Matrices() for _ in blocks_of(model)[1]])
    mark_flat(model, FlatSpec())
    model.save_pretrained(tmp_path)
    assert report(tmp_path).nbytes == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert torch.equal(tiny_models.load(tmp_path).lm_head.weight, model.lm_head.weight)
