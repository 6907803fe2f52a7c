"""How long FlatQuant's calibration takes and how much memory, block by block, and what that makes of the whole model.

    python -m benchmarks.flatquant_calibration --layers 3 --amp --device cuda -o flatquant_calibration_h100.csv

Unless MODEL is a folder with weights, one with random weights of that model's shapes is made, with ``--layers`` blocks:
a block is learned from its own inputs, so blocks take the same time whatever their number, and a step takes the same
time whatever the numbers are. The run is that of ``flute flatquant``: a folder in, a checkpoint out, by default with
the published settings (128 windows of 2048 tokens, 4 to a step, 15 epochs, transforms, diagonals and all clips).

``block_seconds`` is the median over blocks but the first, from the last step of one to the last step of the next, which
is everything that is done for a block while learning; ``step_ms`` is the median step's part of it. ``rest_seconds`` is
what remains: loading, tokens, folding, rounding, writing, and the first block's start. ``projected_minutes`` is a
projection, not a measurement: blocks of the full model times ``block_seconds``, and ``rest_seconds`` as often as the
measured blocks go into the full model.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flute.bench.machine import describe
from flute.bench.model import load_config
from flute.bench.results import write_rows
from flute.checkpoint.shards import info, write_shard
from flute.flatquant.spec import PRESETS
from flute.integrations import folders
from flute.methods.flat_folder import FlatJob, flatquant_folder
from flute.methods.flat_train import Schedule

_GB = 1e9


@dataclass(frozen=True)
class Row:
    """One calibration. ``gpu_allocated_gb``, ``gpu_reserved_gb``: the most of each; ``host_gb``: the process's most."""

    model: str
    blocks: int
    preset: str
    arithmetic: str
    samples: int
    window: int
    batch: int
    epochs: int
    block_seconds: float
    step_ms: float
    rest_seconds: float
    gpu_allocated_gb: float | None
    gpu_reserved_gb: float | None
    host_gb: float
    full_blocks: int
    projected_minutes: float


def random_folder(config: Any, folder: Path, device: str) -> None:
    """A dense bfloat16 checkpoint of ``config`` with random weights, written one by one, and a tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.dtype, config.architectures = "bfloat16", [type(model).__name__]
    config.save_pretrained(folder)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    generator = torch.Generator(device).manual_seed(0)
    file = "model.safetensors"
    with write_shard(folder / file, {name: info(torch.bfloat16, shape, file) for name, shape in shapes.items()}) as out:
        for name, shape in shapes.items():
            out.write(name, _random(name, shape, generator))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders.embedded() / file, folder / file)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return made.normal_(0.0, 0.02, generator=generator).cpu()


class Clock:
    """``on_step``: when each step and each block was done; prints as it goes."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.ends, self.steps = blocks, [time.perf_counter()], [time.perf_counter()]

    def __call__(self, done: int, total: int, loss: float) -> None:
        self.steps.append(time.perf_counter())
        if done % (total // self.blocks) == 0:
            self.ends.append(self.steps[-1])
            print(f"block {len(self.ends) - 1}: {self.ends[-1] - self.ends[-2]:.1f} s, error {loss:.4f}", flush=True)

    def each(self) -> list[float]:
        """Seconds of every block but the first."""
        return [end - start for start, end in itertools.pairwise(self.ends[1:])]

    def projected(self, whole: float, full: int) -> tuple[float, float, float]:
        """Of a run of ``whole`` seconds: a block's seconds, what remains, and the minutes of ``full`` blocks."""
        block = statistics.median(self.each())
        rest = whole - self.blocks * block
        return block, rest, (full * block + rest * full / self.blocks) / 60

    def step(self) -> float:
        """Seconds from one step to the next, the median: what a block takes besides is not in it."""
        return statistics.median(end - start for start, end in itertools.pairwise(self.steps))


def embedded_text(samples: int, window: int) -> str:
    """The embedded one, as often as the windows ask for: no token has 8 characters."""
    text = (folders.embedded() / "heldout.txt").read_text()
    return text * (1 + 8 * samples * window // len(text))


def measured(source: Path, name: str, preset: str, full: int, job: FlatJob, text: str, device: str) -> Row:
    """The row of calibrating the model in ``source``, which has two blocks at least."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    blocks = load_config(str(source)).num_hidden_layers
    clock = Clock(blocks)
    with tempfile.TemporaryDirectory() as out:
        flatquant_folder(source, Path(out) / "quantized", job, {"text": text}, device=device, on_step=clock)
        block, rest, minutes = clock.projected(time.perf_counter() - clock.ends[0], full)
    peaks = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)] if on_gpu else []
    allocated, reserved = (each / _GB for each in peaks) if peaks else (None, None)
    return Row(
        name, blocks, preset, "bfloat16" if job.schedule.amp else "float32", job.samples, job.window, job.batch,
        job.schedule.epochs, block, 1e3 * clock.step(), rest, allocated, reserved,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GB, full, minutes,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default="llama-3.1-8b", help="a name of flute bench model, a config, or a folder"
    )
    parser.add_argument("--layers", type=int, default=3, help="blocks of a random model, 2 at least")
    parser.add_argument("--calibration", type=Path, help="a text; by default the embedded one, repeated")
    parser.add_argument("--preset", default="w4a4kv4", choices=PRESETS)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--cali_bsz", type=int, default=4)
    parser.add_argument("--epoch", type=int, default=15)
    parser.add_argument("--flat_lr", type=float, default=5e-3)
    parser.add_argument("--amp", action="store_true", help="blocks run in bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = load_config(options.model)
    job = FlatJob(
        PRESETS[options.preset], schedule=Schedule(options.epoch, options.flat_lr, amp=options.amp),
        samples=options.nsamples, window=options.window, batch=options.cali_bsz,
    )  # fmt: skip
    text = options.calibration.read_text() if options.calibration else embedded_text(job.samples, job.window)
    full, name = config.num_hidden_layers, Path(options.model).name
    with tempfile.TemporaryDirectory() as folder:
        source = Path(options.model)
        if not any(source.glob("*.safetensors")):
            source, config.num_hidden_layers = Path(folder), options.layers
            random_folder(config, source, options.device)
        row = measured(source, name, options.preset, full, job, text, options.device)
    command = " ".join(["python -m benchmarks.flatquant_calibration", *(arguments or sys.argv[1:])])
    write_rows(options.output, f"{describe()}; {command}", [row])
    print(*(f"{field}: {value}" for field, value in asdict(row).items()), sep="\n")


if __name__ == "__main__":
    main()
