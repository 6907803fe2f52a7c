"""Time of a mixture's two grouped matmuls beside torch's dense grouped matmul, in one run, as one CSV.

    python benchmarks/grouped_speed.py --output benchmarks/results/grouped_speed_h100.csv

bf16, 4 bits, group 64, any table. Every token goes to ``top_k`` different experts, evenly by chance; rows are sorted,
offsets lie on the device. Calls of a graph differ in routing and in which of two stacks they use, and are as many as
it takes to read three times the L2 cache; graphs are replayed in turns; medians. ``ratio`` is dense over flute: above 1
flute is faster. ``active_share`` is codes and scales of the experts that have tokens / time over the read ceiling
measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial
from typing import NamedTuple

import torch

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2, read_ceiling
from flute.kernels.grouped import lut_grouped_linear
from flute.kernels.layout import TILE_ROWS, packed_shape
from flute.spec import QuantSpec


class Mixture(NamedTuple):
    """E experts of which every token takes top_k; the two weights (N, K) of an expert."""

    name: str
    experts: int
    top_k: int
    shapes: tuple[tuple[int, int], tuple[int, int]]


MIXTURES = [
    Mixture("Mixtral-8x7B", 8, 2, ((28672, 4096), (4096, 14336))),
    Mixture("Qwen3-30B-A3B", 128, 8, ((1536, 2048), (2048, 768))),
]
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
STACKS = 2


def routing(mixture: Mixture, tokens: int, seed: int) -> torch.Tensor:
    """Ends of the experts' rows, int32 (E,) on the GPU."""
    made = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, mixture.experts, generator=made).topk(mixture.top_k, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=mixture.experts).cumsum(0).int().cuda()


def stacks(mixture: Mixture, n: int, k: int, spec: QuantSpec, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Random codes and scales in kernel order."""
    shape = (mixture.experts, *packed_shape(n, k, spec.bits))
    return [
        (
            torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8),
            torch.rand(mixture.experts, shape[1], spec.num_groups(k), TILE_ROWS, device="cuda").to(dtype),
        )
        for _ in range(STACKS)
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    spec, dtype, ceiling = QuantSpec(arguments.bits, arguments.group_size, "custom"), torch.bfloat16, read_ceiling()
    head = f"{describe()}; bfloat16, {spec}, read ceiling {ceiling / 1e12:.2f} TB/s; {' '.join(sys.argv)}"
    print(head)
    with open(arguments.output, "w", newline="") as file:
        file.write(f"# {head}\n")
        writer = csv.writer(file)
        writer.writerow(
            ["model", "n", "k", "tokens", "rows", "active", "dense_us", "flute_us", "ratio", "active_share"]
        )
        for mixture in MIXTURES:
            for n, k in mixture.shapes:
                dense = [torch.randn(mixture.experts, n, k, device="cuda", dtype=dtype) for _ in range(STACKS)]
                ours, table = stacks(mixture, n, k, spec, dtype), torch.randn(spec.table_shape, device="cuda").to(dtype)
                each, line = n * (spec.row_bytes(k) + 2 * spec.num_groups(k)), []
                for tokens in TOKENS:
                    rows = tokens * mixture.top_k
                    x = torch.randn(rows, k, device="cuda", dtype=dtype)
                    calls = copies_beyond_l2(min(rows, mixture.experts) * each)
                    ends = [routing(mixture, tokens, seed) for seed in range(calls)]
                    active = sum(int((e.diff(prepend=e.new_zeros(1)) > 0).sum()) for e in ends) / calls
                    theirs_us, ours_us = compare(
                        [partial(torch._grouped_mm, x, dense[i % STACKS].transpose(1, 2), offs=e)
                         for i, e in enumerate(ends)],
                        [partial(lut_grouped_linear, x, *ours[i % STACKS], table, e, spec=spec, out_features=n)
                         for i, e in enumerate(ends)],
                        replays=20 if tokens <= 256 else 8,
                    )  # fmt: skip
                    share = active * each / (1e-6 * ours_us) / ceiling
                    figures = [f"{active:.1f}", f"{theirs_us:.2f}", f"{ours_us:.2f}", f"{theirs_us / ours_us:.2f}"]
                    writer.writerow([mixture.name, n, k, tokens, rows, *figures, f"{share:.2f}"])
                    line.append(f"{tokens}:{theirs_us:.1f}/{ours_us:.1f}={theirs_us / ours_us:.2f}")
                print(f"{mixture.name} {n}x{k}  dense/flute us by tokens  {'  '.join(line)}", flush=True)
                del dense, ours
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
