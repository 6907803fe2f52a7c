"""The CPU kernel against torch's dense matmul, in one run: python benchmarks/cpu_kernel.py [--csv FILE] [--threads T]

y = x . W^T for N=14336, K=4096, group 64: 4 bits (a table of 16 floats, as NF4), 3 bits, 2 bits, and pairs at 4 bits.
A line is the median and the best of `--repeats` calls; contenders take turns, so that a busy moment of the machine hits
them all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import flute
from flute.bench.machine import processor
from flute.kernels import cpu

N, K, GROUP = 14336, 4096, 64


def contenders(tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> one call, all of them on random weights of the same shape."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        x, dense = torch.randn(tokens, K).to(dtype), torch.randn(N, K).to(dtype)
        calls[f"torch {name}"] = lambda x=x, dense=dense: torch.nn.functional.linear(x, dense)
        for bits, vector in ((4, 1), (3, 1), (2, 1), (4, 2)):
            weight = torch.randint(0, 256, (N, K * bits // 8), dtype=torch.uint8)
            scales = torch.rand(N, K // GROUP).to(dtype)
            table = torch.randn((1 << bits,) if vector == 1 else (1 << 2 * bits, 2)).to(dtype)
            calls[f"flute {name} {bits} bits{' in pairs' if vector == 2 else ''}"] = (
                lambda x=x, weight=weight, scales=scales, table=table, bits=bits, vector=vector: cpu.lut_linear(
                    x, weight, scales, table, None, bits=bits, group_size=GROUP, vector_size=vector
                )
            )
    return calls


def measure(calls: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure, print, and write the CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--library", type=Path, help="a compiled _cpu.c that is not beside flute/kernels/cpu.py")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.library:
        cpu.load(options.library)
    if not cpu.available():
        raise SystemExit(cpu.build_hint())
    torch.set_num_threads(options.threads)
    machine = f"{processor()}, {options.threads} threads"
    versions = f"flute {flute.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    today = datetime.date.today().isoformat()
    print(f"{machine}; {versions}; {today}; N={N} K={K} group={GROUP}; ms, median (best) of {options.repeats}")
    rows = []
    for tokens in (1, 4, 16):
        for name, times in measure(contenders(tokens), options.repeats).items():
            median, best = statistics.median(times), min(times)
            print(f"M={tokens:<3} {name:28} {median:8.2f} ({best:.2f})")
            rows.append([today, machine, versions, N, K, GROUP, tokens, name, f"{median:.3f}", f"{best:.3f}"])
    if options.csv:
        with options.csv.open("w", newline="") as file:
            header = ["date", "machine", "versions", "N", "K", "group", "M", "kernel", "median_ms", "best_ms"]
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
