"""Conversions compared with what the owners' own libraries say, where they are installed.

bitsandbytes, hqq and compressed-tensors are no dependencies: without them their tests are skipped, and the layouts are
tested in `test_convert` all the same. gguf comes with the extra ``test``.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from foreign import SIZES, Parts
from test_convert import run
from tiny_models import build, dense_linears, load, prompt
from torch import nn

from flute import LutLinear, QuantSpec
from flute.errors import CheckpointError, IntegrationError
from flute.integrations.base import prepare_model_flute
from flute.integrations.convert import bitsandbytes as ours
from flute.integrations.convert import gguf, hqq
from flute.integrations.convert.exact import Exact, Stored, represent
from flute.kernels.reference import decode


def decoded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a converted checkpoint as its files hold them: factors in float32, the product rounded once."""
    model = load(folder, dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LutLinear)}
    return {
        name: decode(m.weight, m.scales, m.table, m.in_features, m.spec.bits, m.spec.group_size, dtype=dtype)
        for name, m in layers.items()
    }


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def theirs(kind: str, *, double: bool, dtype: torch.dtype, blocksize: int = 64) -> Any:
    """A bitsandbytes layer with random weights (48, 192) and a bias."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(192, 48, bias=True, quant_type=kind, compress_statistics=double, compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(48, 192).to(dtype), requires_grad=False, quant_type=kind, compress_statistics=double,
        blocksize=blocksize,
    )  # fmt: skip
    return layer.to("cpu").to(dtype)


def dequantized(layer: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bitsandbytes_layers(kind: str, double: bool, dtype: torch.dtype) -> None:
    layer = theirs(kind, double=double, dtype=dtype)
    made = ours.read_module("layer", layer)
    assert made.spec == QuantSpec(4, 64, "nf4" if kind == "nf4" else "custom") and made.scales.dtype == torch.float32
    assert torch.equal(made.decoded(dtype), dequantized(layer))


def test_bitsandbytes_blocks() -> None:
    for blocksize, group in ((32, 32), (128, 64), (4096, 64)):  # what blocks and rows of 192 have in common
        layer = theirs("nf4", double=False, dtype=torch.float16, blocksize=blocksize)
        made = ours.read_module("layer", layer)
        assert made.spec.group_size == group and torch.equal(made.decoded(torch.float16), dequantized(layer))


def test_bitsandbytes_layers_in_memory() -> None:
    def model(dtype: torch.dtype) -> nn.ModuleDict:
        return nn.ModuleDict({"a": theirs("nf4", double=True, dtype=dtype), "b": nn.Linear(192, 8, dtype=dtype)})

    x = torch.randn(5, 192)
    exact = model(torch.float32)
    expected = dequantized(exact["a"])
    prepare_model_flute("m", exact, 4, 64, prepare_bnb_layers=True, default_bnb_dtype=torch.float32)
    assert isinstance(exact["a"], LutLinear) and torch.equal(exact["a"].dequantize(), expected)
    assert torch.equal(exact["a"].bias, model(torch.float32)["a"].bias)
    assert torch.allclose(exact["a"](x), torch.nn.functional.linear(x, expected, exact["a"].bias), atol=1e-4)
    for made in (model(torch.float16), model(torch.float32)):
        expected = dequantized(made["a"]).half()
        prepare_model_flute("m", made, 4, 64, prepare_bnb_layers=True, default_bnb_dtype=torch.float16)
        assert made["a"].scales.dtype == torch.float16
        # scale, table and product are each rounded to half a unit in the last place, 2^-11 of the value at most
        assert bool(((made["a"].dequantize() - expected).abs() <= 4 * 2**-11 * expected.abs()).all())
    left = model(torch.float16)
    prepare_model_flute("m", left, 4, 64, prepare_bnb_layers=False)
    assert type(left["a"]).__name__ == "Linear4bit" and isinstance(left["b"], LutLinear)
    with pytest.raises(IntegrationError, match=r"'m\.a' has 4 bits in groups of 64.*g128"):
        prepare_model_flute("m", left, 4, 128)


@pytest.mark.parametrize(("kind", "double", "dtype"), [("nf4", True, torch.bfloat16), ("fp4", False, torch.float16)])
def test_bitsandbytes_checkpoints(kind: str, double: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    build("Llama", dtype, **SIZES).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    model = load(tmp_path / "dense", quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "bnb")
    made = run(tmp_path / "bnb", tmp_path / "out")
    assert made.dtype == dtype and {layer.scales for layer in made.layers} == {torch.float32}
    assert all(0 < layer.rounded < layer.weights for layer in made.layers)
    found = decoded(tmp_path / "out", dtype)
    expected = {name: dequantized(layer) for name, layer in model.named_modules() if hasattr(layer, "quant_state")}
    assert len(expected) == 14 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    converted = load(tmp_path / "out")
    rounded = {layer.name: layer.rounded for layer in made.layers}
    for name, layer in converted.named_modules():
        if isinstance(layer, LutLinear):
            assert int((layer.dequantize() != expected[name]).sum()) == rounded[name]
    assert converted.dtype == dtype


def test_bitsandbytes_without_the_library(tmp_path: Path) -> None:
    weights: dict[str, torch.Tensor] = {}

    def layer(name: str, linear: nn.Linear) -> Parts:
        rows, width = linear.weight.shape
        table, absmax = torch.linspace(-1, 1, 16), torch.rand(rows * width // 64)
        codes = torch.randint(16, (rows, width))
        weights[name] = (table[codes] * absmax.repeat_interleave(64).view(rows, width)).half()
        return foreign.nf4_like(codes, absmax, table, "nf4", 64, "float16")

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = foreign.checkpoint(tmp_path / "a", layer, config, num_hidden_layers=1)
    run(source, tmp_path / "b")
    found = decoded(tmp_path / "b", torch.float16)
    assert len(found) == 7 and all(torch.equal(found[name], weights[name]) for name in found)


def test_what_is_wrong_with_bitsandbytes_tensors() -> None:
    parts = foreign.nf4_like(torch.randint(16, (4, 64)), torch.rand(4), torch.rand(16), "nf4", 64, "float16")
    state = ".weight.quant_state.bitsandbytes__nf4"
    read = ours.read_format({"load_in_4bit": True}).read
    assert isinstance(represent(read("a", parts)), Exact)
    for change, said in (
        ({".weight.quant_map": torch.rand(15)}, r"table \(quant_map\) has shape \(15,\)"),
        ({".weight.absmax": torch.rand(3)}, "3 absmax"),
        ({state: torch.tensor([123, 125], dtype=torch.uint8)}, "quant_state is damaged"),
        ({".weight": parts[".weight"][:-1]}, "its weight is smaller"),
        ({".weight.absmax": torch.ones(4).byte(), ".weight.nested_absmax": torch.ones(9),
          ".weight.nested_quant_map": torch.ones(256)}, "do not fit 4 blocks"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=said):
            read("a", {**parts, **change})


# ---- HQQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("axis", [1, 0])
def test_hqq(bits: int, axis: int) -> None:
    theirs = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, bias=False, dtype=torch.float16)
    config = theirs.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    config["weight_quant_params"] |= {"optimize": False, "round_zero": True}
    layer = theirs.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    layer.encoded_state_dict = True
    found = hqq.stored({f".{name}": value for name, value in layer.state_dict().items()})
    assert torch.equal(found.weight, layer.dequantize())
    if axis == 0:
        assert found.levels is None and "run across rows" in found.why
        return
    made = represent(found)
    assert isinstance(made, Exact) and torch.equal(made.decoded(torch.float16), layer.dequantize())
    assert made.spec.zero_points == (bits == 4)  # rounded zero points about the middle: more than 16 levels


def test_hqq_checkpoints(tmp_path: Path) -> None:
    weights: dict[str, torch.Tensor] = {}

    def layer(name: str, linear: nn.Linear) -> Parts:
        rows, width = linear.weight.shape
        q = torch.randint(16, (rows * width // 64, 64))
        scale, zero = (0.01 + 0.01 * torch.rand(len(q), 1)).half(), torch.full((len(q), 1), 7.5).half()
        weights[name] = ((q.half() - zero) * scale).view(rows, width)
        return foreign.hqq(q, zero, scale, (rows, width))

    source = foreign.checkpoint(tmp_path / "a", layer, {"quant_method": "hqq"}, num_hidden_layers=1)
    run(source, tmp_path / "b")
    found = decoded(tmp_path / "b", torch.float16)
    assert len(found) == 7 and all(torch.equal(found[name], weights[name]) for name in found)


def test_hqq_zero_points_are_fractions() -> None:
    q, zero, scale = torch.randint(16, (512, 64)), torch.rand(512, 1).half() * 15, torch.rand(512, 1).half()
    found = hqq.stored(foreign.hqq(q, zero, scale, (256, 128)))
    assert torch.equal(found.weight, ((q.half() - zero) * scale).view(256, 128))
    for few in (found, hqq.stored(foreign.hqq(q, (zero * 4).round() / 4, scale, (256, 128)))):
        made = represent(few)
        assert isinstance(made, Exact) and made.spec.zero_points
        assert torch.equal(made.decoded(torch.float16), few.weight)
    with pytest.raises(CheckpointError, match="does not hold 512 x 64"):
        hqq.stored({**foreign.hqq(q, zero, scale, (256, 128)), ".W_q": torch.zeros(2, 64).byte()})


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, True), (2, True), (3, False), (2, False), (4, False)])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from flute.integrations.convert import compressed

    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {
        "weight": 0.1 * torch.randn(64, 96).bfloat16(),
        "weight_scale": (0.02 + 0.02 * torch.rand(64, 3)).bfloat16(),
    }
    low = -(1 << (bits - 1))
    if not symmetric:
        state["weight_zero_point"] = torch.randint(low, -low, (64, 3), dtype=torch.int8)
    packed = Compressor.compress(state, scheme)
    expected = Compressor.decompress(packed, scheme)["weight"]
    found = compressed.stored({f".{name}": tensor for name, tensor in packed.items()})
    assert torch.equal(found.weight, expected)
    made = represent(found)
    assert isinstance(made, Exact) and torch.equal(made.decoded(torch.bfloat16), expected)
    assert made.spec.zero_points == (bits == 4 and not symmetric)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q4_1", "Q8_0", "Q6_K"])
def test_gguf_blocks(kind: str) -> None:
    library = pytest.importorskip("gguf", reason="gguf is not installed")
    type_ = library.GGMLQuantizationType[kind]
    block, size = library.GGML_QUANT_SIZES[type_]
    torch.manual_seed(0)
    raw = torch.randint(256, (24, 512 // block * size), dtype=torch.uint8)
    places = raw.view(24, -1, size)
    places[..., -2:] = torch.tensor([0x12, 0x2A], dtype=torch.uint8)  # float16 scales at either end of a block
    places[..., :4] = torch.tensor([0x12, 0x2A, 0x34, 0x21], dtype=torch.uint8)
    weight = torch.from_numpy(library.dequantize(raw.numpy(), type_)).half()
    made = represent(gguf.stored(gguf.Blocks(kind, raw.numpy(), np.arange(24)), weight))
    if kind in ("Q4_0", "IQ4_NL"):
        assert isinstance(made, Exact) and torch.equal(made.decoded(torch.float16), weight)
        assert made.spec == QuantSpec(4, 32, "int4" if kind == "Q4_0" else "custom")
    else:
        assert str(made).startswith(f"{kind}: ")
    order = torch.randperm(24)
    moved = gguf.stored(gguf.Blocks(kind, raw.numpy(), order.numpy()), weight[order])
    assert isinstance(moved, Stored) and isinstance(represent(moved), type(made))


def gguf_file(path: Path, kinds: dict[str, str]) -> dict[str, torch.Tensor]:
    """A Llama of llama.cpp with a type for each kind of matrix; returns its weights as the library dequantizes them."""
    import gguf as library

    sizes = {**SIZES, "vocab_size": 97, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = build("Llama", torch.float32, **sizes)
    writer = foreign.gguf_writer(path, "llama")
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 1)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns neighbours where transformers turns halves
            weight = weight.reshape(heads, 2, 16, 128).swapaxes(1, 2).reshape(weight.shape)
        type_ = library.GGMLQuantizationType[kinds.get(name.split(".")[-2], "F32")]
        raw = library.quantize(weight, type_)
        back = library.dequantize(raw, type_)
        if heads:
            back = back.reshape(heads, 16, 2, 128).swapaxes(1, 2).reshape(back.shape)
        found[name] = torch.from_numpy(np.ascontiguousarray(back)).half()
        writer.add_tensor(names.get_name(name, (".weight",)), raw, raw_dtype=type_)
    foreign.written(writer)
    return found


def test_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kinds = dict.fromkeys(linears, "Q4_0") | {"embed_tokens": "Q8_0"}
    weights = gguf_file(tmp_path / "a.gguf", kinds)
    made = run(tmp_path / "a.gguf", tmp_path / "out")
    assert sum(layer.spec == QuantSpec(4, 32, "int4") for layer in made.layers) == 7 and not list(
        tmp_path.glob(".from*")
    )
    model = load(tmp_path / "out")
    for name in linears:
        layer = model.get_submodule(f"model.layers.0.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}")
        full = next(weight for key, weight in weights.items() if f".{name}." in key)
        assert isinstance(layer, LutLinear) and torch.equal(layer.dequantize(), full)
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert torch.isfinite(model(prompt()).logits).all()
    weights = gguf_file(tmp_path / "b.gguf", {**kinds, "k_proj": "Q4_1"})
    with pytest.raises(CheckpointError, match=r"b\.gguf: 1 of 8 layers.*Q4_1: .* minimum.*k_proj\)"):
        run(tmp_path / "b.gguf", tmp_path / "mixed")
    run(tmp_path / "b.gguf", tmp_path / "mixed", dense_fallback=True)
    dense = dense_linears(load(tmp_path / "mixed"))
    assert torch.equal(
        dense["model.layers.0.self_attn.k_proj"].weight, weights["model.layers.0.self_attn.k_proj.weight"]
    )
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert "model.layers.0.self_attn.k_proj" in config["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_layers_where_they_lie(device: str, nested: bool) -> None:
    """A stand-in for a Linear4bit, with the attributes that are read, on either device."""
    codes, absmax = torch.randint(16, (48, 192)), torch.rand(144) + 0.5
    table = torch.linspace(-1, 1, 16)
    state = SimpleNamespace(absmax=absmax.to(device), code=table.to(device), shape=torch.Size((48, 192)))
    state.dtype, state.blocksize, state.nested = torch.float16, 64, nested
    if nested:
        inner, inner_map = torch.rand(1), torch.rand(256)
        state.absmax = torch.randint(256, (144,), dtype=torch.uint8, device=device)
        state.state2 = SimpleNamespace(absmax=inner.to(device), code=inner_map.to(device), blocksize=256)
        state.offset = torch.tensor(0.25, device=device)
        absmax = inner_map[state.absmax.cpu().long()] * inner + 0.25
    packed = foreign.nf4_like(codes, absmax, table, "nf4", 64, "float16")[".weight"].to(device)
    module = type("Linear4bit", (), {})()
    module.weight, module.bias = SimpleNamespace(data=packed, quant_state=state), None
    layer = ours.converted("layer", module, None)
    assert layer.weight.device.type == device and layer.in_kernel_order == (device == "cuda")
    expected = (table.half().float()[codes] * absmax.half().float().repeat_interleave(64).view(48, 192)).half()
    assert torch.equal(layer.dequantize().cpu(), expected)
    exact = (table[codes] * absmax.repeat_interleave(64).view(48, 192)).half()
    assert torch.equal(ours.read_module("layer", module).decoded(torch.float16).cpu(), exact)
