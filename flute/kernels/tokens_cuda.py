"""Launches of ``cuda/kronecker.cu`` and, without a transform, ``cuda/quantize.cu``; and which tokens they take."""

from __future__ import annotations

import math
from ctypes import c_float
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from . import cuda

_MOST_WARPS = 32
_BLOCKS_PER_SM = 8  # more find no room in shared memory, or nothing to do


@dataclass(frozen=True)
class Problem:
    """One kernel: tokens of n1 x n2, which factors there are, and whether RMSNorm comes first."""

    n1: int
    n2: int
    left: bool
    right: bool
    norm: bool
    bf16: bool
    turn: bool = False

    @property
    def tiles(self) -> tuple[int, int]:
        """16 x 16 tiles of a token."""
        return -(-self.n1 // 16), -(-self.n2 // 16)

    @property
    def warp_tiles(self) -> tuple[int, int]:
        """Tiles of a warp: more where a token is large, since each operand is then read less often."""
        rows, columns = self.tiles
        return min(rows, 2), 2 if rows >= 6 and columns >= 6 else 1

    @property
    def warps(self) -> int:
        """Of a block."""
        return math.prod(-(-all_ // mine) for all_, mine in zip(self.tiles, self.warp_tiles, strict=True))

    def shared_bytes(self, room: int) -> int:
        """Factors, a token, the norm's weight, what is made, rows padded; three floats a warp."""
        padded1, padded2 = (16 * tiles for tiles in self.tiles)
        factors = self.left * padded1 * (padded1 + 8) + self.right * padded2 * (padded2 + 8)
        return 2 * (factors + (1 + self.norm + room) * padded1 * (padded2 + 8)) + 12 * self.warps

    def room(self, shared: int) -> int | None:
        """``ROOM`` of kronecker.cu in ``shared`` bytes; None if they do not do, or there would be too many warps."""
        least = 0 if self.right and self.n2 >= self.n1 else 1
        fitting = (room for room in range(2, least - 1, -1) if self.shared_bytes(room) <= shared)
        return next(fitting, None) if self.warps <= _MOST_WARPS else None

    def macros(self, bits: int, symmetric: bool, room: int = 2, blocks: int = 1) -> tuple[tuple[str, int], ...]:
        """What ``kronecker.cu`` is compiled with; bits 0 writes the transformed token itself."""
        rows, columns = self.warp_tiles
        values = {
            "RANGES": 1, "BF16": self.bf16, "N1": self.n1, "N2": self.n2, "LEFT": self.left, "RIGHT": self.right,
            "NORM": self.norm, "TURN": self.turn, "ROWS": rows, "COLUMNS": columns, "ROOM": room, "BLOCKS": blocks,
            "BITS_OUT": bits, "SYMMETRIC": symmetric,
        }  # fmt: skip
        return tuple((name, int(value)) for name, value in values.items())


def problem(
    x: torch.Tensor,
    n1: int,
    n2: int,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    turn: bool = False,
) -> Problem | None:
    """The kernel for x, or None where plain torch must do it."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() == 0:
        return None
    plain = left is None and right is None
    flags = (left is not None, right is not None, norm_weight is not None, x.dtype == torch.bfloat16, turn)
    found = Problem(n1, n2, *flags)
    if plain:
        return None if norm_weight is not None else found
    return None if found.room(cuda._shared_bytes(x.get_device())) is None else found


@lru_cache(maxsize=1024)
def _kernel(device: int, found: Problem, bits: int, symmetric: bool, many: bool) -> tuple[Any, int]:
    """The kernel and its shared memory. With many tokens two blocks on an SM hide each other's waits."""
    shared, blocks = cuda._shared_bytes(device), 2
    room = found.room(shared // 2 - 1024) if many and found.warps <= _MOST_WARPS // 2 else None
    if room is None:
        room, blocks = found.room(shared), 1
    assert room is not None, "`problem` has asked"
    kernel = cuda._kernel(device, "kronecker.cu", found.macros(bits, symmetric, room, blocks), "kronecker")
    return kernel, found.shared_bytes(room)


def _transform(
    found: Problem,
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
    outputs: tuple[torch.Tensor, ...],
    angles: tuple[torch.Tensor, ...] = (),
) -> None:
    device, m = x.get_device(), x.numel() // (found.n1 * found.n2)
    gpu = cuda.gpu(device)
    kernel, shared = _kernel(device, found, bits, symmetric, m > 2 * gpu.sms)
    x = cuda._aligned(x)
    # copies that must be made live until the launch
    factors = [None if one is None else cuda._aligned(one) for one in (left, right)]
    weight = None if norm_weight is None else norm_weight.to(x.dtype).contiguous()
    config = cuda._config((min(m, _BLOCKS_PER_SM * gpu.sms), 1), 32 * found.warps, shared, 1, gpu.has_clusters)
    angles = tuple(cuda._aligned(one) for one in angles)
    pointers = [cuda._pointer(one) for one in (*factors, weight, clip, *(angles or (None, None)))]
    cuda._launch(device, config, kernel, x.data_ptr(), *pointers, *(one.data_ptr() for one in outputs), m, c_float(eps))


def quantize(
    found: Problem,
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    clip: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (M, n), scales (M,), zeros (M,) or nothing."""
    n, device = found.n1 * found.n2, x.get_device()
    m = x.numel() // n
    codes = torch.empty(m, n, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = torch.empty(0 if symmetric else m, dtype=torch.int32, device=x.device)
    clip = None if clip is None else clip.float().contiguous()
    if found.left or found.right:
        _transform(found, x, left, right, clip, bits, symmetric, norm_weight, eps, (codes, scale, zero))
        return codes, scale, zero
    macros = (("RANGES", 1), ("BF16", int(found.bf16)), ("BITS_OUT", bits), ("SYMMETRIC", int(symmetric)))
    kernel = cuda._kernel(device, "quantize.cu", macros, "quantize")
    config = cuda._config((m, 1), 256, 0, 1, cuda.gpu(device).has_clusters)
    x = x.contiguous()
    pointers = (x.data_ptr(), cuda._pointer(clip), codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    cuda._launch(device, config, kernel, *pointers, n)
    return codes, scale, zero


def kronecker(
    found: Problem,
    x: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The transformed tokens, in x's dtype and shape."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    _transform(found, x, left, right, None, 0, True, norm_weight, eps, (y, nothing, nothing))
    return y


def turn_heads(
    found: Problem, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """Turned and transformed heads (..., H, D), in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    _transform(found, x, None, matrix, None, 0, True, None, 0.0, (y, nothing, nothing), (cos, sin))
    return y
