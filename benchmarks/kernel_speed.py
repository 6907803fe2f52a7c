"""Time of the operator beside torch's dense matmul, in one run, as one CSV.

    python benchmarks/kernel_speed.py --output benchmarks/results/kernel_speed_h100.csv

fp16, group 64, any table; weights rotate through copies beyond three times the L2 cache; CUDA graphs replayed in turns;
medians.
``ratio`` is dense over flute: above 1 flute is faster. ``ceiling_share`` is (codes + scales) / time over the read
ceiling of the same GPU measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2, read_ceiling, rotating_weights
from flute.kernels.ops import lut_linear
from flute.spec import QuantSpec

Call = Callable[[], torch.Tensor]
SHAPES = [
    (4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (28672, 8192),
    (128256, 4096),
]  # fmt: skip
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]


def calls(n: int, k: int, spec: QuantSpec, m: int, dtype: torch.dtype) -> tuple[list[Call], list[Call]]:
    """torch's matmul, and the operator, on rotating weights."""
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    dense = [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(copies_beyond_l2(2 * n * k))]
    copies, table = rotating_weights(n, k, spec, dtype)
    ours = [partial(lut_linear, x, weight, scales, table, spec=spec, out_features=n) for weight, scales in copies]
    return [partial(F.linear, x, weight) for weight in dense], ours


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    dtype, ceiling = getattr(torch, arguments.dtype), read_ceiling()
    head = f"{describe()}; {arguments.dtype}, group {arguments.group_size}, read ceiling {ceiling / 1e12:.2f} TB/s"
    print(head)
    with open(arguments.output, "w", newline="") as file:
        file.write(f"# {head}\n")
        writer = csv.writer(file)
        writer.writerow(["n", "k", "bits", "m", "dense_us", "flute_us", "ratio", "ceiling_share"])
        for n, k in SHAPES:
            for bits in arguments.bits:
                spec, ratios = QuantSpec(bits, arguments.group_size, "custom"), []
                traffic = n * (spec.row_bytes(k) + 2 * spec.num_groups(k))
                for m in TOKENS:
                    dense, ours = compare(*calls(n, k, spec, m, dtype), replays=20 if m <= 256 else 8)
                    share = traffic / (1e-6 * ours) / ceiling
                    writer.writerow(
                        [n, k, bits, m, f"{dense:.2f}", f"{ours:.2f}", f"{dense / ours:.2f}", f"{share:.2f}"]
                    )
                    ratios.append(f"{m}:{dense / ours:.2f}")
                print(f"{n}x{k} {bits}bit  dense over flute by M  {'  '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
