"""When a foreign layer is a layer of ours, exactly; and the codes, scales and table that say so.

An owner's format is read as `Stored`: the dense weight W (N, K) that the owner's own dequantization gives, in the
owner's dtype and order of roundings, and, where the format is of that kind, the same as levels times scales::

    W[n, k] = dtype(table[codes[n, k]] * scales[n, k // g])        product in float32, rounded once

The table may have any length here; zero points are folded into it, since s * (q - z) is a level q - z times s. It can
be stored if the levels that the layer really uses are at most 2^4: the owner's number of bits is kept if they fit,
else one or two bits more are taken. Zero points that differ from group to group thus fit at 2 bits (7 levels, stored in
3 bits) and at 3 bits (15 levels, stored in 4), and at 4 bits only if few are used. Else zero points are stored beside
the scales (`flute.zero_points`), if the format gives them (`Stored.apart`).

`represent` then decodes what would be written and compares it with W, weight by weight. What is not equal is not
written, so that no format is trusted to be what its reader thinks it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from ...quantize import spread
from ...spec import CUSTOM_TABLE, QuantSpec
from ...tables import named_table

_MOST_BITS = 4
_AT_ONCE = 1 << 24  # weights decoded at once: some 16 bytes of scratch each


class Levels(NamedTuple):
    """A weight as levels times scales.

    ``codes`` (N, K / v) integers below E. ``table`` float32 (E,), or (2^(2 bits), 2) for pairs. ``scales`` (N, G) in
    the owner's dtype, one for ``group_size`` weights of a row. ``bits`` of the owner. ``hadamard_size`` n: codes and
    scales are those of W H, as in `QuantSpec`.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    group_size: int
    bits: int
    hadamard_size: int = 0


class Stored(NamedTuple):
    """One layer as its owner has it.

    ``weight`` (N, K): the owner's dequantization in the owner's dtype, of rotated weights before they are rotated back.
    ``levels``: the same as levels times scales; None where the format has no such form, and then ``why`` says it.
    ``apart``: the same with zero points of their own, the best first, to be taken where the levels are too many, or
    where other matrices of a stack of experts take it.
    """

    weight: torch.Tensor
    levels: Levels | None
    why: str = ""
    apart: tuple[Exact, ...] = ()


class Format(NamedTuple):
    """One owner's way to store a layer.

    ``name`` for the report. ``parts``: what may follow a layer's name in the names of its tensors; the first is there
    in every layer, and in layers only. ``read``: a layer's name and its tensors by those endings -> `Stored`.
    """

    name: str
    parts: tuple[str, ...]
    read: Callable[[str, Mapping[str, torch.Tensor]], Stored]


Form = tuple[QuantSpec, tuple[float, ...]]  # what all matrices of a stack have in common: a spec, a table of its own


class Exact(NamedTuple):
    """One layer as we have it: codes uint8 (N, K / v), scales (N, G), a float32 table if it is a custom one, and zeros.

    ``zeros`` (N, G) in the dtype of the scales, if the spec has zero points.
    """

    spec: QuantSpec
    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor | None
    zeros: torch.Tensor | None = None

    @property
    def form(self) -> Form:
        """Spec and custom table (flat, empty if it has a name)."""
        return self.spec, () if self.table is None else tuple(self.table.flatten().tolist())

    def decoded(self, dtype: torch.dtype, factors: torch.dtype = torch.float32) -> torch.Tensor:
        """(N, K) in ``dtype``, scales and table first rounded to ``factors``; rotated weights stay rotated."""
        table = named_table(self.spec.table) if self.table is None else self.table
        values, scales = table.to(self.codes.device, factors).float(), self.scales.to(factors)
        width = self.codes.shape[1] * self.spec.vector_size
        out = torch.empty(len(self.codes), width, dtype=dtype, device=self.codes.device)
        group, step = self.spec.group(width), _rows_at_once(width)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            found = values.index_select(0, self.codes[rows].flatten().int()).view(-1, width)
            if self.zeros is not None:
                found = found.sub_(spread(self.zeros[rows].to(factors), group, width)).to(dtype).float()
            out[rows] = found.mul_(spread(scales[rows], group, width))
        return out

    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> int:
        """How many weights differ from the owner's in ``dtype`` when scales and table are rounded to it, as at load."""
        return int((self.decoded(dtype, factors=dtype) != weight.to(dtype)).sum())


def represent(stored: Stored, form: Form | None = None) -> Exact | str:
    """The layer in our format, equal weight by weight to the owner's; or in one line why it cannot be.

    Args:
        form: None for the best; or one of ``stored.apart``.
    """
    made = fit(stored, form)
    if isinstance(made, str):
        return made
    differ = int((made.decoded(stored.weight.dtype) != stored.weight).sum())
    return f"{differ:,} of {stored.weight.numel():,} weights would not be its owner's" if differ else made


def fit(stored: Stored, form: Form | None = None) -> Exact | str:
    """What `represent` gives for a layer that it has been asked about before: not compared again."""
    chosen = next((made for made in stored.apart if made.form == form), None)
    if chosen is not None:
        return chosen
    levels, apart = stored.levels, next(iter(stored.apart), None)
    held = levels or apart
    if held is None:
        return stored.why
    if not bool(torch.isfinite(held.scales).all()):
        return "its scales hold NaN or Inf"
    if levels is None:
        return apart or stored.why
    group = -1 if levels.scales.shape[1] == 1 else levels.group_size
    if levels.table.dim() == 1:
        fitting = _fitting(levels)
        if isinstance(fitting, str):
            return apart or fitting
        bits, name, table, codes = fitting
    else:
        bits, name, table, codes = levels.bits, CUSTOM_TABLE, levels.table, levels.codes
    vector = stored.weight.shape[1] // codes.shape[1]
    spec = QuantSpec(bits, group, name, vector, levels.hadamard_size)
    return Exact(spec, codes, levels.scales.contiguous(), table.float() if name == CUSTOM_TABLE else None)


def with_zeros(
    q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int
) -> tuple[Exact, ...]:
    """How to store ``(q - zeros) * scales`` with the zero points apart: q (N, K) below 2^bits, the others (N, G).

    First with q and zeros moved by the middle of their range (`int4` is -8 .. 7), where that is exact: the smaller a
    zero point, the smaller is what it adds to a product, and the error of that. Then as they are, which always is.
    """
    middle, group = 1 << (bits - 1), -1 if scales.shape[1] == 1 else group_size
    spec, codes, scales = QuantSpec(bits, group, f"int{bits}", zero_points=True), q.to(torch.uint8), scales.contiguous()
    moved, zeros = (zeros - middle).to(scales.dtype).contiguous(), zeros.to(scales.dtype).contiguous()
    own = torch.arange(1 << bits, dtype=torch.float32)
    plain = Exact(replace(spec, table=CUSTOM_TABLE), codes, scales, own, zeros)
    if not bool((moved.float() == zeros.float() - middle).all()):
        return (plain,)
    return Exact(spec, codes, scales, None, moved), plain


def _fitting(levels: Levels) -> tuple[int, str, torch.Tensor, torch.Tensor] | str:
    """Bits, name and values (2^bits,) of a table that has all levels, and codes uint8 into it."""
    kept = torch.ones(len(levels.table), dtype=torch.bool, device=levels.table.device)
    if len(levels.table) > 1 << levels.bits:
        kept = _used(levels)
    values = levels.table[kept]
    bits = next((b for b in range(max(2, levels.bits), _MOST_BITS + 1) if len(values) <= 1 << b), None)
    if bits is None:
        return f"its weights take {len(values)} levels times a scale, and a table of {_MOST_BITS} bits has 16"
    name, table = _table(values, bits)
    place = (levels.table.unsqueeze(1) == table).int().argmax(1).to(torch.uint8)
    codes = [place.index_select(0, part.flatten().int()) for part in _slices(levels.codes)]
    return bits, name, table, torch.cat(codes).view(levels.codes.shape)


def _used(levels: Levels) -> torch.Tensor:
    """(E,) bool: which levels the layer uses."""
    counts = [torch.bincount(part.int().flatten(), minlength=len(levels.table)) for part in _slices(levels.codes)]
    return torch.stack(counts).sum(0) > 0


def _rows_at_once(width: int) -> int:
    return max(1, _AT_ONCE // width)


def _slices(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Its rows in parts of ``_AT_ONCE`` elements."""
    return matrix.split(_rows_at_once(matrix.shape[1]))


def _table(values: torch.Tensor, bits: int) -> tuple[str, torch.Tensor]:
    """A named table that has all ``values``, else these, the last repeated until there are 2^bits."""
    for family in ("int", "nf"):
        named = named_table(f"{family}{bits}").to(values.device)
        if bool(torch.isin(values, named).all()):
            return f"{family}{bits}", named
    return CUSTOM_TABLE, torch.cat((values, values[-1:].expand((1 << bits) - len(values))))
