"""The CPU kernel against its alternatives, in one run: python benchmarks/cpu_kernel.py [--csv FILE] [--threads T]

y = x . W^T in bfloat16, group 64, through the operator (what a model pays, Python included), for several N x K and M:

    flute nf4, nf3, nf2       torch.ops.flute.lut_linear (in pairs: a table of 256 random pairs)
    dequantize + matmul       torch.ops.flute.dequantize, then torch's linear: what the kernel must not be slower than
    torch                     torch's linear on a dense weight
    bitsandbytes nf4          bitsandbytes' Linear4bit for M of 1 and 16, where the package is installed

Contenders take turns, so that a busy moment of the machine hits them all. A line gives the median and best
time and the median over rounds of time / time of flute nf4 in the same round: above 1, flute is faster.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import flute
from flute.bench.machine import processor
from flute.kernels import cpu, ops  # noqa: F401  (ops makes torch.ops.flute)
from flute.tables import named_table

GROUP = 64
SHAPES = [
    "14336x4096",
    "4096x4096",
    "576x576",
    "1536x576",
    "576x1536",
    "192x576",
    "49152x576",
]  # Llama-3-8B, SmolLM2-135M
OURS = "flute nf4"
Call = Callable[[torch.Tensor], torch.Tensor]


def lut_calls(n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Random codes and scales; the time does not depend on them."""
    tables = {f"nf{bits}": named_table(f"nf{bits}") for bits in (4, 3, 2)} | {"4 bits in pairs": torch.randn(256, 2)}
    for name, bits in (("nf4", 4), ("nf3", 3), ("nf2", 2), ("4 bits in pairs", 4)):
        weight = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
        scales, table = torch.rand(n, k // GROUP).to(dtype), tables[name].to(dtype)
        tensors, sizes = (weight, scales, table), (n, bits, GROUP)
        yield f"flute {name}", lambda x, t=tensors, s=sizes: torch.ops.flute.lut_linear(x, *t, None, *s)
        if name == "nf4":
            yield (
                "dequantize + matmul",
                lambda x, t=tensors: torch.nn.functional.linear(x, torch.ops.flute.dequantize(*t, n, k, 4, GROUP)),
            )


def bitsandbytes_call(dense: torch.Tensor) -> Call:
    """bitsandbytes' layer as its users run it on a CPU: NF4, blocks of 64, in evaluation mode."""
    import bitsandbytes

    (n, k), dtype = dense.shape, dense.dtype
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        dense, requires_grad=False, quant_type="nf4", blocksize=GROUP, compress_statistics=False
    )
    return layer.to("cpu").eval()


def measure(calls: dict[str, Call], x: torch.Tensor, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns, after one call to warm up; 5 to 200 rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(x)
    end = time.perf_counter() + seconds
    while len(times[OURS]) < 5 or (time.perf_counter() < end and len(times[OURS]) < 200):
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure, print, and write the CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K, as 4096x4096")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each N x K and M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if not cpu.available():
        raise SystemExit(cpu.build_hint())
    torch.set_num_threads(options.threads)
    dtype, peer = getattr(torch, options.dtype), importlib.util.find_spec("bitsandbytes") is not None
    machine = f"{processor()}, {options.threads} threads, instruction set {cpu.best()}, load {os.getloadavg()[0]:.1f}"
    versions = f"flute {flute.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    versions += f", bitsandbytes {importlib.metadata.version('bitsandbytes')}" if peer else ""
    today = datetime.date.today().isoformat()
    print(f"{machine}; {versions}; {today}; {options.dtype}, group {GROUP}; ms, median (best), ratio to {OURS}")
    rows = []
    for shape in options.shapes:
        n, k = map(int, shape.split("x"))
        dense = torch.randn(n, k).to(dtype)
        calls = {f"torch {options.dtype}": lambda x, dense=dense: torch.nn.functional.linear(x, dense)}
        calls |= dict(lut_calls(n, k, dtype))
        slow = {"bitsandbytes nf4": bitsandbytes_call(dense)} if peer else {}
        for m in options.tokens:
            with torch.inference_mode():
                times = measure(calls | (slow if m in (1, 16) else {}), torch.randn(m, k).to(dtype), options.seconds)
            for name, each in times.items():
                ratio = statistics.median(a / b for a, b in zip(each, times[OURS], strict=True))
                figures = [f"{statistics.median(each):.4f}", f"{min(each):.4f}", f"{ratio:.3f}", len(each)]
                print(f"{shape:11} M={m:<3} {name:22} {figures[0]:>9} ({figures[1]}) {ratio:6.2f}", flush=True)
                rows.append([today, machine, versions, options.dtype, n, k, GROUP, m, name, *figures])
    if options.csv:
        with options.csv.open("w", newline="") as file:
            header = ["date", "machine", "versions", "dtype", "N", "K", "group", "M", "kernel"]
            header += ["median_ms", "best_ms", "ratio_to_flute_nf4", "rounds"]
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
