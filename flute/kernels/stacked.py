"""The matmul kernel on a stack of weights: what `cuda` is for one weight, for as many as a mixture has experts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..spec import whole_group
from . import boxes, cuda, tiles


@lru_cache(maxsize=4096)
def choose(device: int, m: int, experts: int, n: int, k: int, bits: int, group: int) -> tiles.Tiling | None:
    """The launch with the best estimate for M tokens among a stack of matrices; None when no kernel takes it."""
    return tiles.make_grouped(cuda.gpu(device), m, experts, n, k, bits, group)


@lru_cache(maxsize=4096)
def _prepared(problem: Any, chosen: tiles.Tiling) -> Any:
    return cuda._prepare_matmul(problem, chosen)


def lut_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    out_features: int,
    bits: int,
    group_size: int,
    *,
    forced: tiles.Tiling | None = None,
) -> torch.Tensor | None:
    """y (M, N) of x (M, K), rows sorted by expert, in one launch that asks the host nothing; None: no kernel takes it.

    Args:
        weight, scales: kernel order, stacked: (E, tiles, chunks, chunk_bytes) and (E, tiles, G, 16).
        offsets: int32 (E,), where each expert's rows end. Rows behind the last end are left as they are.
        forced: run this tiling instead of the chosen one (tests, tuning).
    """
    (m, k), device, n = x.shape, x.get_device(), out_features
    group = whole_group(group_size, k)
    chosen = forced or choose(device, m, weight.shape[0], n, k, bits, group)
    if chosen is None:
        return None
    launch = _prepared((device, m, n, k, bits, group, x.dtype == torch.bfloat16), chosen)
    y = x.new_empty(m, n)
    # copies that must be made live until the launch: names hold them, not only their addresses
    x, weight, scales, table = (cuda._aligned(tensor) for tensor in (x, weight, scales, table))
    bias, offsets = None if bias is None else bias.contiguous(), offsets.contiguous()
    if k % 8:  # the copy engine wants rows at multiples of 16 bytes
        x = torch.nn.functional.pad(x, (0, -k % 8))
    box = boxes.tensor_map(device, x.data_ptr(), m, x.shape[-1], chosen.tokens)
    cuda._launch(
        device, launch.config, launch.kernel, box, weight.data_ptr(), scales.data_ptr(), table.data_ptr(),
        int(table.dim() == 2), cuda._pointer(bias), y.data_ptr(), 0, *launch.sizes[:-2],
        offsets.data_ptr(), chosen.experts,
    )  # fmt: skip
    return y
