"""Integer weights in the order of the tensor core's fragments (``cuda/integers.cuh``), made on the device.

Tiles of 16 rows, pieces of 512 bytes along K (padded to 128). A lane's 16 bytes of a piece are the four registers of a
fragment of ``mma.m16n8k32``, which are also a warp's share of ``wgmma``'s: register r, byte i of lane 4 g + t is

    row 2 g + r % 2,  k = 16 (r / 2) + 4 t + i    (rows lie so that a lane's two rows of y are neighbours)

and with 4 bits low nibbles are one fragment, high nibbles that of the next 32 k. Columns keep their order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import OperatorError

PIECE_BYTES, TILE_ROWS, BOX_K = 512, 16, 128


def shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """(tiles, pieces, 512) of an (n, k) weight of 4 or 8 bits."""
    return -(-n // TILE_ROWS), -(-k // BOX_K) * bits // 2, PIECE_BYTES


def arrange(weight: torch.Tensor) -> torch.Tensor:
    """uint8 (N, K / 2) of nibbles, or int8 (N, K) -> uint8 (tiles, pieces, 512), on any device.

    Raises:
        OperatorError: no such weight.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.uint8, torch.int8):
        raise OperatorError(f"flute.arrange: weight {tuple(weight.shape)} {weight.dtype}; needs uint8 or int8 (N, ...)")
    four = weight.dtype == torch.uint8
    weight = weight.view(torch.uint8)
    if four:
        weight = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
    n, k = weight.shape
    weight = F.pad(weight, (0, -k % BOX_K, 0, -n % TILE_ROWS))
    steps = 2 if four else 1
    # tile, g, row's half | piece, step, k's half, t, i
    parts = weight.view(-(-n // TILE_ROWS), 8, 2, -1, steps, 2, 4, 4).permute(0, 3, 1, 6, 5, 2, 7, 4)
    packed = parts[..., 0] | parts[..., 1] << 4 if four else parts[..., 0]
    return packed.reshape(*shape(n, k, 4 if four else 8)).contiguous()


def restore(weight: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of `arrange`: uint8 (N, K / 2) or int8 (N, K), by the number of pieces."""
    tiles, pieces, _ = weight.shape
    four = pieces == shape(n, k, 4)[1]
    parts = weight.view(tiles, pieces, 8, 4, 2, 2, 4)
    nibbles = torch.stack((parts & 15, parts >> 4) if four else (parts,), -1)
    rows = nibbles.permute(0, 2, 5, 1, 7, 4, 3, 6).reshape(tiles * TILE_ROWS, -1)[:n, :k]
    return rows[:, ::2] | rows[:, 1::2] << 4 if four else rows.contiguous().view(torch.int8)
