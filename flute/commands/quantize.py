"""``flute quantize``: a dense model to a checkpoint of 2-4 bits, shard by shard."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import FluteError, SpecError
from .common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    ThreadsOption,
    check_device,
    note,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    read_text,
)

if TYPE_CHECKING:
    import torch

    from ..config import ModelSpec
    from ..spec import QuantSpec


DATA_FREE = ("rtn", "higgs")


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    bits: Annotated[int | None, typer.Option(help="2, 3 or 4; left out: what the table says, else 4.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale; -1: the whole row.")] = 64,
    table: Annotated[
        str | None,
        typer.Option(help="int4, fp4, nf4, ... gauss4, or a JSON file of numbers or pairs. Left out: nf<bits>."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="rtn, higgs: no text needed; gptq, awq, awq+gptq, best, nfl: calibrated.")
    ] = "rtn",
    hadamard_size: Annotated[
        int | None, typer.Option(help="Rotate blocks of at most so many inputs; 0: none. higgs: 512, others: 0.")
    ] = None,
    vector_size: Annotated[int | None, typer.Option(help="Weights per code, 1 or 2. higgs: 2, others: 1.")] = None,
    scale: Annotated[
        str,
        typer.Option(help="For rtn and higgs: absmax, rms, mse: the least squared error; auto: as the table wants."),
    ] = "auto",
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 text to calibrate with; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens in such a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="For nfl: passes over the windows.")] = 2,
    lr: Annotated[float, typer.Option(help="For nfl: first step, in units of a layer's mean scale.")] = 5e-3,
    objective: Annotated[
        str, typer.Option(help="For nfl: kl (to the dense model), nll (of the text), or block after block.")
    ] = "kl",
    learn_table: Annotated[bool, typer.Option("--learn-table", help="For nfl: learn a table per layer.")] = False,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave layers dense: a name, a glob, or re:...")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=bits:3,...", help="Another spec for some layers.")
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head too; a tied one is untied.")
    ] = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL and write a checkpoint that any GPU, and transformers itself, can load.

    Methods rtn and higgs, which hold one shard in memory, and nfl go on where they were when a killed run is repeated.
    The calibrated methods hold the dense model. Method best learns a table per layer unless --table names one;
    docs/quality.md says more.
    """
    check_method(method, calibration or [], scale)
    table_values, spec = layer_spec(bits, group_size, table, method, vector_size, hadamard_size)
    record = model_spec(spec, skip or [], override or [], lm_head=lm_head)
    from ..checkpoint.atomic import refuse_existing
    from ..methods.learn import Learning

    refuse_existing(output := output.expanduser().absolute(), force=force)
    check_device(device)
    texts = {str(path): read_text(path) for path in calibration or []}
    quiet_libraries(threads)
    options: dict[str, Any] = {"table": table_values, "device": device, "force": force, "version": __version__}
    if method in DATA_FREE:
        figures = _run(model, output, record, {**options, "scale": scale}, None, quiet=quiet)
        figures["method"] = method
    else:
        learning = Learning(epochs, lr, objective=objective, learn_table=learn_table, seed=seed)
        options |= {"method": method, "samples": samples, "window": window, "seed": seed}
        options |= {"learning": learning} if method == "nfl" else {}
        figures = _run(model, output, record, options, texts, quiet=quiet)
    if as_json:
        print_json(figures)
    else:
        _print_report(output, figures, quiet=quiet)


def _print_report(output: Path, figures: dict[str, Any], *, quiet: bool) -> None:
    if "method_layers" in figures and not quiet:
        _print_layers(figures)
    print(
        f"{output}: {figures['layers']} layers in {figures['bits_per_weight']:.3f} bits per weight, "
        f"{figures['bytes'] / 1e6:.1f} MB (was {figures['source_bytes'] / 1e6:.1f} MB), {figures['seconds']:.1f} s"
        + (f", at most {figures['peak_bytes'] / 1e9:.2f} GB of memory" if figures["peak_bytes"] else "")
    )


def check_method(method: str, calibration: list[Path], scale: str) -> None:
    """Refuse a method that does not exist, lacks its text, or does not go with other options.

    Raises:
        FluteError: naming the option.
    """
    from ..methods.recipes import RECIPES
    from ..quantize import SCALE_METHODS

    if method not in RECIPES:
        raise FluteError(f"--method {method} is unknown; use {', '.join(RECIPES)}")
    if scale not in SCALE_METHODS:
        raise FluteError(f"--scale {scale} is unknown; use {' or '.join(SCALE_METHODS)}")
    if method not in DATA_FREE and not calibration:
        raise FluteError(f"--method {method} needs a text: --calibration FILE")
    if method not in DATA_FREE and scale != "auto":
        raise FluteError(f"--scale {scale} is for --method rtn; {method} searches its scales by itself")
    if method in DATA_FREE and calibration:
        raise FluteError(f"--calibration is not used by --method {method}; leave it out, or choose another method")


def _print_layers(figures: dict[str, Any]) -> None:
    rows = [
        [
            layer["name"],
            layer["spec"],
            "-" if layer["error"] is None else f"{layer['error']:.5f}",
            f"{layer['damping']:g}",
            f"{layer['seconds']:.1f}",
        ]
        for layer in figures["method_layers"]
    ]
    print_table(["layer", "spec", "output error", "damping", "s"], rows)
    for layer in figures["method_layers"]:
        if layer["note"]:
            print(f"{layer['name']}: {layer['note']}")
    if "learned" in figures:
        learned = figures["learned"]
        print(f"calibration loss {learned['before']:.4f} -> {learned['after']:.4f} at step {learned['best_step']}")
    for line in figures["notes"]:
        print(line)


def peak_bytes(device: str) -> int:
    """Most memory in use so far, of the GPU or of this process; 0 where the system does not tell."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(
    model: str, output: Path, record: ModelSpec, options: dict[str, Any], texts: dict[str, str] | None, *, quiet: bool
) -> dict[str, Any]:
    """Figures of a run; ``texts`` is what a calibrated method reads, None rounds to nearest."""
    from ..checkpoint import streaming
    from ..checkpoint.plan import make_plan
    from ..integrations import card, folders, mixtures
    from ..methods.folder import quantize_folder

    started = time.perf_counter()
    found = folders.find(model)
    if found.gguf:
        note(f"{found.gguf}: unpacked to float16 in memory as a whole first", quiet=quiet)
    output.parent.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {}
    with folders.dense_folder(found, output.parent) as source:
        architecture = folders.architecture(source, record, check_names=True)
        for line in mixtures.told(architecture.left):
            note(line)  # also when quiet: 16 bits where fewer were asked for
        plan = make_plan(source, architecture, record)
        if not plan.weights:
            raise FluteError(f"{model}: no layer is left to quantize; see --skip, and flute inspect for the names")
        with progress_bar(plan.weights, "w", quiet=quiet, scale=True) as bar:

            def progress(name: str, weights: int) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(weights)

            def on_step(done: int, total: int, loss: float) -> None:
                steps.total = total
                steps.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                steps.update(done - steps.n)

            if texts is None:
                more["resumed"] = streaming.run(plan, output, progress=progress, **options)
            else:
                with progress_bar(0, "step", quiet=quiet or "learning" not in options) as steps:
                    made = quantize_folder(plan, output, record, texts, progress=progress, on_step=on_step, **options)
                more["method_layers"] = [{**asdict(layer), "spec": str(layer.spec)} for layer in made.layers]
                more["notes"] = made.notes
                if made.learned is not None:
                    more["learned"] = asdict(made.learned)
        report = folders.validate(output)
        card.write(report, base=model, force=True)
        return {
            "output": str(output),
            "method": options.get("method", "rtn"),
            "layers": len(report.layers),
            "quantized_weights": report.quantized_weights,
            "bits_per_weight": report.bits_per_weight,
            "bytes": report.nbytes,
            "source_bytes": sum(entry.nbytes for entry in plan.headers.values()),
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_bytes(options["device"]),
            "resumed": False,
            "left_dense": architecture.left,
            **more,
        }


def layer_spec(
    bits: int | None,
    group_size: int,
    table: str | None,
    method: str,
    vector_size: int | None = None,
    hadamard_size: int | None = None,
) -> tuple[torch.Tensor | None, QuantSpec]:
    """The custom table, if any, and the spec that the options describe.

    Raises:
        FluteError: an option breaks a rule.
    """
    from ..spec import CUSTOM_TABLE, NAMED_TABLES, PAIR_TABLES, QuantSpec

    size, values = 1, None
    if method == "higgs":
        return None, _higgs(bits, group_size, table, vector_size, hadamard_size)
    if table is not None and table.endswith(".json"):
        values = read_table(Path(table))
        size = 1 if values.dim() == 1 else 2
        width = (values.shape[0].bit_length() - 1) // size
        bits, name = width if bits is None else bits, CUSTOM_TABLE
    elif table is None and method == "best":
        bits, name, size = 4 if bits is None else bits, CUSTOM_TABLE, 2
    elif table is None:
        bits = 4 if bits is None else bits
        name = f"nf{bits}" if bits in (2, 3, 4) else "nf4"  # QuantSpec says what is wrong with other bits
    else:
        name = table
        size = 2 if table in PAIR_TABLES else 1
        if bits is None:  # QuantSpec knows what to say about other names
            bits = int(table[-1]) if table in (*NAMED_TABLES, *PAIR_TABLES) else 4
    return values, QuantSpec(bits, group_size, name, size if vector_size is None else vector_size, hadamard_size or 0)


def _higgs(
    bits: int | None, group_size: int, table: str | None, vector_size: int | None, hadamard_size: int | None
) -> QuantSpec:
    from ..methods.higgs import HADAMARD_SIZE, higgs_spec

    if table is not None:
        raise FluteError(f"--table {table} does not go with --method higgs, which has grids of its own; leave it out")
    return higgs_spec(
        4 if bits is None else bits,
        group_size,
        vector_size=2 if vector_size is None else vector_size,
        hadamard_size=HADAMARD_SIZE if hadamard_size is None else hadamard_size,
    )


def model_spec(spec: QuantSpec, skip: list[str], override: list[str], *, lm_head: bool) -> ModelSpec:
    """The record of a whole model that the options describe.

    Raises:
        FluteError: an option breaks a rule.
    """
    from ..config import ModelSpec

    changes = dict(parse_override(text) for text in override)
    return ModelSpec(spec, changes, tuple(skip), lm_head, experts=True)


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """``PATTERN=bits:4,group_size:128`` -> the pattern and the fields it changes."""
    pattern, _, changes = text.rpartition("=")
    fields: dict[str, Any] = {}
    for part in changes.split(","):
        key, colon, value = part.partition(":")
        if not pattern or not colon:
            raise SpecError(f"--override {text!r} is not PATTERN=field:value,...; for example '*.down_proj=bits:4'")
        fields[key.strip()] = int(value) if value.strip().lstrip("-").isdigit() else value.strip()
    return pattern, fields


def read_table(path: Path) -> torch.Tensor:
    """A custom table (2**bits,) or (2**(2*bits), 2) from a JSON file: a list of numbers, or of pairs."""
    import json

    import torch

    try:
        if path.stat().st_size > 1 << 20:
            raise SpecError(f"{path} has {path.stat().st_size:,} bytes; a table is a list of at most 256 pairs")
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row if isinstance(row, list) else [row] for row in found] if isinstance(found, list) else []
        numbers = all(type(value) in (int, float) for row in rows for value in row)
        if not rows or not numbers or len({len(row) for row in rows}) != 1 or len(rows[0]) not in (1, 2):
            raise SpecError(f"{path} is no table; it must hold a JSON list of numbers, or of pairs of numbers")
        values = torch.tensor(rows, dtype=torch.float32)
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from None
    except SpecError:
        raise
    except (ValueError, RecursionError, OverflowError, RuntimeError) as error:
        raise SpecError(f"{path} is no table: {error}") from None
    return values[:, 0].contiguous() if values.shape[1] == 1 else values
