"""``flute demo``: the main job on the embedded model, from weights to text, with figures and a plot."""

from __future__ import annotations

import csv
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import FluteError
from .common import QuietOption, ThreadsOption, note, print_json, print_table, quiet_libraries, read_text

TABLES = ("nf4", "nf3", "int4")
GROUP_SIZE = 64
_PROMPT = "Return True if"
_NEW_TOKENS = 64
_WINDOW = 512


@dataclass(frozen=True)
class Row:
    """One model of the demo: bits per weight of its linear layers, MB of all tensors, and what it does."""

    model: str
    bits_per_weight: float
    megabytes: float
    perplexity: float
    tokens_per_second: float
    tokens: int
    sample: str


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, figures and plot.")] = Path(
        "demo-output"
    ),
    threads: ThreadsOption = 0,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Quantize the embedded model to nf4, nf3 and int4 (groups of 64), load each back with transformers, and compare.

    Perplexity is on text the model never saw; the plot shows it against the real bits per weight. Needs no network.
    """
    quiet_libraries(threads)
    from ..integrations import folders

    started = time.perf_counter()
    source = folders.embedded()
    text = read_text(source / "heldout.txt")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluteError(f"{output} cannot be made: {error.strerror}; choose another --output") from None
    note("fp16: the embedded model as it is", quiet=quiet)
    rows = [measure("fp16", source, text)]
    for table in TABLES:
        note(f"{table}: quantize, load back, measure", quiet=quiet)
        rows.append(measure(table, quantize(source, output / table, table), text))
    files = write_results(rows, output)
    figures: dict[str, Any] = {
        "models": [asdict(row) for row in rows],
        "group_size": GROUP_SIZE,
        "seq_len": _WINDOW,
        "prompt": _PROMPT,
        "files": [str(path) for path in files],
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        print_json(figures)
    else:
        _show(rows, figures)


def _show(rows: list[Row], figures: dict[str, Any]) -> None:
    print_table(
        ["model", "bits/weight", "MB", "perplexity", "tokens/s"],
        [
            [row.model, f"{row.bits_per_weight:.2f}", f"{row.megabytes:.1f}", f"{row.perplexity:.3f}",
             f"{row.tokens_per_second:.0f}"]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        print(f"{row.model}: {_PROMPT + row.sample!r}\n")
    print(f"{rows[0].tokens} held-out tokens in windows of {_WINDOW}; {figures['seconds']:.0f} s in all")
    print("written: " + ", ".join(figures["files"]))


def quantize(source: Path, out: Path, table: str) -> Path:
    """Make the checkpoint ``out`` from the dense model in ``source``; returns ``out``."""
    from ..checkpoint import streaming
    from ..checkpoint.plan import make_plan
    from ..config import ModelSpec
    from ..integrations import folders
    from ..spec import QuantSpec

    record = ModelSpec(QuantSpec(bits=int(table[-1]), group_size=GROUP_SIZE, table=table))
    plan = make_plan(source, folders.architecture(source, record), record)
    streaming.run(plan, out, force=True, version=__version__)
    return out


def measure(name: str, folder: Path, text: str) -> Row:
    """Load a model the plain way and measure it on the CPU: speed in its own dtype, perplexity in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..checkpoint.shards import read_headers
    from ..evaluate.perplexity import encode, perplexity
    from ..evaluate.speed import generate
    from ..integrations import folders

    quantized = folders.is_quantized(folder)
    bits = folders.validate(folder).bits_per_weight if quantized else 16.0
    model = AutoModelForCausalLM.from_pretrained(folder)  # what any user of transformers writes
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate(model, tokenizer, _PROMPT, 4)  # first calls pay for set-up
    made = generate(model, tokenizer, _PROMPT, _NEW_TOKENS, stop_early=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = perplexity(model, encode(tokenizer, text), seq_len=_WINDOW)
    nbytes = sum(entry.nbytes for entry in read_headers(folder).values())
    return Row(name, bits, nbytes / 1e6, result.perplexity, made.tokens_per_second, result.tokens, made.text)


def write_results(rows: list[Row], output: Path) -> list[Path]:
    """results.json, results.csv and, where matplotlib is installed, perplexity.png."""
    from ..checkpoint.atomic import whole_file, write_json

    values = [asdict(row) for row in rows]
    files = [output / "results.json", output / "results.csv"]
    write_json(files[0], values)
    with whole_file(files[1]) as file:
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, fieldnames=list(values[0]))
        writer.writeheader()
        writer.writerows(values)
        file.write(lines.getvalue().encode())
    try:
        files.append(plot(rows, output / "perplexity.png"))
    except ImportError:
        note("no plot: matplotlib is not installed; run: pip install 'flute-engine[plot]'")
    return files


def plot(rows: list[Row], path: Path) -> Path:
    """Perplexity against real bits per weight, the 16-bit model as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..checkpoint.atomic import whole_file

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    dense, quantized = rows[0], rows[1:]
    axes.axhline(dense.perplexity, color="0.5", linestyle="--", linewidth=1)
    axes.annotate(f"fp16: {dense.perplexity:.2f}", (0.01, dense.perplexity), xycoords=("axes fraction", "data"),
                  xytext=(0, 4), textcoords="offset points", color="0.4")  # fmt: skip
    for row in quantized:
        axes.plot(row.bits_per_weight, row.perplexity, "o", markersize=8)
        label = f"{row.model}: {row.perplexity:.2f}, {row.megabytes:.1f} MB"
        at = (row.bits_per_weight, row.perplexity)
        axes.annotate(label, at, xytext=(-10, 0), textcoords="offset points", ha="right", va="center")
    widest = max(row.bits_per_weight for row in quantized)
    axes.set_xlim(math.floor(min(row.bits_per_weight for row in quantized)) - 0.5, widest + 0.25)
    highest = max(row.perplexity for row in rows)
    spread = max(highest - dense.perplexity, 0.01 * dense.perplexity)
    axes.set_ylim(dense.perplexity - 0.15 * spread, highest + 0.25 * spread)
    axes.set_xlabel("bits per weight of the linear layers, scales included")
    axes.set_ylabel("perplexity on held-out text (lower is better)")
    axes.set_title(f"Embedded model, groups of {GROUP_SIZE}, rounded to nearest")
    axes.grid(alpha=0.3)
    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return path
