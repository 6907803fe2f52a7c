#!/usr/bin/env python3
"""What each table costs a real small model: perplexity, bytes and tokens per second, as CSV and as a table in Markdown.

    python benchmarks/quality_smollm.py MODEL TEXT [--device cuda] [--windows N]
    python benchmarks/quality_smollm.py MODEL TEXT --calibration OTHER_TEXT [--samples 64] [--window 512]

MODEL is a dense folder, a hub id or a .gguf file (SmolLM2-135M in the committed results), TEXT a UTF-8 file (the raw
WikiText-2 test set there). Perplexity is by the protocol of `flute.evaluate.perplexity`. On the CPU it is computed in
float32 and speed is measured in float16; on a GPU both are in float16. Speed: greedy decoding of one sequence with
`model.generate`, the fastest of five runs, which is the one that other programs disturbed least.

With ``--calibration`` the rows are the calibrated methods instead of the tables, and go to quality_methods_DEVICE.csv;
never calibrate on what is evaluated. ``--only`` and ``--measure`` repeat a part and keep the rest of an existing CSV.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import flute
from flute.bench.machine import processor
from flute.checkpoint import streaming
from flute.checkpoint.plan import Plan, make_plan
from flute.checkpoint.shards import read_headers
from flute.commands.common import print_table, progress_bar, quiet_libraries, read_text
from flute.commands.quantize import peak_bytes
from flute.config import ModelSpec
from flute.evaluate.perplexity import context_length, encode, perplexity
from flute.evaluate.speed import generate
from flute.integrations import folders
from flute.methods import Learning, higgs_spec
from flute.methods.folder import quantize_folder
from flute.spec import QuantSpec

RESULTS = Path(__file__).resolve().parent / "results"
SPECS = {
    "nf4 g64": QuantSpec(4, 64, "nf4"),
    "nf4 g128": QuantSpec(4, 128, "nf4"),
    "int4 g64": QuantSpec(4, 64, "int4"),
    "fp4 g64": QuantSpec(4, 64, "fp4"),
    "nf3 g64": QuantSpec(3, 64, "nf3"),
    "nf2 g64": QuantSpec(2, 64, "nf2"),
    **{f"higgs p={p} {bits}-bit g64": higgs_spec(bits, 64, vector_size=p) for bits in (4, 3, 2) for p in (1, 2)},
}
SEARCHED = " mse"  # at the end of a row's name: scales searched for the least squared error
SPECS |= {name + SEARCHED: spec for name, spec in SPECS.items()}
METHODS = {
    f"{method} {'pairs' if method == 'best' else f'nf{bits}'} {bits}-bit g64": (
        method,
        QuantSpec(bits, 64, table, vector),
    )
    for bits in (4, 3, 2)
    for method, table, vector in (
        *((name, f"nf{bits}", 1) for name in ("rtn", "gptq", "awq", "awq+gptq", "nfl")),
        ("best", "custom", 2),
    )
}
COLUMNS = (
    *("weights", "bits_per_weight", "bytes", "perplexity", "tokens", "windows", "seq_len", "bos", "tokens_per_second"),
    *("device", "machine", "threads", "c_kernel", "arithmetic", "flute", "torch", "transformers", "python", "date"),
    *("model", "text", "method", "calibration", "samples", "window", "quantize_seconds", "peak_bytes"),
    *("loss_before", "loss_after"),
)
HEADER = ["weights", "bits/weight", "MB", "perplexity", "tokens/s"]
PROMPT = "The city of"
NEW_TOKENS, RUNS = 64, 5


def planned(source: Path, record: ModelSpec) -> Plan:
    """What a quantized copy of the model in ``source`` will hold."""
    return make_plan(source, folders.architecture(source, record), record)


def quantized(source: Path, out: Path, spec: QuantSpec, scale: str = "auto") -> Path:
    """Make the checkpoint of ``spec``; returns its folder."""
    record = ModelSpec(spec)
    streaming.run(planned(source, record), out, scale=scale)
    return out


def calibrated(source: Path, out: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint of a row of METHODS; returns what the CSV tells of it."""
    method, spec = METHODS[name]
    if method == "rtn":
        quantized(source, out, spec)
        return {"method": method}
    texts = {str(path): read_text(path) for path in options.calibration}
    learning = Learning(**json.loads(options.learning)) if method == "nfl" else None
    record = ModelSpec(spec)
    with progress_bar(0, "w", quiet=False, scale=True) as bar:
        report = quantize_folder(
            planned(source, record), out, record, texts, method=method, samples=options.samples, window=options.window,
            device=options.device, progress=lambda layer, weights: bool(bar.update(weights)),
            learning=learning, on_step=lambda done, total, loss: print(done, total, loss, file=sys.stderr, flush=True),
        )  # fmt: skip
    return {
        "method": method if learning is None else f"{method} {options.learning}",
        "calibration": " ".join(path.name for path in options.calibration),
        "samples": options.samples,
        "window": options.window,
        "quantize_seconds": round(report.seconds, 1),
        "peak_bytes": peak_bytes(options.device),
        **(
            {} if report.learned is None else {"loss_before": report.learned.before, "loss_after": report.learned.after}
        ),
    }


def speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the model in ``folder``."""
    model, tokenizer = folders.load(folders.Found(folder), device=options.device, dtype=torch.float16)
    generate(model, tokenizer, PROMPT, 8, stop_early=False)  # compiles and fills caches
    runs = [generate(model, tokenizer, PROMPT, NEW_TOKENS, stop_early=False) for _ in range(RUNS)]
    return {"tokens_per_second": round(max(run.tokens_per_second for run in runs), 2)}


def quality(folder: Path, text: str, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the model in ``folder``."""
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    model, tokenizer = folders.load(folders.Found(folder), device=options.device, dtype=dtype)
    tokens = encode(tokenizer, text)
    with progress_bar(0, "window", quiet=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(1)

        length = context_length(model, options.seq_len)
        result = perplexity(model, tokens, seq_len=length, max_windows=options.windows, progress=progress)
    return {
        "perplexity": round(result.perplexity, 4),
        "tokens": result.tokens,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "bos": "one at the beginning" if tokens[0] == tokenizer.bos_token_id else "none",
    }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the figures were made."""
    from flute.kernels import cpu

    if options.device == "cuda":
        name, arithmetic = torch.cuda.get_device_name(), "float16"
    else:
        name, arithmetic = processor(), "perplexity float32, speed float16"
    return {
        "device": options.device,
        "machine": name,
        "threads": torch.get_num_threads(),
        "c_kernel": cpu.available(),
        "arithmetic": arithmetic,
        "flute": flute.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "model": options.label or options.model,
        "text": Path(options.text).name,
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by their first column."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["weights"]: dict(row) for row in csv.DictReader(file)}


def figure(row: dict[str, Any], column: str, form: str) -> str:
    """One number of a row for people; a dash where it was not measured."""
    if row.get(column) in (None, ""):
        return "-"
    value = float(row[column])
    return format(value, form if value < 1e6 else ".1e")


def for_people(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The columns HEADER of all rows."""
    return [
        [
            row["weights"],
            figure(row, "bits_per_weight", ".3f"),
            format(float(row["bytes"]) / 1e6, ".1f"),
            figure(row, "perplexity", ".3f"),
            figure(row, "tokens_per_second", ".1f"),
        ]
        for row in rows
    ]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """``path`` as CSV, and the same name with .md: the table for the documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    first = rows[0]
    lines = [
        f"{first['model']} on {first['text']}: {first.get('tokens', 0)} predicted tokens in {first.get('windows', 0)} "
        f"windows of {first.get('seq_len', 0)}, BOS: {first.get('bos', '-')}. {first['machine']}, {first['threads']} "
        f"threads, torch {first['torch']}, {first['arithmetic']}, {first['date']}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in [HEADER, ["---"] * len(HEADER), *for_people(rows)]),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the dense model and every spec; write after each, so that an interrupted run is not lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int, help="only the first so many windows of the text")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="some of: dense, " + ", ".join([*SPECS, *METHODS]))
    parser.add_argument("--measure", nargs="*", choices=("quality", "speed"), help="default: both; quality for methods")
    parser.add_argument("--calibration", nargs="*", type=Path, default=[], help="texts to calibrate with")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration text")
    parser.add_argument("--window", type=int, default=512, help="tokens in such a window")
    parser.add_argument("--learning", default="{}", help="for nfl: fields of flute.methods.Learning, as JSON")
    parser.add_argument("--label", help="what to call the model in the results")
    parser.add_argument("--output", type=Path, help="the CSV; default benchmarks/results/quality_smollm_DEVICE.csv")
    options = parser.parse_args()
    quiet_libraries(options.threads)
    subject, names = ("methods", METHODS) if options.calibration else ("smollm", SPECS)
    measure = options.measure or (["quality"] if options.calibration else ["quality", "speed"])
    output = options.output or RESULTS / f"quality_{subject}_{options.device}.csv"
    text = Path(options.text).read_text(encoding="utf-8")
    rows = read(output) if options.only or options.measure else {}
    with tempfile.TemporaryDirectory() as work, folders.dense_folder(folders.find(options.model), Path(work)) as source:
        for name in options.only or ["dense", *(name for name in names if not name.endswith(SEARCHED))]:
            folder, bits, more = source, 16.0, {}
            if name in METHODS:
                folder = Path(work) / name.replace(" ", "-")
                more = calibrated(source, folder, name, options)
                bits = folders.validate(folder).bits_per_weight
            elif name != "dense":
                scale = "mse" if name.endswith(SEARCHED) else "auto"
                folder = quantized(source, Path(work) / name.replace(" ", "-"), SPECS[name], scale)
                bits = folders.validate(folder).bits_per_weight
            nbytes = sum(entry.nbytes for entry in read_headers(folder).values())
            figures = {"weights": name, "bits_per_weight": bits, "bytes": nbytes, **machine(options), **more}
            if "speed" in measure:
                figures |= speed(folder, options)
            if "quality" in measure:
                figures |= quality(folder, text, options)
            rows[name] = {**rows.get(name, {}), **figures}
            print(name, figures.get("perplexity"), figures.get("tokens_per_second"), file=sys.stderr, flush=True)
            write(list(rows.values()), output)
    print_table(HEADER, for_people(list(rows.values())))


if __name__ == "__main__":
    main()
