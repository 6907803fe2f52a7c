"""Problem and GPU -> launch plan of the mma kernel (``cuda/mma.cu``: many tokens, no ``wgmma``), by arithmetic alone.

What a tiling decides:

* ``row_tiles``, ``token_tiles``, ``row_warps``, ``token_warps``: a warp takes 16 * row_tiles rows of W times
  8 * token_tiles tokens, a block row_warps * token_warps such tiles of y. More rows read x less often from shared
  memory (each `ldmatrix` feeds ``2 * row_tiles`` tensor-core steps), more tokens decode W less often.
* ``split``: into how many slices K is cut where tiles of y are too few for all SMs; their sums meet in a workspace.
* ``stages``: slots of the ring of x.

The estimate counts, per chunk of 128 k, what an SM must do, and takes the slowest: tensor cores, instructions, shared
memory, L2 cache, memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from .layout import CHUNK_K, TILE_ROWS, chunk_bytes
from .plan import MAX_IN_FEATURES, Gpu, group_block, table_bytes

FEWEST_TOKENS = 32  # up to here the decode kernel takes all tokens at once
# (row tiles, token tiles) of a warp, warps along rows and tokens. All are free of spills; CI compiles every one.
_SHAPES = ((1, 8, 8, 1), (2, 8, 8, 1), (1, 12, 8, 1), (2, 12, 8, 1), (1, 16, 8, 1), (2, 16, 8, 1))
_STAGES = (4, 3, 2)
_SPLITS = (1, 2, 3, 4, 6, 8)
# Products a clock and SM of `mma.sync` with 16-bit operands and float32 sums; GeForce cards of sm_86 and up have half.
_RATES = {"sm_80": 1024, "sm_90": 1260, "sm_100": 1024, "sm_103": 1024}
_RATE = 512
_LIBRARY_RATES = {"sm_90": 2048, "sm_100": 4096, "sm_103": 4096}  # where cuBLAS has faster instructions than mma.sync
_LIBRARY_SHARE = 0.85  # of that rate, which cuBLAS reaches


@dataclass(frozen=True, slots=True)
class Tiling:
    """One launch of the mma kernel."""

    row_tiles: int
    token_tiles: int
    row_warps: int
    token_warps: int
    split: int
    stages: int
    group_block: int
    blocks: int
    shared_bytes: int
    cycles: float

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.row_warps * self.token_warps

    @property
    def rows(self) -> int:
        """Rows of W in a tile of y."""
        return TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def tokens(self) -> int:
        """Tokens of a tile of y."""
        return 8 * self.token_tiles * self.token_warps

    @property
    def label(self) -> str:
        """The numbers that decide all others: two tilings of one problem differ in their label."""
        shape = f"row_tiles={self.row_tiles} token_tiles={self.token_tiles}"
        return f"mma {shape} row_warps={self.row_warps} token_warps={self.token_warps} split={self.split}"

    def macros(self, bits: int, bf16: bool) -> tuple[tuple[str, int], ...]:
        """The macros that select this tiling's kernel."""
        return (
            ("BITS", bits),
            ("BF16", int(bf16)),
            ("GROUP_BLOCK", self.group_block),
            ("ROW_TILES", self.row_tiles),
            ("TOKEN_TILES", self.token_tiles),
            ("ROW_WARPS", self.row_warps),
            ("TOKEN_WARPS", self.token_warps),
            ("STAGES", self.stages),
            ("WIDE_TABLE", 0),
        )


def tiling(
    gpu: Gpu, m: int, n: int, k: int, bits: int, block: int, shape: tuple[int, int, int, int], split: int
) -> Tiling | None:
    """The tiling of this shape and split, or None where shared memory or K does not allow it."""
    row_tiles, token_tiles, row_warps, token_warps = shape
    rows, tokens = TILE_ROWS * row_tiles * row_warps, 8 * token_tiles * token_warps
    chunks = ceil(k / CHUNK_K)
    if split > chunks:
        return None
    slot = rows // TILE_ROWS * (chunk_bytes(bits) + 32 * (CHUNK_K // block))
    sizes = [(s, table_bytes(bits, False) + s * tokens * 128 + -(-s // 2) * slot + 16 * s) for s in _STAGES]
    stages, shared = next(((s, size) for s, size in sizes if size <= gpu.shared_bytes), (0, 0))
    if stages == 0:
        return None
    items = ceil(n / rows) * ceil(m / tokens) * split
    per_chunk = _chunk_cycles(gpu, bits, block, shape, min(1.0, ceil(n / rows) * split / gpu.sms))
    each = ceil(chunks / split) * per_chunk + rows * tokens / 5  # and the writing of y
    cycles = ceil(items / gpu.sms) * each
    if split > 1:
        cycles += 6100 + m * n * (8 * split + 2) / (gpu.bytes_per_cycle * gpu.sms)
    return Tiling(*shape, split, stages, block, min(items, gpu.sms), shared, cycles)


def _chunk_cycles(gpu: Gpu, bits: int, block: int, shape: tuple[int, int, int, int], share: float) -> float:
    """Cycles of one chunk of K of one tile of y; ``share`` of the SMs read codes that no other reads.

    Work is counted from the kernel. Seven factors (2.0 and 0.9 here, the exponent, the rest) were fitted to 229 timings
    of one H100 (docs/kernel-log.md, benchmarks/results/mma_sweep_h100.csv): 3 % off in the root mean square.
    """
    row_tiles, token_tiles, row_warps, token_warps = shape
    warps, tiles, tokens = row_warps * token_warps, row_tiles * row_warps, 8 * token_tiles * token_warps
    steps, sets, size = CHUNK_K // 16, CHUNK_K // block, chunk_bytes(bits)
    products = steps * row_tiles * token_tiles
    decode = {4: 17, 3: 19, 2: 12}[bits]  # instructions per step and row tile: lookups, addresses, scaling
    tensor = warps * products * 2048 / _RATES.get(gpu.arch, _RATE)
    issue = warps / 4 * (products + steps * (token_tiles / 2 + row_tiles * decode) + 90)
    shared = warps * (2 * steps * token_tiles + row_tiles * (32 + size / 128 + sets)) + 2 * tokens + tiles * size / 128
    cache = (256 * tokens + tiles * (size + 32 * sets)) / 48
    memory = tiles * (size + 32 * sets) * share / gpu.bytes_per_cycle
    return float(sum(term**3 for term in (tensor, 2.0 * issue, 0.9 * shared, cache, memory)) ** (1 / 3)) + 100


def variants() -> list[tuple[tuple[int, int, int, int], int]]:
    """Every shape and length of the ring that a tiling may have."""
    return [(shape, stages) for shape in _SHAPES for stages in _STAGES]


def candidates(gpu: Gpu, m: int, n: int, k: int, bits: int, block: int) -> Iterator[Tiling]:
    """Every tiling worth a look for y (m, n) = x (m, k) . W^T."""
    for shape in _SHAPES:
        for split in _SPLITS:
            made = tiling(gpu, m, n, k, bits, block, shape, split)
            if made and (split == 1 or made.blocks <= gpu.sms):
                yield made


def dense_cycles(gpu: Gpu, m: int, n: int, k: int, bits: int) -> float:
    """Estimate of the other way: write the dense weight to memory, read it again in a library's matmul."""
    rate = _LIBRARY_RATES.get(gpu.arch, _RATES.get(gpu.arch, _RATE)) * _LIBRARY_SHARE
    return 8000 + n * k * (m / rate + (bits / 8 + 4) / gpu.bytes_per_cycle) / gpu.sms


def worthwhile(gpu: Gpu, m: int, n: int, k: int, bits: int, group: int) -> list[Tiling]:
    """The tilings that are estimated to beat the dense path, the best first."""
    dense = dense_cycles(gpu, m, n, k, bits)
    found = candidates(gpu, m, n, k, bits, group_block(group, k))
    return sorted((one for one in found if one.cycles <= dense), key=lambda one: one.cycles)


def make(gpu: Gpu, m: int, n: int, k: int, bits: int, group: int) -> Tiling | None:
    """The tiling to run, or None where K is beyond the kernel's arithmetic or the dense path is estimated faster."""
    found = worthwhile(gpu, m, n, k, bits, group) if k <= MAX_IN_FEATURES else []
    return found[0] if found else None
