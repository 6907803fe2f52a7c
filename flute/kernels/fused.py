"""The operator ``flute::lut_fused``: `lut_linear`, and what a decoder block does in front of it and behind.

    x' = x / sqrt(mean(x^2) + eps) * gain           an RMSNorm, where ``gain`` is given
    y  = x' . W^T + bias
    y  = silu(first half of y) * second half        where ``gated``
    y  = residual + y                               where ``residual`` is given

Every line is rounded as torch rounds the modules and operations it stands for. With few tokens a launch of its own
costs each of them more than its work; the decode kernel does the norm while it takes x into shared memory, and the rest
before it writes y. Where that kernel does not run, or `MOST_TOKENS` are exceeded, the lines are run one by one, with
the same meaning. No gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from . import direct, fused_cuda, ops
from .fused_cuda import MOST_TOKENS as MOST_TOKENS  # of one launch
from .tokens import gate, rms_norm

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "lut_fused(Tensor x, Tensor weight, Tensor scales, Tensor table, Tensor? bias, int out_features, int bits, "
    "int group_size, Tensor? gain, float eps, bool gated, Tensor? residual) -> Tensor"
)


def _lut_fused(x: torch.Tensor, *given: Any) -> torch.Tensor:
    """``given``: the operator's other arguments, in their order."""
    linear, (gain, eps, gated, residual) = given[:7], given[7:]
    y = fused_cuda.lut_fused(x, linear, gain, eps, gated, residual) if x.is_cuda else None
    if y is not None:
        return y
    y = ops.backend(x)(x if gain is None else rms_norm(x, gain, eps), *linear)
    y = gate(y) if gated else y
    return y if residual is None else residual + y


def _fake(x: torch.Tensor, *given: Any) -> torch.Tensor:
    out_features, gated = given[4], given[9]
    return x.new_empty(*x.shape[:-1], out_features // (2 if gated else 1))


_library.impl("lut_fused", _lut_fused, "CPU")
_library.impl("lut_fused", _lut_fused, "CUDA")
torch.library.register_fake("flute::lut_fused", _fake, lib=_library)


def lut_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., N) of x (..., K), see above; N is ``out_features``, half of it if ``gated``.

    Args:
        x, weight, scales, table, bias, out_features, bits, group_size: as of `ops.lut_linear`.
        gain, eps: weight (K,) in x's dtype and eps of the norm in front, or None.
        gated: two halves of y are the gate and what it opens.
        residual: (..., N) in x's dtype, or None.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    call = _lut_fused if direct.possible(x, bias, gain, residual) else torch.ops.flute.lut_fused
    y: torch.Tensor = call(
        x, weight, scales, table, bias, out_features, bits, group_size, gain, eps, gated, residual
    )  # fmt: skip
    return y
