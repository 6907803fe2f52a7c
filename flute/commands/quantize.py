"""``flute quantize``: a dense model to a checkpoint of 2-4 bits, shard by shard."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
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
    make_room,
    note,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    read_text,
)
from .method_options import (
    ActOrderOption,
    BitsOption,
    CalibrationOption,
    HadamardOption,
    LrOption,
    MethodOption,
    ObjectiveOption,
    PerLayerOption,
    SamplesOption,
    ScaleOption,
    TableOption,
    WindowOption,
    check_method,
    check_used,
    split_average,
)

if TYPE_CHECKING:
    import torch

    from ..checkpoint.architecture import Architecture
    from ..config import ModelSpec
    from ..methods.allocation import Allocation
    from ..spec import QuantSpec


def quantize(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    bits: BitsOption = None,
    per_layer: PerLayerOption = False,
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale; -1: the whole row.")] = 64,
    table: TableOption = None,
    method: MethodOption = "rtn",
    hadamard_size: HadamardOption = None,
    vector_size: Annotated[int | None, typer.Option(help="Weights per code, 1 or 2. higgs: 2, others: 1.")] = None,
    scale: ScaleOption = "auto",
    calibration: CalibrationOption = None,
    samples: SamplesOption = 64,
    window: WindowOption = 512,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    act_order: ActOrderOption = True,
    epochs: Annotated[int, typer.Option(min=1, help="For nfl: passes over the windows.")] = 2,
    lr: LrOption = None,
    objective: ObjectiveOption = "kl",
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
    The calibrated methods, and an average of bits, hold the dense model. Method best learns a table per layer unless
    --table names one; docs/quality.md says more.
    """
    check_method(method, calibration or [], scale)
    whole, average = split_average(bits, per_layer, table, override or [])
    check_used(method, average, context)
    table_values, spec = layer_spec(whole, group_size, table, method, vector_size, hadamard_size)
    record = model_spec(spec, skip or [], override or [], lm_head=lm_head)
    from ..checkpoint.atomic import refuse_existing
    from ..methods.folder import allocate_folder
    from ..methods.learn import Learning
    from ..methods.recipes import RECIPES

    refuse_existing(output := output.expanduser().absolute(), force=force)
    check_device(device)
    texts = {str(path): read_text(path) for path in calibration or []}
    quiet_libraries(threads)
    options: dict[str, Any] = {"table": table_values, "device": device, "force": force, "version": __version__}
    drawn: dict[str, Any] = {"samples": samples, "window": window, "seed": seed}
    read = {"texts": texts, "scale": scale, "device": device, **drawn}
    share = None if average is None else partial(allocate_folder, bits=average, **read)
    if RECIPES[method].calibrated:
        options |= {"method": method, "act_order": act_order, **drawn}
        if RECIPES[method].learns_scales:
            options["learning"] = Learning(epochs, lr, objective=objective, learn_table=learn_table, seed=seed)
    else:
        options["scale"] = scale
    figures = {"method": method, **_run(model, output, record, options, texts, share, quiet=quiet)}
    if as_json:
        print_json(figures)
    else:
        _print_report(output, figures, quiet=quiet)


def _print_report(output: Path, figures: dict[str, Any], *, quiet: bool) -> None:
    if "method_layers" in figures and not quiet:
        _print_layers(figures)
    if "average" in figures:
        shared = figures["average"]
        told = ", ".join(f"{count} of {bits} bits" for bits, count in shared["layers"].items())
        told += f" ({shared['rotated']} rotated)" if shared["rotated"] else ""
        print(f"layers: {told}; {shared['bits']:.3f} on average, scales not counted")
    print(
        f"{output}: {figures['layers']} layers in {figures['bits_per_weight']:.3f} bits per weight, "
        f"{figures['bytes'] / 1e6:.1f} MB (was {figures['source_bytes'] / 1e6:.1f} MB), {figures['seconds']:.1f} s"
        + (f", at most {figures['peak_bytes'] / 1e9:.2f} GB of memory" if figures["peak_bytes"] else "")
    )


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
    model: str,
    output: Path,
    record: ModelSpec,
    options: dict[str, Any],
    texts: dict[str, str],
    share: Callable[..., Allocation] | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Figures of a run; ``texts`` is what a calibrated method reads, others have none; ``share`` chooses bits."""
    from ..checkpoint import streaming
    from ..checkpoint.plan import make_plan
    from ..integrations import card, described, folders, mixtures
    from ..methods.folder import quantize_folder

    started = time.perf_counter()
    found = folders.find(model)
    if found.gguf:
        note(f"{found.gguf}: unpacked to float16 in memory as a whole first", quiet=quiet)
    make_room(output)
    more: dict[str, Any] = {}
    with folders.dense_folder(found, output.parent) as source:
        architecture = folders.architecture(source, record, check_names=True)
        for line in mixtures.told(architecture.left):
            note(line)  # also when quiet: 16 bits where fewer were asked for
        if share is not None:
            weights = sum(map(math.prod, architecture.linears.values()))
            record, architecture, more["average"] = _allocated(share, source, record, weights, quiet=quiet)
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

            if not texts:
                more["resumed"] = streaming.run(plan, output, progress=progress, **options)
            else:
                with progress_bar(0, "step", quiet=quiet or "learning" not in options) as steps:
                    made = quantize_folder(plan, output, record, texts, progress=progress, on_step=on_step, **options)
                more["method_layers"] = [{**asdict(layer), "spec": str(layer.spec)} for layer in made.layers]
                more["notes"] = made.notes
                if made.learned is not None:
                    more["learned"] = asdict(made.learned)
        report = folders.validate(output)
        card.write(described.of_report(report), base=model)
    return {
        "output": str(output),
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


def _allocated(
    share: Callable[..., Allocation], source: Path, record: ModelSpec, weights: int, *, quiet: bool
) -> tuple[ModelSpec, Architecture, dict[str, Any]]:
    """The record with bits for every layer, what that makes of the model, and figures of the choice."""
    from ..integrations import folders

    with progress_bar(weights, "w", quiet=quiet, scale=True) as bar:
        bar.set_description_str("sensitivity")
        made = share(source, record, progress=lambda name, weights: bool(bar.update(weights)))
    architecture = folders.architecture(source, made.record)
    layers = Counter(str(spec.bits) for spec in architecture.specs.values())
    rotated = sum(spec.hadamard_size > 0 for spec in architecture.specs.values())
    kl = {"predicted_kl": made.predicted, "predicted_kl_below": made.uniform}
    return (
        made.record,
        architecture,
        {"bits": made.bits, "layers": dict(sorted(layers.items())), "rotated": rotated, **kl},
    )


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
    elif table is None and method.startswith("best"):
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
