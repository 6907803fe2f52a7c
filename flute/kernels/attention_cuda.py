"""Launches of ``cuda/kv_*.cu`` and ``decode_attention.cu``, and which caches they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_MOST_DECODE_DIM = 192  # more would spill registers


def takes(dtype: torch.dtype, key_dim: int, value_dim: int, slots: int, paged: bool) -> bool:
    """Whether the kernels take this cache; others are for plain torch."""
    return takes_decode(dtype, key_dim, value_dim, _MOST_DIM) and not (paged and slots % _BLOCK)


def takes_decode(dtype: torch.dtype, key_dim: int, value_dim: int, most: int = _MOST_DECODE_DIM) -> bool:
    """Whether ``decode_attention.cu`` takes heads of these sizes; others are for plain torch."""
    dims = key_dim % 8 == 0 and value_dim % 8 == 0 and 0 < max(key_dim, value_dim) <= most
    return dtype in (torch.float16, torch.bfloat16) and dims


Macros = tuple[tuple[str, int], ...]


def macros(bf16: bool, key_dim: int, value_dim: int, key_symmetric: bool, value_symmetric: bool) -> Macros:
    """What both files are compiled with."""
    symmetric = (("KEY_SYMMETRIC", int(key_symmetric)), ("VALUE_SYMMETRIC", int(value_symmetric)))
    dims = (("KEY_DIM", key_dim), ("VALUE_DIM", value_dim), ("TILES", _tiles(key_dim, value_dim)))
    return (("RANGES", 1), ("BF16", int(bf16)), ("WARPS", _WARPS), *dims, *symmetric)


def _tiles(key_dim: int, value_dim: int) -> int:
    """Tiles of 16 positions that a warp takes at once: as many as registers hold."""
    return 4 if key_dim + value_dim <= 256 else 2


@lru_cache(maxsize=256)
def _kernel(device: int, file: str, name: str, *what: Any) -> Any:
    return cuda._kernel(device, file, macros(*what), name)


def _rows_aligned(x: torch.Tensor, numbers: int) -> torch.Tensor:
    """x with every row a run of so many ``numbers`` at once, as a lane reads them; copied if it must be."""
    odd = any(stride % numbers for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    good = x.stride(-1) == 1 and not odd and x.data_ptr() % (numbers * x.element_size()) == 0
    return x if good else x.clone(memory_format=torch.contiguous_format)


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
    key, value = _rows_aligned(key, 2), _rows_aligned(value, 2)
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
    query = cuda._aligned(query)
    stores = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, starts, table)
    operands = (query.data_ptr(), *map(cuda._pointer, stores))
    sizes = (heads, group, tokens, slots, pages, splits, c_float(scaling * log2(e)))

    def kernel(name: str) -> Any:
        return _kernel(device, "kv_attention.cu", name, *what)

    _launch(kernel, "kv_attention", (row_blocks, batch * heads), _WARPS, splits, together, operands, out, sizes)
    return out


def _launch(
    kernel: Callable[[str], Any],
    name: str,
    blocks: tuple[int, int],
    warps: int,
    splits: int,
    together: bool,
    operands: Sequence[int],
    out: torch.Tensor,
    sizes: Sequence[Any],
) -> None:
    """A kernel on ``parts.cuh`` and, where parts do not meet in a cluster, ``kv_merge``."""
    device, value_dim = out.get_device(), out.shape[-1]
    rows, overlap, partial = out.numel() // value_dim, cuda.gpu(device).has_clusters, None
    if splits > 1 and not together:
        partial = torch.empty(rows, splits, value_dim + 2, dtype=torch.float32, device=out.device)
    cluster, shared = splits if together else 1, (warps + 1) * _ROWS * (value_dim + 2) * 4
    grid = (blocks[0] * splits // cluster, blocks[1])  # of clusters
    config = cuda._config(grid, 32 * warps, shared, cluster, overlap)
    cuda._launch(device, config, kernel(name), *operands, out.data_ptr(), cuda._pointer(partial), *sizes)
    if partial is not None:
        config = cuda._config((rows, 1), 128, 0, 1, overlap)
        cuda._launch(device, config, kernel("kv_merge"), partial.data_ptr(), out.data_ptr(), splits)


def decode_macros(bf16: bool, key_dim: int, value_dim: int, warps: int) -> Macros:
    """What ``decode_attention.cu`` is compiled with."""
    dims = (("KEY_DIM", key_dim), ("VALUE_DIM", value_dim), ("TILES", _decode_tiles(key_dim, value_dim)))
    return (("BF16", int(bf16)), *dims, ("WARPS", warps))


def _decode_tiles(key_dim: int, value_dim: int) -> int:
    """Tiles of 16 positions that a warp of ``decode_attention.cu`` takes at once: as many as registers hold."""
    return 2 if key_dim + value_dim <= 256 else 1


def decode_parts(blocks: int, steps: int, gpu: Gpu) -> tuple[int, int, bool]:
    """Warps of a block, in how many parts the positions are cut, and whether these meet in a cluster.

    Of all cuts of which ``blocks`` run at once the quickest by an estimate in tenths of microseconds, read off
    ``benchmarks/results/decode_attention_cuts_h100.txt``: a round of one step a warp takes longer the more warps an SM
    has, meeting costs once, and a second launch, which adds more parts than a cluster holds, more.
    """
    many = 2 * _WARPS
    cuts = [
        (warps, count, True, (13 + 0.3 * count) * (count > 1))
        for warps, per_sm in ((_WARPS, _BLOCKS_PER_SM), (many, 1))
        for count, at_once in (gpu.clusters if gpu.has_clusters else ((1, gpu.sms),))
        if blocks <= per_sm * at_once
    ]
    most = min(gpu.sms // blocks, ceil(steps / many))
    if most > 1:
        cuts.append((many, most, False, 45))

    def estimate(cut: tuple[int, int, bool, float]) -> float:
        warps, count, _, meeting = cut
        return max(1.0, steps / (count * warps)) * (16 + warps * ceil(blocks * count / gpu.sms)) + meeting

    return min(cuts, key=estimate, default=(_WARPS, 1, True, 0.0))[:3]


@lru_cache(maxsize=256)
def _decode_kernel(device: int, name: str, *what: Any) -> Any:
    return cuda._kernel(device, "decode_attention.cu", decode_macros(*what), name)


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """As `decode_attention.decode_attention`."""
    (batch, many, tokens, dim), device = query.shape, query.get_device()
    (_, heads, positions, value_dim), gpu = value.shape, cuda.gpu(device)
    out = torch.empty(batch, tokens, many, value_dim, dtype=query.dtype, device=query.device)
    if out.numel() == 0 or positions == 0:
        return out.zero_()
    group = many // heads
    row_blocks, steps = ceil(group * tokens / _ROWS), ceil(positions / (_BLOCK * _decode_tiles(dim, value_dim)))
    warps, splits, together = decode_parts(batch * heads * row_blocks, steps, gpu)
    what = (query.dtype == torch.bfloat16, dim, value_dim, warps)
    rows = [_rows_aligned(x, 8) for x in (query, key, value)]
    operands = [number for x in rows for number in (x.data_ptr(), *x.stride()[:3])]
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    apart = (0, 0) if mask is None else (mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2))
    sizes = (heads, group, tokens, positions, splits, c_float(scaling * log2(e)))
    operands += [cuda._pointer(mask), *apart]

    def kernel(name: str) -> Any:
        return _decode_kernel(device, name, *what)

    _launch(kernel, "decode_attention", (row_blocks, batch * heads), warps, splits, together, operands, out, sizes)
    return out
