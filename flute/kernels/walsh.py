"""How the Hadamard kernel (``cuda/hadamard.cu``) cuts its work, and the signs of the factors 12, 20, 28 as device text.

A block of n = m 2^k is read as (radix, 2^log): the radix is m times the top bits that 2^log leaves. Three phases with
an exchange through shared memory between them; a thread holds in float32 pairs of neighbours times

    1. the radix               pairs of a column, straight from x
    2. 16                      a run of 32 neighbours: the low five bits of log
    3. 2^(log - 5)             pairs of a column of runs: the remaining bits, straight to y

Several blocks of x make a chunk where they are small, so that a thread has something to do. Where GPUs have clusters,
``split`` blocks of threads may share a chunk: each reads its share of the columns and owns its share of the radix.

Blocks of 8 to 1024 without a factor need none of that: a warp holds one or more of them in registers, eight neighbours
of a lane times ``vectors``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from ..hadamard import conference, split

_RUN = 32  # neighbours of phase 2
_CHUNK = 1024  # the fewest elements of a chunk
_WARP = 1024  # the largest size that a warp does alone
_AHEAD_BYTES = 57344  # of x for each SM, between what a block reads and what it fetches for later
_FETCHING = 4096  # the smallest size for which that was of use


@dataclass(frozen=True)
class Cut:
    """One launch: ``batch`` transforms of (factor * 2**top) x 2**log by ``threads`` x ``split`` threads.

    ``vectors``: of eight neighbours, that each lane of a warp holds; 0 where threads meet in shared memory.
    """

    factor: int
    top: int
    log: int
    batch: int
    threads: int
    split: int
    vectors: int = 0

    @property
    def size(self) -> int:
        """n, elements of a transform."""
        return self.factor << self.top + self.log

    @property
    def chunk(self) -> int:
        """Elements of a chunk."""
        return self.size * self.batch

    @property
    def shared_bytes(self) -> int:
        """Of one thread block."""
        return 0 if self.vectors else 4 * self.chunk // self.split

    def macros(self, dtype: str) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with; dtype is "float16", "bfloat16" or "float32"."""
        (scale,) = struct.unpack("<I", struct.pack("<f", 1 / math.sqrt(self.size)))
        return (
            ("BF16", int(dtype == "bfloat16")),
            ("FP32", int(dtype == "float32")),
            ("FACTOR", self.factor),
            ("TOP", self.top),
            ("LOG", self.log),
            ("BATCH", self.batch),
            ("THREADS", self.threads),
            ("SPLIT", self.split),
            ("VECTORS", self.vectors),
            ("SCALE", scale),
        )


def cut(size: int, parts: int = 1, threads: int | None = None) -> Cut | None:
    """How a block of ``size`` is cut; None for 1, 12, 20, 28, which have no pairs of neighbours.

    Args:
        parts: thread blocks that share one transform.
        threads: of each; what `_threads` finds if None.
    """
    factor, bits = split(size)
    if bits == 0:
        return None
    if factor == 1 and 8 <= size <= _WARP and parts == 1:
        vectors = max(1, size // 256)
        threads = threads or _CHUNK // (8 * vectors)
        return Cut(1, 0, bits, threads * vectors * 8 // size, threads, 1, vectors)
    log = min(10, bits if factor > 1 else max(bits - 4, min(bits, 5)))
    radix = factor << bits - log
    batch = 1 if parts > 1 else 1 << max(0, math.ceil(math.log2(_CHUNK / size)))
    return Cut(factor, bits - log, log, batch, threads or _threads(radix, log, size * batch, parts), parts)


def choose(size: int, elements: int, sms: int, shared_limit: int, clusters: bool) -> Cut | None:
    """The launch for x of so many elements; None where only plain torch can do it.

    Clusters where transforms are large and either too few for all SMs, or so large that one would fill an SM.
    """
    parts = 1
    if clusters and size > 12288 and 4 * (elements // size) <= sms:
        parts = 4
    elif clusters and size > 24576:
        parts = 2
    found = cut(size, parts)
    return found if found is not None and found.shared_bytes <= shared_limit else None


def ahead(size: int, item_bytes: int, sms: int) -> int:
    """How many chunks later the one is that a block fetches into the L2 cache; 2^40 for none."""
    return sms * max(1, _AHEAD_BYTES // (size * item_bytes)) if size >= _FETCHING else 1 << 40


def _threads(radix: int, log: int, elements: int, parts: int) -> int:
    """The number of threads that leaves the fewest idle in the three phases' passes; of equals what is next to 256.

    At most 128 values a thread in phase 2, and small blocks in clusters, where several share an SM.
    """
    mine = elements // parts
    values = (2 * radix, _RUN, 2 << max(0, log - 5))

    def idle(threads: int) -> int:
        return sum(math.ceil(mine / each / threads) * threads * each for each in values)

    least = max(min(128, mine // _RUN), mine // 112 if parts == 1 else 0)
    most = max(32, min(512 if parts == 1 else 128, mine // _RUN))
    return min(range(-(-least // 32) * 32, -(-most // 32) * 32 + 1, 32), key=lambda n: (idle(n), abs(n - 256)))


def device_header(factor: int) -> str:
    """CUDA C++: for row i of the conference matrix of a factor, the set of columns that are -1 as a word of bits."""
    rows = conference(factor) if factor > 1 else ()
    words = [sum(1 << j for j, value in enumerate(row) if value < 0) for row in rows]
    lines = [
        f"[[maybe_unused]] constexpr int HALF = {len(rows)};",
        "__device__ __forceinline__ constexpr unsigned negative(int row) {",
        "  switch (row) {  // always a constant after unrolling",
    ]
    lines += [f"    case {row}: return 0x{word:x}u;" for row, word in enumerate(words)]
    return "\n".join([*lines, "  }", "  return 0;", "}", ""])
