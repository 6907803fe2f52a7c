"""What a call costs beside the kernel, eager, compiled and in CUDA graphs; layers of one x apart and in one launch.

    python benchmarks/dispatch.py --tree after --output benchmarks/results/dispatch_h100.csv

``--append`` adds to a file, so that the same script can measure two trees (PYTHONPATH says which flute is imported).
fp16, 4 bits, group 64, one decoder layer's shapes of Llama 3.1 8B. Rows:

* call: one layer of 1024 x 1024, whose kernel is shorter than any dispatch; microseconds of the host per call, median
  of batches that the GPU's queue holds. ``compiled`` is torch.compile's default, sixteen layers one after the other.
* group: q, k, v (4096, 1024, 1024 x 4096) and gate, up (14336 x 4096), per group: ``eager`` is host time as above,
  ``graph`` GPU time in a replayed graph over copies beyond the L2 cache (see `flute.bench.timing`).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2
from flute.linear import LutLinear
from flute.spec import QuantSpec

try:
    from flute.integrations.fusion import fuse
except ImportError:  # a tree from before there was one
    fuse = None

GROUPS = {
    "qkv": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024},
    "gate_up": {"gate_proj": 14336, "up_proj": 14336},
}
TOKENS = (1, 16)
DEEP, BATCH, BATCHES = 16, 128, 40


def lut(n: int, k: int) -> LutLinear:
    """A layer of random codes and scales."""
    layer = LutLinear(k, n, QuantSpec(), device="cuda", dtype=torch.float16)
    layer.weight.data.random_(0, 256)
    layer.scales.data.uniform_(0.01, 0.02)
    return layer.arrange()


class Group(nn.Module):
    """Layers of one x."""

    def __init__(self, rows: dict[str, int], k: int = 4096) -> None:
        super().__init__()
        for name, n in rows.items():
            setattr(self, name, lut(n, k))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One y each."""
        return [layer(x) for layer in self.children()]


def host_microseconds(call: Callable[[], Any], calls: int = BATCH) -> float:
    """Host time of one call, as long as the GPU is not waited for."""
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begun) / calls * 1e6)
    return statistics.median(times)


def call_rows(row: Callable[..., None]) -> None:
    """One layer: torch's and ours."""
    layers = {
        "nn.Linear": nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.float16),
        "LutLinear": lut(1024, 1024),
    }
    for name, layer in layers.items():
        deep = nn.Sequential(*[layer] * DEEP)
        compiled = torch.compile(deep, fullgraph=True)
        for m in TOKENS:
            x = torch.randn(m, 1024, device="cuda", dtype=torch.float16)
            row("call", name, "1024x1024", m, "eager", host_microseconds(partial(layer, x)))
            row("call", name, "1024x1024", m, "graph", compare([partial(layer, x)] * DEEP)[0])
            compiled(x)
            row("call", name, "1024x1024", m, "compiled", host_microseconds(partial(compiled, x), BATCH // DEEP) / DEEP)


def group_rows(row: Callable[..., None]) -> None:
    """Groups, apart and in one launch."""
    for name, rows in GROUPS.items():
        each = sum(rows.values()) * 4096 // 2
        apart = [Group(rows) for _ in range(copies_beyond_l2(each))]
        joined = [Group(rows) for _ in apart] if fuse else []
        for group in joined:
            fuse(group)
            assert next(group.children()).together.joined
        for m in TOKENS:
            x = torch.randn(m, 4096, device="cuda", dtype=torch.float16)
            contestants = {"apart": apart, "one launch": joined} if joined else {"apart": apart}
            times = compare(*[[partial(group, x) for group in groups] for groups in contestants.values()])
            for kind, groups, found in zip(contestants, contestants.values(), times, strict=True):
                row("group", kind, name, m, "eager", host_microseconds(partial(groups[0], x), BATCH // 4))
                row("group", kind, name, m, "graph", found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--tree", required=True, help="a name for the code that is measured")
    parser.add_argument("--append", action="store_true")
    arguments = parser.parse_args()
    new = not (arguments.append and Path(arguments.output).exists())
    with open(arguments.output, "w" if new else "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            file.write(f"# {describe()}\n")
        file.write(f"# python {' '.join(sys.argv)}\n")
        if new:
            writer.writerow(["tree", "what", "kind", "shape", "m", "mode", "microseconds"])

        def row(*values: Any) -> None:
            *labels, microseconds = values
            writer.writerow([arguments.tree, *labels, f"{microseconds:.2f}"])
            print(arguments.tree, *labels, f"{microseconds:.2f}", flush=True)

        with torch.no_grad():
            call_rows(row)
            group_rows(row)


if __name__ == "__main__":
    main()
