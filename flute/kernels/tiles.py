"""Problem and GPU -> launch plan of the matmul kernel (``cuda/matmul.cu``, Hopper), by arithmetic alone.

What a tiling decides:

* ``tokens`` and ``rows``: a block takes 64 * rows rows of W times ``tokens`` tokens. More rows read x less often, more
  tokens decode W less often. ``span``: how many of its row tiles a block really fills, the same for all blocks.
* ``ways`` and ``split``: among how many groups of warps and blocks of a cluster K is cut, so that small layers keep all
  SMs busy.
* ``cut``: whether what is left of whole waves of tiles is cut along K too, in as many equal parts as there are blocks.
  Pays where tensor cores bind and the last wave would leave many SMs without work; needs a workspace.
* ``per_sm``: blocks that fit an SM together. With two, the next launch asks for its weights while this one computes.
* ``boxes`` and ``stages``: lengths of the rings of x and of codes.

For a stack of ``experts`` matrices only the sum M of all experts' tokens is known at launch. The estimate then takes
them as spread evenly, by chance; the kernel takes any. Blocks are persistent and one to an SM: which of them have work
is not known either, and two to an SM would gather on a few SMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from .layout import CHUNK_K, TILE_ROWS, chunk_bytes
from .plan import CLUSTER_SIZES, MAX_IN_FEATURES, Gpu, group_block, soft_max, table_bytes

_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256)
FEWEST_TOKENS = 8  # up to here the decode kernel was never behind
_SHAPES = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3), (1, 4))  # (rows, ways)
_NEXT_TILE = 4000  # cycles from an expert's tile to the next, chosen by benchmarks/results/grouped_sweep_h100.csv
_CUT = {(128, 3), (192, 2), (256, 2)}  # (tokens, rows) worth cutting along K
_FEWEST_CUT = 8  # chunks of K that a tile must have to be cut
_MOST_X = 24 << 20  # bytes of x: blocks with parts of tiles are at different k, and what the L2 cache drops comes twice
_CLEARING, _PART = 2910, 25.6  # cycles: of the launch that clears flags, and to hand over and add an accumulator row
_FLIGHT_BYTES = 48 * 1024  # codes on their way per SM: deeper rings only make the first chunk wait for all the others


@dataclass(frozen=True, slots=True)
class Tiling:
    """One launch of the matmul kernel."""

    tokens: int
    rows: int
    ways: int
    split: int
    per_sm: int
    boxes: int
    stages: int
    group_block: int
    blocks: int
    shared_bytes: int
    cycles: float
    wide: bool
    span: int
    experts: int = 0
    cut: bool = False

    @property
    def workspace(self) -> int:
        """32-bit words that a launch needs where tiles are cut: for each block a flag, and room for its part of one."""
        return ceil(self.blocks / 32) * 32 + self.blocks * 64 * self.rows * self.tokens if self.cut else 0

    @property
    def threads(self) -> int:
        """Threads per block: groups of four computing warps, and those that copy."""
        return 32 * (4 * self.rows * self.ways + _copying(self.tokens, self.rows, self.cut))

    @property
    def label(self) -> str:
        """The numbers that decide all others: two tilings of one problem differ in their label."""
        return (
            f"matmul tokens={self.tokens} rows={self.rows} ways={self.ways} split={self.split} per_sm={self.per_sm} "
            f"wide={int(self.wide)} cut={int(self.cut)}"
        )

    def macros(self, bits: int, bf16: bool) -> tuple[tuple[str, int], ...]:
        """The macros that select this tiling's kernel."""
        return (
            ("BITS", bits),
            ("BF16", int(bf16)),
            ("GROUP_BLOCK", self.group_block),
            ("TOKENS", self.tokens),
            ("ROWS", self.rows),
            ("WAYS", self.ways),
            ("COPY_WARPS", _copying(self.tokens, self.rows, self.cut) - 1),
            ("BLOCKS", self.per_sm),
            ("X_BOXES", self.boxes),
            ("CODE_STAGES", self.stages),
            ("WIDE_TABLE", int(self.wide)),
            ("GROUPED", int(self.experts > 0)),
            ("CUT", int(self.cut)),
        )


def _copying(tokens: int, rows: int, cut: bool) -> int:
    """Warps that copy: one x, the others codes; four where they hand over registers, which only four together can."""
    return 4 if cut or rows > 2 or tokens * rows >= 512 else rows + 1


def _fits_registers(tokens: int, rows: int, ways: int, per_sm: int) -> bool:
    """Whether no register is spilled, from what the compiler was seen to need; CI compiles every variant."""
    if tokens == 256:
        return per_sm == 1 and rows * ways <= 2 and ways == 1
    needed = tokens // 2 + 48 + (8 if ways > 1 else 0)
    warps = 4 * rows * ways + _copying(tokens, rows, False)
    quarter = -(-warps * per_sm // 4)  # an SM's warps and registers come in quarters
    return needed <= min(255, 65536 // (128 * quarter) // 8 * 8)


def variants() -> list[tuple[int, int, int, int]]:
    """Every (tokens, rows, ways, per_sm) that a tiling may have."""
    return [
        (tokens, rows, ways, per_sm)
        for tokens in _TOKENS
        for rows, ways in _SHAPES
        for per_sm in (1, 2)
        if _fits_registers(tokens, rows, ways, per_sm)
    ]


def _token_tiles(m: int, tokens: int, experts: int) -> int:
    """Tiles of ``tokens`` tokens among M: of a stack, those to be expected when experts are drawn evenly by chance."""
    if experts == 0:
        return ceil(m / tokens)
    active = experts * (1 - (1 - 1 / experts) ** m)
    return round(active * max(1.0, m / active / tokens + 0.5))  # an expert's last tile is half full


def tiling(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    bits: int,
    block: int,
    tokens: int,
    rows: int,
    ways: int,
    split: int,
    per_sm: int,
    wide: bool,
    experts: int = 0,
    cut: bool = False,
) -> Tiling | None:
    """The tiling with these numbers, or None where shared memory or the GPU does not allow it; experts 0: no stack."""
    chunks = -(-k // CHUNK_K)
    together = dict(gpu.clusters).get(split, 0)
    if together == 0 or split * ways > chunks or (experts and split * per_sm > 1):
        return None
    if cut and (split * ways * per_sm > 1 or experts or (tokens, rows) not in _CUT):
        return None
    if cut and (chunks < _FEWEST_CUT or 2 * m * k > _MOST_X):
        return None
    box = tokens * 128
    slot = 4 * rows * (chunk_bytes(bits) + 32 * (CHUNK_K // block))
    sums = rows * ways * tokens * 256
    own = 0  # what a stack needs beside the rings: two numbers for each expert, and room for partial sums
    if experts:
        own, sums = 16 + 8 * experts + (sums if ways > 1 else 0), 0
    boxes, stages = _rings(gpu.shared_of(per_sm) - table_bytes(bits, wide) - 320 - own, box, slot, tokens, ways, per_sm)
    if boxes == 0 or sums > boxes * box + stages * slot:
        return None
    at_once = (together if split * ways > 1 else gpu.sms) * per_sm
    token_tiles = _token_tiles(m, tokens, experts)
    span = 4 * rows if experts or cut else _span(ceil(n / TILE_ROWS), 4 * rows, token_tiles, at_once)
    units = ceil(ceil(n / TILE_ROWS) / span) * token_tiles
    blocks = split * units if split * ways > 1 else min(units, gpu.sms * per_sm)
    if cut and (units % gpu.sms == 0 or 2 * units < gpu.sms):
        return None  # nothing to share, or by so many that adding up takes longer
    if experts or cut:  # how many tiles of a stack there will be is not known
        blocks = gpu.sms
    shared = table_bytes(bits, wide) + boxes * box + stages * slot + 8 * (2 * boxes + 2 * stages) + own
    # The next launch's blocks come as soon as there is room. They must not gather two by two on some SMs: either none
    # fits beside one that runs, or every SM gets one.
    if per_sm == 1:
        shared = max(shared, gpu.unshared)
    else:
        blocks = max(blocks, together * split)
    work = (-(-units * chunks // gpu.sms), gpu.sms) if cut else (-(-chunks // split), units)  # chunks, and how often
    cycles = _cycles(gpu, bits, tokens, rows, ways, split, *work, slot, at_once, per_sm, span / (4 * rows))
    if experts:
        cycles += _NEXT_TILE * -(-units // at_once)
    if cut:
        cycles += _CLEARING + _PART * rows * tokens
    return Tiling(
        tokens, rows, ways, split, per_sm, boxes, stages, block, blocks, shared, cycles, wide, span, experts, cut
    )


def _rings(room: int, box: int, slot: int, tokens: int, ways: int, per_sm: int) -> tuple[int, int]:
    """Boxes of x and stages of codes in so many bytes, (0, 0) where too few fit."""
    stages = max(3, ways + 1, -(-_FLIGHT_BYTES // (slot * per_sm)))
    if tokens == 256:
        stages = 3  # x is what the tensor cores would wait for: it gets all the room
    stages = min(stages, 8, (room - max(3, 2 * ways) * box) // slot)
    boxes = min((room - stages * slot) // box, 2 * stages, 12)
    if ways > 1:
        boxes -= boxes % (2 * ways)  # a slot of x serves one way only, see matmul.cu
    return (boxes, stages) if stages >= max(2, ways) and boxes >= max(3, 2 * ways) else (0, 0)


def _span(tiles: int, most: int, token_tiles: int, at_once: int) -> int:
    """Row tiles per block, at most ``most``: as few as keep the number of waves, so that the last wave is full too."""
    waves = ceil(ceil(tiles / most) * token_tiles / at_once)
    return min(most, ceil(tiles / max(1, waves * at_once // token_tiles)))


def _cycles(
    gpu: Gpu, bits: int, tokens: int, rows: int, ways: int, split: int, chunks: int, units: int, slot: int,
    at_once: int, per_sm: int, full: float,
) -> float:  # fmt: skip
    """Estimate of one launch: waves of blocks, each as long as its SM or a group of warps on its own needs, and a rest.

    An SM takes a chunk of 64 rows as fast as instructions (decoding), tensor cores and what comes out of the L2 cache
    together allow. A group of warps on its own needs its latency. The factors were fitted to timings of one H100
    (docs/kernel-log.md, section 12).
    """
    issue = full * {4: 349, 3: 361, 2: 281}[bits] + 0.62 * tokens
    tensor = 4.44 * tokens
    cache = (256 * tokens + full * slot) / rows / 124
    alone = 625 * -(-chunks // ways)
    resident = min(per_sm, -(-units * per_sm // at_once))
    together = chunks * rows * resident * soft_max(1.7, issue, tensor, cache)
    meeting = 0.0
    if split * ways > 1:
        meeting = 4145 + 1790 * (ways - 1) + 189 * (split - 1) + (13.3 * rows * tokens if split > 1 else 0)
    return -(-units // at_once) * (soft_max(2.47, alone, together) + meeting) + (1335 if per_sm == 1 else 1308)


def candidates(gpu: Gpu, m: int, n: int, k: int, bits: int, block: int) -> Iterator[Tiling]:
    """Every tiling worth a look for y (m, n) = x (m, k) . W^T."""
    whole = next((tokens for tokens in _TOKENS if tokens >= m), 0)
    half = next((tokens for tokens in _TOKENS if 2 * tokens >= m), 0)
    for tokens, rows, ways, per_sm in variants():
        if tokens not in ((whole, half) if m <= 256 else (128, 192, 256)):
            continue
        for split in CLUSTER_SIZES:
            made = tiling(gpu, m, n, k, bits, block, tokens, rows, ways, split, per_sm, True)
            made = made or tiling(gpu, m, n, k, bits, block, tokens, rows, ways, split, per_sm, False)
            # where K is cut blocks are not persistent: many waves of them would each begin anew
            if made and (split * ways == 1 or made.blocks // split <= 2 * per_sm * dict(gpu.clusters)[split]):
                yield made
        sizes = (gpu, m, n, k, bits, block, tokens, rows, ways, 1, per_sm)
        yield from [made for wide in (True, False) if (made := tiling(*sizes, wide, cut=True))][:1]


def make(gpu: Gpu, m: int, n: int, k: int, bits: int, group: int) -> Tiling | None:
    """The tiling to run, or None where the GPU is no Hopper or K is beyond the kernel's arithmetic."""
    if not gpu.has_wgmma or k > MAX_IN_FEATURES:
        return None
    found = candidates(gpu, m, n, k, bits, group_block(group, k))
    return min(found, key=lambda one: one.cycles, default=None)


def candidates_grouped(gpu: Gpu, m: int, experts: int, n: int, k: int, bits: int, group: int) -> Iterator[Tiling]:
    """Every tiling for M tokens among a stack of matrices."""
    for tokens, rows, ways, per_sm in variants():
        sizes = (gpu, m, n, k, bits, group_block(group, k), tokens, rows, ways, 1, per_sm)
        yield from [made for wide in (True, False) if (made := tiling(*sizes, wide, experts))][:1]


def make_grouped(gpu: Gpu, m: int, experts: int, n: int, k: int, bits: int, group: int) -> Tiling | None:
    """The tiling to run for M tokens among a stack of matrices, or None as in `make`."""
    if not gpu.has_wgmma or k > MAX_IN_FEATURES:
        return None
    return min(candidates_grouped(gpu, m, experts, n, k, bits, group), key=lambda one: one.cycles, default=None)
