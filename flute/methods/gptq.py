"""Rounding with error feedback (GPTQ) to any table, any group size, pairs included: pure functions on tensors.

Columns are rounded one after the other; what rounding a column does to the layer's output is made up for, as far as H
allows, by the columns still to come (Frantar et al. 2023, GPTQ, algorithm 1; H^-1 = U^T U, U upper triangular):

    codes[:, j] = nearest table entry to W[:, j] / s
    e           = (W[:, j] - table[codes] s) / U[j, j]
    W[:, k]    -= e U[j, k]        for every later k

A vector table rounds a pair of columns at once. Then U[j, j] is a 2 x 2 triangle T, e = (w - w^) T^-1, and the nearest
entry is nearest in that metric, which is where |e| is least.

Columns go in the order of falling diagonal of H (act-order), so that those that matter most are rounded while most
others are left to make up for them. Scales belong to the *unpermuted* groups and are fixed before, so the checkpoint
needs no index of groups, and any group size, short last groups included, works in any order.

Corrections reach columns outside the current block of 128 once per block, as one matrix product.
"""

from __future__ import annotations

import torch

from ..quantize import nearest
from .hessian import Damped, inverse_factor

BLOCK = 128  # columns; even, so that no pair is cut


def decode(codes: torch.Tensor, wide: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """W^ (N, K) float32 of codes (N, K / v), spread scales (N, K) and table (E, v)."""
    return table[codes].flatten(1) * wide


def as_pairs(table: torch.Tensor) -> torch.Tensor:
    """Any table as (E, v): single values are vectors of one."""
    return table.unsqueeze(-1) if table.dim() == 1 else table


def round_unit(
    wanted: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, metric: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int64 (N,) and values (N, v) nearest to ``wanted`` (N, v), where |d| is |d metric|.

    Args:
        scale: (N,). A zero decodes to zero whatever the code.
        table: (E, v).
        metric: (v, v); only its shape, not its size, matters.
    """
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    unit = wanted / safe.unsqueeze(-1)
    if table.shape[1] == 1:
        codes = nearest(unit.squeeze(-1).contiguous(), table.squeeze(-1))
    else:
        metric = metric / metric[0, 0]
        codes = nearest(unit @ metric, table @ metric).squeeze(-1)
    return codes, table[codes] * scale.unsqueeze(-1)


def column_order(diagonal: torch.Tensor, vector: int) -> torch.Tensor:
    """Permutation of columns by falling diagonal of H; pairs stay together. Equal ones keep their order."""
    units = diagonal.view(-1, vector).sum(-1)
    order = torch.sort(units, descending=True, stable=True).indices
    return (order.unsqueeze(-1) * vector + torch.arange(vector, device=order.device)).flatten()


def corners(matrix: torch.Tensor, vector: int) -> torch.Tensor:
    """(K / v, v, v): the blocks on the diagonal of a (K, K) matrix."""
    units = len(matrix) // vector
    return matrix.view(units, vector, units, vector).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def round_with_feedback(
    weight: torch.Tensor, made: Damped, wide: torch.Tensor, table: torch.Tensor, *, act_order: bool = True
) -> torch.Tensor:
    """Codes int64 (N, K / v) of W (N, K) for fixed scales.

    Args:
        weight: (N, K) float32.
        made: H (K, K), damped.
        wide: scales as float32 (N, K), from `spread`.
        table: (E, v) float32, v 1 or 2.
        act_order: most important columns first; else from left to right.
    """
    rows, width = weight.shape
    vector = table.shape[1]
    diagonal = made.matrix.diagonal()
    order = column_order(diagonal, vector) if act_order else torch.arange(width, device=weight.device)
    if act_order:
        permuted = made.matrix.double()[order][:, order]
        upper = inverse_factor(torch.linalg.cholesky(permuted))
    else:
        upper = inverse_factor(made.factor)
    left, wide = weight[:, order].clone(), wide[:, order]
    metrics = torch.linalg.inv(corners(upper, vector))
    codes = torch.empty(rows, width // vector, dtype=torch.int64, device=weight.device)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        part, triangle = left[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(part)
        for i in range(0, stop - start, vector):
            unit = slice(i, i + vector)
            metric = metrics[(start + i) // vector]
            found, value = round_unit(part[:, unit], wide[:, start + i], table, metric)
            codes[:, (start + i) // vector] = found
            errors[:, unit] = (part[:, unit] - value) @ metric
            part[:, i + vector :] -= errors[:, unit] @ triangle[unit, i + vector :]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, order[::vector] // vector] = codes
    return back
