"""Transform and quantize activations, token by token: ``flute::kronecker_quantize`` and ``flute::kronecker``.

    X (n1, n2) = reshape(norm(x))         x is one token of n = n1 n2 numbers
    Z = left^T . round(X . right)         = x . (left (x) right); FlatQuant (arXiv 2410.09426), section 3
    codes = clamp(round(Z / scale) + zero), Z ~ scale (codes - zero)

One launch of ``cuda/kronecker.cu`` on CUDA; plain torch where its registers or shared memory do not hold a token.
``left`` (n1, n1) or ``right`` (n2, n2) may be absent, which is the identity and costs nothing. All kernels agree with
the reference here code for code, wherever sums are exact, because every rounding has its place:

* gate (optional, of an MLP's inner layer): x (2 n) becomes silu(x[:n]) x[n:]; silu(g) = g / (1 + e^-g) in float32,
  rounded to x's dtype, and so is the product.
* norm (optional): x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times the weight, rounded again, which is
  what transformers' RMSNorm does.
* X . right and left^T . Y multiply numbers of x's dtype and add in float32. The middle product is rounded to x's dtype
  (it is the second one's operand), unless left is absent; Z is not rounded.
* the range of a token is (cmin zmin, cmax zmax) with the clip ratios; symmetric: scale = max |range| / (2^(b-1) - 1),
  asymmetric: scale = (high - low) / (2^b - 1), zero = round(-low / scale) - 2^(b-1); no range: scale = 1.
* codes: float32, IEEE division, halves to even, clamped to -2^(b-1) .. 2^(b-1) - 1; asymmetric ones are thus stored
  2^(b-1) lower than in the paper, so that all widths up to 8 bits are int8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import OperatorError
from . import tokens_cuda

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "kronecker_quantize(Tensor x, Tensor? left, Tensor? right, Tensor? clip, int bits, bool symmetric, "
    "Tensor? norm_weight, float eps, bool gated=False) -> (Tensor, Tensor, Tensor)"
)
_library.define("kronecker(Tensor x, Tensor? left, Tensor? right, Tensor? norm_weight, float eps) -> Tensor")

Quantized = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


# ---- the definition ------------------------------------------------------------------------------------------------


def gate(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) times second half of x (..., 2 n): (..., n)."""
    first, second = x.chunk(2, -1)
    return F.silu(first) * second


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., n) over its root mean square, rounded, times weight (n,), rounded: as transformers' modules do it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * (wide * scale).to(x.dtype)


def transform(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Z (M, n) of x (..., n), as above; float32, or float64 of float64 x. Plain torch on any device."""
    dtype, n = x.dtype, x.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    n1, n2 = _factors(n, left, right)
    z = x.reshape(-1, n1, n2).to(wide)
    if right is not None:
        z = z @ right.to(wide)
        z = z.to(dtype).to(wide) if left is not None else z
    if left is not None:
        z = left.to(wide).T @ z
    return z.reshape(-1, n)


def over(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, rounded once on every device: given a Python number, CUDA multiplies with 1 / number, rounded."""
    return x / torch.full_like(x, number)


def quantize_rows(
    z: torch.Tensor,
    bits: int,
    symmetric: bool,
    clip: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Codes of rows, one scale (and zero) each.

    Args:
        z: (..., n), used as float32.
        clip: (2,), ratios of (largest, smallest) value, or None for (1, 1).
        scale_dtype: scales are rounded to it before they divide (the KV cache's are float16).

    Returns:
        int8 codes (..., n), scales (...,) in scale_dtype, int32 zeros (...,) or None if symmetric.
    """
    z = z.float()
    low, high, half = z.amin(-1), z.amax(-1), 1 << (bits - 1)
    if clip is not None:
        ratios = clip.float()
        low, high = low * ratios[1], high * ratios[0]
    width, steps = (torch.maximum(low.abs(), high), half - 1) if symmetric else (high - low, 2 * half - 1)
    scale = over(width, steps).to(scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.round(z / scale.float()[..., None])
    if symmetric:
        return codes.clamp(-half, half - 1).to(torch.int8), scale, None
    zero = torch.round(-low / scale.float()) - half
    codes = (codes + zero[..., None]).clamp(-half, half - 1)
    return codes.to(torch.int8), scale, zero.to(torch.int32)


# ---- checks --------------------------------------------------------------------------------------------------------


def _refuse(what: str) -> None:
    raise OperatorError(f"flute.kronecker: {what}")


def _factors(n: int, left: torch.Tensor | None, right: torch.Tensor | None) -> tuple[int, int]:
    """n1, n2."""
    if left is not None:
        return left.shape[0], n // left.shape[0]
    return (1, n) if right is None else (n // right.shape[0], right.shape[0])


def _features(x: torch.Tensor, gated: bool) -> int:
    """n."""
    return x.shape[-1] // 2 if gated else x.shape[-1]


def _check(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    gated: bool = False,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        _refuse(f"x {tuple(x.shape)} has no last dimension of features")
    if not x.is_floating_point():
        _refuse(f"x is {x.dtype}; use float16, bfloat16, float32 or float64")
    if gated and x.shape[-1] % 2:
        _refuse(f"x {tuple(x.shape)} is gated, so its last dimension must be even: gates, then what they multiply")
    n = _features(x, gated)
    for name, factor in (("left", left), ("right", right)):
        if factor is None:
            continue
        if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or n % factor.shape[0]:
            _refuse(f"{name} {tuple(factor.shape)} is no square matrix whose size divides n={n}")
        if factor.dtype != x.dtype or factor.device != x.device:
            _refuse(f"{name} is {factor.dtype} on {factor.device}, x is {x.dtype} on {x.device}; make them alike")
    if left is not None and right is not None and left.shape[0] * right.shape[0] != n:
        _refuse(f"left of {left.shape[0]} times right of {right.shape[0]} is not n={n}")
    if norm_weight is not None and (tuple(norm_weight.shape) != (n,) or norm_weight.device != x.device):
        _refuse(f"norm_weight {tuple(norm_weight.shape)} on {norm_weight.device}; needs ({n},) on {x.device}")


def _check_quantizer(clip: torch.Tensor | None, bits: int, x: torch.Tensor) -> None:
    if not 2 <= bits <= 8:
        _refuse(f"bits={bits}; codes have 2 to 8")
    if clip is not None and (tuple(clip.shape) != (2,) or clip.device != x.device):
        _refuse(f"clip {tuple(clip.shape)} on {clip.device}; needs (2,) ratios (largest, smallest) on {x.device}")


# ---- the operators -------------------------------------------------------------------------------------------------


def _quantize(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, left, right, norm_weight, gated)
    _check_quantizer(clip, bits, x)
    x = gate(x) if gated else x
    codes, scale, zero = quantize_rows(transform(x, left, right, norm_weight, eps), bits, symmetric, clip)
    return codes, scale, x.new_empty(0, dtype=torch.int32) if zero is None else zero


def _quantize_cuda(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, left, right, norm_weight, gated)
    _check_quantizer(clip, bits, x)
    sizes = _factors(_features(x, gated), left, right)
    problem = tokens_cuda.problem(x, *sizes, left, right, norm_weight, gated=gated)
    if problem is None:
        return _quantize(x, left, right, clip, bits, symmetric, norm_weight, eps, gated)
    return tokens_cuda.quantize(problem, x, left, right, clip, bits, symmetric, norm_weight, eps)


def _quantize_fake(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, left, right, norm_weight, gated)
    _check_quantizer(clip, bits, x)
    n, m = _features(x, gated), x.numel() // x.shape[-1]
    zeros = x.new_empty(0 if symmetric else m, dtype=torch.int32)
    return x.new_empty((m, n), dtype=torch.int8), x.new_empty(m, dtype=torch.float32), zeros


def _kronecker(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    _check(x, left, right, norm_weight)
    return transform(x, left, right, norm_weight, eps).to(x.dtype).view(x.shape)


def _kronecker_cuda(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    _check(x, left, right, norm_weight)
    problem = tokens_cuda.problem(x, *_factors(x.shape[-1], left, right), left, right, norm_weight)
    if problem is None or (left is None and right is None):
        return _kronecker(x, left, right, norm_weight, eps)
    return tokens_cuda.kronecker(problem, x, left, right, norm_weight, eps)


def _kronecker_fake(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    _check(x, left, right, norm_weight)
    return x.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x and the norm's weight: left . grad . right^T through RMSNorm; factors, once calibrated, are not learned."""
    x, left, right, norm_weight = ctx.saved_tensors  # type: ignore[attr-defined]
    wide = torch.promote_types(x.dtype, torch.float32)
    made = grad.to(wide).reshape(-1, *_factors(x.shape[-1], left, right))
    made = made if left is None else left.to(wide) @ made
    made = (made if right is None else made @ right.to(wide).mT).reshape(x.shape)
    if norm_weight is None:
        return made.to(x.dtype), None, None, None, None
    scale = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + ctx.eps)  # type: ignore[attr-defined]
    unit = x.to(wide) * scale
    grad_weight = (made * unit).reshape(-1, x.shape[-1]).sum(0).to(norm_weight.dtype)
    made = made * norm_weight.to(wide)
    grad_x = scale * (made - unit * (made * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), None, None, grad_weight, None


_library.impl("kronecker_quantize", _quantize, "CompositeExplicitAutograd")
_library.impl("kronecker", _kronecker, "CompositeExplicitAutograd")
_library.impl("kronecker_quantize", _quantize_cuda, "CUDA")
_library.impl("kronecker", _kronecker_cuda, "CUDA")
torch.library.register_fake("flute::kronecker_quantize", _quantize_fake, lib=_library)
torch.library.register_fake("flute::kronecker", _kronecker_fake, lib=_library)
torch.library.register_autograd("flute::kronecker", _backward, setup_context=_save, lib=_library)


def kronecker_quantize(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None = None,
    bits: int = 4,
    symmetric: bool = True,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gated: bool = False,
) -> Quantized:
    """Codes of x . (left (x) right), one scale a token; on CUDA one launch.

    Args:
        x: (..., n), float16 or bfloat16 (float32 and float64 too, in plain torch); (..., 2 n) if gated.
        left: (n1, n1) in x's dtype, or None for the identity.
        right: (n2, n2) in x's dtype, or None.
        clip: (2,), ratios that (largest, smallest) value of a token are multiplied by, or None.
        bits: 2 to 8.
        norm_weight: (n,), RMSNorm comes first; None for no norm.
        eps: RMSNorm's.
        gated: silu(first half of x) * second half comes first.

    Returns:
        int8 codes (M, n) between -2^(bits-1) and 2^(bits-1) - 1, float32 scales (M,), and int32 zeros (M,), None if
        symmetric: value ~ scale * (code - zero). The same bits on every run.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    codes, scale, zero = torch.ops.flute.kronecker_quantize(
        x, left, right, clip, bits, symmetric, norm_weight, eps, gated
    )
    return codes, scale, None if symmetric else zero


def quantize_tokens(
    x: torch.Tensor, bits: int = 4, symmetric: bool = True, clip: torch.Tensor | None = None
) -> Quantized:
    """`kronecker_quantize` without norm and transform."""
    return kronecker_quantize(x, None, None, clip, bits, symmetric)


def kronecker(
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """x . (left (x) right) rounded to x's dtype, for layers whose activations stay unquantized; else as above.

    Gradients are those of x and of the norm's weight.
    """
    return torch.ops.flute.kronecker(x, left, right, norm_weight, eps)
