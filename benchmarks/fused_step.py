"""What the small steps of a decoder block cost as launches of their own, and inside the products.

    python -m benchmarks.fused_step --tokens 1,2,4 -o fused_step_h100.csv

The four products of a layer of Llama 3.1 8B (bf16, group 64) in the order of a decode step, attention left out (its
output is a part of q, k, v): ``apart`` with norms, SiLU * up and residuals compiled by torch and launched early
(`enable_pdl`), ``fused`` by `flute.kernels.fused`. Each product also alone, ``fused`` with what is around it, ``apart``
bare. Microseconds in a replayed CUDA graph over layers beyond the L2 cache, both in turns.

With ``--model llama-3.1-8b`` an eager decode step of the whole model as well, by the clock: there the host's work is
what takes the time, and ``apart`` are transformers' own blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flute.bench.decoder import _compiled
from flute.bench.machine import describe
from flute.bench.model import Plan, build
from flute.bench.results import write_rows
from flute.bench.timing import compare, rotating_weights
from flute.integrations.lutblocks import give_back, take_over
from flute.kernels.fused import lut_fused
from flute.kernels.ops import lut_linear
from flute.kernels.tokens import gate, rms_norm
from flute.spec import QuantSpec

WIDTH, INNER, QKV = 4096, 14336, 6144
SHAPES = {"qkv": (QKV, WIDTH), "o": (WIDTH, WIDTH), "gate_up": (2 * INNER, WIDTH), "down": (WIDTH, INNER)}
EPS = 1e-5


@dataclass(frozen=True)
class Row:
    """Microseconds of one layer, of one of its products, or of a whole model's step."""

    what: str
    bits: int
    tokens: int
    apart: float
    fused: float
    ratio: float


class Layers:
    """Products of several layers, and what is around them."""

    def __init__(self, bits: int, tokens: int, dtype: torch.dtype) -> None:
        self.spec = QuantSpec(bits, 64, f"nf{bits}")
        made = {name: rotating_weights(*shape, self.spec, dtype, most=16) for name, shape in SHAPES.items()}
        self.weights = {name: copies for name, (copies, _) in made.items()}
        self.table = next(table for _, table in made.values())
        self.gain = torch.rand(WIDTH, device="cuda").to(dtype)
        self.x = {k: torch.randn(tokens, k, device="cuda").to(dtype) for _, k in SHAPES.values()}
        self.norm, self.silu = _compiled(lambda x, gain: rms_norm(x, gain, EPS)), _compiled(gate)
        self.add_norm, self.add = _compiled(_add_norm), _compiled(torch.add)

    def product(self, name: str, x: torch.Tensor, copy: int) -> torch.Tensor:
        weight, scales = self.weights[name][copy % len(self.weights[name])]
        return lut_linear(x, weight, scales, self.table, spec=self.spec, out_features=SHAPES[name][0])

    def around(self, name: str, x: torch.Tensor, copy: int, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight, scales = self.weights[name][copy % len(self.weights[name])]
        given = (weight, scales, self.table, None, SHAPES[name][0], self.spec.bits, self.spec.group_size)
        gain = self.gain if name in ("qkv", "gate_up") else None
        return lut_fused(x, *given, gain=gain, eps=EPS, gated=name == "gate_up", residual=residual)

    def apart(self, copy: int) -> torch.Tensor:
        """A layer whose small steps are launches of their own."""
        h = self.x[WIDTH]
        heads = self.product("qkv", self.norm(h, self.gain), copy)[:, :WIDTH].contiguous()
        h, normed = self.add_norm(h, self.product("o", heads, copy), self.gain)
        inner = self.silu(self.product("gate_up", normed, copy))
        return self.add(h, self.product("down", inner, copy))

    def fused(self, copy: int) -> torch.Tensor:
        """The same in four launches, and the copy that stands for attention."""
        heads = self.around("qkv", self.x[WIDTH], copy)[:, :WIDTH].contiguous()
        h = self.around("o", heads, copy, self.x[WIDTH])
        return self.around("down", self.around("gate_up", h, copy), copy, h)


def _add_norm(h: torch.Tensor, more: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = h + more
    return h, rms_norm(h, gain, EPS)


def measured(bits: int, tokens: int, dtype: torch.dtype) -> list[Row]:
    """The rows of one width and number of tokens."""
    layers, copies, rows = Layers(bits, tokens, dtype), range(16), []

    def row(what: str, apart: Callable[[int], object], fused: Callable[[int], object]) -> None:
        times = compare(*([lambda copy=copy, run=run: run(copy) for copy in copies] for run in (apart, fused)))
        rows.append(Row(what, bits, tokens, *times, times[0] / times[1]))

    with torch.no_grad():
        row("layer", layers.apart, layers.fused)
        for name, (_, k) in SHAPES.items():
            x, residual = layers.x[k], layers.x[WIDTH] if name in ("o", "down") else None
            row(
                name,
                lambda copy, name=name, x=x: layers.product(name, x, copy),
                lambda copy, name=name, x=x, residual=residual: layers.around(name, x, copy, residual),
            )
    return rows


@torch.no_grad()
def eager_microseconds(model: Any, batch: int, steps: int = 24) -> float:
    """Median of a decode step by the clock, the host's work included, with transformers' default cache."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    cache, taken = None, []
    for _ in range(steps):
        begun = time.perf_counter()
        made = model(tokens, past_key_values=cache, use_cache=True)
        cache, tokens = made.past_key_values, made.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - begun))
    return statistics.median(taken[steps // 4 :])


def of_model(config: str, bits: int, batches: list[int]) -> list[Row]:
    """Rows of a whole model in eager mode."""
    model, rows = build(Plan(config), f"nf{bits}"), []
    for batch in batches:
        times = []
        for change in (give_back, take_over):
            change(model)
            times.append(eager_microseconds(model, batch))
        rows.append(Row("model eager", bits, batch, *times, times[0] / times[1]))
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="1,2,4")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--model", default="", help="also a whole model, by its name in flute bench model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for bits in map(int, options.bits.split(",")):
        for tokens in map(int, options.tokens.split(",")):
            made = measured(bits, tokens, torch.bfloat16)
            print(*made, sep="\n", flush=True)
            rows += made
            write_rows(options.output, describe(), rows)
    if options.model:
        rows += of_model(options.model, 4, [int(tokens) for tokens in options.tokens.split(",")])
        write_rows(options.output, describe(), rows)


if __name__ == "__main__":
    main()
