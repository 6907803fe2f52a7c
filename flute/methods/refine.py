"""Improve codes, scales and table of a layer under H, in turns; the squared output error never rises.

With the other two fixed each is simple, and each step is exact or a descent:

* codes: one column (or pair) at a time takes the entry that is best given all others, w^ - (gradient) / H[j, j],
  (coordinate descent; Behdin et al. 2023, QuantEase, section 3);
* scales: W^ is linear in them, so the G scales of a row solve a G x G system;
* table: W^ is linear in it, too; the system is solved by conjugate gradients, which need only products with H.

Scales and table are rounded to their storage dtype, and taken only where that is still an improvement.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..quantize import spread, sum_by_code
from .gptq import BLOCK, corners, decode, round_unit
from .hessian import loss

_ROWS_AT_ONCE = 1 << 24  # elements of scratch
_STEPS = 3  # of conjugate gradients


def sweep_codes(
    target: torch.Tensor, matrix: torch.Tensor, codes: torch.Tensor, wide: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """One pass of coordinate descent over all columns; new codes int64 (N, K / v).

    Args:
        target: (N, K) float32. matrix: H (K, K) float32, positive definite.
        codes: int64 (N, K / v). wide: (N, K). table: (E, v).
    """
    vector, width = table.shape[1], target.shape[1]
    codes = codes.clone()
    values = decode(codes, wide, table)
    gradient = (values - target) @ matrix
    blocks = corners(matrix, vector)
    inverses, metrics = torch.linalg.inv(blocks), torch.linalg.cholesky(blocks)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        slope, square = gradient[:, start:stop].clone(), matrix[start:stop, start:stop]
        moved = torch.zeros_like(slope)
        for i in range(0, stop - start, vector):
            unit, at = slice(i, i + vector), slice(start + i, start + i + vector)
            index = (start + i) // vector
            wanted = values[:, at] - slope[:, unit] @ inverses[index]
            found, value = round_unit(wanted, wide[:, start + i], table, metrics[index])
            step = value - values[:, at]
            codes[:, index] = found
            values[:, at] = value
            moved[:, unit] = step
            slope[:, i + vector :] += step @ square[unit, i + vector :]
        gradient += moved @ matrix[start:stop]
    return codes


def fit_scales(
    target: torch.Tensor,
    matrix: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """Scales (N, G) of least squared output error for fixed codes, in the dtype of ``scales``; row by row no worse."""
    width = target.shape[1]
    groups = scales.shape[1]
    chunk = max(1, _ROWS_AT_ONCE // (width * groups))
    fitted = []
    for part, code, old in zip(target.split(chunk), codes.split(chunk), scales.split(chunk), strict=True):
        values = table[code].flatten(1)
        padded = torch.nn.functional.pad(values, (0, groups * group - width)).view(len(part), groups, group)
        system = torch.empty(len(part), groups, groups, dtype=torch.float64, device=target.device)
        for g in range(groups):  # v_g H v_h for all h at once
            columns = slice(g * group, min((g + 1) * group, width))
            product = torch.nn.functional.pad(
                (values[:, columns] @ matrix[columns]) * values, (0, groups * group - width)
            )
            system[:, g] = product.view(len(part), groups, group).sum(-1)
        pull = torch.nn.functional.pad((part @ matrix), (0, groups * group - width)).view_as(padded)
        wanted = (pull * padded).sum(-1).double()
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30  # groups that decode to zero have no say
        system = (system + system.transpose(1, 2)) / 2
        solved = torch.linalg.solve(system, wanted.unsqueeze(-1)).squeeze(-1)
        fitted.append(_better(part, matrix, code, old, solved, table, group))
    return torch.cat(fitted)


def _better(
    target: torch.Tensor,
    matrix: torch.Tensor,
    codes: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    table: torch.Tensor,
    group: int,
) -> torch.Tensor:
    width, limit = target.shape[1], torch.finfo(old.dtype).max
    new = torch.nan_to_num(new).clamp(-limit, limit).to(old.dtype)
    before = loss(target - decode(codes, spread(old, group, width), table), matrix)
    after = loss(target - decode(codes, spread(new, group, width), table), matrix)
    return torch.where((after < before).unsqueeze(-1), new, old)


def fit_table(
    target: torch.Tensor,
    matrix: torch.Tensor,
    codes: torch.Tensor,
    wide: torch.Tensor,
    table: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Table (E, v) of less squared output error for fixed codes and scales, rounded to ``dtype``, or the old one."""
    gather = _gatherer(codes, wide, *table.shape)
    residual = -gather((decode(codes, wide, table) - target) @ matrix)
    weights = gather(wide * matrix.diagonal())
    precondition = torch.where(weights > 0, 1 / weights.clamp_min(1e-30), torch.zeros_like(weights))
    change, towards = torch.zeros_like(residual), precondition * residual
    direction, energy = towards, (residual * towards).sum()
    for _ in range(_STEPS):
        product = gather(decode(codes, wide, direction.to(table.dtype)) @ matrix)
        curvature = (direction * product).sum()
        if not float(curvature) > 0:
            break
        step = energy / curvature
        change, residual = change + step * direction, residual - step * product
        towards = precondition * residual
        energy, before = (residual * towards).sum(), energy
        direction = towards + energy / before * direction
    new = (table + change.to(table.dtype)).to(dtype).to(table.dtype)
    if not bool(torch.isfinite(new).all()):
        return table
    gains = (
        loss(target - decode(codes, wide, table), matrix).sum() - loss(target - decode(codes, wide, new), matrix).sum()
    )
    return new if float(gains) > 0 else table


def _gatherer(
    codes: torch.Tensor, wide: torch.Tensor, entries: int, vector: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that sums values (N, K), times their scales, over the weights that use each table entry: (E, v)."""

    def gather(values: torch.Tensor) -> torch.Tensor:
        return sum_by_code((values * wide).view(-1, vector), codes.flatten(), entries)

    return gather
