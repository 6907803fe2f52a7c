"""x rounded to its grid and back, as it is learned through.

    y = (q - z) s,    q = clamp(round(u) + z),    u = min(max(x, bottom), top) / s

with s and z of the row (`flute.flatquant.rounding`, where the same is written out) and, for weights, the clipped
extremes top and bottom. A step of calibration does this to every weight and activation of a block. Autograd keeps six
tensors of x's size for it and goes over them some fifty times; here x alone is kept, and the gradient is

    dx = g          where neither x nor q was clamped, else 0        (straight through the rounding)
    dtop, dbottom = sums of g where x was clamped to them and q was not
    ds = sum g (q - z) - sum g u,    the latter where q was not clamped
    dz = -s sum g   where q was clamped

What numbers of a row, dtop to dz, mean for its extremes and clip ratios is left to autograd. The gradient of an extreme
goes to the first of equal numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .rounding import Grid, between, clipped_rows, codes, decode, grid, limits, shrunk


class _Kind(NamedTuple):
    """How rows are rounded; ``clamped``: x, too, ends at the clipped extremes."""

    bits: int
    symmetric: bool
    dtype: torch.dtype
    clamped: bool

    def row(self, high: torch.Tensor, low: torch.Tensor, clip: torch.Tensor | None) -> _Row:
        """What rows with these extremes (..., 1) are clamped to, and their grid."""
        top, bottom = shrunk(high, low, clip)
        most, least = top, bottom
        if self.clamped:  # extremes of what is clamped
            most, least = (torch.minimum(torch.maximum(each, bottom), top) for each in (high, low))
        return _Row(top, bottom, between(most, least, self.bits, self.symmetric, self.dtype))


class _Row(NamedTuple):
    top: torch.Tensor
    bottom: torch.Tensor
    grid: Grid


def fake(
    x: torch.Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    clip: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    clamped: bool = False,
) -> torch.Tensor:
    """x (..., n) rounded to its grid, in x's dtype; 16 bits and more leave it alone.

    Args:
        clip: ratios (..., 2), of max and of min, that broadcast over rows; None: 1.
        dtype: in which scales are stored.
        clamped: clamp x to the clipped extremes first, as `rounding.clipped_rows` does with weights; then the grid is
            that of what remains.
    """
    if bits >= 16:
        return x
    kind = _Kind(bits, symmetric, dtype, clamped and clip is not None)
    if torch.compiler.is_compiling():
        return _defined(x, clip, kind)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, clip)):
        return _Fake.apply(x, clip, kind)
    return _rounded(x, clip, kind)[0]


def _defined(x: torch.Tensor, clip: torch.Tensor | None, kind: _Kind) -> torch.Tensor:
    """The same written out, for compilers, which find a way of their own."""
    if kind.clamped:
        x, clip = clipped_rows(x, clip), None
    made = grid(wide := x.float(), kind.bits, symmetric=kind.symmetric, clip=clip, dtype=kind.dtype)
    return decode(codes(wide, made, kind.bits), made).to(x.dtype)


def _rounded(x: torch.Tensor, clip: torch.Tensor | None, kind: _Kind) -> tuple[torch.Tensor, ...]:
    """y, and the extremes of x's rows (..., 1)."""
    wide = x.float()
    high, low = wide.amax(-1, keepdim=True), wide.amin(-1, keepdim=True)
    row = kind.row(high, low, clip)
    units, zero = _units(wide, row, kind).round_(), row.grid.zero
    if zero is not None:
        units += zero
    units.clamp_(*limits(kind.bits, symmetric=kind.symmetric))
    if zero is not None:
        units -= zero
    return units.mul_(row.grid.scale).to(x.dtype), high, low


class _Fake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor | None, kind: _Kind) -> torch.Tensor:
        y, high, low = _rounded(x, clip, kind)
        ctx.save_for_backward(x, clip, high, low)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        with torch.enable_grad():
            clip, *extremes = (None if each is None else each.detach().requires_grad_() for each in rest)
            row = ctx.kind.row(*extremes, clip)
        wide = x.float()
        dx, of_row = _gradients(wide, g.float(), _Row(*(_detached(each) for each in row)), ctx.kind)
        numbers = [number for number in (row.top, row.bottom, *row.grid) if number is not None]
        leaves = [leaf for leaf in (*extremes, clip) if leaf is not None]
        found = torch.autograd.grad(numbers, leaves, of_row)
        dx.scatter_add_(-1, wide.argmax(-1, keepdim=True), found[0])
        dx.scatter_add_(-1, wide.argmin(-1, keepdim=True), found[1])
        return dx.to(x.dtype), None if clip is None else found[2], None


def _detached(part: Any) -> Any:
    if isinstance(part, Grid):
        return Grid(*(_detached(each) for each in part))
    return None if part is None else part.detach()


def _units(wide: torch.Tensor, row: _Row, kind: _Kind) -> torch.Tensor:
    """u, in memory of its own."""
    return wide.clamp(row.bottom, row.top).div_(row.grid.scale) if kind.clamped else wide / row.grid.scale


def _gradients(wide: torch.Tensor, g: torch.Tensor, row: _Row, kind: _Kind) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """dx through each number itself, and of the row's numbers (..., 1): dtop, dbottom, ds and, if there is one, dz."""
    zero, units = row.grid.zero, _units(wide, row, kind)
    whole = units.round()
    if zero is not None:
        whole += zero
    kept = whole.clamp(*limits(kind.bits, symmetric=kind.symmetric))
    dx = g * (kept == whole)
    if zero is not None:
        kept -= zero
    of_scale = kept.mul_(g).addcmul_(dx, units, value=-1).sum(-1, keepdim=True)
    of_zero = [] if zero is None else [row.grid.scale * (dx - g).sum(-1, keepdim=True)]
    of_ends = [torch.zeros_like(row.top), torch.zeros_like(row.bottom)]
    if kind.clamped:
        above, below = wide > row.top, wide < row.bottom
        of_ends = [torch.where(end, dx, 0.0).sum(-1, keepdim=True) for end in (above, below)]
        dx.masked_fill_(above.logical_or_(below), 0.0)
    return dx, [*of_ends, of_scale, *of_zero]
