"""Time of the Hadamard transform beside a copy of the same bytes and beside the published design, in one run, as CSV.

    python benchmarks/hadamard_speed.py --output benchmarks/results/hadamard_speed_h100.csv

x (m, k) rotated in blocks of ``size``; inputs and outputs rotate through buffers beyond three times the L2 cache where
m is large (at most 64 of them, so for few tokens they lie in it, as activations do); CUDA graphs replayed in turns;
medians. ``copy_us`` is torch's ``copy_``, ``share_of_copy`` is copy_us / flute_us: 1 is the speed of the memory.

``published_us`` is not a package: it is `hadamard_published.cu`, our own kernel after the design that Dao-AILab's
fast-hadamard-transform publishes (one block of threads a row, everything in registers, two exchanges through shared
memory, shuffles), with the same numbers of threads and elements, as that package is built from source only. Its README
states, for an A100 and "not too small" batches in 16 bits, 1.0 times the time of a copy up to 512, at most 1.2 up to
8192, 1.3 at 16384 and 1.8 at 32768.
"""

from __future__ import annotations

import argparse
import csv
import math
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2, rotating_weights
from flute.hadamard import matrix, split, transform
from flute.kernels import cuda, jit
from flute.kernels.hadamard import hadamard
from flute.kernels.ops import lut_linear
from flute.spec import QuantSpec

Call = Callable[[], object]
# (size, k)
PROBLEMS = [
    (128, 4096), (512, 4096), (1024, 4096), (4096, 4096), (5120, 5120), (6144, 6144), (8192, 8192), (512, 14336),
    (14336, 14336), (16384, 16384), (20480, 20480), (24576, 24576), (1024, 28672), (28672, 28672), (32768, 32768),
]  # fmt: skip
TOKENS = [1, 16, 256, 4096]


@cache
def published(size: int) -> tuple[Any, int] | None:
    """The stand-in's kernel and its number of threads; None for sizes that the design has no row for."""
    factor, log = split(size)
    if factor > 1:
        each, threads, chunks = 4, (1 << log) // 4, factor
        if log > 10:
            return None
    else:
        each, threads = 8, {7: 16, 8: 32, 9: 32, 10: 128}.get(log, 256)
        chunks = size // (8 * threads)
    if threads < 32:
        return None
    (scale,) = struct.unpack("<I", struct.pack("<f", 1 / math.sqrt(size)))
    given = {"FACTOR": factor, "EACH": each, "CHUNKS": chunks, "THREADS": threads, "SCALE": scale, "BF16": 0}
    folder = Path(jit.__file__).parent / "cuda"
    rows = matrix(factor).lt(0).long() @ (1 << torch.arange(factor)) if factor > 1 else []
    signs = "".join(f"    case {i}: return {int(row)}u;\n" for i, row in enumerate(rows))
    text = "\n".join([
        *(f"#define {name} {value}" for name, value in given.items()), (folder / "types.cuh").read_text(),
        f"__device__ __forceinline__ constexpr unsigned minus(int row) {{ switch (row) {{ {signs} }} return 0; }}",
        (Path(__file__).parent / "hadamard_published.cu").read_text(),
    ])  # fmt: skip
    core, arch = cuda._core(), cuda._arch(torch.cuda.current_device())
    return core.ObjectCode.from_cubin(jit.cubin(text, arch)).get_kernel("hadamard_published"), threads


def run_published(x: torch.Tensor, size: int) -> torch.Tensor:
    """The stand-in on x, float16 and contiguous."""
    found = published(size)
    assert found is not None
    kernel, threads = found
    y = torch.empty_like(x)
    config = cuda._config((x.numel() // size, 1), threads, min(32768, 4 * size), 1, False)
    cuda._launch(x.get_device(), config, kernel, x.data_ptr(), y.data_ptr())
    return y


def calls(size: int, m: int, k: int) -> list[list[Call]]:
    """A copy, the operator, and the stand-in where there is one; every result is kept, so none is written twice."""
    count = copies_beyond_l2(4 * m * k)
    inputs = [torch.randn(m, k, device="cuda").half() for _ in range(count)]
    kept: dict[object, torch.Tensor] = {}

    def keep(what: Callable[[torch.Tensor], torch.Tensor]) -> list[Call]:
        return [lambda i=i, x=x: kept.__setitem__((what, i), what(x)) for i, x in enumerate(inputs)]

    contestants = [keep(lambda x: torch.empty_like(x).copy_(x)), keep(lambda x: hadamard(x, size))]
    if published(size):
        assert torch.equal(run_published(inputs[0].round(), size), transform(inputs[0].round(), size))
        contestants.append(keep(lambda x: run_published(x, size)))
    return contestants


def beside_decoding(m: int, n: int, k: int, size: int) -> list[float]:
    """Microseconds of a 4-bit matrix product alone, and of the transform followed by it."""
    spec = QuantSpec(4, 64, "custom")
    copies, table = rotating_weights(n, k, spec, torch.float16)
    x = torch.randn(m, k, device="cuda").half()
    alone = [lambda w=w, s=s: lut_linear(x, w, s, table, spec=spec, out_features=n) for w, s in copies]
    both = [lambda w=w, s=s: lut_linear(hadamard(x, size), w, s, table, spec=spec, out_features=n) for w, s in copies]
    return compare(alone, both)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True)
    output = Path(parser.parse_args().output)
    print(describe())
    with output.open("w", newline="") as file:
        file.write(f"# {describe()}; float16; python benchmarks/hadamard_speed.py --output {output.name}\n")
        writer = csv.writer(file)
        columns = ["size", "k", "m", "copy_us", "flute_us", "published_us", "share_of_copy", "published_over_flute"]
        writer.writerow(columns)
        for size, k in PROBLEMS:
            line = []
            for m in TOKENS:
                copy, ours, *other = compare(*calls(size, m, k), replays=12)
                peer = [f"{other[0]:.2f}", f"{other[0] / ours:.2f}"] if other else ["", ""]
                writer.writerow([size, k, m, f"{copy:.2f}", f"{ours:.2f}", peer[0], f"{copy / ours:.2f}", peer[1]])
                line.append(f"{m}: {copy:.1f} {ours:.1f} {peer[0] or '-'}")
            print(f"{size} of {k}  copy, flute, published us by M  {'   '.join(line)}", flush=True)
    with output.with_name(output.stem + "_decode.csv").open("w", newline="") as file:
        file.write(f"# {describe()}; float16, 4 bits, group 64\n")
        writer = csv.writer(file)
        writer.writerow(["n", "k", "size", "m", "product_us", "with_transform_us"])
        for n, k, size in ((4096, 4096, 512), (4096, 4096, 4096), (4096, 14336, 512), (4096, 14336, 14336)):
            for m in (1, 4, 16):
                alone, both = beside_decoding(m, n, k, size)
                writer.writerow([n, k, size, m, f"{alone:.2f}", f"{both:.2f}"])
                print(
                    f"{n}x{k}, blocks of {size}, M={m}: product {alone:.2f} us, with transform {both:.2f} us",
                    flush=True,
                )


if __name__ == "__main__":
    main()
