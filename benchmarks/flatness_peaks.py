"""How large outliers are: the largest channel norm of activations and weights, over the root mean square of them all.

    python -m benchmarks.flatness_peaks tiny SMOLLM2 --text valid.txt -o flatness_peaks.csv

A level matrix has 1 (`flute.methods.flatness`). Rows: model, block, matrix, and the peak before any transform and
behind Hadamard rotations, at the first block, the one in the middle and the last.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from flute.bench.machine import describe
from flute.bench.results import write_rows
from flute.integrations import folders
from flute.integrations.flatblocks import blocks_of
from flute.methods.calibration import token_windows
from flute.methods.flatness import curves


@dataclass(frozen=True)
class Row:
    """Peaks of one matrix."""

    model: str
    block: int
    matrix: str
    plain: float
    hadamard: float


def peaks(name: str, text: str, samples: int, window: int) -> list[Row]:
    """Of three blocks of a model."""
    model, tokenizer = folders.load(folders.find(name), dtype=torch.float32)
    windows = token_windows(tokenizer, {"text": text}, samples=samples, length=window)
    count, rows = len(blocks_of(model)[1]), []
    for block in sorted({0, count // 2, count - 1}):
        for matrix, lines in curves(model, windows, block).items():
            rows.append(Row(Path(name).name, block, matrix, lines["none"][0], lines["hadamard"][0]))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    text = options.text.read_text()
    rows = [row for name in options.models for row in peaks(name, text, options.samples, options.window)]
    seen = f"{options.samples} windows of {options.window} tokens of {options.text.name}"
    write_rows(options.output, f"{describe()}; python -m benchmarks.flatness_peaks, {seen}", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
