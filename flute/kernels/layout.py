"""Kernel order: where every code lies when the CUDA kernels read it. This file is the only place that knows.

The packer below and the device code (through `device_header`) are both derived from the same few numbers.

A tensor-core step ``mma.m16n8k16`` takes 16 rows of W as its A operand. Lane l = 4 g + t (g = l / 4, t = l % 4) holds
four pairs of weights, a pair being two neighbours along K::

    register r = 2 rh + h      row = g + 8 h      k = 4 i + 2 rh + {0, 1}   from the lane's own 8 positions

The order of K inside a step is free as long as x is permuted alike, so within each block of 32 k lane t owns the eight
*consecutive* positions 8 t .. 8 t + 7 and the block takes two steps i = 0, 1: a lane then loads its activations as one
16-byte vector. A **chunk** is 16 rows times 64 k (4 bit) or 128 k (3 and 2 bit): what one warp takes in one go, 16 bytes
per lane (24 at 3 bit). Chunks of a row tile follow one another along K, row tiles along N::

    packed uint8 (ceil(N / 16), ceil(K / chunk_k), chunk_bytes)        scales (ceil(N / 16), G, 16)

Pair number ``q = ((s * 2 + i) * 2 + rh) * 2 + h`` of a lane, s the block of 32, is a field of 2 * bits bits in the lane's
32-bit words. Its value *is* the index into the pair table (both codes of the pair, low one first), which is also the code
of a two-dimensional codebook: scalar and vector tables are one thing here.

    4 bit   4 words, 4 pairs each, byte q % 4 of word q / 4
    3 bit   6 words, 5 pairs each in bits 0..29; pairs 30 and 31 are made of the top two bits of words 0,1,2 and 3,4,5
    2 bit   4 words; the pairs rh = 0, 1 of one row share a byte, since one 8-byte lookup decodes all four weights

The scales of a row tile lie as (group, g, h), so that a lane reads the scales of rows g and g + 8 as one 32-bit word.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..packing import pack_codes, unpack_codes
from ..spec import QuantSpec

TILE_ROWS = 16
LAYOUT_VERSION = 1  # part of every kernel's cache key: change it with any change of order
_BLOCK_K = 32
_CHUNK_K = {4: 64, 3: 128, 2: 128}
_LANE_WORDS = {4: 4, 3: 6, 2: 4}
_SLICE_WEIGHTS = 1 << 24  # packing works on slices of rows: int64 scratch stays near 128 MB


def chunk_k(bits: int) -> int:
    """Positions along K of one chunk."""
    return _CHUNK_K[bits]


def chunk_bytes(bits: int) -> int:
    """Bytes of one chunk: 32 lanes of 4 or 6 words."""
    return 32 * 4 * _LANE_WORDS[bits]


def supports(spec: QuantSpec, in_features: int) -> bool:
    """Whether the kernels take this spec natively: groups must not end inside a block of 32 positions."""
    group = spec.group(in_features)
    return group == in_features or group % _BLOCK_K == 0


@lru_cache(maxsize=None)
def _fields(bits: int) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """For every pair q of a lane: the pieces (word, shift in word, width, shift in the pair's value) it is made of."""
    width, pairs = 2 * bits, _CHUNK_K[bits] // 4
    if bits == 4:
        return tuple(((q // 4, 8 * (q % 4), width, 0),) for q in range(pairs))
    if bits == 3:
        whole = [((q // 5, 6 * (q % 5), width, 0),) for q in range(30)]
        spread = [tuple((3 * half + i, 30, 2, 2 * i) for i in range(3)) for half in range(2)]
        return (*whole, *spread)
    fields = []
    for q in range(pairs):
        step, rh, h = q // 4, q // 2 % 2, q % 2
        byte = 2 * step + h
        fields.append(((byte // 4, 8 * (byte % 4) + 4 * rh, width, 0),))
    return tuple(fields)


def _pairs_of_rows(weight: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Rows of checkpoint bytes -> pair values uint8 (rows, ceil(K / 2)): a pair is simply a code of twice the width."""
    pairs = -(-in_features // 2)
    needed = -(-pairs * 2 * bits // 8)
    return unpack_codes(torch.nn.functional.pad(weight, (0, needed - weight.shape[1])), 2 * bits, pairs)


def _to_words(pairs: torch.Tensor, bits: int) -> torch.Tensor:
    """Pairs (16 * T, C * chunk_k / 2) -> words int64 (T, C, 32 lanes, lane_words)."""
    tiles, chunks = pairs.shape[0] // TILE_ROWS, 2 * pairs.shape[1] // _CHUNK_K[bits]
    blocks = _CHUNK_K[bits] // _BLOCK_K
    # (tile, h, g, chunk, s, t, i, rh) -> (tile, chunk, g, t, s, i, rh, h)
    ordered = pairs.view(tiles, 2, 8, chunks, blocks, 4, 2, 2).permute(0, 3, 2, 5, 4, 6, 7, 1)
    lanes = ordered.reshape(tiles, chunks, 32, -1).to(torch.int64)
    words = torch.zeros(tiles, chunks, 32, _LANE_WORDS[bits], dtype=torch.int64, device=pairs.device)
    for q, pieces in enumerate(_fields(bits)):
        for word, shift, width, low in pieces:
            words[..., word] |= ((lanes[..., q] >> low) & ((1 << width) - 1)) << shift
    return words


def _from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_to_words`."""
    tiles, chunks = words.shape[:2]
    blocks = _CHUNK_K[bits] // _BLOCK_K
    lanes = torch.zeros(tiles, chunks, 32, _CHUNK_K[bits] // 4, dtype=torch.int64, device=words.device)
    for q, pieces in enumerate(_fields(bits)):
        for word, shift, width, low in pieces:
            lanes[..., q] |= ((words[..., word] >> shift) & ((1 << width) - 1)) << low
    ordered = lanes.view(tiles, chunks, 8, 4, blocks, 2, 2, 2).permute(0, 7, 2, 1, 4, 3, 5, 6)
    return ordered.reshape(tiles * TILE_ROWS, -1).to(torch.uint8)


def _words_to_bytes(words: torch.Tensor, bits: int) -> torch.Tensor:
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
    return -(-out_features // TILE_ROWS), -(-in_features // _CHUNK_K[bits]), chunk_bytes(bits)


def pack_weight(weight: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Checkpoint bytes uint8 (N, row_bytes) -> kernel order uint8 (tiles, chunks, chunk_bytes); padding is code 0."""
    rows = weight.shape[0]
    tiles, chunks, size = packed_shape(rows, in_features, bits)
    packed = torch.empty(tiles, chunks, size, dtype=torch.uint8, device=weight.device)
    width = chunks * _CHUNK_K[bits] // 2
    step = max(1, _SLICE_WEIGHTS // (TILE_ROWS * chunks * _CHUNK_K[bits]))
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        part = weight[first * TILE_ROWS : (first + count) * TILE_ROWS]
        pairs = _pairs_of_rows(part, bits, in_features)
        pairs = torch.nn.functional.pad(pairs, (0, width - pairs.shape[1], 0, count * TILE_ROWS - part.shape[0]))
        packed[first : first + count] = _words_to_bytes(_to_words(pairs, bits), bits)
    return packed


def unpack_weight(packed: torch.Tensor, bits: int, out_features: int, in_features: int) -> torch.Tensor:
    """The exact inverse of `pack_weight`: kernel order -> checkpoint bytes uint8 (N, row_bytes)."""
    tiles, chunks, _ = packed.shape
    pairs_per_row, row_bytes = -(-in_features // 2), -(-in_features * bits // 8)
    step = max(1, _SLICE_WEIGHTS // (TILE_ROWS * chunks * _CHUNK_K[bits]))
    parts = []
    for part in packed.split(step):
        pairs = _from_words(_bytes_to_words(part, bits), bits)[:, :pairs_per_row].contiguous()
        parts.append(pack_codes(pairs, 2 * bits)[:, :row_bytes])
    return torch.cat(parts)[:out_features].contiguous()


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales (N, G) -> (tiles, G, 16) with rows g and g + 8 of a tile side by side; padding rows get 0."""
    rows, groups = scales.shape
    tiles = -(-rows // TILE_ROWS)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, tiles * TILE_ROWS - rows))
    return padded.view(tiles, 2, 8, groups).permute(0, 3, 2, 1).reshape(tiles, groups, TILE_ROWS).contiguous()


def unpack_scales(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The exact inverse of `pack_scales`."""
    tiles, groups, _ = packed.shape
    rows = packed.view(tiles, groups, 8, 2).permute(0, 3, 2, 1).reshape(tiles * TILE_ROWS, groups)
    return rows[:out_features].contiguous()


def _extract(pieces: tuple[tuple[int, int, int, int], ...], up: int) -> str:
    """C expression: the value made of ``pieces``, shifted left by ``up`` bits."""
    terms = []
    for word, shift, width, low in pieces:
        move = shift - low - up
        moved = f"(w[{word}] >> {move})" if move >= 0 else f"(w[{word}] << {-move})"
        terms.append(f"({moved} & 0x{((1 << width) - 1) << (low + up):x}u)")
    return " | ".join(terms)


def device_header(bits: int) -> str:
    """The layout as CUDA C++: constants, and for every lookup of a lane its byte offset in the table.

    The table in shared memory holds each entry once per bank, 128 bytes an entry, so an offset is the index times 128.
    """
    fields = _fields(bits)
    if bits == 2:  # one lookup per four weights: the two pairs that share a byte
        lookups = [((pieces[0][0], pieces[0][1], 8, 0),) for q, pieces in enumerate(fields) if q // 2 % 2 == 0]
    else:
        lookups = list(fields)
    lines = [
        f"constexpr int CHUNK_K = {_CHUNK_K[bits]}, LANE_WORDS = {_LANE_WORDS[bits]}, CHUNK_BYTES = {chunk_bytes(bits)};",
        f"constexpr int TILE_ROWS = {TILE_ROWS}, BLOCK_K = {_BLOCK_K}, LOOKUPS = {len(lookups)};",
        "__device__ __forceinline__ unsigned lookup_offset(const unsigned (&w)[LANE_WORDS], int lookup) {",
        "  switch (lookup) {  // always a constant after unrolling",
    ]
    lines += [f"    case {n}: return {_extract(pieces, 7)};" for n, pieces in enumerate(lookups)]
    return "\n".join([*lines, "  }", "  return 0;", "}", ""])
