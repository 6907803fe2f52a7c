"""What upstream FLUTE has packed: its model zoo (``flute_config.json``) and transformers' HIGGS checkpoints.

::

    NAME.weight   int16 (N b / 16, K)       NAME.tables   (2^b,)      NAME.tables2   (2^b, 2^b, 2): pairs, see below
    NAME.scales   (N, G)

The order of the codes depends on the bits b and the tile T (32 or 64) of the kernel they were packed for, on nothing
else. Words are 16 bits, J = 16 / b codes each. At 4 and 2 bits word (row c T + t, column 2 r + e) holds in slot s, from
the lowest bits, code[n, k] with

    k = 2 r + 1 - s mod 2        n = c J T + (e J / 2 + s div 2) T + t

At 3 bits (T = 32) N / 16 rows of "plane 0" come before N / 8 rows of planes 1 and 2. Columns 2 r, 2 r + 1 are the
halves of a word w_m of 32 bits of plane m, in row 32 c + t or N / 16 + 64 c + 32 (m - 1) + t. It holds five pairs
(code of k = 2 r + 1 low, of k = 2 r high) of rows n = 512 c + 32 (m + 3 u) + t, u = 0 .. 4; the two bits left over in
each of the three words are the pair of block 15. A wrong T permutes the outputs and no number in a checkpoint shows it.

W[n, k] = dtype(tables[code] * scale). ``tables2`` has all pairs of these and is not read, except for HIGGS with pairs,
which takes tables2[code of k, code of k + 1] for two weights. HIGGS weights are rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from ...quantize import spread
from ..container import RESERVED
from .exact import Format, Levels, Stored
from .uniform import whole_number

ZOO_TILE = 32  # of every kernel that upstream tuned before its checkpoints stopped naming a GPU
TILES = (32, 64)
_PARTS = (".tables2", ".tables", ".weight", ".scales")


def zoo_format(config: Mapping[str, Any], tile: int | None) -> Format:
    """The format of a checkpoint with this ``flute_config.json``.

    Args:
        tile: T; None: 32 if the file says for which GPU it was packed (``num_sms``), as all of the zoo does.

    Raises:
        CheckpointError: a number that upstream did not have, no tile is known, or another one than the zoo's.
    """
    bits, group = whole_number(dict(config), "num_bits"), whole_number(dict(config), "group_size")
    if tile is None and "num_sms" not in config:
        raise CheckpointError("flute_config.json has no num_sms, so its tile is unknown; give --tile 32 or --tile 64")
    if tile not in (None, ZOO_TILE) and "num_sms" in config:
        raise CheckpointError(
            f"flute_config.json has num_sms, so it was packed with tile {ZOO_TILE}, not {tile}, which would permute "
            "its outputs; leave --tile out"
        )
    tile = tile or ZOO_TILE
    check_tile(bits, tile)
    return Format(f"FLUTE {bits} bit, tile {tile}", _PARTS, lambda name, found: stored(found, bits, group, tile))


def higgs_format(config: dict[str, Any]) -> Format:
    """The format of a transformers checkpoint with this ``quantization_config`` (``quant_method`` "higgs")."""
    bits, group = whole_number(config, "bits", 4), whole_number(config, "group_size", 256)
    size, vector = whole_number(config, "hadamard_size", 512), whole_number(config, "p", 2)
    layers = config.get("tune_metadata")
    if vector not in (1, 2) or bits not in (2, 3, 4):
        raise CheckpointError(f"HIGGS with bits={bits}, p={vector} is not read; 2, 3 or 4 bits with p 1 or 2 are")

    def read(name: str, parts: Mapping[str, torch.Tensor]) -> Stored:
        number = (layers or {}).get(name, {}).get("template_id")
        if type(number) is not int:
            raise CheckpointError("tune_metadata has no template_id for it, so its tile is unknown")
        if number in RESERVED:
            raise CheckpointError(f"template_id={number} is an order of flute's; transformers loads it as it is")
        return stored(parts, bits, group, tile_of(bits, number), pairs=vector == 2, hadamard_size=size)

    return Format(f"HIGGS {bits} bit", _PARTS, read)


def tile_of(bits: int, template: int) -> int:
    """The tile of upstream's kernel number ``template`` (0.4): of each three kinds of blocks one has tile 64."""
    if bits == 3:
        return 32
    return 64 if template // (16 if bits == 4 else 4) % 3 == 0 else 32


def check_tile(bits: int, tile: int) -> None:
    """Raise CheckpointError if upstream had no such kernel."""
    if bits not in (2, 3, 4) or tile not in TILES or (bits == 3 and tile != 32):
        raise CheckpointError(
            f"no upstream kernel has {bits} bits and tile {tile}; with 2 and 4 bits it is 32 or 64, with 3 bits 32"
        )


def unpack(packed: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """int16 (N b / 16, K) -> codes uint8 (N, K).

    Raises:
        CheckpointError: N or K does not fit bits and tile.
    """
    check_tile(bits, tile)
    rows, width = packed.shape
    count = rows * 16 // bits
    step = 512 if bits == 3 else tile * 16 // bits
    if packed.dtype != torch.int16 or rows * 16 % bits or count % step or width % 2:
        raise CheckpointError(
            f"weight {tuple(packed.shape)} {packed.dtype} cannot have been packed with tile {tile} at {bits} bits: its "
            f"{count} outputs must be a multiple of {step}; it was packed with another tile"
        )
    word = packed.int() & 0xFFFF
    return _planes(word) if bits == 3 else _slots(word, bits, tile)


def _slots(word: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    rows, width = word.shape
    slots = 16 // bits
    chunks = rows // tile
    word = word.view(chunks, tile, width // 2, 2)
    codes = torch.empty(chunks, slots, tile, width // 2, 2, dtype=torch.uint8)
    for slot in range(slots):
        value = (word >> (bits * slot)) & ((1 << bits) - 1)
        for e in range(2):
            codes[:, e * slots // 2 + slot // 2, :, :, 1 - slot % 2] = value[..., e].to(torch.uint8)
    return codes.view(-1, width)


def _planes(word: torch.Tensor) -> torch.Tensor:
    rows, width = word.shape
    first = rows // 3  # N / 16 of 3 N / 16
    halves = word.view(rows, width // 2, 2).long()
    joined = halves[..., 0] | halves[..., 1] << 16
    rest = joined[first:].view(-1, 2, 32, width // 2)
    planes = (joined[:first].view(-1, 32, width // 2), rest[:, 0], rest[:, 1])
    codes = torch.empty(first // 32, 16, 32, width // 2, 2, dtype=torch.uint8)
    for block in range(16):
        if block < 15:
            pair = planes[block % 3] >> (6 * (block // 3))
        else:
            pair = planes[0] >> 30 | planes[1] >> 30 << 2 | planes[2] >> 30 << 4
        codes[:, block, ..., 1] = (pair & 7).to(torch.uint8)
        codes[:, block, ..., 0] = (pair >> 3 & 7).to(torch.uint8)
    return codes.view(-1, width)


def stored(
    parts: Mapping[str, torch.Tensor],
    bits: int,
    group_size: int,
    tile: int,
    *,
    pairs: bool = False,
    hadamard_size: int = 0,
) -> Stored:
    """One layer; of HIGGS the weight is the rotated one.

    Raises:
        CheckpointError: shapes do not fit together.
    """
    codes, scales = unpack(parts[".weight"], bits, tile), parts[".scales"]
    rows, width = codes.shape
    group = width if group_size == -1 else group_size
    if scales.shape != (rows, -(-width // group)):
        raise CheckpointError(
            f"scales {tuple(scales.shape)} do not fit {rows} x {width} codes in groups of {group_size}: another number "
            "of bits or another group size"
        )
    if pairs:
        table = _pair_table(parts[".tables2"], bits, scales.dtype)
        codes = codes[:, 0::2] << bits | codes[:, 1::2]
        values = table[codes.int()].flatten(1)
    else:
        table = parts[".tables"].float()
        if table.shape != (1 << bits,):
            raise CheckpointError(f"its table has shape {tuple(table.shape)}; {bits} bits need {(1 << bits,)}")
        values = table[codes.int()]
    weight = (values * spread(scales, group, width)).to(scales.dtype)
    return Stored(weight, Levels(codes, table, scales, group, bits, hadamard_size))


def _pair_table(tables2: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Bits of pairs, kept in float16 or float32 whatever they mean, -> float32 (2^(2 bits), 2)."""
    container = tables2.dtype in (torch.float16, torch.float32, dtype)
    if not container or tables2.numel() * tables2.itemsize != 4 << 2 * bits:
        raise CheckpointError(
            f"tables2 is {tables2.dtype} {tuple(tables2.shape)}; {bits} bits need {1 << 2 * bits} pairs of 16 bits"
        )
    return tables2.contiguous().flatten().view(dtype).view(-1, 2).float()
