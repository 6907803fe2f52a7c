"""Kernel order: where every code lies when the CUDA kernels read it. This file is the only place that knows.

The packer below and the device code (through `device_header`) are both derived from the same few numbers.

A tensor-core step (``mma.m16n8k16`` of one warp, ``wgmma.m64nNk16`` of four) takes 16 rows of W per warp as its A
operand. Lane l = 4 g + t (g = l / 4, t = l % 4) holds four pairs of weights, a pair being two neighbours along K::

    register r = 2 rh + h      row = 2 g + h      k = 16 step + 8 rh + 2 t + {0, 1}

Columns are in the order in which x lies in memory, so x needs no shuffling. Rows of a tile are not in the order of the
instruction (which calls row 2 g + h row g + 8 h): this way a lane ends up with two neighbours along N, and with their
scales in one 32-bit word. A **chunk** is 16 rows times 128 k, what one warp takes in one go: 32, 24 or 16 bytes a lane.
Chunks of a row tile follow one another along K, row tiles along N::

    packed uint8 (ceil(N / 16), ceil(K / 128), chunk_bytes)        scales (ceil(N / 16), G, 16)

Within a chunk lie the first four words of all lanes, 16 bytes each, then the words that remain of all lanes.

Pair number ``q = (step * 2 + rh) * 2 + h`` of a lane is a field of 2 * bits bits in the lane's 32-bit words. Its value
*is* the index into the pair table (both codes of the pair, low one first), which is also the code of a two-dimensional
codebook: scalar and vector tables are one thing here. A lookup takes one byte of a word, whole, because a byte is what
one instruction can move to where an address wants it::

    4 bit   8 words; byte q is pair q
    3 bit   6 words; the low six bits of byte q are pair q < 24. The two bits left over in each byte make the pairs 24
            to 27 (bytes 0 to 3 of words 0, 1, 2, low bits first) and 28 to 31 (words 3, 4, 5)
    2 bit   4 words; byte i is the pairs 2 i and 2 i + 1 (h = 0, 1), which one lookup of 8 bytes decodes together

The scales of a row tile lie as (group, row).
"""

from __future__ import annotations

from functools import cache

import torch

from ..packing import pack_codes, unpack_codes
from ..spec import whole_group

TILE_ROWS = 16
CHUNK_K = 128
LAYOUT_VERSION = 4  # in kernels' cache keys and HIGGS containers on disk: any other order is another version
_BLOCK_K = 32
_LANE_WORDS = {4: 8, 3: 6, 2: 4}
_SLICE_WEIGHTS = 1 << 24  # packing works on slices of rows: int64 scratch stays near 128 MB


def chunk_bytes(bits: int) -> int:
    """Bytes of one chunk: 32 lanes of 8, 6 or 4 words."""
    return 32 * 4 * _LANE_WORDS[bits]


def supports(group_size: int, in_features: int) -> bool:
    """Whether kernel order, and so the CUDA kernels, take groups of ``group_size`` (-1: the whole row).

    Groups must not end inside a block of 32 positions.
    """
    group = whole_group(group_size, in_features)
    return group == in_features or group % _BLOCK_K == 0


Piece = tuple[int, int, int, int]  # (word, first bit, width, where it goes in the value)


@cache
def _fields(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """For every pair q of a lane: the pieces its value is made of."""
    width = 2 * bits
    if bits == 2:
        return tuple(((q // 8, 4 * (q % 8), width, 0),) for q in range(32))
    whole = tuple(((q // 4, 8 * (q % 4), width, 0),) for q in range(4 * _LANE_WORDS[bits]))
    return whole + tuple(_left_over(*divmod(q, 4)) for q in range(32 - len(whole)))


def _left_over(half: int, byte: int) -> tuple[Piece, ...]:
    """Where the pair lies that 3-bit codes hide in the upper two bits of a byte of three words."""
    return tuple((3 * half + i, 8 * byte + 6, 2, 2 * i) for i in range(3))


def _pairs_of_rows(weight: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Rows of checkpoint bytes -> pair values uint8 (rows, ceil(K / 2)): a pair is simply a code of twice the width."""
    pairs = -(-in_features // 2)
    needed = -(-pairs * 2 * bits // 8)
    return unpack_codes(torch.nn.functional.pad(weight, (0, needed - weight.shape[1])), 2 * bits, pairs)


def _to_words(pairs: torch.Tensor, bits: int) -> torch.Tensor:
    """Pairs (16 * T, C * chunk_k / 2) -> words int64 (T, C, 32 lanes, lane_words)."""
    tiles, chunks = pairs.shape[0] // TILE_ROWS, 2 * pairs.shape[1] // CHUNK_K
    # (tile, g, h, chunk, step, rh, t) -> (tile, chunk, g, t, step, rh, h)
    ordered = pairs.view(tiles, 8, 2, chunks, -1, 2, 4).permute(0, 3, 1, 6, 4, 5, 2)
    lanes = ordered.reshape(tiles, chunks, 32, -1).to(torch.int64)
    words = torch.zeros(tiles, chunks, 32, _LANE_WORDS[bits], dtype=torch.int64, device=pairs.device)
    for q, pieces in enumerate(_fields(bits)):
        for word, shift, width, low in pieces:
            words[..., word] |= ((lanes[..., q] >> low) & ((1 << width) - 1)) << shift
    return words


def _from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_to_words`."""
    tiles, chunks = words.shape[:2]
    lanes = torch.zeros(tiles, chunks, 32, CHUNK_K // 4, dtype=torch.int64, device=words.device)
    for q, pieces in enumerate(_fields(bits)):
        for word, shift, width, low in pieces:
            lanes[..., q] |= ((words[..., word] >> shift) & ((1 << width) - 1)) << low
    ordered = lanes.view(tiles, chunks, 8, 4, -1, 2, 2).permute(0, 2, 6, 1, 4, 5, 3)
    return ordered.reshape(tiles * TILE_ROWS, -1).to(torch.uint8)


def _words_to_bytes(words: torch.Tensor) -> torch.Tensor:
    """Words (T, C, 32, W) -> bytes (T, C, chunk_bytes): first four words of every lane, then the rest of every lane."""
    tiles, chunks = words.shape[:2]
    shifts = torch.arange(4, device=words.device) * 8
    octets = ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8)
    head, tail = octets[:, :, :, :4].reshape(tiles, chunks, -1), octets[:, :, :, 4:].reshape(tiles, chunks, -1)
    return torch.cat((head, tail), dim=-1)


def _bytes_to_words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    tiles, chunks, _ = packed.shape
    head = packed[:, :, :512].reshape(tiles, chunks, 32, 4, 4)
    tail = packed[:, :, 512:].reshape(tiles, chunks, 32, _LANE_WORDS[bits] - 4, 4)
    octets = torch.cat((head, tail), dim=3).to(torch.int64)
    shifts = torch.arange(4, device=packed.device) * 8
    return (octets << shifts).sum(-1)


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed codes of a (N, K) weight."""
    return -(-out_features // TILE_ROWS), -(-in_features // CHUNK_K), chunk_bytes(bits)


def pack_weight(weight: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Checkpoint bytes uint8 (N, row_bytes) -> kernel order uint8 (tiles, chunks, chunk_bytes); padding is code 0."""
    rows = weight.shape[0]
    tiles, chunks, size = packed_shape(rows, in_features, bits)
    packed = torch.empty(tiles, chunks, size, dtype=torch.uint8, device=weight.device)
    width = chunks * CHUNK_K // 2
    step = max(1, _SLICE_WEIGHTS // (TILE_ROWS * chunks * CHUNK_K))
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        part = weight[first * TILE_ROWS : (first + count) * TILE_ROWS]
        pairs = _pairs_of_rows(part, bits, in_features)
        pairs = torch.nn.functional.pad(pairs, (0, width - pairs.shape[1], 0, count * TILE_ROWS - part.shape[0]))
        packed[first : first + count] = _words_to_bytes(_to_words(pairs, bits))
    return packed


def unpack_weight(packed: torch.Tensor, bits: int, out_features: int, in_features: int) -> torch.Tensor:
    """The exact inverse of `pack_weight`: kernel order -> checkpoint bytes uint8 (N, row_bytes)."""
    chunks = packed.shape[1]
    pairs_per_row, row_bytes = -(-in_features // 2), -(-in_features * bits // 8)
    step = max(1, _SLICE_WEIGHTS // (TILE_ROWS * chunks * CHUNK_K))
    parts = []
    for part in packed.split(step):
        pairs = _from_words(_bytes_to_words(part, bits), bits)[:, :pairs_per_row].contiguous()
        parts.append(pack_codes(pairs, 2 * bits)[:, :row_bytes])
    return torch.cat(parts)[:out_features].contiguous()


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales (N, G) -> (tiles, G, 16), the rows of a tile side by side; padding rows get 0."""
    rows, groups = scales.shape
    tiles = -(-rows // TILE_ROWS)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, tiles * TILE_ROWS - rows))
    return padded.view(tiles, TILE_ROWS, groups).transpose(1, 2).contiguous()


def unpack_scales(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The exact inverse of `pack_scales`."""
    tiles, groups, _ = packed.shape
    return packed.transpose(1, 2).reshape(tiles * TILE_ROWS, groups)[:out_features].contiguous()


def device_header(bits: int) -> str:
    """The layout as CUDA C++: constants, and ``left_over_words``, which makes words 6 and 7 of 3-bit codes.

    After it byte i of a lane's LOOKUP_WORDS words is what lookup i takes, for all widths.
    """
    words = _LANE_WORDS[bits]
    lines = [
        f"[[maybe_unused]] constexpr int LANE_WORDS = {words};",
        f"constexpr int CHUNK_K = {CHUNK_K}, LOOKUP_WORDS = {4 if bits == 2 else 8};",
        f"constexpr int TILE_ROWS = {TILE_ROWS}, BLOCK_K = {_BLOCK_K}, CHUNK_BYTES = {chunk_bytes(bits)};",
        "__device__ __forceinline__ void left_over_words([[maybe_unused]] unsigned (&w)[LOOKUP_WORDS]) {",
    ]
    for half in range(2 if bits == 3 else 0):
        pieces = _left_over(half, 0)  # of byte 0; all four bytes are moved at once
        terms = (
            f"(w[{word}] >> {first - low} & 0x{3 << low:02x}{3 << low:02x}{3 << low:02x}{3 << low:02x}u)"
            for word, first, _, low in pieces
        )
        lines.append(f"  w[{words + half}] = {' | '.join(terms)};")
    return "\n".join([*lines, "}", ""])
