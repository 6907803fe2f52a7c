#!/usr/bin/env python3
"""What a table for every row is worth against one for the layer, at equal real bits.

    python benchmarks/row_tables.py model MODEL CALIBRATION TEXT [--output FILE.csv]
    python benchmarks/row_tables.py weights MODEL [--output FILE.csv]

A row's table of E = 2^b values of 16 bits costs 16 E / K bits per weight, a scale per group of g 16 / g; a layer's
table is counted too. Tables and scales are fitted in turns (k-means, then least squares) to W, with either kind alike.
``weights`` gives sum (W - W^)^2 / sum W^2 over the layers of one width K. ``model`` then learns tables and scales
through the whole model (`Learning()`, 16 windows of 256 tokens of CALIBRATION) and gives KL to the dense model on 16
windows of 256 of TEXT. ``group`` -1 is the whole row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rotation import write
from torch import nn

from flute.commands.common import quiet_libraries, read_text
from flute.evaluate.divergence import divergence
from flute.evaluate.perplexity import encode
from flute.integrations import folders
from flute.integrations.modules import quantizable
from flute.learned import LearnedLinear
from flute.methods import Learning
from flute.methods.calibration import token_windows
from flute.methods.learn import learn_model
from flute.quantize import Quantized, quantize, spread
from flute.spec import QuantSpec
from flute.tables import named_table

ROUNDS = 20
MODEL = ((2, 64, False), (2, 32, False), (2, -1, True), (2, 64, True), (2, 43, False),
         (3, 64, False), (3, 32, False), (3, -1, True), (3, 64, True), (3, 22, False))  # fmt: skip


def codes_of(unit: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """int64 (N, K): the entry of a row's table (N, E) nearest to each value (N, K)."""
    ordered, order = tables.sort(1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    return order.gather(1, torch.searchsorted(middles, unit.contiguous()))


def fit(weight: torch.Tensor, bits: int, group: int, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (N, G) and tables (N, E), all rows the same unless ``per_row``, in float16 as float32."""
    rows, width = weight.shape
    spec = QuantSpec(bits, group, f"nf{bits}")
    scales = quantize(weight, spec, scale="mse").scales.float()
    tables, size = named_table(spec.table).expand(rows, -1), spec.group(width)
    for _ in range(ROUNDS):
        wide = spread(scales, size, width)
        codes = codes_of(weight / wide, tables)
        zero = torch.zeros_like(tables)
        mass, moment = (zero.scatter_add(1, codes, each) for each in (wide.square(), wide * weight))
        if not per_row:
            mass, moment = (each.sum(0).expand(rows, -1) for each in (mass, moment))
        tables = torch.where(mass > 0, moment / mass.clamp_min(1e-30), tables).half().float()
        values = tables.gather(1, codes_of(weight / wide, tables))
        above, below = (
            nn.functional.pad(each, (0, -width % size)).view(rows, -1, size).sum(-1)
            for each in (values * weight, values.square())
        )
        scales = torch.where((below > 0) & (above > 0), above / below.clamp_min(1e-30), scales).half().float()
    return scales, tables


def real_bits(weight: torch.Tensor, bits: int, scales: torch.Tensor, per_row: bool) -> float:
    """Codes, scales and tables, per weight."""
    return bits + 16 * (scales.numel() + 2**bits * (len(weight) if per_row else 1)) / weight.numel()


class RowTables(LearnedLinear):
    """`LearnedLinear` with tables (N, E), of which one is learned for all rows or each by itself."""

    def __init__(self, linear: nn.Linear, spec: QuantSpec, per_row: bool) -> None:
        super().__init__(linear, spec, dtype=torch.float16)
        scales, tables = fit(linear.weight.detach(), spec.bits, spec.group_size, per_row)
        self.scales = nn.Parameter(scales)
        del self.table
        self.table = nn.Parameter(tables if per_row else tables[:1].clone())

    def now(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales spread and tables as they are stored; gradients pass the rounding."""
        scales, tables = (each + (each.half().float() - each).detach() for each in (self.scales, self.table))
        tables, wide = tables.expand(len(self.weight), -1), spread_of(scales, self.spec, self.in_features)
        codes = codes_of(self.weight / wide.detach(), tables.detach()) if self.fixed is None else self.fixed.long()
        return codes, wide, tables

    def quantized(self, dtype: torch.dtype | None = None) -> Quantized:
        """Codes and scales."""
        return Quantized(self.now()[0].to(torch.uint8), self.scales.detach().half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        if self.plain:
            return nn.Linear.forward(self, x)
        codes, wide, tables = self.now()
        return nn.functional.linear(x, tables.gather(1, codes) * wide, self.bias)


def spread_of(scales: torch.Tensor, spec: QuantSpec, width: int) -> torch.Tensor:
    """`spread` of this layer."""
    return spread(scales, spec.group(width), width)


def of_model(arguments: argparse.Namespace) -> None:
    """KL of the model for every format in ``MODEL``."""
    made: list[dict[str, object]] = []
    dense, tokenizer = folders.load(folders.find(arguments.model), dtype=torch.float32)
    windows = token_windows(tokenizer, {"": read_text(arguments.calibration)}, samples=16, length=256)
    tokens = encode(tokenizer, read_text(arguments.text))
    for bits, group, per_row in MODEL:
        model: Any = folders.load(folders.find(arguments.model), dtype=torch.float32)[0]
        spec, cost, weights = QuantSpec(bits, group, f"nf{bits}"), 0.0, 0
        for name in quantizable(model):
            layer = RowTables(model.get_submodule(name), spec, per_row)
            cost += real_bits(layer.weight, bits, layer.scales, per_row) * layer.weight.numel()
            weights += layer.weight.numel()
            model.set_submodule(name, layer)
        learned = learn_model(model, {}, windows, Learning(), dtype=torch.float16)
        kl = divergence(model, dense, tokens, seq_len=256, max_windows=16).kl
        made.append({
            "bits": bits, "group": group, "tables": "row" if per_row else "layer",
            "bits_per_weight": f"{cost / weights:.4f}", "calibration_kl_fitted": f"{learned.before:.5f}",
            "calibration_kl_learned": f"{learned.after:.5f}", "kl": f"{kl:.5f}",
        })  # fmt: skip
        print(made[-1], flush=True)
        write(made, arguments.output)


def of_weights(arguments: argparse.Namespace) -> None:
    """Squared errors, by the number of inputs: of groups of 64 with either table, and of smaller groups."""
    made: list[dict[str, object]] = []
    model: Any = folders.load(folders.find(arguments.model), dtype=torch.float32)[0]
    kinds: dict[int, list[torch.Tensor]] = {}
    for name in quantizable(model)[:: arguments.every]:
        weight = model.get_submodule(name).weight.detach()
        kinds.setdefault(weight.shape[1], []).append(weight)
    for width, weights in sorted(kinds.items()):
        for bits in (2, 3, 4):
            even = -(-width // (-(-width // 64) + 2**bits))  # as many scales more as a row's table has values
            for group, per_row in ((64, False), (64, True), (even, False)):
                error = power = cost = 0.0
                for weight in weights:
                    scales, tables = fit(weight, bits, group, per_row)
                    wide = spread_of(scales, QuantSpec(bits, group, f"nf{bits}"), width)
                    rounded = tables.gather(1, codes_of(weight / wide, tables)) * wide
                    error, power = (
                        error + float((weight - rounded).square().sum()),
                        power + float(weight.square().sum()),
                    )
                    cost += real_bits(weight, bits, scales, per_row) / len(weights)
                made.append({
                    "inputs": width, "layers": len(weights), "bits": bits, "group": group,
                    "tables": "row" if per_row else "layer", "bits_per_weight": f"{cost:.4f}",
                    "t2": f"{error / power:.6f}",
                })  # fmt: skip
                print(made[-1], flush=True)
                write(made, arguments.output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, texts in (("model", of_model, ("calibration", "text")), ("weights", of_weights, ())):
        command = commands.add_parser(name)
        command.add_argument("model")
        for each in texts:
            command.add_argument(each, type=Path)
        command.add_argument("--every", type=int, default=1, help="every so-many-th layer of the weights")
        command.add_argument("--output", type=Path, default=Path(f"row_tables_{name}.csv"))
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    quiet_libraries()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
