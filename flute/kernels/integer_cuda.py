"""Launches of ``cuda/integer_decode.cu`` and ``cuda/integer_matmul.cu``, and which one it is, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F

from . import cuda, pieces
from .boxes import tensor_map
from .plan import Gpu

_MOST_DECODE_TOKENS = 8  # on Hopper; other GPUs have the decode kernel only
_SHAPES = (  # columns, rows
    (16, 1), (16, 2), (16, 4), (32, 1), (32, 4), (64, 1), (64, 2), (128, 2), (192, 2), (256, 2), (192, 3), (128, 4),
)  # fmt: skip
_SPLITS = (1, 2, 4, 8)
_USUAL_STAGES = 8
_CLUSTER_SHARED = 200 * 1024


@dataclass(frozen=True)
class Tiling:
    """One launch of ``int_matmul``: tiles of 64 * rows rows of W times ``columns`` tokens, K cut in ``split``.

    ``pitch``: how many row tiles of 16 such a tile has, as few as keep the number of waves.
    """

    columns: int
    rows: int
    split: int
    stages: int
    pitch: int
    cycles: float

    @property
    def threads(self) -> int:
        """Computing warps, those that copy W, one that copies x."""
        return 32 * (4 * self.rows + (3 if self.rows * self.columns >= 512 else self.rows) + 1)

    def slot_bytes(self, bits: int) -> int:
        """Of 128 k of x and of W."""
        return pieces.BOX_K * (self.columns + 8 * self.rows * bits)

    def shared_bytes(self, bits: int) -> int:
        """The ring, and two barriers a slot."""
        return self.stages * (self.slot_bytes(bits) + 16)

    def macros(self, bits: int, bf16: bool) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with."""
        names = ("CODE_BITS", "BF16", "COLUMNS", "ROWS", "STAGES")
        return tuple(zip(names, (bits, int(bf16), self.columns, self.rows, self.stages), strict=True))


def tilings(m: int, n: int, k: int, bits: int, gpu: Gpu) -> Iterator[Tiling]:
    """Every tiling that fits, with an estimate of its cycles."""
    boxes, row_tiles, together = ceil(k / pieces.BOX_K), ceil(n / pieces.TILE_ROWS), dict(gpu.clusters)
    for columns, rows in _SHAPES:
        for split in _SPLITS:
            bare = Tiling(columns, rows, split, 1, 4 * rows, 0.0)
            slot = bare.slot_bytes(bits)
            shared = gpu.shared_bytes if split == 1 else min(gpu.shared_bytes, _CLUSTER_SHARED)
            # more than half of an SM's: else blocks would gather on those SMs that the launch ahead leaves free
            stages = min(max(_USUAL_STAGES, gpu.shared_bytes // 2 // (slot + 16) + 1), shared // (slot + 16))
            if split > boxes or stages < 3 or 256 * rows * columns > stages * slot:
                continue
            token_tiles, at_once = ceil(m / columns), together.get(split, 0)
            tiles = ceil(row_tiles / bare.pitch) * token_tiles
            if split > 1 and tiles > at_once:  # a cluster makes one tile, and all run at once
                continue
            waves = ceil(tiles / at_once)
            pitch = ceil(row_tiles / max(1, waves * at_once // token_tiles))
            # a box takes the tensor cores, or the L2 cache's 24 bytes a cycle and SM, or memory's 12 of W, or one group
            # of warps its steps; a tile takes its writing and latencies, too
            x_bytes = pieces.BOX_K * columns
            weight_bytes = (slot - x_bytes) * pitch / bare.pitch
            box = max(2.2 * rows * columns, (x_bytes + weight_bytes) / 24, weight_bytes / (12 * token_tiles), 400.0)
            each = ceil(boxes / split) * box + 1500 + 6 * columns * rows + (1500 if split > 1 else 0)
            yield Tiling(columns, rows, split, stages, pitch, waves * each)


@lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, bits: int, gpu: Gpu) -> Tiling:
    """The tiling with the least estimated cycles."""
    return min(tilings(m, n, k, bits, gpu), key=lambda one: one.cycles)


def _decode_shape(m: int, n: int, sms: int) -> tuple[int, int, int, int]:
    """Warps, row tiles, token tiles and pieces in flight of ``int_decode``."""
    if m <= 8:
        return (16, 1, 1, 4) if n <= 32 * sms else (8, 1, 1, 8)
    return (8, 1, 2, 4) if m <= 16 else (8, 2, 4, 4)


def decode_macros(m: int, n: int, bits: int, bf16: bool, sms: int) -> tuple[tuple[str, int], ...]:
    """What ``integer_decode.cu`` is compiled with."""
    names = ("CODE_BITS", "BF16", "WARPS", "ROW_TILES", "TOKEN_TILES", "DEPTH")
    return tuple(zip(names, (bits, int(bf16), *_decode_shape(m, n, sms)), strict=True))


def int_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    *,
    forced: Tiling | None = None,
) -> torch.Tensor:
    """y (M, N) of a weight from `pieces.arrange`; ``dtype`` of 16 bits. ``forced``: this tiling (tests, benchmarks)."""
    (m, k), n, device = codes.shape, weight_scale.shape[0], codes.get_device()
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    if m == 0:
        return y
    bits = 4 if weight.shape[1] == pieces.shape(n, k, 4)[1] else 8
    if k % 16:  # rows are read 16 bytes at a time
        codes = F.pad(codes, (0, -k % 16))
    codes, weight = cuda._aligned(codes), cuda._aligned(weight)
    scale, weight_scale = scale.contiguous(), weight_scale.contiguous()
    extras = [None if one is None else one.contiguous() for one in (bias, zero, row_sum)]
    extras.append(None if residual is None else cuda._aligned(residual))
    operands = (scale.data_ptr(), weight_scale.data_ptr(), *map(cuda._pointer, extras), y.data_ptr())
    gpu, bf16 = cuda.gpu(device), dtype == torch.bfloat16
    if forced is None and (m <= _MOST_DECODE_TOKENS or gpu.arch != "sm_90"):
        kernel, config = _decode(device, m, n, bits, bf16)
        few = (m, n, codes.shape[1], weight.shape[1])
        cuda._launch(device, config, kernel, weight.data_ptr(), codes.data_ptr(), *operands, *few)
        return y
    made = forced or choose(m, n, k, bits, gpu)
    kernel, config = _matmul(device, made, m, n, bits, bf16)
    box = tensor_map(device, codes.data_ptr(), m, codes.shape[1] // 2, made.columns)  # pairs of codes
    sizes = (m, n, ceil(k / pieces.BOX_K), made.split, made.pitch)
    cuda._launch(device, config, kernel, box, weight.data_ptr(), *operands, *sizes)
    return y


@lru_cache(maxsize=4096)
def _decode(device: int, m: int, n: int, bits: int, bf16: bool) -> tuple[Any, Any]:
    gpu = cuda.gpu(device)
    warps, row_tiles, token_tiles, _ = _decode_shape(m, n, gpu.sms)
    macros = decode_macros(m, n, bits, bf16, gpu.sms)
    grid = (ceil(n / (16 * row_tiles)), ceil(m / (8 * token_tiles)))
    config = cuda._config(grid, 32 * warps, warps * row_tiles * token_tiles * 512, 1, gpu.has_clusters)
    return cuda._kernel(device, "integer_decode.cu", macros, "int_decode"), config


@lru_cache(maxsize=4096)
def _matmul(device: int, made: Tiling, m: int, n: int, bits: int, bf16: bool) -> tuple[Any, Any]:
    tiles = ceil(n / (pieces.TILE_ROWS * made.pitch)) * ceil(m / made.columns)
    blocks = tiles if made.split > 1 else min(tiles, cuda.gpu(device).sms)  # of clusters, where K is cut
    config = cuda._config((blocks, 1), made.threads, made.shared_bytes(bits), made.split, True)
    return cuda._kernel(device, "integer_matmul.cu", made.macros(bits, bf16), "int_matmul"), config
