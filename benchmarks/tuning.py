"""What tuning gains over the analytic choice, and whether its winners also win inside their bucket of M; one CSV.

    python benchmarks/tuning.py --output benchmarks/results/tuning_h100.csv [--bits 4 3 2] [--seconds 170]

fp16, group 64, any table. Every (shape, bits, M) is tuned as ``flute tune`` does it: ``analytic_us``, ``us`` and
``gain`` at the last M of the bucket, no winner where the analytic choice stays. Winners are then timed beside the
analytic choice at another M of the bucket, ``inside_m``: ``inside_gain`` above 1 says that the winner is faster there
too, and ``followed`` whether it is what runs there.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from functools import partial

import torch

from flute.bench import timing, tuning
from flute.bench.machine import describe
from flute.kernels import choice, cuda, tuned
from flute.spec import CUSTOM_TABLE, QuantSpec

SHAPES = [
    (4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (28672, 8192),
]  # fmt: skip
TOKENS = {1: None, 4: 3, 16: 12, 64: 50, 256: 200, 1024: 700}  # last M of a bucket: another M of it


def inside(problem: tuned.Problem, winner: str, m: int) -> dict[str, object]:
    """The analytic choice beside the winner at ``m``; nothing where the winner is not legal there."""
    _, n, k, bits, group, _ = problem
    found = choice.contestants(cuda.gpu(0), m, n, k, bits, group)
    rivals = [found[0], *(one for one in found if one.label == winner)]
    if len(rivals) == 1:
        return {"inside_m": m, "followed": 0}
    copies, table = timing.rotating_weights(n, k, QuantSpec(bits, group, CUSTOM_TABLE), torch.float16, 24)
    x = torch.randn(m, k, device="cuda").half()
    calls = [
        [partial(cuda.lut_linear, x, *weight, table, None, n, bits, group, forced=one) for weight in copies]
        for one in rivals
    ]
    base, won = timing.compare(*calls, replays=25)
    return {
        "inside_m": m, "inside_analytic_us": f"{base:.2f}", "inside_winner_us": f"{won:.2f}",
        "inside_gain": f"{base / won:.3f}", "followed": int(cuda.choose(0, m, n, k, bits, group) == rivals[1]),
    }  # fmt: skip


def measured(shape: tuple[int, int], bits: int, seconds_end: float) -> list[dict[str, object]]:
    """The rows of one shape and width."""
    rows = []
    wanted = tuning.problems([shape], TOKENS, QuantSpec(bits, 64, CUSTOM_TABLE), torch.float16)
    for problem in wanted:
        if time.monotonic() > seconds_end:
            break
        (result,) = tuning.tune([problem], again=True)
        verdict = result.verdict
        assert verdict is not None, result
        row: dict[str, object] = {
            "n": problem.n, "k": problem.k, "bits": bits, "m": problem.m, "analytic": result.analytic,
            "analytic_us": f"{verdict.analytic_us:.2f}", "us": f"{verdict.us:.2f}", "gain": f"{result.gain:.3f}",
            "winner": verdict.plan or "", "first": verdict.first, "tried": result.measured, "wrong": len(result.wrong),
            "inside_m": "", "inside_analytic_us": "", "inside_winner_us": "", "inside_gain": "", "followed": "",
        }  # fmt: skip
        other = TOKENS[problem.m]
        if verdict.plan and other:
            row |= inside(problem, verdict.plan, other)
        rows.append(row)
    return rows


def main() -> None:
    """Tune, print a line per shape and width, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further problem after so long")
    arguments = parser.parse_args()
    begun, gains = time.monotonic(), []
    with open(arguments.output, "w", newline="") as file:
        file.write(f"# {describe()}; float16, group 64; python benchmarks/tuning.py --bits {arguments.bits}\n")
        writer: csv.DictWriter | None = None
        for bits in arguments.bits:
            for shape in SHAPES:
                rows = measured(shape, bits, begun + arguments.seconds)
                for row in rows:
                    if writer is None:
                        writer = csv.DictWriter(file, row)
                        writer.writeheader()
                    writer.writerow(row)
                file.flush()
                gains += [float(str(row["gain"])) for row in rows]
                told = "  ".join(f"{row['m']}:{row['gain']}" for row in rows)
                print(
                    f"{shape[0]}x{shape[1]} {bits}bit  gain by M  {told}  ({time.monotonic() - begun:.0f} s)",
                    flush=True,
                )
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    print(f"{len(gains)} problems, geometric mean {mean:.3f}, most {max(gains):.3f}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
