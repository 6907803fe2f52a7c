"""Problem and GPU -> launch plan of the decode kernel, by arithmetic alone: nothing is tuned, listed or stored.

The kernel streams row tiles through the warps of persistent blocks (see ``cuda/decode.cu``). What a plan decides:

* ``split``: into how many slices K is cut, one per block of a cluster. More slices make room for x in shared memory.
* ``ways``: among how many warps of a block a slice is cut again. More ways balance few rows over many SMs.
* ``rows``: units of ``row_tiles`` tiles that a block works on at once; a block has ``rows * ways`` warps.
* ``passes``: rows of the grid, ``tokens`` tokens each.
* ``per_sm``: blocks that fit an SM together. With two, the next launch asks for its weights while this one computes.

Plans are compared by an estimate of clock cycles: the chunks of the busiest warp, each at the rate of the SM's
narrowest pipe or at the latency of one chunk, whichever is longer, plus what a round and a launch cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .layout import CHUNK_K, TILE_ROWS, chunk_bytes

_SCALE_BYTES = 128
_COMPACT_TABLE = {4: 32768, 3: 8192, 2: 32768}
_WIDE_TABLE = 65536
# By token tiles, row tiles and blocks per SM: what a warp takes at once needs registers, and none may spill. Quarters
# of an SM have registers of their own, so nine warps are as hard to fit as twelve.
_MAX_WARPS = {
    (1, 1, 1): 16, (1, 2, 1): 16, (2, 1, 1): 16, (2, 2, 1): 12, (4, 1, 1): 8, (4, 2, 1): 8,
    (1, 1, 2): 12, (1, 2, 2): 8, (2, 1, 2): 8,
}  # fmt: skip
_SPILLING = {(4, 2, 1, 32), (1, 1, 2, 32)}  # the same and the group block: these would spill after all
_SPILLING_LATER = {(2, 2, 1, 32)}  # and these on GPUs with clusters other than Hopper
_SPILLING_RINGS = {(2, 1, 1, 2, 6)}  # bits, the same, and stages: with the wide table; the compact one has them
_MOST_STAGES = {1: 8, 2: 6}  # by blocks per SM, likewise
_TOKEN_TILES = (1, 2, 4)
CLUSTER_SIZES = (1, 2, 3, 4, 8)  # asked of the driver; the decode kernel uses powers of two
_IN_FLIGHT_BYTES = 40 * 1024  # codes on their way per SM that saturate the memory: latency x bandwidth / SMs, and slack
MAX_IN_FEATURES = 1 << 20  # block and group arithmetic in the kernel is exact up to here


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a plan needs to know of a GPU.

    Args:
        sms: multiprocessors. shared_bytes: most shared memory of one block. arch: "sm_90".
        clusters: (size, how many such clusters of blocks that fill an SM run at once); without clusters they stand for
            slices of the grid: (split, sms // split).
        bytes_per_cycle: DRAM bytes per clock cycle and SM at the measured read ceiling.
    """

    sms: int
    shared_bytes: int
    arch: str
    clusters: tuple[tuple[int, int], ...]
    bytes_per_cycle: float = 13.5

    def shared_of(self, per_sm: int) -> int:
        """Most shared memory of one of ``per_sm`` blocks of an SM; the system takes 1 KB of each."""
        return (self.shared_bytes + 1024) // per_sm - 1024

    @property
    def unshared(self) -> int:
        """So much shared memory of a block that no second one like it fits beside it on an SM."""
        return self.shared_bytes // 2 + 1024

    @property
    def has_wgmma(self) -> bool:
        """Asynchronous tensor cores with A in registers: Hopper alone has them."""
        return self.arch == "sm_90"

    @property
    def has_clusters(self) -> bool:
        """Blocks of a cluster can write into each other's shared memory (sm_90 and up)."""
        return int(self.arch.removeprefix("sm_")) >= 90


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch of the decode kernel; every number the kernel and its launcher need."""

    passes: int
    tokens: int
    token_tiles: int
    row_tiles: int
    rows: int
    ways: int
    split: int
    stages: int
    group_block: int
    clusters: int
    pitch: int
    shared_bytes: int
    cycles: float
    per_sm: int
    wide: bool

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.rows * self.ways

    @property
    def logs(self) -> tuple[int, int]:
        """Base-2 logarithms of ``split`` and ``ways``, which are powers of two."""
        return self.split.bit_length() - 1, self.ways.bit_length() - 1

    @property
    def label(self) -> str:
        """The numbers that decide all others: two plans of one problem differ in their label."""
        return (
            f"decode row_tiles={self.row_tiles} rows={self.rows} ways={self.ways} split={self.split} "
            f"per_sm={self.per_sm} wide={int(self.wide)}"
        )

    def macros(self, bits: int, bf16: bool) -> tuple[tuple[str, int], ...]:
        """The macros that select this plan's kernel."""
        return decode_macros(
            bits, bf16, self.group_block, self.token_tiles, self.row_tiles, self.stages, self.per_sm, self.wide
        )


def decode_macros(
    bits: int, bf16: bool, group_block: int, token_tiles: int, row_tiles: int, stages: int, per_sm: int, wide: bool
) -> tuple[tuple[str, int], ...]:
    """Macros of one variant of the decode kernel."""
    return (
        ("BITS", bits),
        ("BF16", int(bf16)),
        ("GROUP_BLOCK", group_block),
        ("TOKEN_TILES", token_tiles),
        ("ROW_TILES", row_tiles),
        ("STAGES", stages),
        ("MAX_THREADS", 32 * _MAX_WARPS[token_tiles, row_tiles, per_sm]),
        ("BLOCKS", per_sm),
        ("WIDE_TABLE", int(wide)),
    )


def variants() -> list[tuple[tuple[str, int], ...]]:
    """Every variant of the decode kernel that a plan can ask for (stages only change the size of the ring)."""
    return [
        decode_macros(bits, bf16, block, tiles, rows, 4, per_sm, wide)
        for bits in (2, 3, 4)
        for bf16 in (False, True)
        for block in (32, 64, 128)
        for tiles, rows, per_sm in _MAX_WARPS
        for wide in (True, False)
        if (tiles, rows, per_sm, block) not in _SPILLING
    ]


def table_bytes(bits: int, wide: bool) -> int:
    """Shared memory of the pair table: entries 256 bytes apart (an address takes one instruction) or 128 (two)."""
    return _WIDE_TABLE if wide else _COMPACT_TABLE[bits]


def group_block(group: int, in_features: int) -> int:
    """Positions that surely share a scale: 128 or 64 when groups are whole multiples of it, else 32."""
    if group >= in_features:
        return 128
    return next(block for block in (128, 64, 32) if group % block == 0)


def _stages(warps: int, slot: int, per_sm: int) -> int:
    """Ring slots per warp, so that all warps together keep enough bytes in flight."""
    wanted = min(-(-_IN_FLIGHT_BYTES // (warps * slot)) + 1, _MOST_STAGES[per_sm])
    return next(stages for stages in (3, 4, 6, 8) if stages >= wanted)  # few choices: each is a kernel of its own


def _step_cycles(gpu: Gpu, bits: int, block: int, token_tiles: int, row_tiles: int, wide: bool) -> tuple[float, float]:
    """Cycles of one chunk step of one warp: what it takes from the SM that all warps share, and its latency when alone.

    Instructions, shared-memory wavefronts and bytes are counted from the kernel; the factors on them and on the latency
    were fitted to timings of one H100 (docs/kernel-log.md, section 7).
    """
    lookups = 32 if bits > 2 else 16
    sets = CHUNK_K // block
    issue = row_tiles * ((2.0 if wide else 2.9) * lookups + 8 * token_tiles + 4 * sets * (token_tiles + 1))
    issue += 4 * token_tiles + 35 + (24 * row_tiles if bits == 3 else 0)
    shared = row_tiles * (32 + chunk_bytes(bits) / 64 + 2 * sets) + 16 * token_tiles
    tensor = row_tiles * token_tiles * 8
    memory = row_tiles * (chunk_bytes(bits) + 32 * sets) / gpu.bytes_per_cycle
    return soft_max(5.1, shared, 2.7 * tensor, 0.84 * memory, 0.385 * issue), 223 + 1.27 * issue


def soft_max(power: float, *terms: float) -> float:
    """Near balance every term is felt."""
    return float(sum(term**power for term in terms) ** (1 / power))


def _candidate(
    gpu: Gpu,
    m: int,
    passes: int,
    n: int,
    k: int,
    bits: int,
    block: int,
    row_tiles: int,
    rows: int,
    ways: int,
    split: int,
    per_sm: int,
    wide: bool,
) -> Plan | None:
    """The plan with these numbers, or None where shared memory, threads or the GPU do not allow it."""
    tokens = -(-m // passes)
    passes = -(-m // tokens)
    token_tiles = next((tiles for tiles in _TOKEN_TILES if tokens <= 8 * tiles), 0)
    warps, participants = rows * ways, ways * split
    chunks, units = ceil(k / CHUNK_K), ceil(n / (TILE_ROWS * row_tiles))
    together = dict(gpu.clusters).get(split, 0)
    room = gpu.shared_of(per_sm)
    clusters = max(min(together, 1), together // passes)  # passes beyond what fits at once wait their turn
    kind = (token_tiles, row_tiles, per_sm)
    if warps > _MAX_WARPS.get(kind, 0) or (*kind, block) in _SPILLING or (per_sm > 1 and gpu.arch != "sm_90"):
        return None
    if (*kind, block) in _SPILLING_LATER and gpu.has_clusters and not gpu.has_wgmma:
        return None
    if clusters == 0 or participants > min(32, chunks) or (ways > 1 and not gpu.has_clusters):
        return None
    slot = row_tiles * (chunk_bytes(bits) + _SCALE_BYTES)
    wanted = _stages(warps, slot, per_sm)
    # 16 bytes off a multiple of 128, so that eight tokens lie in different banks
    pitch = 2 * CHUNK_K * -(-chunks // split) + 16
    exchange = 2 * warps * row_tiles * token_tiles * 512 + 256 if participants > 1 and gpu.has_clusters else 0
    fixed = table_bytes(bits, wide) + exchange + tokens * pitch
    stages = next((s for s in (wanted, 3) if fixed + warps * s * slot <= room), 0)
    if stages == 0 or (wide and (bits, *kind, stages) in _SPILLING_RINGS):
        return None
    shared = fixed + warps * stages * slot
    if per_sm == 1:  # two to an SM: all SMs alike, or the next launch's blocks would gather where there is room
        clusters = min(clusters, -(-units // rows))
    rounds = -(-units // (clusters * rows))
    rate, latency = _step_cycles(gpu, bits, block, token_tiles, row_tiles, wide)
    busy = min(warps, ways * -(-units // clusters))
    uneven = 0.2 * (-busy % 4)  # quarters of an SM that have a warp less than others
    step = soft_max(2.3, rate * (busy + uneven), latency)
    per_round = 0 if participants == 1 else 455 + 71 * ways + (987 if split > 1 else 0) + 161 * row_tiles * token_tiles
    cycles = rounds * (-(-chunks // participants) * step + per_round)
    # what a launch costs; large clusters leave SMs empty for the next one, pairs that fill an SM each wait for both
    cycles += (5270 if split == 2 else 4470) if per_sm == 1 else 3250 if split >= 4 else 2940
    cycles += 0.054 * tokens * pitch
    return Plan(
        passes, tokens, token_tiles, row_tiles, rows, ways, split, stages, block, clusters, pitch, shared, cycles,
        per_sm, wide,
    )  # fmt: skip


def candidates(gpu: Gpu, m: int, n: int, k: int, bits: int, group: int) -> list[Plan]:
    """Every legal plan for y (m, n) = x (m, k) . W^T with groups of ``group``, the best estimate first."""
    block, passes = group_block(group, k), -(-m // 32)
    while passes <= m:
        found = [
            plan
            for row_tiles in (1, 2)
            for rows in range(1, 17)
            for ways in (1, 2, 4, 8)
            for split in (1, 2, 4, 8)
            for per_sm in (1, 2)
            for wide in (True, False)
            if rows * ways >= 4
            and (plan := _candidate(gpu, m, passes, n, k, bits, block, row_tiles, rows, ways, split, per_sm, wide))
        ]
        if found:
            return sorted(found, key=lambda plan: plan.cycles)
        passes *= 2  # x does not fit: fewer tokens at once
    return []


def make(gpu: Gpu, m: int, n: int, k: int, bits: int, group: int) -> Plan | None:
    """The plan to run, or None when not even one token fits or K is beyond `MAX_IN_FEATURES` (then: the dense path)."""
    if k > MAX_IN_FEATURES:
        return None
    found = candidates(gpu, m, n, k, bits, group)
    return found[0] if found else None
