"""The vLLM plugin without vLLM: what ranks take of a checkpoint, which layers a module holds, versions, the wrapper."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flute
from flute import QuantSpec, dequantize, quantize
from flute.config import ModelSpec
from flute.errors import IntegrationError, SpecError
from flute.experts import LutExperts
from flute.integrations.vllm import NAMES, slicing, supported
from flute.integrations.vllm.names import expert_specs, flat_renames, flat_site, flat_transform, linear_specs
from flute.packing import pack_codes, unpack_codes
from flute.quantize import Quantized
from flute.zero_experts import lut_experts

ROOT = Path(__file__).resolve().parent.parent


@given(
    bits=st.sampled_from([2, 3, 4]),
    vector_size=st.sampled_from([1, 2]),
    group=st.sampled_from([-1, 16, 24, 48, 64, 96, 1000]),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_shares_are_the_weight(bits: int, vector_size: int, group: int, ranks: int) -> None:
    table = f"nf{bits}" if vector_size == 1 else f"gausspair{bits}"
    spec, n, k = QuantSpec(bits, group, table, vector_size), 5, 192
    torch.manual_seed(bits)
    made = quantize(torch.randn(n, k), spec)
    whole = dequantize(*made, spec)
    rows = pack_codes(made.codes, spec.code_bits)
    parts = []
    for rank in range(ranks):
        own = slicing.share("layer", spec, k, rank, ranks)
        assert own.in_features == k // ranks
        taken = own.take_codes(rows)
        assert taken.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr(), "bytes are sliced, not repacked"
        codes = unpack_codes(taken.contiguous(), spec.code_bits, own.spec.row_codes(own.in_features))
        scales = own.take_scales(made.scales)
        assert scales.shape == (n, own.spec.num_groups(own.in_features))
        parts.append(dequantize(*Quantized(codes, scales), own.spec))
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_of_all_ranks_sum_to_the_whole(ranks: int, zeros: bool) -> None:
    """Ranks share rows of gate and up and columns of down, here through its groups; vLLM adds up what they make."""
    torch.manual_seed(0)
    specs = {"gate_up": QuantSpec(4, 32, "nf4"), "down": QuantSpec(3, 64, "nf3")}
    plain, inner = LutExperts(3, 48, 96, specs), 96 // ranks
    specs["down"] = replace(specs["down"], zero_points=zeros)
    whole = lut_experts(3, 48, 96, specs)
    for role, (n, k) in whole.shapes.items():
        plain.fill(role, torch.randn(3, n, k))
        whole.put(role, *plain.checkpoint_tensors(role))
    if zeros:
        whole.down_zeros.data = torch.randn(3, 48, 2)
    x, index, weights = torch.randn(7, 48), torch.rand(7, 3).topk(2).indices, torch.rand(7, 2)
    total = torch.zeros(7, 48)
    for rank in range(ranks):
        own = slicing.share("down", specs["down"], 96, rank, ranks)
        made = lut_experts(3, 48, inner, {**specs, "down": own.spec})
        rows = [*range(rank * inner, (rank + 1) * inner), *range(96 + rank * inner, 96 + (rank + 1) * inner)]
        made.put("gate_up", whole.gate_up_proj[:, rows], whole.gate_up_scales[:, rows])
        codes, scales = (torch.stack([*map(take, held)]) for take, held in (
            (own.take_codes, whole.down_proj), (own.take_scales, whole.down_scales)))  # fmt: skip
        made.put("down", codes, scales)
        if zeros:
            made.down_zeros.data = torch.stack([own.take_scales(held) for held in whole.down_zeros])
        assert torch.equal(made.dequantize("down"), whole.dequantize("down")[..., rank * inner : (rank + 1) * inner])
        total += made(x, index, weights)
    torch.testing.assert_close(total, whole(x, index, weights), rtol=1e-4, atol=1e-4)


def test_a_cut_through_a_group() -> None:
    spec = QuantSpec(4, 64, "nf4")
    own = slicing.share("layer", spec, 704, 1, 2)
    assert (own.in_features, own.spec.group_size, own.codes) == (352, 32, slice(176, 352))
    assert own.groups == (5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10)
    aligned = slicing.share("layer", spec, 4096, 3, 8)
    assert (aligned.spec, aligned.groups) == (spec, tuple(range(24, 32)))
    scales = torch.arange(128.0).view(2, 64)
    assert aligned.take_scales(scales).data_ptr() == scales[:, 24:].data_ptr(), "groups that are neighbours are a view"
    short = QuantSpec(3, 40, "nf3")  # 3 groups, the last one short: alone it stays as it is
    assert slicing.share("layer", short, 100, 0, 1).spec == short


@pytest.mark.parametrize(
    ("spec", "in_features", "ranks", "words"),
    [
        (QuantSpec(3, 64, "nf3"), 200, 2, "layer 'a.b': 100 of 200 columns per rank do not fill whole bytes at 3 bits"),
        (QuantSpec(4, 64, "nf4"), 128, 3, "42 of 128 columns per rank do not fill whole bytes"),
        (QuantSpec(4, 64, "nf4", 1, 256), 768, 2, "384 of 768 .* Hadamard blocks of 256; .* --hadamard-size 128"),
    ],
)
def test_refused(spec: QuantSpec, in_features: int, ranks: int, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        slicing.share("a.b", spec, in_features, 0, ranks)


def test_runs() -> None:
    assert slicing.runs(["a", "a", "b", "a"]) == [range(0, 2), range(2, 3), range(3, 4)]
    assert slicing.runs(["a"]) == [range(0, 1)]


# ---- names -----------------------------------------------------------------------------------------------------------

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_layers_of_a_module() -> None:
    overrides = {"model.layers.0.attn.v_proj": {"bits": 3}, "*.experts.down_proj": {"bits": 2}}
    record = ModelSpec(QuantSpec(), overrides, ("*.mlp.gate_proj", "*.mlp.up_proj", "*.o_proj"), experts=True)
    four, three = QuantSpec(), QuantSpec(3, 64, "nf3")
    assert linear_specs(record, PACKED, "model.layers.0.attn.qkv_proj") == [four, four, three]
    assert linear_specs(record, PACKED, "model.layers.0.mlp.down_proj") == [four]
    assert linear_specs(record, PACKED, "model.layers.0.mlp.gate_up_proj") == []
    assert linear_specs(record, PACKED, "model.layers.0.mlp.gate") == [], "a router"
    assert expert_specs(record, "model.layers.0.mlp.experts") == [four, QuantSpec(2, 64, "nf2")]
    assert expert_specs(ModelSpec(), "model.layers.0.mlp.experts") == []
    old_name = ModelSpec(experts=True, overrides={"model.layers.0.mlp.experts.gate_up_proj": {"bits": 3}})
    assert expert_specs(old_name, "model.layers.0.block_sparse_moe.experts") == [three, four]


def test_half_a_module() -> None:
    with pytest.raises(SpecError, match=r"'a\.qkv_proj': a\.k_proj is dense and a\.q_proj, a\.v_proj is quantized"):
        linear_specs(ModelSpec(modules_to_not_convert=("*.k_proj",)), PACKED, "a.qkv_proj")


@pytest.mark.parametrize(
    ("module", "site", "transform"),
    [
        ("self_attn.qkv_proj", "attn", "self_attn.input_transform"),
        ("self_attn.o_proj", "out", "self_attn.output_transform"),
        ("mlp.gate_up_proj", "mlp", "mlp.input_transform"),
        ("mlp.down_proj", "down", "mlp.down_transform"),
    ],
)
def test_transform_of_a_module(module: str, site: str, transform: str) -> None:
    prefix = f"model.layers.3.{module}"
    assert flat_site(PACKED, prefix) == site
    assert flat_transform(prefix, site) == f"model.layers.3.{transform}"
    for part in ("left", "right", "clip"):
        assert renamed(f"model.layers.3.{transform}.{part}") == f"{prefix}.transform.{part}"


def renamed(name: str) -> str | None:
    """As vLLM's loader does it: rule by rule, twice, since loaders are nested."""
    for pattern, new in [*flat_renames().items()] * 2:
        if pattern.search(name):
            if new is None:
                return None
            name = pattern.sub(new, name)
    return name


def test_tensors_of_heads() -> None:
    """Values' transform is o_proj's right factor; what is for keys and queries has no place."""
    assert renamed("model.layers.0.self_attn.heads.value") == "model.layers.0.self_attn.o_proj.transform.right"
    for name in ("key", "query", "offset", "q_clip", "k_clip", "v_clip"):
        assert renamed(f"model.layers.0.self_attn.heads.{name}") is None
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight_scale", "self_attn.q_norm.weight"):
        assert renamed(name) == name


def test_modules_without_a_transform() -> None:
    assert flat_site(PACKED, "lm_head") is None
    assert flat_site(PACKED, "model.layers.0.mlp.gate") is None
    with pytest.raises(IntegrationError, match=r"'model\.layers\.0\.self_attn\.k_proj': .* q, k and v as one module"):
        flat_site(PACKED, "model.layers.0.self_attn.k_proj")


# ---- which vLLM, and the wrapper -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.26.0", True), ("0.32.0+cpu", True), ("0.32.1rc1", True), ("0.25.1", False), ("0.33.0", False), ("dev", False)],
)
def test_versions(version: str, known: bool) -> None:
    assert supported(version) is known


STANDIN = {
    "__init__.py": "__version__ = '0.99.0'",
    "model_executor/__init__.py": "",
    "model_executor/layers/__init__.py": "",
    "model_executor/layers/quantization/__init__.py": (
        "methods = {}\ndef register_quantization_config(name):\n    return lambda kind: methods.setdefault(name, kind)"
    ),
    "model_executor/layers/quantization/base_config.py": "class QuantizationConfig: pass",
    "server.py": (
        "import sys\nfrom vllm.model_executor.layers.quantization import methods\n"
        "print(__name__, sys.argv[1:])\nmethods['flute'].from_config({})"
    ),
}


def test_wrapper_and_unknown_version(tmp_path: Path) -> None:
    """A stand-in for vLLM: the wrapper runs its module as ``python -m`` does; a version unknown to us is refused."""
    for name, text in STANDIN.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = [sys.executable, "-m", "flute.integrations.vllm", "vllm.server", "--model", "DIR"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.strip() == "__main__ ['--model', 'DIR']"
    refusal = f"IntegrationError: this is vLLM 0.99.0; flute {flute.__version__} serves with {NAMES}"
    assert done.returncode and done.stderr.strip().endswith(refusal)
    usage = subprocess.run(command[:3], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert usage.returncode == 1 and usage.stderr.startswith("usage: python -m flute.integrations.vllm MODULE")
