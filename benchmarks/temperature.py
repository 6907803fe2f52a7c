"""Whether a dense model is too sure of itself on a text: its perplexity with logits divided by a temperature.

    python -m benchmarks.temperature tiny --text first.txt --windows 30 --length 512 -o temperature.csv

Where a temperature above 1 lowers the perplexity, so may noise in weights and activations, which flattens predictions
likewise: perplexity then understates what rounding does to a model, and only the divergence from it tells.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import exp
from pathlib import Path

import torch

from flute.bench.machine import describe
from flute.bench.results import write_rows
from flute.evaluate.perplexity import cut, encode, window_logits, window_loss
from flute.integrations import folders

TEMPERATURES = (0.95, 1.0, 1.05, 1.1, 1.15)


@dataclass(frozen=True)
class Row:
    """Perplexity at one temperature."""

    model: str
    temperature: float
    perplexity: float


def rows_of(name: str, text: str, windows: int, length: int) -> list[Row]:
    """Of one model."""
    model, tokenizer = folders.load(folders.find(name), dtype=torch.float32)
    losses, count = dict.fromkeys(TEMPERATURES, 0.0), 0
    for part in cut(encode(tokenizer, text), length, windows):
        window = torch.tensor(part)
        logits, count = window_logits(model, window), count + len(part) - 1
        for temperature in TEMPERATURES:
            losses[temperature] += window_loss(logits / temperature, window[1:])
    return [Row(Path(name).name, temperature, exp(loss / count)) for temperature, loss in losses.items()]


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows = rows_of(options.model, options.text.read_text(), options.windows, options.length)
    seen = f"{options.windows} windows of {options.length} tokens of {options.text.name}"
    write_rows(options.output, f"{describe()}; python -m benchmarks.temperature {options.model}, {seen}", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
