"""A table of a layer's own, learned from its weights before any error feedback: k-means on normalized weights.

Weights are divided by their group's scale, u = w / s, and k-means looks for the entries of least weighted error
sum a (u - table[code])^2 with a = s^2 H[k, k], the squared output error that a weight makes on its own. Scales are
searched anew for the table found, and so on a few times. A table of pairs starts from all pairs of a scalar table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantize import nearest, quantize, spread, sum_by_code
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import named_table

_ROUNDS, _LLOYD = 2, 10
_SAMPLE = 1 << 16  # points that k-means looks at


class Learned(NamedTuple):
    """``table`` float32 of the spec's shape; ``scales`` (N, G) that suit it."""

    table: torch.Tensor
    scales: torch.Tensor


def learn_table(
    weight: torch.Tensor, spec: QuantSpec, importance: torch.Tensor, *, scale_dtype: torch.dtype, name: str = "weight"
) -> Learned:
    """A learned table for W (N, K).

    Args:
        weight: (N, K) float32.
        spec: a custom spec.
        importance: (K,), the diagonal of H.
        scale_dtype: of scales and table.

    Returns:
        table float32 of ``spec.table_shape``, largest magnitude about 1, rounded to ``scale_dtype``, and scales (N, G).
    """
    width = weight.shape[1]
    scalar = QuantSpec(spec.bits, spec.group_size, CUSTOM_TABLE)
    table = named_table(f"nf{spec.bits}").to(weight.device)
    for _ in range(_ROUNDS):
        scales = quantize(
            weight, scalar, table=table, scale="mse", scale_dtype=scale_dtype, importance=importance, name=name
        ).scales
        wide = spread(scales, spec.group(width), width)
        unit = weight / torch.where(wide == 0, torch.ones_like(wide), wide)
        mass = wide.square() * importance
        table = lloyd(unit.view(-1, 1), mass.view(-1, 1), table)
    if spec.vector_size == 2:
        table = lloyd(unit.view(-1, 2), mass.view(-1, 2), torch.cartesian_prod(table, table))
    return Learned(table.to(scale_dtype).float(), scales)


def lloyd(points: torch.Tensor, mass: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """k-means from ``table``; entries that no point is nearest to stay where they are.

    Args:
        points: (P, v) float32; every so-many-th is looked at when there are many.
        mass: (P, v), weights of the squared errors. Points go to the nearest entry without it.
        table: (E,) or (E, v).
    """
    stride = max(1, len(points) // _SAMPLE)
    points, mass = points[::stride].contiguous(), mass[::stride]
    entries = table.view(len(table), -1)
    for _ in range(_LLOYD):
        codes = nearest(points, entries if entries.shape[1] == 2 else entries.squeeze(-1)).flatten()
        total, moment = sum_by_code(mass, codes, len(entries)), sum_by_code(mass * points, codes, len(entries))
        entries = torch.where(total > 0, (moment / total.clamp_min(1e-300)).float(), entries)
    return entries.view(table.shape)
