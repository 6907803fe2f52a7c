"""Time of FlatQuant's kernels at the shapes of Llama-3-8B beside torch's float16, in one run, as CSV.

    python benchmarks/flatquant_speed.py --output benchmarks/results/flatquant_speed_h100.csv

* ``transform``: [RMSNorm,] Kronecker transform, range, codes of M tokens, one launch; torch has no such operator.
* ``linear``: int4 weights times int8 codes to float16, beside ``torch.nn.functional.linear`` in float16.
* ``layer``: all of a layer's kernels in order, for M sequences; residuals are added by the products. What one launch
  does to the next shows here only. ``layer without transforms``: the same with codes that are there already, which
  tells what transforms cost a layer.
* ``attention``: one token's keys and values appended and its queries answered, 2048 tokens of context, 32 query and 8
  key heads of 128, M sequences; beside SDPA over float16 keys and values (``enable_gqa``, no mask), without an append.

Weights and caches rotate through copies beyond three times the L2 cache (as many as 16 GB hold), activations are few
enough to lie in it, as in a model. CUDA graphs replayed in turns; medians.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from flute.bench.machine import describe
from flute.bench.results import write_rows
from flute.bench.timing import compare, copies_beyond_l2
from flute.kernels import pieces
from flute.kernels.attention import Store, kv_append, kv_attention
from flute.kernels.heads import turn_heads
from flute.kernels.integer import int_linear
from flute.kernels.tokens import Quantized, kronecker_quantize

TOKENS = (1, 16, 64, 2048)
# what, n1, n2, left, right, norm: input of q, k, v and of gate, up; of o; of down
TRANSFORMS = (("hidden", 64, 64, True, True), ("heads", 32, 128, False, False), ("down", 112, 128, True, False))
LINEARS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HEADS, GROUP, DIM, CONTEXT = 8, 4, 128, 2048
_MOST_BYTES = 16 << 30


@dataclass
class Row:
    """One line of the file; ``torch_us`` and ``speedup`` are empty where torch has nothing to compare with."""

    kernel: str
    shape: str
    m: int
    flute_us: float
    torch_us: float | None
    speedup: float | None


def transforms() -> Iterator[Row]:
    """Every site's transform."""
    for name, n1, n2, right, norm in TRANSFORMS:
        left = torch.randn(n1, n1, device="cuda").half() / n1**0.5
        other = torch.randn(n2, n2, device="cuda").half() / n2**0.5 if right else None
        weight = torch.rand(n1 * n2, device="cuda").half() if norm else None
        for m in TOKENS:
            inputs = [torch.randn(m, n1 * n2, device="cuda").half() for _ in range(8)] * 8
            (us,) = compare([lambda x=x: kronecker_quantize(x, left, other, norm_weight=weight) for x in inputs])  # noqa: B023
            yield Row("transform", f"{name} {n1}x{n2}{' norm' if norm else ''}", m, us, None, None)


def linears() -> Iterator[Row]:
    """Every linear, q, k, v and gate, up as one."""
    for n, k in LINEARS:
        scale = torch.rand(n, device="cuda")
        shape = pieces.shape(n, k, 4)
        packed = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(copies_beyond_l2(n * k // 2))
        ]
        dense = [torch.randn(n, k, device="cuda").half() for _ in range(copies_beyond_l2(2 * n * k))]
        for m in TOKENS:
            x, each = torch.randint(-8, 8, (m, k), dtype=torch.int8, device="cuda"), torch.rand(m, device="cuda")
            wide = torch.randn(m, k, device="cuda").half()
            ours: list[Callable[[], object]] = [lambda w=w: int_linear(x, each, w, scale) for w in packed]  # noqa: B023
            theirs: list[Callable[[], object]] = [lambda w=w: F.linear(wide, w) for w in dense]  # noqa: B023
            us, torch_us = compare(ours, theirs, replays=10)
            yield Row("linear", f"{n}x{k}", m, us, torch_us, torch_us / us)


def attentions() -> Iterator[Row]:
    """A decoding step's attention."""
    for batch in (1, 16, 64):
        dense_bytes = 4 * batch * HEADS * CONTEXT * DIM
        few = max(1, min(copies_beyond_l2(dense_bytes // 4), _MOST_BYTES // dense_bytes))
        ours: list[Callable[[], object]] = []
        theirs: list[Callable[[], object]] = []
        lengths = torch.full((batch,), CONTEXT, dtype=torch.int32, device="cuda")
        query = torch.randn(batch, HEADS * GROUP, 1, DIM, device="cuda").half()
        key, value = torch.randn(2, batch, HEADS, 1, DIM, device="cuda").half()
        for _ in range(few):
            keys, values = (Store.empty(batch, HEADS, CONTEXT, DIM, False, "cuda") for _ in range(2))
            dense = torch.randn(2, batch, HEADS, CONTEXT, DIM, device="cuda").half()
            kv_append(dense[0], dense[1], keys, values, lengths)

            def step(keys: Store = keys, values: Store = values) -> torch.Tensor:
                kv_append(key, value, keys, values, lengths)  # noqa: B023
                return kv_attention(query, keys, values, lengths, DIM**-0.5)  # noqa: B023

            ours.append(step)
            theirs.append(lambda kv=dense: F.scaled_dot_product_attention(query, kv[0], kv[1], enable_gqa=True))  # noqa: B023
        us, torch_us = compare(ours, theirs)
        yield Row("attention", f"context {CONTEXT}", batch, us, torch_us, torch_us / us)


class Layer:
    """A layer's weights and cache, drawn anew, for ``batch`` sequences of ``context`` tokens."""

    def __init__(self, batch: int, context: int) -> None:
        where = {"device": "cuda"}
        # outputs about as large as inputs: after an overflow all would be NaN, and every code would take a division
        self.products = [
            (
                torch.randint(0, 256, pieces.shape(n, k, 4), dtype=torch.uint8, **where),
                torch.rand(n, **where) / (2 * k**0.5),
            )
            for n, k in LINEARS
        ]
        self.keys, self.values = (Store.empty(batch, HEADS, context, DIM, False, "cuda") for _ in range(2))
        self.lengths = torch.full((batch,), context, dtype=torch.int32, **where)
        kv_append(*torch.randn(2, batch, HEADS, context, DIM, **where).half(), self.keys, self.values, self.lengths)
        self.square, self.heads, self.left, self.right = (
            torch.randn(n, n, **where).half() / n**0.5 for n in (64, HEADS * GROUP, 112, DIM)
        )
        self.clip, self.norm = torch.full((2,), 0.9, **where), torch.rand(64 * 64, **where).half()
        self.rotation = torch.randn(2, batch, 1, DIM, **where).half()

    def product(self, place: int, quantized: Quantized, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Of (q, k, v), o, (gate, up) or down."""
        return int_linear(*quantized[:2], *self.products[place], residual=residual)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """(M, 4096) -> (M, 4096)."""
        norm = {"clip": self.clip, "norm_weight": self.norm}
        mixed = self.attention(self.product(0, kronecker_quantize(x, self.square, self.square, **norm)))
        hidden = self.product(1, kronecker_quantize(mixed, self.heads, None, self.clip), x)
        inner = self.product(2, kronecker_quantize(hidden, self.square, self.square, **norm))
        return self.product(3, kronecker_quantize(inner, self.left, self.right, self.clip, gated=True), hidden)

    def bare(self, x: torch.Tensor, narrow: Quantized, wide: Quantized) -> torch.Tensor:
        """The same without transforms: (M, 4096) -> (M, 4096) of given codes (M, 4096) and (M, 14336)."""
        self.attention(self.product(0, narrow))
        hidden = self.product(1, narrow, x)
        self.product(2, narrow)
        return self.product(3, wide, hidden)

    def attention(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values (M, 6144) -> (M, 4096)."""
        q, k, v = rows.view(len(rows), 1, -1, DIM).split((HEADS * GROUP, HEADS, HEADS), 2)
        q, k = turn_heads(q, k, *self.rotation, self.right, self.right)
        kv_append(k.transpose(1, 2), v.transpose(1, 2), self.keys, self.values, self.lengths)
        return kv_attention(q.transpose(1, 2), self.keys, self.values, self.lengths, DIM**-0.5).view(len(rows), -1)


def layers() -> Iterator[Row]:
    """A decoding step's layer after one and after `CONTEXT` tokens, eight of them in turn."""
    for context, batch in itertools.product((1, CONTEXT), (1, 16, 64)):
        x = torch.randn(batch, 64 * 64, device="cuda").half()
        drawn = [Layer(batch, context) for _ in range(8)]
        one = drawn[0]
        narrow = kronecker_quantize(x, one.square, one.square)
        wide = kronecker_quantize(torch.randn(batch, 112 * DIM, device="cuda").half(), one.left, one.right)
        us, bare = compare(
            [lambda one=one: one.step(x) for one in drawn],  # noqa: B023
            [lambda one=one: one.bare(x, narrow, wide) for one in drawn],  # noqa: B023
        )
        yield Row("layer", f"context {context}", batch, us, None, None)
        yield Row("layer without transforms", f"context {context}", batch, bare, None, None)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True)
    output = Path(parser.parse_args().output)
    print(describe())
    rows: list[Row] = []
    for measure in (transforms, linears, attentions, layers):
        for row in measure():
            rows.append(row)
            beside = f"torch {row.torch_us:8.1f} us, {row.speedup:.2f} times" if row.torch_us and row.speedup else ""
            print(f"{row.kernel} {row.shape} M={row.m}: {row.flute_us:8.2f} us  {beside}", flush=True)
    write_rows(output, f"{describe()}; python benchmarks/flatquant_speed.py --output {output.name}", rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
