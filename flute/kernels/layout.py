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
codebook: scalar and vector tables are one thing here. Fields begin at bit 7 and run round the word, because a table
entry takes 128 bytes: the first field of a word is then a table offset without a shift.

    4 bit   8 words, 4 fields each at bits 7, 15, 23, 31 (the last one goes on at bit 0)
    3 bit   6 words, 5 fields each at bits 7, 13, 19, 25, 31; the two bits left over at 5 in words 0, 1, 2 make pair 30,
            those in words 3, 4, 5 pair 31
    2 bit   4 words of 4 bytes as at 4 bit; a byte holds the pairs rh = 0, 1 of one row, one 8-byte lookup decodes both

The scales of a row tile lie as (group, row).
"""

from __future__ import annotations

from functools import cache

import torch

from ..packing import pack_codes, unpack_codes
from ..spec import whole_group

TILE_ROWS = 16
CHUNK_K = 128
LAYOUT_VERSION = 3  # part of every kernel's cache key: change it with any change of order
_BLOCK_K = 32
_LANE_WORDS = {4: 8, 3: 6, 2: 4}
_FIRST_BIT = 7  # log2 of the bytes of a table entry
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


Piece = tuple[int, int, int, int]  # (word, first bit, width, where it goes in the value); bits run round the word


@cache
def _fields(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """For every pair q of a lane: the pieces its value is made of."""
    width = 2 * bits

    def at(word: int, bit: int) -> tuple[Piece, ...]:
        return ((word, (_FIRST_BIT + bit) % 32, width, 0),)

    if bits == 4:
        return tuple(at(q // 4, 8 * (q % 4)) for q in range(32))
    if bits == 3:
        whole = [at(q // 5, 6 * (q % 5)) for q in range(30)]
        return (*whole, *(tuple((3 * half + i, 5, 2, 2 * i) for i in range(3)) for half in range(2)))
    fields = []
    for q in range(32):
        step, rh, h = q // 4, q // 2 % 2, q % 2
        byte = 2 * step + h
        fields.append(at(byte // 4, 8 * (byte % 4) + 4 * rh))
    return tuple(fields)


def _straight(pieces: tuple[Piece, ...]) -> list[Piece]:
    """The same pieces, those that run over the end of a word cut in two."""
    cut: list[Piece] = []
    for word, first, width, low in pieces:
        here = min(width, 32 - first)
        cut.append((word, first, here, low))
        if here < width:
            cut.append((word, 0, width - here, low + here))
    return cut


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
        for word, shift, width, low in _straight(pieces):
            words[..., word] |= ((lanes[..., q] >> low) & ((1 << width) - 1)) << shift
    return words


def _from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_to_words`."""
    tiles, chunks = words.shape[:2]
    lanes = torch.zeros(tiles, chunks, 32, CHUNK_K // 4, dtype=torch.int64, device=words.device)
    for q, pieces in enumerate(_fields(bits)):
        for word, shift, width, low in _straight(pieces):
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


def _extract(pieces: tuple[Piece, ...]) -> str:
    """C expression: the value made of ``pieces``, times the bytes of a table entry."""
    terms = []
    for word, first, width, low in pieces:
        right = first - low - _FIRST_BIT
        if first + width > 32:  # only whole fields run round
            moved = f"__funnelshift_l(w[{word}], w[{word}], {-right % 32})"
        else:
            moved = f"(w[{word}] >> {right})" if right > 0 else f"(w[{word}] << {-right})" if right else f"w[{word}]"
        terms.append(f"({moved} & 0x{((1 << width) - 1) << (low + _FIRST_BIT):x}u)")
    return " | ".join(terms)


def device_header(bits: int) -> str:
    """The layout as CUDA C++: constants, and for every lookup of a lane its byte offset in the table.

    The table in shared memory holds each entry once per bank, 128 bytes an entry, so an offset is the index times 128.
    """
    lookups: list[tuple[Piece, ...]]
    fields = _fields(bits)
    if bits == 2:  # one lookup per four weights: the two pairs that share a byte
        lookups = [((pieces[0][0], pieces[0][1], 8, 0),) for q, pieces in enumerate(fields) if q // 2 % 2 == 0]
    else:
        lookups = list(fields)
    lines = [
        f"constexpr int CHUNK_K = {CHUNK_K}, LANE_WORDS = {_LANE_WORDS[bits]}, CHUNK_BYTES = {chunk_bytes(bits)};",
        f"constexpr int TILE_ROWS = {TILE_ROWS}, BLOCK_K = {_BLOCK_K};",
        "__device__ __forceinline__ unsigned lookup_offset(const unsigned (&w)[LANE_WORDS], int lookup) {",
        "  switch (lookup) {  // always a constant after unrolling",
    ]
    lines += [f"    case {n}: return {_extract(pieces)};" for n, pieces in enumerate(lookups)]
    return "\n".join([*lines, "  }", "  return 0;", "}", ""])
