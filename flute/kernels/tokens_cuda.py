"""Launches of ``cuda/kronecker.cu`` and, without a transform, ``cuda/quantize.cu``; and which tokens they take."""

from __future__ import annotations

import math
from ctypes import c_float
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from . import cuda
from .plan import Gpu

_MOST_WARPS = 32
_BLOCKS_PER_SM = 8  # more find no room in shared memory, or nothing to do
_CLUSTERS = (8, 4, 2)  # blocks that may share a token


@dataclass(frozen=True)
class Problem:
    """One kernel: tokens of n1 x n2, which factors there are, whether RMSNorm, a gate or rotary angles come first.

    ``cluster``: blocks that share a token.
    """

    n1: int
    n2: int
    left: bool
    right: bool
    norm: bool
    bf16: bool
    turn: bool = False
    gated: bool = False
    cluster: int = 1

    @property
    def tiles(self) -> tuple[int, int]:
        """16 x 16 tiles of a block's part of a token."""
        return -(-self.n1 // 16), -(-self.n2 // 16) // self.cluster

    @property
    def warp_tiles(self) -> tuple[int, int]:
        """Tiles of a warp: more where a token is large, since each operand is then read less often."""
        rows, columns = self.tiles
        if self.cluster > 1 and rows * columns <= _MOST_WARPS:
            return 1, 1
        return min(rows, 2), 2 if rows >= 6 and columns >= 6 else 1

    @property
    def warps(self) -> int:
        """Of a block."""
        return math.prod(-(-all_ // mine) for all_, mine in zip(self.tiles, self.warp_tiles, strict=True))

    def shared_bytes(self, room: int) -> int:
        """Factors, a token, the norm's weight, what is made, angles, rows padded; a warp's sum, and ranges of all."""
        padded1, part = 16 * self.tiles[0], 16 * self.tiles[1]
        padded2 = part * self.cluster
        factors = self.left * padded1 * (padded1 + 8) + self.right * padded2 * (part + 8)
        whole = self.cluster == 1 or self.right or self.norm or self.gated  # a block needs all of x
        tokens = (1 + self.norm) * padded1 * ((padded2 if whole else part) + 8) + room * padded1 * (part + 8)
        angles = self.turn * 2 * (padded2 + 8)
        return 2 * (factors + tokens + angles) + (4 + 8 * self.cluster) * self.warps

    def room(self, shared: int) -> int | None:
        """``ROOM`` of kronecker.cu in ``shared`` bytes; None if they do not do, or there would be too many warps."""
        least = 0 if self.right and self.n2 >= self.n1 else 1
        fitting = (room for room in range(2, least - 1, -1) if self.shared_bytes(room) <= shared)
        return next(fitting, None) if self.warps <= _MOST_WARPS else None

    def shared_among(self, tokens: int, gpu: Gpu) -> Problem:
        """The same with as many blocks a token as run at once, if each has whole tiles of columns."""
        together = dict(gpu.clusters) if gpu.has_clusters else {}
        fitting = (n for n in _CLUSTERS if tokens <= together.get(n, 0) and self.n2 % (16 * n) == 0)
        made = replace(self, cluster=next(fitting, 1))
        return made if made.room(gpu.shared_bytes) else self

    def macros(
        self, bits: int, symmetric: bool, room: int = 2, blocks: int = 1, short: bool = False
    ) -> tuple[tuple[str, int], ...]:
        """What ``kronecker.cu`` is compiled with; bits 0 writes the transformed token itself."""
        rows, columns = self.warp_tiles
        values = {
            "RANGES": 1, "BF16": self.bf16, "N1": self.n1, "N2": self.n2, "LEFT": self.left, "RIGHT": self.right,
            "NORM": self.norm, "GATED": self.gated, "TURN": self.turn, "CLUSTER": self.cluster, "ROWS": rows,
            "COLUMNS": columns, "ROOM": room, "BLOCKS": blocks, "SHORT": short, "BITS_OUT": bits,
            "SYMMETRIC": symmetric,
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
    gated: bool = False,
) -> Problem | None:
    """The kernel for x, or None where plain torch must do it."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() == 0:
        return None
    plain = left is None and right is None
    flags = (left is not None, right is not None, norm_weight is not None, x.dtype == torch.bfloat16, turn, gated)
    found = Problem(n1, n2, *flags)
    if plain:
        return None if norm_weight is not None or gated else found
    return None if found.room(cuda._shared_bytes(x.get_device())) is None else found


@lru_cache(maxsize=1024)
def _kernel(device: int, found: Problem, bits: int, symmetric: bool, many: bool) -> tuple[Any, int]:
    """The kernel and its shared memory. With many tokens two blocks of an SM hide waits, with few code is short."""
    shared, blocks = cuda._shared_bytes(device), 2
    room = found.room(shared // 2 - 1024) if many and found.warps <= _MOST_WARPS // 2 else None
    if room is None:
        room, blocks = found.room(shared), 1
    assert room is not None, "`problem` and `shared_among` have asked"
    name = "turn_heads" if found.turn else "kronecker"
    macros = found.macros(bits, symmetric, room, blocks, not many)
    kernel = cuda._kernel(device, "kronecker.cu", macros, name)
    return kernel, found.shared_bytes(room)


def _apart(shared: int, blocks: int, gpu: Gpu) -> int:
    """Shared memory to ask for: so much that no two of ``blocks`` share an SM, where there is one for each.

    Launches that begin early find some SMs free and others not, and their blocks gather there: a layer of four tokens
    takes 10 % longer (docs/kernel-log.md, section 16).
    """
    return max(shared, gpu.unshared) if blocks <= gpu.sms else shared


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
) -> None:
    device, m = x.get_device(), outputs[0].numel() // (found.n1 * found.n2)
    gpu = cuda.gpu(device)
    found = found.shared_among(m, gpu)
    kernel, shared = _kernel(device, found, bits, symmetric, m > 2 * gpu.sms)
    x = cuda._aligned(x)
    # copies that must be made live until the launch
    factors = [None if one is None else cuda._aligned(one) for one in (left, right)]
    weight = None if norm_weight is None else norm_weight.to(x.dtype).contiguous()
    blocks = min(m, _BLOCKS_PER_SM * gpu.sms)
    shared = _apart(shared, blocks * found.cluster, gpu)
    config = cuda._config((blocks, 1), 32 * found.warps, shared, found.cluster, gpu.has_clusters)
    pointers = [cuda._pointer(one) for one in (*factors, weight, clip)]
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
    m = x.numel() // (2 * n if found.gated else n)
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


def heads_problem(q: torch.Tensor, k: torch.Tensor) -> Problem | None:
    """The kernel for heads (..., H, D) of queries and keys, or None where plain torch must do it."""
    most = math.gcd(q.shape[-2], k.shape[-2])
    together = next(n for n in range(min(most, 16), 0, -1) if most % n == 0)  # one tile of rows, many blocks
    matrix = q.new_empty(q.shape[-1], 0)
    return problem(q, together, q.shape[-1], None, matrix, None, turn=True) if k.numel() else None


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x (..., H, D) and how far tokens are apart; copied unless heads are neighbours and tokens equally far apart."""
    heads, dim = x.shape[-2:]
    flat = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
    if flat.stride()[1:] != (dim, 1) or flat.stride(0) % 8 or flat.data_ptr() & 15:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat, flat.stride(0) if flat.shape[0] > 1 else heads * dim


def turn_heads(
    found: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned and transformed heads (..., H, D) of both, in their dtype."""
    device, gpu = q.get_device(), cuda.gpu(q.get_device())
    units, tokens = (q.shape[-2] // found.n1, k.shape[-2] // found.n1), q.numel() // (q.shape[-2] * q.shape[-1])
    blocks = (min(tokens * units[0], _BLOCKS_PER_SM * gpu.sms), 2)  # of queries; of keys
    kernel, shared = _kernel(device, found, 0, True, tokens > 2 * gpu.sms)
    config = cuda._config(blocks, 32 * found.warps, _apart(shared, 2 * blocks[0], gpu), 1, gpu.has_clusters)
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    # copies that must be made live until the launch
    (q, q_pitch), (k, k_pitch) = _rows(q), _rows(k)
    cos, sin, query, key = (cuda._aligned(one) for one in (cos, sin, query, key))
    pointers = [one.data_ptr() for one in (q, k, query, key, cos, sin, *outputs)]
    angles = cos.numel() // found.n2
    cuda._launch(device, config, kernel, *pointers, tokens, q_pitch, k_pitch, *units, angles)
    return outputs[0], outputs[1]
