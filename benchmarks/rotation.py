#!/usr/bin/env python3
"""Which layers a rotation helps and which it harms: KL divergence with one kind of layer rounded, all others dense.

    python benchmarks/rotation.py MODEL TEXT [--bits 3] [--output FILE.csv]

MODEL is a dense folder, TEXT a UTF-8 file, of which four windows of 512 tokens are read. Every kind of layer (q_proj,
down_proj, ...) is rounded by plain NormalFloat and by HIGGS p=2, both in groups of 64; then all layers by HIGGS but
some kinds, which are NormalFloat. ``kl`` is that to the dense model, ``t2`` the squared error of the rounded weights
relative to their squares.

``--inputs`` tells why instead: of every v_proj and down_proj the largest input on one window relative to the root mean
square of all (``input``), at which token, the norm of the weights it meets relative to the others' (``weights``), the
error there relative to the others' weights (``at_nf``, ``at_higgs``), and the squared error of the layer's output
relative to the output (``nf``, ``higgs``).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flute.commands.common import quiet_libraries, read_text
from flute.evaluate.perplexity import encode
from flute.integrations import folders
from flute.integrations.modules import quantizable
from flute.methods import higgs_spec
from flute.methods.sensitivity import log_probabilities, weights_replaced
from flute.quantize import dequantize, quantize
from flute.spec import QuantSpec

RESULTS = Path(__file__).resolve().parent / "results"
MIXTURES = ((), ("q_proj", "k_proj", "v_proj"), ("v_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "down_proj"))


def rounding(weight: torch.Tensor, spec: QuantSpec, scale: str = "auto") -> torch.Tensor:
    """W^ (N, K) float32."""
    spec = spec.fitted(weight.shape[1])
    return dequantize(*quantize(weight, spec, scale=scale), spec, dtype=torch.float32)


def write(rows: list[dict[str, object]], path: Path) -> None:
    """All rows so far."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def inputs(model: Any, window: torch.Tensor, specs: tuple[QuantSpec, QuantSpec]) -> list[dict[str, object]]:
    """What goes into v_proj and down_proj on a window (1, T), and what errors make of it."""
    seen: dict[str, torch.Tensor] = {}
    names = [name for name in quantizable(model) if name.endswith(("v_proj", "down_proj"))]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given[0][0]})
        )
        for name in names
    ]
    model(input_ids=window, use_cache=False)
    for hook in hooks:
        hook.remove()
    rows: list[dict[str, object]] = []
    for name in names:
        x, weight = seen[name], model.get_parameter(f"{name}.weight").detach()
        token, channel = divmod(int(x.abs().argmax()), x.shape[1])
        norm = weight.square().mean().sqrt()
        row: dict[str, object] = {
            "layer": name,
            "token": token,
            "input": f"{x.abs().max() / x.square().mean().sqrt():.1f}",
        }
        row["weights"] = f"{weight[:, channel].square().mean().sqrt() / norm:.3f}"
        for label, spec in zip(("nf", "higgs"), specs, strict=True):
            error = weight - rounding(weight, spec)
            row[f"at_{label}"] = f"{error[:, channel].square().mean().sqrt() / norm:.3f}"
            row[label] = f"{(x @ error.T).square().sum() / (x @ weight.T).square().sum():.4f}"
        rows.append(row)
    return rows


def main() -> None:
    """Measure; write after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--inputs", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "rotation_cpu.csv")
    options = parser.parse_args()
    quiet_libraries(options.threads)
    model, tokenizer = folders.load(folders.find(options.model), dtype=torch.float32)
    tokens = torch.tensor(encode(tokenizer, read_text(options.text)[:200_000]))
    windows = tokens[: 64 * 512].view(64, 512)[torch.randperm(64, generator=torch.Generator().manual_seed(1))[:4]]
    plain, rotated = QuantSpec(options.bits, 64, f"nf{options.bits}"), higgs_spec(options.bits, 64)
    if options.inputs:
        write(inputs(model, windows[:1], (plain, rotated)), options.output)
        return
    truth = log_probabilities(model, windows)
    names = quantizable(model)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    rows: list[dict[str, object]] = []

    def measure(layers: str, formats: str, spec_of: Callable[[str], QuantSpec | None], scale: str = "auto") -> None:
        rounded, wrong, whole = {}, 0.0, 0.0
        for name in names:
            if (spec := spec_of(name.rpartition(".")[2])) is not None:
                weight = model.get_parameter(f"{name}.weight").detach()
                made = rounding(weight, spec, scale)
                rounded[f"{name}.weight"] = made
                wrong, whole = wrong + float((weight - made).square().sum()), whole + float(weight.square().sum())
        with weights_replaced(model, rounded):
            found = log_probabilities(model, windows)
        kl = float(torch.nn.functional.kl_div(found, truth, log_target=True, reduction="batchmean"))
        said = found.view(*windows.shape, -1)[:, :-1].gather(2, windows[:, 1:, None])
        figures = {
            "t2": f"{wrong / whole:.5f}",
            "kl": f"{kl:.5f}",
            "perplexity": f"{math.exp(-float(said.mean())):.3f}",
        }
        rows.append({"bits": options.bits, "layers": layers, "format": formats, **figures})
        print(*rows[-1].values(), file=sys.stderr, flush=True)
        write(rows, options.output)

    for kind in kinds:
        for format_, spec in (("nf", plain), ("higgs", rotated)):
            measure(kind, format_, lambda other, kind=kind, spec=spec: spec if other == kind else None)
    measure("all", "nf", lambda kind: plain)
    measure("all", "nf, scales searched", lambda kind: plain, "mse")
    for left in MIXTURES:
        measure(
            "all",
            f"higgs, {' '.join(left)} nf" if left else "higgs",
            lambda kind, left=left: plain if kind in left else rotated,
        )


if __name__ == "__main__":
    main()
