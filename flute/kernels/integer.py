"""Products of integer codes, ``flute::int_linear``: exact in int32, scaled once.

    y (M, N) = (codes - zero) (M, K) . W^T (N, K) * scale (M, 1) * weight_scale (N,) + bias (N,)

Weights are int8, or two int4 in a byte: the even column in the low nibble, two's complement (the published FlatQuant
layout). CUDA's kernels want either of them as `pieces.arrange` makes it, with three dimensions; else that is done in
every call. Sums are exact: at most 128 * 128 * K < 2^31 for K < 131072. The rest is float32 in this order, rounded to
y's dtype once: float(sum) * (scale * weight_scale) + bias. A residual is added to that, rounded again. The zeros of
asymmetric activations enter as sum - zero * row_sum, with the sums of W's rows. Zeros of the weights' rows enter by the
same two operands, exchanged: sums of the tokens' codes as ``zero``, the rows' zeros as ``row_sum``.
"""

from __future__ import annotations

import torch

from ..errors import OperatorError
from . import integer_cuda, pieces

MOST_FEATURES = 1 << 17  # K from which sums could leave int32

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "int_linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? zero, "
    "Tensor? row_sum, ScalarType dtype, Tensor? residual=None) -> Tensor"
)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes (..., 2 j) between -8 and 7 -> uint8 (..., j), even columns in the low nibbles."""
    if codes.shape[-1] % 2:
        raise OperatorError(f"flute.pack_nibbles: {codes.shape[-1]} columns; two share a byte, pad to an even number")
    nibbles = codes.to(torch.uint8) & 15  # two's complement wraps
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: int8 (..., 2 j)."""
    signed = packed.view(torch.int8)
    return torch.stack((signed << 4 >> 4, signed >> 4), -1).flatten(-2)


def _refuse(what: str) -> None:
    raise OperatorError(f"flute.int_linear: {what}")


def _check(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> None:
    if codes.dim() != 2 or codes.dtype != torch.int8:
        _refuse(f"codes {tuple(codes.shape)} {codes.dtype}; needs int8 (M, K)")
    (m, k), n = codes.shape, weight_scale.numel()
    if not 0 < k < MOST_FEATURES:
        _refuse(f"K={k}; sums are exact for 1 to {MOST_FEATURES - 1}")
    shapes: dict[torch.dtype, list] = {
        torch.uint8: [(n, k / 2), pieces.shape(n, k, 4), pieces.shape(n, k, 8)],
        torch.int8: [(n, k)],
    }
    if tuple(weight.shape) not in shapes.get(weight.dtype, []):
        _refuse(f"weight {tuple(weight.shape)} {weight.dtype}; needs uint8 ({n}, {k}/2) of int4, or int8 ({n}, {k})")
    if tuple(weight_scale.shape) != (n,) or tuple(scale.shape) != (m,):
        _refuse(f"scale {tuple(scale.shape)}, weight_scale {tuple(weight_scale.shape)}; needs ({m},) and (N,)")
    if scale.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        _refuse(f"scale is {scale.dtype}, weight_scale {weight_scale.dtype}; both must be float32")
    if (zero is None) != (row_sum is None):
        _refuse("zero needs row_sum, the sums of the weight's rows, and row_sum needs zero")
    for name, one, shape, kind in (("zero", zero, (m,), torch.int32), ("row_sum", row_sum, (n,), torch.int32)):
        if one is not None and (tuple(one.shape) != shape or one.dtype != kind):
            _refuse(f"{name} {tuple(one.shape)} {one.dtype}; needs {kind} {shape}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        _refuse(f"dtype={dtype}; use float16, bfloat16 or float32")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != dtype):
        _refuse(f"bias {tuple(bias.shape)} {bias.dtype}; needs {dtype} ({n},)")
    if residual is not None and (tuple(residual.shape) != (m, n) or residual.dtype != dtype):
        _refuse(f"residual {tuple(residual.shape)} {residual.dtype}; needs {dtype} ({m}, {n})")
    operands = (codes, scale, weight, weight_scale, bias, zero, row_sum, residual)
    devices = {one.device for one in operands if one is not None}
    if len(devices) > 1:
        _refuse(f"tensors on {len(devices)} devices: {', '.join(sorted(map(str, devices)))}")


def reference(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in plain torch; float64 holds every sum exactly, and its matrix product runs on every device."""
    if weight.dim() == 3:
        weight = pieces.restore(weight, weight_scale.shape[0], codes.shape[1])
    integers = unpack_nibbles(weight) if weight.dtype == torch.uint8 else weight
    sums = codes.double() @ integers.double().T
    if zero is not None and row_sum is not None:
        sums -= zero.double()[:, None] * row_sum.double()
    y = sums.float() * (scale[:, None] * weight_scale)
    y = (y if bias is None else y + bias.float()).to(dtype)
    return y if residual is None else residual + y


def _int_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)
    return reference(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)


def _int_linear_cuda(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)
    if dtype == torch.float32:
        return reference(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)
    arranged = weight if weight.dim() == 3 else pieces.arrange(weight)
    return integer_cuda.int_linear(codes, scale, arranged, weight_scale, bias, zero, row_sum, dtype, residual)


def _int_linear_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=dtype)


_library.impl("int_linear", _int_linear, "CompositeExplicitAutograd")
_library.impl("int_linear", _int_linear_cuda, "CUDA")
torch.library.register_fake("flute::int_linear", _int_linear_fake, lib=_library)


def int_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    zero: torch.Tensor | None = None,
    row_sum: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (M, N) of int8 codes and int4 or int8 weights, as above.

    Args:
        codes: int8 (M, K).
        scale: float32 (M,), of the tokens.
        weight: uint8 (N, K / 2) of `pack_nibbles`, int8 (N, K), or `pieces.arrange` of either.
        weight_scale: float32 (N,).
        bias: (N,) in ``dtype``, or None.
        dtype: of y: float16, bfloat16 or float32.
        zero: int32 (M,) of asymmetric tokens, or sums of their codes; or None; needs ``row_sum``.
        row_sum: int32 (N,), sums of the weight's rows, or the rows' zeros.
        residual: (M, N) in ``dtype``, what y is added to; or None.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.flute.int_linear(codes, scale, weight, weight_scale, bias, zero, row_sum, dtype, residual)
