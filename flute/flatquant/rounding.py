"""Uniform grids: one row, one scale. Plain tensors; float32; the definition that kernels and checkpoints are held to.

    symmetric    scale = max(|min| c_min, max c_max) / (2^(b-1) - 1)      codes in [-2^(b-1), 2^(b-1) - 1]
    asymmetric   scale = (max - min) / (2^b - 1), zero = round(-min / scale)     codes in [0, 2^b - 1]

with min and max of the row, shrunk by the clip ratios c = (c_max, c_min). A row of zeros has scale 1. Codes are
round(x / scale) + zero, half to even, clamped. The gradient goes straight through the rounding, and through clamp and
scale as it is; `flute.flatquant.fake` has both at once, in fewer passes over x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import SpecError
from ..kernels.tokens import over


class Grid(NamedTuple):
    """``scale`` (..., 1); ``zero`` (..., 1), float with whole values, or None: symmetric."""

    scale: torch.Tensor
    zero: torch.Tensor | None


def limits(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Least and largest code."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


def grid(
    x: torch.Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    clip: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    """The grid of each row of x (..., n) float32.

    Args:
        clip: ratios (..., 2), of max and of min, that broadcast over rows; None: 1.
        dtype: in which scales are stored: they are rounded to it before they divide.
    """
    return between(*shrunk(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), clip), bits, symmetric, dtype)


def shrunk(top: torch.Tensor, bottom: torch.Tensor, clip: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Extremes of rows times their clip ratios."""
    return (top, bottom) if clip is None else (top * clip[..., :1], bottom * clip[..., 1:])


def between(top: torch.Tensor, bottom: torch.Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid of rows with these extremes (..., 1)."""
    if symmetric:
        scale = over(torch.maximum(bottom.abs(), top), (1 << (bits - 1)) - 1)
    else:
        scale = over(top - bottom, (1 << bits) - 1)
    scale = scale.to(dtype).to(top.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Grid(scale, None if symmetric else through(-bottom / scale))


def through(x: torch.Tensor) -> torch.Tensor:
    """round(x), half to even; the gradient is that of x."""
    return x + (x.round() - x).detach()


def codes(x: torch.Tensor, made: Grid, bits: int) -> torch.Tensor:
    """Codes of x (..., n), as floats with whole values."""
    low, high = limits(bits, symmetric=made.zero is None)
    units = through(x / made.scale)
    return (units if made.zero is None else units + made.zero).clamp(low, high)


def decode(units: torch.Tensor, made: Grid) -> torch.Tensor:
    """What codes stand for."""
    return (units if made.zero is None else units - made.zero) * made.scale


def grouped(rows: torch.Tensor, size: int) -> torch.Tensor:
    """W (N, K) as (N, K / size, size), of which each part gets a scale; -1: (N, 1, K).

    Raises:
        SpecError: ``size`` does not divide K.
    """
    if size < 0:
        return rows.unsqueeze(1)
    if rows.shape[-1] % size:
        raise SpecError(f"w_groupsize={size} does not divide the {rows.shape[-1]} columns of a layer; use a divisor")
    return rows.unflatten(-1, (-1, size))


def clipped_rows(weight: torch.Tensor, clip: torch.Tensor | None) -> torch.Tensor:
    """W (N, K) clamped per row to its own extremes times ``clip`` (N, 2)."""
    if clip is None:
        return weight
    top, bottom = shrunk(weight.amax(-1, keepdim=True), weight.amin(-1, keepdim=True), clip)
    return torch.minimum(torch.maximum(weight, bottom), top)
