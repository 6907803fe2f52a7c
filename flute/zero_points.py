"""Weights of other owners whose groups have a zero point beside their scale (most AWQ models); `ZeroPointLinear`.

::

    W = (table[codes] - zeros) * scales                       zeros (N, G); difference and product rounded to the dtype

One table serves a layer, so a zero point of each group cannot be folded into it. The product can be split, though:

    y = x . (table[codes] * scales)^T + m . s^T        m (..., G) the means of x over groups, s = -g * zeros * scales

The first term is `LutLinear`'s, in its kernels; the second is a product with K / g instead of K columns. Means of x do
not overflow in float16 where sums might. `dequantize` gives the owner's weights bit for bit; y has the rounding errors
of both terms, each some units in the last place of sum |x| |W|, as with any order of summation.

`zero_experts` does the same for the experts of a mixture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .kernels import layout
from .linear import LutLinear
from .parallel import local
from .spec import QuantSpec


def lut_linear(in_features: int, out_features: int, spec: QuantSpec, **keywords: Any) -> LutLinear:
    """The layer that holds ``spec``; arguments as of `LutLinear`."""
    kind = ZeroPointLinear if spec.zero_points else LutLinear
    return kind(in_features, out_features, spec, **keywords)


def decoded(levels: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """W (..., N, K) of levels table[codes] (..., N, K) and zeros and scales (..., N, G) for ``group`` weights each."""
    zeros, scales = (part.repeat_interleave(group, -1)[..., : levels.shape[-1]] for part in (zeros, scales))
    return (levels - zeros) * scales


def shift(zeros: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """s above (..., N, G) in the dtype of ``scales``, rounded once."""
    return (zeros.float() * scales.float() * -group).to(scales.dtype)


def group_means(x: torch.Tensor, group: int) -> torch.Tensor:
    """m above (..., G) of x (..., K), in its dtype (torch sums in float32); a short last group is filled with zeros."""
    short = -x.shape[-1] % group
    groups = nn.functional.pad(x, (0, short)) if short else x
    return groups.unflatten(-1, (-1, group)).mean(-1)


def working_dtype(y: torch.Tensor) -> torch.dtype:
    """In which the second term of y is computed: float32 on a CPU, where small products in 16 bits are slow."""
    return torch.float32 if y.device.type == "cpu" else y.dtype


class ZeroPointLinear(LutLinear):
    """A `LutLinear` with zero points.

    Attributes:
        zeros: Parameter (N, G) in the dtype of the scales, in the checkpoint's order on any device. Never trained.
        shift: buffer (N, G), s above as `arrange` found zeros and scales: who writes to one of them arranges again.
            None, and then made in every call, until `arrange`, and where parameters are offloaded.
    """

    shift: torch.Tensor | None
    _holds_zeros = True

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, **keywords: Any) -> None:
        super().__init__(in_features, out_features, spec, **keywords)
        self.zeros = nn.Parameter(torch.zeros_like(self.scales), requires_grad=False)
        self.register_buffer("shift", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        return self.shifted(super().forward(x), x)

    def shifted(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the zero points add to the product y (..., N) of x (..., K) with the rest of the weight; the sum."""
        held = self._shift() if self.shift is None else self.shift
        means, dtype = group_means(x, self.spec.group(self.in_features)), working_dtype(y)
        return y + nn.functional.linear(means.to(dtype), held.to(dtype)).to(y.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight (N, K) in the dtype of the scales: the owner's, bit for bit."""
        scales, spec, width = self.scales, self.spec, self.in_features
        levels = torch.ops.flute.dequantize(
            self.weight, torch.ones_like(scales), self.table.to(scales.dtype), self.out_features, width, spec.bits,
            spec.group_size,
        )  # fmt: skip
        return decoded(levels, self.zeros, self._row_scales(), spec.group(width))

    def arrange(self) -> LutLinear:
        """As `LutLinear.arrange`."""
        super().arrange()
        self.shift = self._shift()
        return self

    def _shift(self) -> torch.Tensor:
        return shift(local(self.zeros.detach()), self._row_scales(), self.spec.group(self.in_features))

    def _row_scales(self) -> torch.Tensor:
        held = local(self.scales.detach())
        return layout.unpack_scales(held, self.rows) if self.in_kernel_order else held
