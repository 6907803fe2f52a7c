"""Layers with zero points: the weights exactly, products within rounding, wherever a layer goes."""

import copy
import shutil
from pathlib import Path
from unittest import mock

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import Weights, equal, run, uniform_layer
from tiny_models import load, prompt
from torch import nn

from flute import LutLinear, QuantSpec, quantize
from flute.errors import CheckpointError, SpecError
from flute.evaluate import sqnr
from flute.integrations import card, described, folders, fusion
from flute.packing import pack_codes
from flute.zero_points import ZeroPointLinear, lut_linear

SPEC = QuantSpec(4, 32, "int4", zero_points=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64}


def layer(
    n: int, k: int, group: int, dtype: torch.dtype = torch.float32, *, bias: bool = False
) -> tuple[ZeroPointLinear, torch.Tensor]:
    """A random layer, and W by the formula, one rounding after the other."""
    torch.manual_seed(0)
    made = lut_linear(k, n, QuantSpec(4, group, "int4", zero_points=True), bias=bias, dtype=dtype)
    assert isinstance(made, ZeroPointLinear)
    codes, groups = torch.randint(16, (n, k)), made.scales.shape[1]
    zeros, scales = torch.randint(-8, 9, (n, groups)).to(dtype), (0.01 + 0.1 * torch.rand(n, groups)).to(dtype)
    made.weight.data, made.zeros.data, made.scales.data = pack_codes(codes.to(torch.uint8), 4), zeros, scales
    if bias:
        nn.init.normal_(made.bias)
    of = torch.arange(k) // (k if group == -1 else group)
    return made, ((codes - 8).to(dtype) - zeros[:, of]) * scales[:, of]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(48, 128, 32), (40, 100, 32), (16, 72, -1), (24, 56, 8), (8, 40, 64)])
def test_weights_and_products(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    made, weight = layer(n, k, group, dtype, bias=True)
    assert torch.equal(made.dequantize(), weight)
    for shape in ((1, k), (2, 3, k), (70, k)):
        x = torch.randn(shape).to(dtype)
        y, exact = made(x), x.double() @ weight.double().T + made.bias.double()
        # both terms are sums of |x| (|level| + |zero|) scale at most, each rounded a few times
        most = x.abs().double() @ (made.dequantize().abs().double() + 8 * made.scales.double().amax()).T
        assert y.shape == exact.shape and y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * (most + made.bias.abs())).all())


def test_large_inputs_do_not_overflow() -> None:
    made, _ = layer(16, 128, 128, torch.float16)
    made.scales.data *= 0.01
    x = torch.full((2, 128), 1000.0).half()  # the sum of a group is no float16
    exact = x.double() @ made.dequantize().double().T
    assert ((made(x).double() - exact).abs() <= 0.01 * x[0, 0] * made.dequantize().abs().sum(1)).all()


def test_gradients_and_autocast() -> None:
    made, weight = layer(48, 128, 32)
    x, g = torch.randn(5, 128, requires_grad=True), torch.randn(5, 48)
    torch.testing.assert_close(torch.autograd.grad(made(x), x, g)[0], g @ weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16 and (y - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()


def test_compiled() -> None:
    made, _ = layer(48, 100, 32)
    x = torch.randn(3, 100)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))


def test_state_dtype_and_kernel_order() -> None:
    made, _ = layer(48, 128, 32)
    expected = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert expected.keys() == {"weight", "scales", "zeros"}
    with mock.patch.object(LutLinear, "_suits_kernels", lambda layer: True):  # the order that kernels want
        made.arrange()
        assert made.in_kernel_order and torch.equal(made.shift, -32 * made.zeros * expected["scales"])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
        other = ZeroPointLinear(128, 48, SPEC)
        other.load_state_dict(expected)
        assert other.in_kernel_order and torch.equal(other.shift, made.shift)
        half = made.bfloat16()
        assert half.shift.dtype == torch.bfloat16
    half = half.arrange()
    assert not half.in_kernel_order
    assert torch.equal(half.zeros.float(), expected["zeros"]) and "zeros" in repr(half)


def test_the_shift_is_made_once_and_anew_with_other_weights() -> None:
    made, _ = layer(48, 128, 32)
    x = torch.randn(3, 128)
    y = made(x)
    assert made.shift is None  # nothing was arranged yet
    made.arrange()
    with mock.patch.object(ZeroPointLinear, "_shift", side_effect=AssertionError):
        assert torch.equal(made(x), y) and torch.equal(copy.deepcopy(made)(x), y)
    other = layer(48, 128, 32)[0]
    other.zeros.data += 1
    for change in (lambda: made.load_state_dict(other.state_dict()), lambda: made.half().float()):
        change()
        assert torch.equal(made.shift, -32 * made.zeros * made.scales) and made.shift.dtype == made.scales.dtype
    assert not made.shift.requires_grad and torch.equal(made.zeros, other.zeros)


def test_layers_of_one_x_share_a_launch() -> None:
    parent, x = nn.Module(), torch.randn(3, 128)
    for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
        setattr(parent, name, layer(16 * (place + 1), 128, 32)[0])
    apart = [child(x) for child in parent.children()]
    model = nn.ModuleDict({"self_attn": parent})
    with torch.no_grad():
        assert fusion.fuse(model, anywhere=True) == 1
        together = [child(x) for child in parent.children()]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other)


def test_refused() -> None:
    with pytest.raises(SpecError, match=r"does not hold this; use flute\.zero_points\.lut_linear"):
        LutLinear(64, 16, SPEC)
    with pytest.raises(SpecError, match="does not hold this"):
        ZeroPointLinear(64, 16, QuantSpec())
    with pytest.raises(SpecError, match="layer 'a': nothing is quantized with zero points here"):
        quantize(torch.randn(4, 64), SPEC, name="a")
    for wrong in ({"zero_points": 1}, {"zero_points": True, "hadamard_size": 32}):
        with pytest.raises(SpecError, match="zero_points"):
            QuantSpec.from_dict({"bits": 4, **wrong})


def test_the_spec() -> None:
    assert QuantSpec.from_dict(SPEC.to_dict()) == SPEC and SPEC.to_dict()["zero_points"] is True
    assert "zero_points" not in QuantSpec().to_dict() and str(SPEC) == "int4 4bit g32 zeros"
    assert SPEC.bits_per_weight(128) == 5 and QuantSpec(4, 128, "int4", zero_points=True).bits_per_weight(4096) == 4.25


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A converted model whose every layer has zero points, and its owner's weights."""
    weights: Weights = {}
    folder = tmp_path_factory.mktemp("awq")
    source = foreign.checkpoint(folder / "a", uniform_layer(weights, foreign.awq, 64, 4, list(range(16))), AWQ)
    run(source, folder / "b")
    return folder / "b", weights


def test_a_checkpoint(awq: tuple[Path, Weights], tmp_path: Path) -> None:
    folder, weights = awq
    report = folders.validate(folder)
    assert {layer.bits_per_weight for layer in report.layers} == {4.5}
    model = load(folder)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if isinstance(model.get_submodule(name.rpartition(".")[0]), LutLinear)]
    model.save_pretrained(tmp_path / "again")
    written = (tmp_path / "again" / "README.md").read_text()
    assert written == card.text(described.of_folder(folder), "again")  # memory and files say the same
    assert "(table[codes] - zero) * scale`): 4.500 bits" in written and "| int4 and zero points |" in written
    dense = load(folder).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert all(torch.equal(dense.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert all(value > 60 for value in sqnr.distances(report, tmp_path / "dense").sqnr.values())
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    offload = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    moved = load(folder, device_map=offload, offload_folder=tmp_path / "offload")
    assert torch.equal(moved(prompt()).logits, model(prompt()).logits)
    half = load(folder, dtype=torch.bfloat16)
    assert equal(half.to(torch.float32), {}) and torch.isfinite(half(prompt()).logits).all()


@pytest.mark.parametrize("lost", [True, False])
def test_zeros_that_are_wrong(lost: bool, awq: tuple[Path, Weights], tmp_path: Path) -> None:
    folder = shutil.copytree(awq[0], tmp_path / "damaged")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.zeros"
    if lost:
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for read in (load, folders.validate):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.zeros") as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_cuda(dtype: torch.dtype) -> None:
    """Weights bit for bit, products within the bound, in a graph and compiled; and back on the CPU all is as it was."""
    made, weight = layer(256, 512, 64, dtype)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made = made.cuda()
    assert made.in_kernel_order and torch.equal(made.dequantize().cpu(), weight)
    compiled, wide = torch.compile(made, fullgraph=True), weight.double().cuda()
    for tokens in (1, 5, 64, 300):
        x = torch.randn(tokens, 512, device="cuda").to(dtype)
        exact = x.double() @ wide.T
        most = x.abs().double() @ (wide.abs() + 8 * state["scales"].double().amax().cuda()).T
        made(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = made(x)
        graph.replay()
        for y in (made(x), replayed, compiled(x)):
            assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * most).all())
    back = made.cpu()
    assert not back.shift.is_cuda and all(
        torch.equal(back.state_dict()[name], tensor) for name, tensor in state.items()
    )
