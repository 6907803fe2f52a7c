"""The operator ``flute::lut_fused``: a product, and what a decoder block does in front of it and behind.

    x' = x / sqrt(mean(x^2) + eps) * gain           an RMSNorm, where ``gain`` is given
    y  = x' . [W1; W2; ...]^T + [bias1; ...]        as `joined` has it
    y  = silu(first half of y) * second half        where ``gated``
    y  = residual + y                               where ``residual`` is given

Every line is rounded as torch rounds the modules and operations it stands for. With few tokens a launch of its own
costs each of them more than its work; the decode kernel does the norm while it takes x into shared memory, and the rest
before it writes y. Where that kernel does not run, or `MOST_TOKENS` are exceeded, the lines are run one by one, with
the same meaning. No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import direct, fused_cuda, joined
from .fused_cuda import MOST_TOKENS as MOST_TOKENS  # of one launch

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "lut_fused(Tensor x, Tensor[] weights, Tensor[] scales, Tensor table, Tensor[] biases, int[] out_features, "
    "int bits, int group_size, Tensor? gain, float eps, bool gated, Tensor? residual) -> Tensor"
)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., K) normed in float32, rounded, times ``gain`` (K,), rounded: what transformers' RMSNorm modules do."""
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _lut_fused(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    table: torch.Tensor,
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    bits: int,
    group_size: int,
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    codes, scaled = joined.neighbours(weights), joined.neighbours(scales)
    bias = joined.neighbours(biases) if biases else None
    if codes is not None and scaled is not None and (bias is not None or not biases) and x.is_cuda:
        y = fused_cuda.lut_fused(
            x, codes, scaled, table, bias, sum(out_features), bits, group_size, gain, eps, gated, residual
        )
        if y is not None:
            return y
    if gain is not None:
        x = rms_norm(x, gain, eps)
    y = joined.lut_linears(x, weights, scales, table, biases, out_features, bits, group_size)
    if gated:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    return y if residual is None else residual + y


def _fake(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    table: torch.Tensor,
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    bits: int,
    group_size: int,
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(out_features) // (2 if gated else 1))


_library.impl("lut_fused", _lut_fused, "CPU")
_library.impl("lut_fused", _lut_fused, "CUDA")
torch.library.register_fake("flute::lut_fused", _fake, lib=_library)


def lut_fused(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    table: torch.Tensor,
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    bits: int,
    group_size: int,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., N) of x (..., K), see above; N is the sum of ``out_features``, half of it if ``gated``.

    Args:
        x: float16 or bfloat16 (float32 too on the CPU). weights, scales, table, biases: as of `joined`, in x's dtype.
        out_features: rows of each weight.
        bits, group_size: of all.
        gain, eps: weight (K,) and eps of the norm in front, or None.
        gated: two halves of y are the gate and what it opens.
        residual: (..., N) contiguous, or None.

    Raises:
        OperatorError: shapes, dtypes or devices of x and weights do not fit.
    """
    call = _lut_fused if direct.possible(x, gain, residual, *biases) else torch.ops.flute.lut_fused
    return call(x, weights, scales, table, biases, out_features, bits, group_size, gain, eps, gated, residual)
