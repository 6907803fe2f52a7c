"""LutLinear: an nn.Linear to everybody, codes and scales inside, and the same bytes wherever it has been."""

import copy

import pytest
import torch
from torch import nn

from flute.errors import SpecError
from flute.linear import LutLinear
from flute.quantize import dequantize, quantize
from flute.spec import QuantSpec
from flute.tables import named_table

SPECS = [QuantSpec(), QuantSpec(3, 48, "nf3"), QuantSpec(2, -1, "int2"), QuantSpec(4, 32, "custom", 2)]


def made(spec: QuantSpec, dtype: torch.dtype = torch.float16, bias: bool = True) -> tuple[nn.Linear, LutLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(96, 40, bias=bias, dtype=dtype)
    table = torch.randn(spec.table_shape) if spec.table == "custom" else None
    return dense, LutLinear.from_linear(dense, spec, table=table)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_it_is_the_dense_layer_with_rounded_weights(spec: QuantSpec, dtype: torch.dtype) -> None:
    dense, lut = made(spec, dtype)
    table = lut.table if spec.table == "custom" else None
    quantized = quantize(dense.weight.detach(), spec, table=table, scale_dtype=dtype)
    assert torch.equal(lut.dequantize(), dequantize(*quantized, spec, table=table))
    x = torch.randn(3, 96, dtype=dtype)
    right = x.double() @ lut.dequantize().double().T + dense.bias.double()
    assert (lut(x).double() - right).norm() / right.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert isinstance(lut, nn.Linear) and lut.weight.dtype == torch.uint8 and not lut.weight.requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trip(spec: QuantSpec) -> None:
    _, lut = made(spec)
    state = lut.state_dict()
    assert set(state) == {"weight", "scales", "bias"} | ({"table"} if spec.table == "custom" else set())
    other = LutLinear(96, 40, spec, bias=True, dtype=torch.float16)
    other.load_state_dict(state)
    x = torch.randn(3, 96).half()
    assert torch.equal(other(x), lut(x))
    assert torch.equal(copy.deepcopy(lut)(x), lut(x))


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(3, 128, "nf3"), QuantSpec(2, -1, "nf2")], ids=str)
def test_kernel_order_and_back(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; K = 777 ends in the middle of a group."""
    linear = LutLinear.from_linear(nn.Linear(777, 333), spec)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    monkeypatch.setattr(LutLinear, "_suits_kernels", lambda self: True)
    assert linear.arrange().in_kernel_order
    state = linear.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    linear.load_state_dict(before)
    assert linear.in_kernel_order
    monkeypatch.undo()
    assert not linear.arrange().in_kernel_order
    assert torch.equal(linear.weight, before["weight"]) and torch.equal(linear.scales, before["scales"])


def test_a_named_table_is_rounded_once_whatever_the_way() -> None:
    _, lut = made(QuantSpec())
    lut = lut.to(torch.bfloat16)
    assert torch.equal(lut.table, named_table("nf4").to(torch.bfloat16))
    assert lut.scales.dtype == torch.bfloat16 and lut.weight.dtype == torch.uint8


def test_it_decodes_with_the_float32_scales_of_kbit_training() -> None:
    _, lut = made(QuantSpec(), torch.bfloat16)
    right = lut.dequantize()
    lut.scales.data = lut.scales.data.float()
    assert lut.dequantize().dtype == torch.float32
    assert torch.equal(lut.dequantize().to(torch.bfloat16), right)


def test_meta_then_empty() -> None:
    lut = LutLinear(96, 40, QuantSpec(), device="meta", dtype=torch.float16)
    assert lut.weight.shape == (40, 48) and lut.to(torch.bfloat16).weight.is_meta


def test_autocast_casts_x_like_a_dense_layer() -> None:
    _, lut = made(QuantSpec(), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert lut(torch.randn(3, 96)).dtype == torch.bfloat16


def test_gradients_and_adapters() -> None:
    _, lut = made(QuantSpec(), torch.float32)
    low = nn.Parameter(torch.zeros(40, 4))
    down = torch.randn(96, 4)
    x, target = torch.randn(32, 96), torch.randn(32, 40)
    losses = []
    optimizer = torch.optim.Adam([low], lr=0.05)
    for _ in range(20):
        loss = (lut(x) + (x @ down) @ low.T - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_refused_sizes() -> None:
    with pytest.raises(SpecError, match="odd"):
        LutLinear(7, 8, QuantSpec(4, 32, "custom", 2))
    with pytest.raises(SpecError, match="empty"):
        LutLinear(0, 8, QuantSpec())
