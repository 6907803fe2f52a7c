"""How far learning scales gets with one first step or another: KL to the dense model on the calibration text.

    python -m benchmarks.nfl_rates MODEL --calibration valid.txt --method gptq+nfl --rates 5e-3,1e-3,3e-4 -o rates.csv

Every rate begins anew from the same dense model. ``after`` is that of the state kept, so where no epoch ended better
than the start, it is ``before``. With ``--text`` the perplexity on the first ``--eval-windows`` windows of another
text follows. A method that learns nothing (``gptq``) is measured once. Rows are added as they come.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from flute.bench.machine import describe
from flute.bench.results import read_rows, write_rows
from flute.commands.quantize import layer_spec
from flute.evaluate.perplexity import encode, perplexity
from flute.integrations import folders
from flute.methods.calibration import token_windows
from flute.methods.learn import Learning
from flute.methods.model import quantize_model


@dataclass(frozen=True)
class Row:
    """One run. ``before``, ``after``: nats per token; ``best_step``: where the state kept was reached."""

    model: str
    method: str
    bits: int
    rate: float | None
    samples: int
    window: int
    epochs: int
    before: float | None
    after: float | None
    best_step: int
    seconds: float
    perplexity: float | None
    eval_windows: int


def measured(
    source: Path, calibration: Path, method: str, bits: int, rate: float | None, sizes: tuple[int, int, int],
    text: Path | None, evaluated: tuple[int, int],
) -> Row:  # fmt: skip
    """The row of one rate; ``sizes``: samples, window, epochs; ``evaluated``: windows of ``text``, tokens of one."""
    samples, window, epochs = sizes
    model, tokenizer = folders.load(folders.Found(source), dtype=torch.float32)
    windows = token_windows(tokenizer, {calibration.name: calibration.read_text()}, samples=samples, length=window)
    _, spec = layer_spec(bits, 64, None, method)
    started = time.perf_counter()
    learning = None if rate is None else Learning(epochs, rate)
    learned = quantize_model(model, spec, windows, method=method, learning=learning).learned
    seconds, found = time.perf_counter() - started, None
    if text is not None:
        tokens, (count, length) = encode(tokenizer, text.read_text()), evaluated
        found = perplexity(model, tokens, seq_len=length, max_windows=count).perplexity
    before, after, step = (None, None, 0) if learned is None else (learned.before, learned.after, learned.best_step)
    return Row(
        source.name, method, bits, rate, samples, window, epochs, before, after, step, seconds, found,
        evaluated[0] if text else 0,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder with a dense model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--method", default="gptq+nfl")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rates", default="5e-3,1e-3,3e-4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-windows", type=int, default=20)
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    sizes = (options.samples, options.window, options.epochs)
    for rate in map(float, options.rates.split(",")) if "nfl" in options.method else [None]:
        row = measured(
            options.model, options.calibration, options.method, options.bits, rate, sizes, options.text,
            (options.eval_windows, options.eval_length),
        )  # fmt: skip
        print(row, flush=True)
        rows = read_rows(options.output, Row)[1] if options.output.exists() else []
        write_rows(options.output, describe(), [*rows, row])


if __name__ == "__main__":
    main()
