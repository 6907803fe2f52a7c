"""The operator ``flute::lut_linear`` and its partner ``flute::dequantize``, known to torch.

    y (..., N) = x (..., K) . W^T + bias,     W = table[codes] * scales

Codes and scales come in one of two layouts, told apart by their rank: the checkpoint's (uint8 (N, row_bytes) and
(N, G)) or, on CUDA, kernel order (uint8 (tiles, chunks, chunk_bytes) and (tiles, G, 16), see `layout`). Every M is one
opaque operator call, so torch.compile, CUDA graphs and vLLM never see the choice of kernel inside:

* CUDA: the kernel with the best estimate, or the one that tuning found (`cuda.choose`). What no kernel takes (groups
  that are no multiple of 32), or what is estimated to be faster so on GPUs other than Hopper: dequantize, then matmul.
* CPU: the C kernel (`cpu`) for small M if it was built, else dequantize and matmul.

Gradients flow to x (and bias) only: dx = dy . W. The codes are constants, so adapters such as LoRA train on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import OperatorError
from ..spec import QuantSpec, whole_group
from . import cpu, cuda, direct, layout, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_library = torch.library.Library("flute", "DEF")
_library.define(
    "lut_linear(Tensor x, Tensor weight, Tensor scales, Tensor table, Tensor? bias, int out_features, int bits, "
    "int group_size) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor scales, Tensor table, int out_features, int in_features, int bits, "
    "int group_size) -> Tensor"
)


# ---- checks --------------------------------------------------------------------------------------------------------


def _refuse(what: str) -> None:
    raise OperatorError(f"flute.lut_linear: {what}")


def _check_weight(
    weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, n: int, k: int, bits: int, group_size: int
) -> None:
    if bits not in (2, 3, 4):
        _refuse(f"bits={bits}; use 2, 3 or 4")
    if group_size != -1 and group_size < 1:
        _refuse(f"group_size={group_size}; use a positive number, or -1 for the whole row")
    if n < 1 or k < 1:
        _refuse(f"weight of {n} x {k}; both must be positive")
    if tuple(table.shape) not in ((1 << bits,), (1 << 2 * bits, 2)):
        _refuse(f"table {tuple(table.shape)} does not fit bits={bits}; expected {(1 << bits,)} or {(1 << 2 * bits, 2)}")
    group = whole_group(group_size, k)
    if table.dim() == 2 and (k % 2 or group % 2):
        _refuse(f"a table of pairs needs even K and group_size, got K={k}, group_size={group_size}")
    groups = -(-k // group)
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    if weight.dim() == 3:
        if not layout.supports(group_size, k):
            _refuse(f"group_size={group_size} in kernel order; its groups are multiples of 32 or the whole row of {k}")
        shapes = (layout.packed_shape(n, k, bits), (-(-n // layout.TILE_ROWS), groups, layout.TILE_ROWS))
    else:
        shapes = ((n, -(-k * bits // 8)), (n, groups))
    if weight.dtype != torch.uint8 or tuple(weight.shape) != shapes[0]:
        _refuse(f"weight {tuple(weight.shape)} {weight.dtype}; {n} x {k} at {bits} bits needs uint8 {shapes[0]}")
    if tuple(scales.shape) != shapes[1]:
        _refuse(f"scales {tuple(scales.shape)}; {n} x {k} with group_size={group_size} needs {shapes[1]}")
    if not weight.device == scales.device == table.device:
        _refuse(f"tensors on two devices: weight {weight.device}, scales {scales.device}, table {table.device}")
    if scales.dtype != table.dtype or scales.dtype not in _DTYPES:
        _refuse(f"scales are {scales.dtype} and table is {table.dtype}; both must be one of float16, bfloat16, float32")
    if weight.dim() == 3 and weight.device.type == "cpu":
        _refuse("weight is in kernel order on the CPU; kernel order is for CUDA, move the layer with .to('cpu')")


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group_size: int,
) -> int:
    """Refuse arguments that do not fit together; returns K."""
    if x.dim() == 0:
        _refuse("x is a scalar; it needs a last dimension of in_features")
    _check_weight(weight, scales, table, n, x.shape[-1], bits, group_size)
    if x.dtype != scales.dtype:
        _refuse(f"x is {x.dtype} but scales are {scales.dtype}; cast x, or load the layer in {x.dtype}")
    if x.device != weight.device:
        _refuse(f"x is on {x.device} but weight is on {weight.device}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        _refuse(f"bias {tuple(bias.shape)} {bias.dtype} on {bias.device}; needs ({n},) {x.dtype} on {x.device}")
    return x.shape[-1]


# ---- implementations -----------------------------------------------------------------------------------------------


def _checkpoint_order(
    weight: torch.Tensor, scales: torch.Tensor, out_features: int, in_features: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.dim() == 2:
        return weight, scales
    return layout.unpack_weight(weight, bits, out_features, in_features), layout.unpack_scales(scales, out_features)


def _dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check_weight(weight, scales, table, out_features, in_features, bits, group_size)
    if weight.is_cuda and weight.dim() == 3 and scales.dtype != torch.float32:  # that kernel writes 16 bits
        return cuda.dequantize(weight, scales, table, out_features, in_features, bits, group_size)
    if not weight.is_cuda and cpu.available():
        group = whole_group(group_size, in_features)
        return cpu.dequantize(weight, scales, table, in_features, bits=bits, group_size=group, vector_size=table.dim())
    plain = _checkpoint_order(weight, scales, out_features, in_features, bits)
    return reference.decode(*plain, table, in_features, bits, group_size)


def _dense_path(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    dense = _dequantize(weight, scales, table, out_features, x.shape[-1], bits, group_size)
    return F.linear(x, dense, bias)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(M, N) as (..., N), but no view: autograd lets nobody write in place into views that an operator returns."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def _lut_linear_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    k = check(x, weight, scales, table, bias, out_features, bits, group_size)
    flat = x.reshape(-1, k).contiguous()  # torch's matmul may round otherwise for other strides
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    if cpu.available() and flat.shape[0] <= cpu.most_tokens(x.dtype, out_features * k):
        group = whole_group(group_size, k)
        y = cpu.lut_linear(flat, weight, scales, table, bias, bits=bits, group_size=group, vector_size=table.dim())
    else:
        y = _dense_path(flat, weight, scales, table, bias, out_features, bits, group_size)
    return _shaped(y, x)


def _lut_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    y = cuda.again(x, weight, scales, table, bias, out_features, bits, group_size)
    if y is not None:
        return y
    k = check(x, weight, scales, table, bias, out_features, bits, group_size)
    if x.dtype == torch.float32:
        _refuse("x is float32; the CUDA kernels take float16 and bfloat16, cast x and the layer")
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    if layout.supports(group_size, k):
        if weight.dim() == 2:  # an offloaded layer, moved here for this call only
            weight, scales = layout.pack_weight(weight, bits, k), layout.pack_scales(scales)
        y = cuda.lut_linear(x, weight, scales, table, bias, out_features, bits, group_size)
        if y is not None:
            return y
    flat = x.reshape(-1, k).contiguous()  # torch's matmul may round otherwise for other strides
    y = _dense_path(flat, weight, scales, table, bias, out_features, bits, group_size)
    return _shaped(y, x)


def _lut_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    check(x, weight, scales, table, bias, out_features, bits, group_size)
    return x.new_empty(*x.shape[:-1], out_features)


def _dequantize_fake(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check_weight(weight, scales, table, out_features, in_features, bits, group_size)
    return scales.new_empty(out_features, in_features)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, scales, table, _bias, out_features, bits, group_size = inputs
    ctx.save_for_backward(weight, scales, table)
    ctx.sizes = (out_features, x.shape[-1], bits, group_size)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, scales, table = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = grad @ torch.ops.flute.dequantize(weight, scales, table, *ctx.sizes)  # type: ignore[attr-defined]
    if ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None


_library.impl("lut_linear", _lut_linear_cpu, "CPU")
_library.impl("lut_linear", _lut_linear_cuda, "CUDA")
_library.impl("dequantize", _dequantize, "CPU")
_library.impl("dequantize", _dequantize, "CUDA")
torch.library.register_fake("flute::lut_linear", _lut_linear_fake, lib=_library)
torch.library.register_fake("flute::dequantize", _dequantize_fake, lib=_library)
torch.library.register_autograd("flute::lut_linear", _backward, setup_context=_setup_context, lib=_library)


# ---- calls ---------------------------------------------------------------------------------------------------------


def backend(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The operator's kernel for x, a plain tensor on a CPU or GPU: takes the operator's arguments."""
    return _lut_linear_cuda if x.is_cuda else _lut_linear_cpu


def apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """``torch.ops.flute.lut_linear``, past torch's dispatcher where that has nothing to do (see `direct`)."""
    if direct.possible(x, weight, scales, table, bias):
        return backend(x)(x, weight, scales, table, bias, out_features, bits, group_size)
    return torch.ops.flute.lut_linear(x, weight, scales, table, bias, out_features, bits, group_size)


def lut_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    spec: QuantSpec,
    out_features: int | None = None,
) -> torch.Tensor:
    """y = x . W^T + bias with W = table[codes] * scales, products summed in float32 and rounded once.

    Args:
        x: (..., K), float16 or bfloat16 (float32 too on the CPU); any strides, any leading dimensions, also empty.
        weight: codes, uint8 (N, row_bytes) as in a checkpoint, or kernel order (see `layout.pack_weight`) on CUDA.
        scales: (N, G), or kernel order beside kernel-order codes; x's dtype.
        table: (2**bits,), or (2**(2*bits), 2) for vectors; x's dtype.
        bias: (N,) in x's dtype, or None.
        spec: bits and group size.
        out_features: N; needed for kernel order, where N may be padded.

    Returns:
        (..., N) in x's dtype, the same bits on every run of the same machine.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    n = weight.shape[0] if out_features is None else out_features
    return apply(x, weight, scales, table, bias, n, spec.bits, spec.group_size)
