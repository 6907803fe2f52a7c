"""Weights to codes and scales, and back: pure functions on tensors, on any device.

A weight matrix W (N, K) is cut along K into groups of g weights. A group shares one scale s and each weight (or pair of
weights, ``vector_size`` 2) becomes the index of a table entry::

    codes[n, j] = argmin_i |W[n, k] / s - table[i]|        W^[n, k] = table[codes[n, k]] * s[n, k // g]

``absmax`` takes the smallest scale with which the table spans the group, s = max(max w / max t, max -w / max -t), which
is the usual absmax for tables that reach equally far on both sides. ``mse`` tries a fan of smaller scales and keeps,
group by group, the one with the least squared error: clipping a rare large weight often costs less than coarser steps.

``rms`` is the root mean square of the group, which tables made for variance 1 want (with them, the fan of ``mse`` is
around it). ``auto`` is ``rms`` for those tables and ``absmax`` for all others.

A spec with ``hadamard_size`` n stores W H instead of W, every n neighbours along K rotated (`flute.hadamard`); since
H = H^T = H^-1, decoding rotates once more and gives W^ back.

Scales are rounded to their storage dtype *before* codes are chosen, so codes are the nearest for the scale that will be
used. A value exactly between two table entries takes the lower one. A group of zeros gets scale 0 and decodes to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import QuantizeError, SpecError
from .hadamard import transform
from .spec import QuantSpec
from .tables import resolve_table

SCALE_METHODS = ("auto", "absmax", "rms", "mse")
_MSE_FAN = tuple(1.0 - 0.02 * step for step in range(31))  # 1.00, 0.98 .. 0.40 of the covering scale,
_WIDEST = 1.4  # or, for tables made for variance 1, of so many root mean squares
_ROWS_AT_ONCE_ELEMENTS = 1 << 23  # bound on float32 scratch: a slice of rows of about 32 MB
_MANY = 1 << 16  # values from which a comparison with every middle is quicker than a search, on a CPU


class Quantized(NamedTuple):
    """Codes uint8 (N, K / vector_size) and scales (N, ceil(K / g)) in a 16- or 32-bit float dtype."""

    codes: torch.Tensor
    scales: torch.Tensor


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """(N, K) -> (N, G, g) float32, the short last group padded with zeros (which change no absmax)."""
    rows, width = weight.shape
    groups = -(-width // group)
    padded = torch.nn.functional.pad(weight.to(torch.float32), (0, groups * group - width))
    return padded.view(rows, groups, group)


def _covering_scale(grouped: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(N, G, g) -> (N, G): the smallest scale with which the table's range covers each group."""
    high, low = float(table.max()), float(-table.min())
    above, below = grouped.amax(-1).clamp_min(0), (-grouped).amax(-1).clamp_min(0)
    if low <= 0 or high <= 0:  # a one-sided table: cover what it can reach
        return torch.maximum(above, below) / max(high, low)
    return torch.maximum(above / high, below / low)


def _rms(grouped: torch.Tensor, width: int) -> torch.Tensor:
    """(N, G, g) -> (N, G): root mean squares; zeros that fill the short last group do not count."""
    group = grouped.shape[-1]
    counts = torch.full((grouped.shape[1],), group, device=grouped.device)
    counts[-1] = width - group * (grouped.shape[1] - 1)
    return (grouped.square().sum(-1) / counts).sqrt()


def _round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the storage dtype, never to Inf, never to a zero that would lose a group that is not zero."""
    info = torch.finfo(dtype)
    rounded = scale.clamp_max(info.max).to(dtype)
    smallest = info.smallest_normal if dtype == torch.float32 else info.tiny * info.eps
    return torch.where((rounded == 0) & (scale > 0), torch.full_like(rounded, smallest), rounded)


def nearest(unit: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Codes int64 of the table entries nearest to ``unit`` (..., g): (..., g), or (..., g/2) for a table of pairs."""
    if table.dim() == 1:
        ordered, order = torch.sort(table, stable=True)
        middles = (ordered[1:] + ordered[:-1]) / 2
        if unit.is_cuda or unit.numel() < _MANY:
            return order[torch.bucketize(unit, middles)]
        place = torch.zeros(unit.shape, dtype=torch.uint8, device=unit.device)
        for middle in middles.tolist():
            place += (unit > middle).view(torch.uint8)
        return place.long() if torch.equal(ordered, table) else values_of(place, order)
    pairs = unit.reshape(-1, 2)
    # |p - t|^2 = |p|^2 - 2 p.t + |t|^2 and the first term does not choose; 256 entries at once need slices
    norms = (table * table).sum(-1)
    chunk = max(1, _ROWS_AT_ONCE_ELEMENTS // table.shape[0])
    best = [torch.addmm(norms, part, table.T, alpha=-2).min(-1).indices for part in pairs.split(chunk)]
    return torch.cat(best).view(*unit.shape[:-1], unit.shape[-1] // 2)


def values_of(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """T[c] for codes (..., n) of any integer dtype: (..., n), or (..., 2 n) for a table of pairs (E, 2)."""
    values = table.index_select(0, codes.flatten().int())  # twice as fast as T[c] on a CPU
    return values.view(*codes.shape[:-1], codes.shape[-1] * table[0].numel())


def spread(scales: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """Scales (N, G) -> float32 (N, K), one for each weight."""
    return scales.float().repeat_interleave(group, dim=1)[:, :width]


def sum_by_code(values: torch.Tensor, codes: torch.Tensor, entries: int) -> torch.Tensor:
    """Sums float64 (E, v) of values (P, v) by their codes (P,), in an order that is the same on every run."""
    total = torch.zeros(entries, values.shape[1], dtype=torch.float64, device=values.device)
    if not values.is_cuda:
        return total.index_add_(0, codes, values.double())
    for entry in range(entries):  # scattered additions on a GPU come in any order
        total[entry] = (values * (codes == entry).unsqueeze(-1)).sum(0, dtype=torch.float64)
    return total


def _nearest(grouped: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Codes int64 of the nearest table entries: (N, G, g) scalars, or (N, G, g/2) when the table holds pairs."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return nearest(grouped / safe.unsqueeze(-1), table)


def _decode(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(N, G, codes) and (N, G) -> (N, G, g) float32."""
    return values_of(codes, table) * scale.unsqueeze(-1)


def _searched_scale(
    grouped: torch.Tensor,
    covering: torch.Tensor,
    table: torch.Tensor,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    best = _round_scale(covering, dtype)
    least = torch.full_like(covering, float("inf"))
    for share in _MSE_FAN:
        scale = _round_scale(covering * share, dtype)
        wide = scale.to(torch.float32)
        error = (grouped - _decode(_nearest(grouped, wide, table), wide, table)).square()
        error = error.sum(-1) if importance is None else (error * importance).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _check_weight(weight: torch.Tensor, spec: QuantSpec, scale: str, name: str) -> None:
    if scale not in SCALE_METHODS:
        raise QuantizeError(f"layer {name!r}: scale={scale!r} is unknown; use one of {', '.join(SCALE_METHODS)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantizeError(
            f"layer {name!r}: weight is {tuple(weight.shape)} {weight.dtype}; a floating-point matrix (N, K) is needed"
        )
    spec.check_layer(name, *weight.shape)
    if spec.zero_points:
        raise SpecError(f"layer {name!r}: nothing is quantized with zero points here; leave zero_points out")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite)
        row, column = bad[0].tolist()
        raise QuantizeError(
            f"layer {name!r}: {len(bad)} of {weight.numel()} weights are NaN or Inf, the first at [{row}, {column}]; "
            "repair the checkpoint, or leave this layer out with a skip pattern"
        )


def quantize(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    table: torch.Tensor | None = None,
    scale: str = "auto",
    scale_dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> Quantized:
    """Quantize W (N, K) by rounding to nearest.

    Args:
        weight: (N, K), any float dtype, any device.
        spec: bits, group size, table and vector size.
        table: the custom table, when ``spec.table`` is ``"custom"``.
        scale: ``"auto"``, ``"absmax"``, ``"rms"`` or ``"mse"``.
        scale_dtype: dtype of the stored scales; the weight's own if that has 16 bits, else float16.
        importance: (K,), weights of the squared errors in the search of ``"mse"``; None: all the same. Of W's own
            channels, so not with a rotation.
        name: the layer's name, for messages.

    Returns:
        Quantized: codes uint8 (N, K / vector_size), scales (N, ceil(K / g)).

    Raises:
        QuantizeError: NaN or Inf weights, wrong rank or dtype, importance of rotated weights.
        SpecError: the spec does not fit the shape.
    """
    _check_weight(weight, spec, scale, name)
    values = resolve_table(spec, table).to(weight.device)
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16
    # The kernels see the table in the activation dtype: choose codes among the values that will be used.
    values = values.to(scale_dtype).to(torch.float32)
    width = weight.shape[1]
    if scale == "auto":
        scale = "rms" if spec.unit_variance else "absmax"
    by_rms = scale == "rms" or (scale == "mse" and spec.unit_variance)
    if importance is not None and spec.hadamard_size:
        raise QuantizeError(
            f"layer {name!r}: importance is of channels, which hadamard_size={spec.hadamard_size} mixes"
        )
    if importance is not None:
        importance = _grouped(importance.to(weight.device).unsqueeze(0), spec.group(width))
    codes, scales = [], []
    for part in weight.split(max(1, _ROWS_AT_ONCE_ELEMENTS // width)):
        if spec.hadamard_size:
            part = transform(part.to(torch.float32), spec.hadamard_size)
        grouped = _grouped(part, spec.group(width))
        begun = _rms(grouped, width) if by_rms else _covering_scale(grouped, values)
        if by_rms and scale == "mse":
            begun = begun * _WIDEST
        chosen = (
            _searched_scale(grouped, begun, values, scale_dtype, importance)
            if scale == "mse"
            else _round_scale(begun, scale_dtype)
        )
        index = _nearest(grouped, chosen.to(torch.float32), values).flatten(1)[:, : spec.row_codes(width)]
        codes.append(index.to(torch.uint8))
        scales.append(chosen)
    return Quantized(torch.cat(codes), torch.cat(scales))


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    spec: QuantSpec,
    *,
    table: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weights that codes and scales stand for: ``dtype(table[codes] * scales)``, rounded once, rotated back.

    Args:
        codes: uint8 (N, K / vector_size). scales: (N, ceil(K / g)).
        spec, table: as in `quantize`.
        zeros: (N, ceil(K / g)) where ``spec.zero_points``: then ``dtype(dtype(table[codes] - zeros) * scales)``.
        dtype: of the result, and the dtype to which the table is rounded first; default the scales' own.

    Returns:
        (N, K) in ``dtype``.
    """
    dtype = dtype or scales.dtype
    values = resolve_table(spec, table).to(device=codes.device, dtype=dtype).to(torch.float32)
    decoded = values_of(codes, values)
    width = decoded.shape[1]
    if zeros is not None:
        decoded = (decoded - spread(zeros, spec.group(width), width)).to(dtype).float()
    whole = decoded * spread(scales, spec.group(width), width)
    return (transform(whole, spec.hadamard_size) if spec.hadamard_size else whole).to(dtype)
