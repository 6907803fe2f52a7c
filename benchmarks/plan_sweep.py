"""Times of many plans of both CUDA kernels, beside what the planner estimates for them, as one CSV.

    python benchmarks/plan_sweep.py --output benchmarks/results/plan_sweep_h100.csv [--bits 4 3 2]

The factors in ``flute/kernels/plan.py`` and ``tiles.py`` were fitted to such a file. fp16, group 64; weights rotate
through at most 24 copies; the median of five replays of a CUDA graph, in turns with all plans of the problem and dense.
Kernels are compiled before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F

from flute.bench import timing
from flute.bench.machine import describe
from flute.kernels import choice, cuda, plan, tiles
from flute.spec import QuantSpec

SHAPES = [
    (4096, 4096), (1024, 4096), (6144, 4096), (4096, 14336), (8192, 8192), (28672, 4096), (2048, 2048), (28672, 8192),
]  # fmt: skip
TOKENS = {4: [1, 4, 8, 16, 32, 64, 128, 256, 1024], 2: [1, 4, 8, 16, 32, 64, 128, 256, 1024], 3: [1, 8, 16, 64, 256]}
COPIES, LARGEST = 24, 1.3e11
FIELDS = (
    "tokens", "rows", "ways", "split", "blocks", "stages", "row_tiles", "clusters", "passes", "per_sm", "boxes", "wide",
    "span", "cut",
)  # fmt: skip


def contestants(gpu: plan.Gpu, m: int, n: int, k: int, bits: int) -> list[plan.Plan | tiles.Tiling]:
    """The three most promising plans of each kind of decode kernel, and the twelve most promising tilings."""
    kinds: dict[tuple[int, int, bool], list[plan.Plan]] = {}
    if m <= choice.DECODE_TOKENS:
        for one in plan.candidates(gpu, m, n, k, bits, 64):
            kinds.setdefault((one.row_tiles, one.per_sm, one.wide), []).append(one)
    tilings = sorted(tiles.candidates(gpu, m, n, k, bits, 64), key=lambda one: one.cycles) if m >= 8 else []
    return [*(one for plans in kinds.values() for one in plans[:3]), *tilings[:12]]


def main() -> None:
    """Compile, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    gpu = cuda.gpu(0)
    problems = [
        (n, k, bits, m) for n, k in SHAPES for bits in arguments.bits for m in TOKENS[bits] if n * k * m <= LARGEST
    ]
    for bits in arguments.bits:
        every = [one for n, k, some, m in problems if some == bits for one in contestants(gpu, m, n, k, bits)]
        cuda.compile_ahead(0, every, bits, False)
    ceiling = timing.read_ceiling()
    with open(arguments.output, "w", newline="") as file:
        file.write(f"# {describe()}; float16, group 64, read ceiling {ceiling / 1e12:.2f} TB/s\n")
        writer = csv.writer(file)
        writer.writerow(["kernel", "n", "k", "bits", "m", "dense_us", "us", "estimated_cycles", *FIELDS])
        for (n, k, bits), group in itertools.groupby(problems, key=lambda problem: problem[:3]):
            copies, table = timing.rotating_weights(n, k, QuantSpec(bits, 64, "custom"), torch.float16, COPIES)
            dense = [torch.randn(n, k, device="cuda").half() for _ in copies]
            for *_, m in group:
                x = torch.randn(m, k, device="cuda").half()
                found = contestants(gpu, m, n, k, bits)
                run = partial(cuda.lut_linear, x)
                calls = [[partial(run, w, s, table, None, n, bits, 64, forced=one) for w, s in copies] for one in found]
                base, *spent = timing.compare([partial(F.linear, x, weight) for weight in dense], *calls, replays=5)
                for one, us in zip(found, spent, strict=True):
                    kernel, plain = "matmul" if isinstance(one, tiles.Tiling) else "decode", asdict(one)
                    fields = [plain.get(field, "") for field in FIELDS]
                    writer.writerow([kernel, n, k, bits, m, f"{base:.2f}", f"{us:.2f}", int(one.cycles), *fields])
                file.flush()


if __name__ == "__main__":
    main()
