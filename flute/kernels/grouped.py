"""The operator ``flute::lut_grouped_linear``: tokens times a stack of weights, one for each expert of a mixture.

    y[t] = x[t] . W[e]^T + bias[e]     for offsets[e - 1] <= t < offsets[e],     W[e] = table[codes[e]] * scales[e]

x (M, K) has its rows sorted by expert; ``offsets`` int32 (E,) says where each expert's rows end, as ``offs`` of torch's
grouped matmul does. On Hopper it may lie on the device alone: all experts are one launch of the matmul kernel, which
counts its tiles itself (``cuda/work.cuh``), so nothing waits for the host and a CUDA graph may be replayed with other
offsets. Elsewhere (CPU, older GPUs, groups that are no multiple of 32) offsets are read by the host and every expert
that has tokens is a call of ``flute::lut_linear``.

Codes and scales come as a stack of what `ops` takes: uint8 (E, N, row_bytes) and (E, N, G), or in kernel order uint8
(E, tiles, chunks, chunk_bytes) and (E, tiles, G, 16). Gradients flow to x and bias, expert by expert.
"""

from __future__ import annotations

import torch

from ..spec import QuantSpec
from . import layout, ops

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "lut_grouped_linear(Tensor x, Tensor weight, Tensor scales, Tensor table, Tensor? bias, Tensor offsets, "
    "int out_features, int bits, int group_size) -> Tensor"
)
_library.define(
    "lut_grouped_linear_backward(Tensor grad, Tensor weight, Tensor scales, Tensor table, Tensor offsets, "
    "int in_features, int bits, int group_size) -> Tensor"
)


# ---- kernel order of a stack -----------------------------------------------------------------------------------------


def pack_stack(
    weight: torch.Tensor, scales: torch.Tensor, bits: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (E, N, row_bytes) and scales (E, N, G) -> kernel order of every expert, stacked."""
    experts, rows = weight.shape[:2]
    codes = weight.new_empty(experts, *layout.packed_shape(rows, in_features, bits))
    for expert in range(experts):
        codes[expert] = layout.pack_weight(weight[expert], bits, in_features)
    return codes, torch.stack([layout.pack_scales(part) for part in scales])


def unpack_stack(
    weight: torch.Tensor, scales: torch.Tensor, bits: int, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse of `pack_stack`."""
    codes = torch.stack([layout.unpack_weight(part, bits, out_features, in_features) for part in weight])
    return codes, torch.stack([layout.unpack_scales(part, out_features) for part in scales])


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    n: int,
    bits: int,
    group_size: int,
) -> None:
    if x.dim() != 2:
        ops._refuse(f"x {tuple(x.shape)}; a stack of experts takes (M, K), its rows sorted by expert")
    if weight.dim() not in (3, 4) or weight.shape[0] < 1 or scales.shape[:1] != weight.shape[:1]:
        ops._refuse(f"weight {tuple(weight.shape)} and scales {tuple(scales.shape)}; both must be stacks of E experts")
    experts = weight.shape[0]
    own_bias = None if bias is None else bias.select(0, 0) if bias.dim() == 2 else bias
    if bias is not None and tuple(bias.shape) != (experts, n):
        ops._refuse(f"bias {tuple(bias.shape)}; a stack of {experts} experts with {n} outputs needs ({experts}, {n})")
    ops.check(x, weight.select(0, 0), scales.select(0, 0), table, own_bias, n, bits, group_size)
    if offsets.dtype != torch.int32 or tuple(offsets.shape) != (experts,) or offsets.device != x.device:
        ops._refuse(
            f"offsets {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}; "
            f"needs int32 ({experts},) on {x.device}: where each expert's rows end"
        )


def _parts(offsets: torch.Tensor, rows: int) -> list[tuple[int, slice]]:
    """Every expert that has tokens, and its rows; reads offsets, so on a GPU the host waits."""
    ends = offsets.tolist()
    if any(begin > end for begin, end in zip([0, *ends], [*ends, rows], strict=True)):
        ops._refuse(f"offsets {ends}; they must rise and end at M = {rows} at most")
    return [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if begin < end]


# ---- implementations -------------------------------------------------------------------------------------------------


def _expert_by_expert(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight, scales, table, bias, offsets, out_features, bits, group_size)
    y = x.new_zeros(x.shape[0], out_features)
    for expert, rows in _parts(offsets, x.shape[0]):
        own_bias = None if bias is None else bias[expert]
        y[rows] = torch.ops.flute.lut_linear(
            x[rows], weight[expert], scales[expert], table, own_bias, out_features, bits, group_size
        )
    return y


def _grouped_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight, scales, table, bias, offsets, out_features, bits, group_size)
    if x.dtype == torch.float32:
        ops._refuse("x is float32; the CUDA kernels take float16 and bfloat16, cast x and the experts")
    (m, k), y = x.shape, None
    if m == 0:
        return x.new_empty(0, out_features)
    if layout.supports(group_size, k):
        from . import stacked

        if weight.dim() == 3:  # offloaded experts, moved here for this call only
            weight, scales = pack_stack(weight, scales, bits, k)
        y = stacked.lut_grouped_linear(x, weight, scales, table, bias, offsets, out_features, bits, group_size)
    if y is None:
        y = _expert_by_expert(x, weight, scales, table, bias, offsets, out_features, bits, group_size)
    return y


def _grouped_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight, scales, table, bias, offsets, out_features, bits, group_size)
    return x.new_empty(x.shape[0], out_features)


def _grouped_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    offsets: torch.Tensor,
    in_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    grad_x, n = grad.new_zeros(grad.shape[0], in_features), grad.shape[1]
    for expert, rows in _parts(offsets, grad.shape[0]):
        own = (weight[expert], scales[expert])
        grad_x[rows] = grad[rows] @ torch.ops.flute.dequantize(*own, table, n, in_features, bits, group_size)
    return grad_x


def _grouped_backward_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    offsets: torch.Tensor,
    in_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], in_features)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, scales, table, _bias, offsets, _n, bits, group_size = inputs
    ctx.save_for_backward(weight, scales, table, offsets)
    ctx.sizes = (x.shape[-1], bits, group_size)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, scales, table, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = torch.ops.flute.lut_grouped_linear_backward(
            grad.contiguous(), weight, scales, table, offsets, *ctx.sizes  # type: ignore[attr-defined]
        )  # fmt: skip
    if ctx.needs_input_grad[4]:  # type: ignore[attr-defined]
        rows = torch.arange(grad.shape[0], device=grad.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, rows, right=True)
        sums = grad.new_zeros(offsets.shape[0] + 1, grad.shape[1], dtype=torch.float32)  # the last: rows of no expert
        grad_bias = sums.index_add(0, expert, grad.float())[:-1].to(grad.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None


_library.impl("lut_grouped_linear", _expert_by_expert, "CPU")
_library.impl("lut_grouped_linear", _grouped_cuda, "CUDA")
_library.impl("lut_grouped_linear_backward", _grouped_backward, "CPU")
_library.impl("lut_grouped_linear_backward", _grouped_backward, "CUDA")
torch.library.register_fake("flute::lut_grouped_linear", _grouped_fake, lib=_library)
torch.library.register_fake("flute::lut_grouped_linear_backward", _grouped_backward_fake, lib=_library)
torch.library.register_autograd("flute::lut_grouped_linear", _backward, setup_context=_setup_context, lib=_library)


# ---- the public function ---------------------------------------------------------------------------------------------


def lut_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    spec: QuantSpec,
    out_features: int | None = None,
) -> torch.Tensor:
    """y[t] = x[t] . W[e]^T + bias[e] for the rows t of every expert e; sums in float32, rounded once.

    Args:
        x: (M, K) float16 or bfloat16 (float32 too on the CPU), rows sorted by expert.
        weight: codes uint8 (E, N, row_bytes), or kernel order on CUDA (see `pack_stack`).
        scales: (E, N, G), or kernel order beside kernel-order codes; x's dtype.
        table: (2**bits,), or (2**(2*bits), 2) for vectors; one for all experts; x's dtype.
        offsets: int32 (E,) on x's device, rising: where each expert's rows end. Empty experts are allowed.
        bias: (E, N) in x's dtype, or None.
        spec: bits and group size.
        out_features: N; needed for kernel order, where N may be padded.

    Returns:
        (M, N) in x's dtype, the same bits on every run. Rows behind the last end have no meaning.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit; also offsets that do not rise, where the host reads them.
    """
    n = weight.shape[1] if out_features is None else out_features
    return torch.ops.flute.lut_grouped_linear(x, weight, scales, table, bias, offsets, n, spec.bits, spec.group_size)
