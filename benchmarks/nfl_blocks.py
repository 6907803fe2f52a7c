"""How long NFL takes block by block and how much memory, at the shapes of a large model, and what all of it would take.

    python -m benchmarks.nfl_blocks --layers 4 --device cuda -o nfl_blocks_h100.csv

A model with random weights of MODEL's shapes and ``--layers`` blocks lies in bfloat16 on the device; scales are learned
with ``--objective block`` and the defaults of ``flute quantize --method nfl`` (nf4, groups of 64, 64 windows of 512
tokens, two epochs). Blocks take the same time whatever the numbers are and however many blocks there are.

``block_seconds`` is the median over blocks but the first, from the last step of one to the last step of the next, which
is everything that is done for a block. ``rest_seconds`` is what remains of the call. Projections, not measurements:
``projected_minutes``, blocks of the full model times ``block_seconds`` and ``rest_seconds`` as often as the measured
blocks go into it, and ``projected_gb``, the peak and the weights of the blocks that were left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.flatquant_calibration import Clock, embedded_text, random_folder
from flute.bench.machine import describe
from flute.bench.model import load_config
from flute.bench.results import write_rows
from flute.integrations import folders
from flute.methods.calibration import token_windows
from flute.methods.learn import Learning
from flute.methods.model import quantize_model
from flute.spec import QuantSpec

_GB = 1e9


@dataclass(frozen=True)
class Row:
    """One run. ``gpu_allocated_gb``: the most that lay on the GPU."""

    model: str
    blocks: int
    spec: str
    samples: int
    window: int
    epochs: int
    block_seconds: float
    rest_seconds: float
    gpu_allocated_gb: float | None
    full_blocks: int
    projected_minutes: float
    projected_gb: float | None


def measured(source: Path, name: str, full: int, samples: int, window: int, epochs: int, bits: int, device: str) -> Row:
    """The row of learning the scales of the model in ``source``, which has two blocks at least."""
    on_gpu = torch.device(device).type == "cuda"
    model, tokenizer = folders.load(folders.Found(source), dtype=None)
    model.to(device)
    blocks = model.config.num_hidden_layers
    each = sum(p.nbytes for p in model.model.layers[0].parameters())
    windows = token_windows(tokenizer, {"text": embedded_text(samples, window)}, samples=samples, length=window)
    spec, clock = QuantSpec(bits, 64, f"nf{bits}"), Clock(blocks)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    quantize_model(
        model, spec, windows, method="nfl", learning=Learning(epochs=epochs, objective="block"), on_step=clock
    )
    block, rest, minutes = clock.projected(time.perf_counter() - started, full)
    peak = torch.cuda.max_memory_allocated(device) / _GB if on_gpu else None
    return Row(
        name, blocks, str(spec), samples, window, epochs, block, rest, peak, full, minutes,
        None if peak is None else peak + (full - blocks) * each / _GB,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", help="a name of flute bench model, or a config")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the random model, 2 at least")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = load_config(options.model)
    full, config.num_hidden_layers = config.num_hidden_layers, options.layers
    with tempfile.TemporaryDirectory() as folder:
        random_folder(config, Path(folder), options.device)
        row = measured(
            Path(folder), Path(options.model).name, full, options.samples, options.window, options.epochs,
            options.bits, options.device,
        )  # fmt: skip
    command = " ".join(["python -m benchmarks.nfl_blocks", *(arguments or sys.argv[1:])])
    write_rows(options.output, f"{describe()}; {command}", [row])
    print(*(f"{field}: {value}" for field, value in asdict(row).items()), sep="\n")


if __name__ == "__main__":
    main()
