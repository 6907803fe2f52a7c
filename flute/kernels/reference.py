"""The operator in plain torch: the definition every kernel is tested against, and the fallback that always works.

Both functions take the *checkpoint* layout: codes as bytes (N, row_bytes), scales (N, G).
"""

from __future__ import annotations

import torch

from ..packing import unpack_codes
from ..spec import whole_group

_SLICE_WEIGHTS = 1 << 24  # rows are decoded in slices so that index scratch stays near 128 MB


def decode(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    in_features: int,
    bits: int,
    group_size: int,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W^ (N, K) = dtype(table[codes] * scales), the product rounded once.

    Args:
        weight: uint8 (N, row_bytes). scales: (N, G). table: (2**bits,) or (2**(2*bits), 2).
        in_features: K. group_size: weights per scale, -1 for the whole row.
        dtype: of the result; default the scales' own. float64 gives the exact product.
    """
    dtype = dtype or scales.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vector = 1 if table.dim() == 1 else 2
    group = whole_group(group_size, in_features)
    rows = weight.shape[0]
    out = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    step = max(1, _SLICE_WEIGHTS // in_features)
    values = table.to(wide)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        codes = unpack_codes(weight[part], bits * vector, in_features // vector)
        decoded = values[codes.int()].flatten(1)
        spread = scales[part].to(wide).repeat_interleave(group, dim=1)[:, :in_features]
        out[part] = (decoded * spread).to(dtype)
    return out


def lut_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """y (..., N) = x (..., K) . W^T + bias in float64, for tests: exact products, no rounding on the way."""
    dense = decode(weight, scales, table, x.shape[-1], bits, group_size, dtype=torch.float64)
    y = x.to(torch.float64) @ dense.T
    return y if bias is None else y + bias.to(torch.float64)
