"""Time of the likeliest tilings of every problem of grouped_speed.py: what the planner's choice of them loses.

    python benchmarks/grouped_sweep.py --output benchmarks/results/grouped_sweep_h100.csv

Of each problem the eight tilings with the best estimate, and the best of every width; bf16, 4 bits, group 64.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from functools import partial

import torch
from grouped_speed import MIXTURES, STACKS, TOKENS, Mixture, routing, stacks

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2
from flute.kernels import cuda, plan, stacked, tiles
from flute.spec import QuantSpec

_BEST, _CALLS, _HOPELESS = 8, 16, 2.0


def candidates(gpu: plan.Gpu, mixture: Mixture, n: int, k: int, tokens: int) -> list[tiles.Tiling]:
    """Tilings worth timing, the best estimate first."""
    found = sorted(
        tiles.candidates_grouped(gpu, tokens * mixture.top_k, mixture.experts, n, k, 4, 64), key=lambda one: one.cycles
    )
    kept = found[:_BEST]
    for width in sorted({one.tokens for one in found}):
        kept += [one for one in found if one.tokens == width and one.cycles < _HOPELESS * found[0].cycles][:1]
    return list(dict.fromkeys(kept))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    gpu, spec, dtype = cuda.gpu(0), QuantSpec(4, 64, "custom"), torch.bfloat16
    losses = []
    with open(arguments.output, "w", newline="") as file:
        file.write(f"# {describe()}; bfloat16, {spec}; {' '.join(sys.argv)}\n")
        writer = csv.writer(file)
        writer.writerow(["n", "k", "experts", "rows", "tokens", "tile_rows", "ways", "wide", "cycles", "us"])
        for mixture in MIXTURES:
            for n, k in mixture.shapes:
                ours, table = stacks(mixture, n, k, spec, dtype), torch.randn(16, device="cuda").to(dtype)
                each = n * (spec.row_bytes(k) + 2 * spec.num_groups(k))
                for tokens in TOKENS:
                    rows, found = tokens * mixture.top_k, candidates(gpu, mixture, n, k, tokens)
                    cuda.compile_ahead(0, found, 4, True)
                    x = torch.randn(rows, k, device="cuda", dtype=dtype)
                    calls = min(_CALLS, copies_beyond_l2(min(rows, mixture.experts) * each))
                    ends = [routing(mixture, tokens, seed) for seed in range(calls)]
                    run = partial(stacked.lut_grouped_linear, x)
                    timed = compare(
                        *([partial(run, *ours[i % STACKS], table, None, e, n, 4, 64, forced=one)
                           for i, e in enumerate(ends)] for one in found),
                        replays=5,
                    )  # fmt: skip
                    for one, us in zip(found, timed, strict=True):
                        sizes = [one.tokens, one.rows, one.ways, int(one.wide), int(one.cycles)]
                        writer.writerow([n, k, mixture.experts, rows, *sizes, f"{us:.2f}"])
                    best = found[timed.index(min(timed))]
                    losses.append(timed[0] / min(timed))
                    chosen = f"chosen {found[0].tokens, found[0].rows, found[0].ways}"
                    print(f"{n}x{k} {tokens}: {chosen} {timed[0]:.1f} best {best.tokens, best.rows, best.ways} "
                          f"{min(timed):.1f}", flush=True)  # fmt: skip
    mean = math.exp(sum(map(math.log, losses)) / len(losses))
    print(f"the choice takes {mean:.3f} times the best on average, {max(losses):.3f} at worst")


if __name__ == "__main__":
    main()
