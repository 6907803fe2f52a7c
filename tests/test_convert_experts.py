"""Mixtures of experts from other owners: each matrix of each expert keeps its weights, stacked by the loader."""

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import SIZES, Parts, integers
from safetensors.torch import load_file, save_file
from test_convert import CT, GPTQ, Weights, run, uniform_layer
from tiny_models import build, load, prompt
from torch import nn

from flute import LutLinear, QuantSpec
from flute.errors import CheckpointError
from flute.experts import LutExperts
from flute.integrations import folders

QWEN: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": QWEN,
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 64},
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def nf4(weights: Weights) -> Any:
    """For `foreign.checkpoint`: bitsandbytes' layers."""

    def layer(name: str, linear: nn.Linear) -> Parts:
        from flute.tables import named_table

        table, (rows, width) = named_table("nf4"), linear.weight.shape
        codes, absmax = torch.randint(16, (rows, width)), torch.rand(rows * width // 64).half().float()
        weights[name] = (table[codes] * absmax.repeat_interleave(64).view(rows, width)).half()
        return foreign.nf4_like(codes, absmax, table, "nf4", 64, "float16")

    return layer


def expected(weights: Weights, layer: int, count: int) -> dict[str, torch.Tensor]:
    """The stacks of one decoder layer, from its matrices by their names on disk."""
    mine = {name: weight for name, weight in weights.items() if f".layers.{layer}." in name and ".experts." in name}

    def of(expert: int, *ends: str) -> torch.Tensor:
        return next(w for name, w in mine.items() if f"experts.{expert}." in name and name.endswith(ends))

    gate_up = [torch.cat((of(e, ".w1", ".gate_proj"), of(e, ".w3", ".up_proj"))) for e in range(count)]
    down = [of(e, ".w2", ".down_proj") for e in range(count)]
    return {"gate_up": torch.stack(gate_up), "down": torch.stack(down)}


def check(folder: Path, weights: Weights, dtype: torch.dtype = torch.float16) -> Any:
    """Load, and compare every quantized weight with its owner's."""
    model = load(folder, dtype=dtype)
    stacks = [module for module in model.modules() if isinstance(module, LutExperts)]
    assert len(stacks) == 2
    for place, experts in enumerate(stacks):
        for role, weight in expected(weights, place, experts.num_experts).items():
            assert torch.equal(experts.dequantize(role), weight.to(dtype)), (place, role)
    for name, layer in model.named_modules():
        if isinstance(layer, LutLinear):
            assert torch.equal(layer.dequantize(), weights[name].to(dtype)), name
    assert torch.isfinite(model(prompt()).logits).all()
    return model


@pytest.mark.parametrize(
    ("family", "make", "config", "spec"),
    [
        ("Mixtral", lambda w: uniform_layer(w, lambda *a: foreign.gptq(*a, 4), 64, 4, [8]), GPTQ,
         QuantSpec(4, 64, "int4")),
        ("Qwen3Moe", lambda w: uniform_layer(w, foreign.awq, 32, 4, [5]), AWQ, QuantSpec(4, 32, "custom")),
        ("Qwen2Moe", lambda w: uniform_layer(w, lambda q, z, s: foreign.compressed(q, None, s, 4), 32, 4, [8]), CT,
         QuantSpec(4, 32, "int4")),
    ],
)  # fmt: skip
def test_experts_are_converted(family: str, make: Any, config: Any, spec: QuantSpec, tmp_path: Path) -> None:
    weights: Weights = {}
    source = foreign.checkpoint(tmp_path / "a", make(weights), config, shards=2, family=family, **FAMILIES[family])
    made = run(source, tmp_path / "b")
    assert {layer.spec for layer in made.layers} == {spec} and len(made.layers) == len(weights)
    check(tmp_path / "b", weights)
    stacks = [layer for layer in folders.validate(tmp_path / "b").layers if len(layer.shape) == 3]
    assert len(stacks) == 4 and {layer.spec for layer in stacks} == {spec}


def test_experts_of_bitsandbytes(tmp_path: Path) -> None:
    weights: Weights = {}
    source = foreign.checkpoint(tmp_path / "a", nf4(weights), BNB, family="Mixtral", **FAMILIES["Mixtral"])
    made = run(source, tmp_path / "b")
    assert {layer.spec for layer in made.layers} == {QuantSpec(4, 64, "nf4")}
    stack = load(tmp_path / "b", dtype=torch.float32).model.layers[1].mlp.experts
    for role, weight in expected(weights, 1, 3).items():
        assert torch.equal(stack.dequantize(role).half(), weight)


def test_experts_that_differ_are_refused_or_kept_dense(tmp_path: Path) -> None:
    weights: Weights = {}
    odd = "model.layers.1.mlp.experts.2.up_proj"

    def layer(name: str, linear: nn.Linear) -> Parts:
        q, _, s, weights[name] = integers(*linear.weight.shape, 64 if name == odd else 32, 4, [8])
        return foreign.compressed(q, None, s, 4)

    source = foreign.checkpoint(tmp_path / "a", layer, CT, family="Qwen3Moe", **QWEN)
    with pytest.raises(CheckpointError, match=r"9 of 26 layers.*experts differ in bits.* or levels \(.*layers\.1"):
        run(source, tmp_path / "b")
    made = run(source, tmp_path / "b", dense_fallback=True)
    assert sum(layer.spec is None for layer in made.layers) == 9
    model = load(tmp_path / "b")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(first, LutExperts) and not isinstance(second, LutExperts)
    for role, weight in expected(weights, 1, 3).items():
        assert torch.equal(getattr(second, f"{role}_proj"), weight)
    assert torch.equal(first.dequantize("down"), expected(weights, 0, 3)["down"])


def test_a_missing_expert_is_one_line(tmp_path: Path) -> None:
    layer = uniform_layer({}, foreign.awq, 32, 4, [8])
    source = foreign.checkpoint(tmp_path / "a", layer, AWQ, family="Qwen3Moe", **QWEN)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.1.up_proj" not in name}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj' need \(3, 128, 128\).*have 5 matrices") as error:
        run(source, tmp_path / "b")
    assert "\n" not in str(error.value) and not (tmp_path / "b").exists()


def gguf_mixture(path: Path, up: str = "Q4_0") -> dict[str, torch.Tensor]:
    """A Qwen3-MoE of llama.cpp, whose files have one tensor for all experts; its stacks as the library decodes them."""
    import gguf

    inner = 768  # what transformers takes: it does not read this size from such files
    sizes = {**SIZES, "vocab_size": 97, "num_hidden_layers": 1, **QWEN, "moe_intermediate_size": inner}
    writer = foreign.gguf_writer(path, "qwen3moe")
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    names, decoded = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 1), {}

    def put(name: str, weight: torch.Tensor, kind: str) -> None:
        type_ = gguf.GGMLQuantizationType[kind]
        raw = gguf.quantize(weight.contiguous().numpy(), type_)
        writer.add_tensor(name, raw, raw_dtype=type_)
        decoded[name] = torch.from_numpy(gguf.dequantize(raw, type_)).half()

    for name, tensor in build("Qwen3Moe", torch.float32, **sizes).state_dict().items():
        if name.endswith("gate_up_proj"):
            put("blk.0.ffn_gate_exps.weight", tensor[:, :inner], "Q4_0")
            put("blk.0.ffn_up_exps.weight", tensor[:, inner:], up)
        elif name.endswith("experts.down_proj"):
            put("blk.0.ffn_down_exps.weight", tensor, "Q4_0")
        else:
            put(names.get_name(name, (".weight",)), tensor, "Q4_0" if "proj" in name else "F32")
    foreign.written(writer)
    gate_up = torch.cat([decoded[f"blk.0.ffn_{role}_exps.weight"] for role in ("gate", "up")], 1)
    return {"gate_up": gate_up, "down": decoded["blk.0.ffn_down_exps.weight"]}


def test_experts_of_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    stacks = gguf_mixture(tmp_path / "a.gguf")
    made = run(tmp_path / "a.gguf", tmp_path / "out")
    assert {layer.spec for layer in made.layers} == {QuantSpec(4, 32, "int4")} and len(made.layers) == 13
    experts = load(tmp_path / "out").model.layers[0].mlp.experts
    assert all(torch.equal(experts.dequantize(role), stack) for role, stack in stacks.items())
    gguf_mixture(tmp_path / "b.gguf", up="Q8_0")
    with pytest.raises(CheckpointError, match=r"9 of 13 layers.*another matrix of these experts.*Q8_0: it has 8 bits"):
        run(tmp_path / "b.gguf", tmp_path / "mixed")
