"""What FlatQuant costs: one calibration, several presets, beside plain rounding and Hadamard rotations.

    python -m benchmarks.flatquant_accuracy MODEL --calibration valid.txt --text wiki.test.raw -o results.csv

Rows are written as they come; ``kl``: mean of KL(dense || model) in nats per token, on the windows of the perplexity.
``rtn``: no transform, no clip. ``hadamard``: fixed rotations at every site (QuaRot's way), activations clipped at 0.9,
keys and values at 0.95 of their range as there, weights with the least squared error of a grid of clips. ``flatquant``:
learned for W4A4KV4 (``closed form``: with --epochs 0, where it begins); other presets take its matrices and leave out
clips that belong to other bits. ``fake``: numbers rounded in floating point; ``real``: codes and integer weights.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path
from typing import Any

import torch

from flute.evaluate.divergence import divergence
from flute.evaluate.perplexity import encode
from flute.flatquant.fake import fake
from flute.flatquant.fold import FACTORS_OF, SITE_OF
from flute.flatquant.matrices import Matrices
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations import folders
from flute.integrations.flatblocks import blocks_of, shape_of
from flute.methods.calibration import token_windows
from flute.methods.flat_start import Start
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

BASE = PRESETS["w4a4kv4"]
HEADER = ["model", "method", "preset", "path", "perplexity", "eval_windows", "eval_tokens_each", "samples",
          "sample_tokens", "epochs", "calibration_seconds", "threads", "device", "torch", "kl"]  # fmt: skip


def hadamard_matrices(model: Any, windows: torch.Tensor, device: str) -> list[Matrices]:
    """The baseline: rotations, fixed clips of activations, searched clips of weights."""
    start = Start(factors="hadamard", diagonals=False, clip_weights=False, clip_activations=False)
    made, _ = calibrate(model, BASE, windows[:1], start, Schedule(epochs=0), batch=1, device=device)
    for block, matrices in zip(blocks_of(model)[1], made, strict=True):
        matrices.clips = {site: torch.full((1, 2), 0.9) for site in FACTORS_OF}
        matrices.clips |= {name: torch.full((2,), 0.95) for name in ("key", "value")}
        dense = {name: tensor.cpu() for name, tensor in block.named_parameters()}
        _, weights = matrices.folded(dense, BASE, shape_of(block), torch.float32)
        for name in SITE_OF:
            matrices.row_clips[name] = searched(weights[name].float())
    return made


def searched(weight: torch.Tensor) -> torch.Tensor:
    """Clips (N, 2) of least squared error per row, the same on both sides, in steps of 0.05."""
    best = torch.ones(len(weight), 2)
    least = torch.full((len(weight),), float("inf"))
    for share in torch.arange(0.5, 1.01, 0.05).tolist():
        error = (weight - fake(weight, 4, clip=torch.full((2,), share))).square().sum(-1)
        best[error < least] = share
        least = torch.minimum(error, least)
    return best


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--real", nargs="*", default=["w4a4kv4"], help="presets to run with integer weights too")
    parser.add_argument("--skip-baselines", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--state", type=Path)
    options = parser.parse_args()

    model, tokenizer = folders.load(folders.find(options.model), dtype=torch.float32, device=options.device)
    tokens = encode(tokenizer, options.text.read_text())
    texts = {str(options.calibration): options.calibration.read_text()}
    windows = token_windows(tokenizer, texts, samples=options.samples, length=options.window)
    new = not options.output.exists()
    with open(options.output, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HEADER)
        name, seconds = Path(options.model).name, 0.0

        def row(method: str, preset: str, path: str, candidate: Any, *, learned: bool = False) -> None:
            found = divergence(candidate, model, tokens, seq_len=options.eval_length, max_windows=options.eval_windows)
            text = found.model
            made = [len(windows), options.window, options.epochs, round(seconds, 1)] if learned else ["", "", "", ""]
            fields = [name, method, preset, path, round(text.perplexity, 4), text.windows, text.seq_len, *made]
            fields += [torch.get_num_threads(), options.device, torch.__version__, round(found.kl, 5)]
            writer.writerow(fields)
            file.flush()
            print(*fields, flush=True)

        def quantized(spec: FlatSpec, matrices: list[Matrices], *, real: bool = False) -> Any:
            made = copy.deepcopy(model)
            apply(made, spec, [each.adapted(BASE, spec) for each in matrices], real=real)
            return made

        if not options.skip_baselines:
            row("dense", "", "", model)
            row("rtn", "w4a4kv4", "fake", quantized(BASE, [Matrices() for _ in blocks_of(model)[1]]))
            row("hadamard", "w4a4kv4", "fake", quantized(BASE, hadamard_matrices(model, windows, options.device)))
        started = time.perf_counter()
        made, report = calibrate(
            model, BASE, windows, Start(), Schedule(options.epochs, options.lr, amp=options.amp),
            batch=options.batch, device=options.device, state=options.state,
            on_step=lambda done, total, loss: print(done, total, loss, end="\r", flush=True),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        print(*report.notes, sep="\n")
        method = "flatquant" if options.epochs else "closed form"
        for preset in options.presets:
            row(method, preset, "fake", quantized(PRESETS[preset], made), learned=True)
            if preset in options.real:
                row(method, preset, "real", quantized(PRESETS[preset], made, real=True), learned=True)


if __name__ == "__main__":
    main()
