"""Launches of ``cuda/kv_append.cu``, ``kv_attention.cu`` and ``kv_dequantize.cu``, and which caches they take."""

from __future__ import annotations

from ctypes import c_float
from functools import lru_cache
from math import ceil, e, log2
from typing import Any

import torch

from . import cuda
from .plan import Gpu

_WARPS = 4
_ROWS = 8  # of queries a block
_BLOCK = 16  # neighbours that lie in one page
_BLOCKS_PER_SM = 2
_MOST_TOGETHER = 8  # parts that a cluster holds
_TOGETHER = (8, 4, 2)
_MOST_STEPS = 4  # of a warp, before more parts than that pay for a second launch
_MOST_DIM = 256


def takes(dtype: torch.dtype, key_dim: int, value_dim: int, slots: int, paged: bool) -> bool:
    """Whether the kernels take this cache; others are for plain torch."""
    dims = key_dim % 8 == 0 and value_dim % 8 == 0 and max(key_dim, value_dim) <= _MOST_DIM
    return dtype in (torch.float16, torch.bfloat16) and dims and not (paged and slots % _BLOCK)


Macros = tuple[tuple[str, int], ...]


def macros(bf16: bool, key_dim: int, value_dim: int, key_symmetric: bool, value_symmetric: bool) -> Macros:
    """What both files are compiled with."""
    symmetric = (("KEY_SYMMETRIC", int(key_symmetric)), ("VALUE_SYMMETRIC", int(value_symmetric)))
    dims = (("KEY_DIM", key_dim), ("VALUE_DIM", value_dim), ("TILES", _tiles(key_dim, value_dim)))
    return (("RANGES", 1), ("BF16", int(bf16)), *dims, *symmetric)


def _tiles(key_dim: int, value_dim: int) -> int:
    """Tiles of 16 positions that a warp takes at once: as many as registers hold."""
    return 4 if key_dim + value_dim <= 256 else 2


@lru_cache(maxsize=256)
def _kernel(device: int, file: str, name: str, *what: Any) -> Any:
    return cuda._kernel(device, file, macros(*what), name)


def _rows_aligned(x: torch.Tensor) -> torch.Tensor:
    """x with neighbours in the last dimension, every row at an even place; copied if it must be."""
    good = x.stride(-1) == 1 and not any(stride % 2 for stride in x.stride()[:-1]) and not x.data_ptr() & 3
    return x if good else x.contiguous()


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    key_clip: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    value_clip: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """As `attention.kv_append`; the stores must be contiguous."""
    (batch, heads, tokens, _), device = key.shape, key.get_device()
    if key.numel() == 0:
        return
    dims = (key.shape[-1], value.shape[-1])
    what = (key.dtype == torch.bfloat16, *dims, key_zero is None, value_zero is None)
    kernel = _kernel(device, "kv_append.cu", "kv_append", *what)
    blocks = ceil(2 * batch * heads * tokens / _WARPS)
    config = cuda._config((blocks, 1), 32 * _WARPS, 0, 1, cuda.gpu(device).has_clusters)
    key, value = _rows_aligned(key), _rows_aligned(value)
    clips = [None if clip is None else clip.float().contiguous() for clip in (key_clip, value_clip)]
    stores = (
        key_codes.data_ptr(), key_scale.data_ptr(), cuda._pointer(key_zero), cuda._pointer(clips[0]),
        value_codes.data_ptr(), value_scale.data_ptr(), cuda._pointer(value_zero), cuda._pointer(clips[1]),
    )  # fmt: skip
    pages = 1 if table is None else table.shape[1]
    sizes = (batch, heads, tokens, key_codes.shape[2], pages)
    rows = (key.data_ptr(), *key.stride()[:3], value.data_ptr(), *value.stride()[:3])
    cuda._launch(device, config, kernel, *rows, *stores, lengths.data_ptr(), cuda._pointer(table), *sizes)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """As `store.Store.dequantize` without a page table; all contiguous."""
    device, dim = codes.get_device(), 2 * codes.shape[-1]
    out = torch.empty(*codes.shape[:-1], dim, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    pieces = out.numel() // 8
    macros = (("BF16", int(dtype == torch.bfloat16)), ("SYMMETRIC", int(zero is None)))
    kernel = cuda._kernel(device, "kv_dequantize.cu", macros, "kv_dequantize")
    config = cuda._config((ceil(pieces / 256), 1), 256, 0, 1, False)
    pointers = (codes.data_ptr(), scale.data_ptr(), cuda._pointer(zero), out.data_ptr())
    cuda._launch(device, config, kernel, *pointers, pieces, dim // 8)
    return out


def parts(blocks: int, capacity: int, step: int, gpu: Gpu) -> tuple[int, bool]:
    """In how many parts the cache is cut, and whether they meet in a cluster.

    As many as run at once for each of ``blocks``, none whose warps have nothing to do, ``step`` positions each. A
    cluster needs no second launch, so few parts with some more work are preferred.
    """
    fewest = _WARPS * step
    wanted = max(1, min(_BLOCKS_PER_SM * gpu.sms // blocks, capacity // fewest))
    if gpu.has_clusters and (wanted <= _MOST_TOGETHER or capacity <= _MOST_TOGETHER * fewest * _MOST_STEPS):
        fitting = (n for n, at_once in gpu.clusters[::-1] if n in _TOGETHER and blocks <= _BLOCKS_PER_SM * at_once)
        return next((n for n in fitting if n <= wanted), 1), True
    return wanted, False


def attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    table: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """As `attention.kv_attention`; the stores must be contiguous."""
    (batch, many, tokens, dim), device = query.shape, query.get_device()
    heads, slots, value_dim = key_codes.shape[1], key_codes.shape[2], 2 * value_codes.shape[-1]
    out = torch.empty(batch, many, tokens, value_dim, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    group, pages, gpu = many // heads, 1 if table is None else table.shape[1], cuda.gpu(device)
    row_blocks, step = ceil(group * tokens / _ROWS), _BLOCK * _tiles(dim, value_dim)
    splits, together = parts(batch * heads * row_blocks, slots * pages, step, gpu)
    what = (query.dtype == torch.bfloat16, dim, value_dim, key_zero is None, value_zero is None)
    query, partial = cuda._aligned(query), None
    if splits > 1 and not together:
        shape = (batch * many * tokens, splits, value_dim + 2)
        partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    stores = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, starts, table)
    pointers = (query.data_ptr(), *map(cuda._pointer, stores), out.data_ptr(), cuda._pointer(partial))
    sizes = (heads, group, tokens, slots, pages, splits, c_float(scaling * log2(e)))
    kernel = _kernel(device, "kv_attention.cu", "kv_attention", *what)
    cluster, shared = splits if together else 1, (_WARPS + 1) * _ROWS * (value_dim + 2) * 4
    grid = (row_blocks * splits // cluster, batch * heads)  # of clusters
    cuda._launch(device, cuda._config(grid, 32 * _WARPS, shared, cluster, gpu.has_clusters), kernel, *pointers, *sizes)
    if partial is not None:
        merge = _kernel(device, "kv_attention.cu", "kv_merge", *what)
        config = cuda._config((batch * many * tokens, 1), 128, 0, 1, gpu.has_clusters)
        cuda._launch(device, config, merge, partial.data_ptr(), out.data_ptr(), splits)
    return out
