"""``flute quantize``: a dense model to a checkpoint of 2-4 bits, shard by shard."""

from __future__ import annotations

import time
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
    progress_bar,
    quiet_libraries,
)

if TYPE_CHECKING:
    import torch

    from ..config import ModelSpec

_METHODS = ("rtn",)


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    bits: Annotated[int | None, typer.Option(help="2, 3 or 4; left out: what the table says, else 4.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights along K that share a scale; -1: the whole row.")] = 64,
    table: Annotated[
        str | None, typer.Option(help="int4, fp4, nf4, ... or a JSON file of numbers or of pairs. Left out: nf<bits>.")
    ] = None,
    method: Annotated[str, typer.Option(help="rtn: round to nearest.")] = "rtn",
    scale: Annotated[str, typer.Option(help="absmax, or mse: search for the least squared error.")] = "absmax",
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

    Memory holds one shard at most. A run that was killed goes on when the same command is repeated.
    """
    if method not in _METHODS:
        raise FluteError(f"--method {method} is unknown; use {' or '.join(_METHODS)}")
    values, record = model_spec(bits, group_size, table, skip or [], override or [], lm_head=lm_head)
    from ..checkpoint.atomic import refuse_existing
    from ..quantize import SCALE_METHODS

    if scale not in SCALE_METHODS:
        raise FluteError(f"--scale {scale} is unknown; use {' or '.join(SCALE_METHODS)}")
    output = output.expanduser().absolute()
    refuse_existing(output, force=force)
    check_device(device)
    quiet_libraries(threads)
    figures = _run(model, output, record, values, scale=scale, device=device, force=force, quiet=quiet)
    if as_json:
        print_json(figures)
    else:
        print(
            f"{output}: {figures['layers']} layers in {figures['bits_per_weight']:.3f} bits per weight, "
            f"{figures['bytes'] / 1e6:.1f} MB (was {figures['source_bytes'] / 1e6:.1f} MB), {figures['seconds']:.1f} s"
        )


def _run(
    model: str,
    output: Path,
    record: ModelSpec,
    table: torch.Tensor | None,
    *,
    scale: str,
    device: str,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    from ..checkpoint import streaming
    from ..checkpoint.plan import make_plan
    from ..integrations import folders, mixtures

    started = time.perf_counter()
    found = folders.find(model)
    if found.gguf:
        note(f"{found.gguf}: unpacked to float16 in memory as a whole first", quiet=quiet)
    output.parent.mkdir(parents=True, exist_ok=True)
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

            resumed = streaming.run(
                plan,
                output,
                table=table,
                scale=scale,
                device=device,
                force=force,
                progress=progress,
                version=__version__,
            )
        report = folders.validate(output)
        return {
            "output": str(output),
            "layers": len(report.layers),
            "quantized_weights": report.quantized_weights,
            "bits_per_weight": report.bits_per_weight,
            "bytes": report.nbytes,
            "source_bytes": sum(entry.nbytes for entry in plan.headers.values()),
            "seconds": time.perf_counter() - started,
            "resumed": resumed,
            "left_dense": architecture.left,
        }


def model_spec(
    bits: int | None, group_size: int, table: str | None, skip: list[str], override: list[str], *, lm_head: bool
) -> tuple[torch.Tensor | None, ModelSpec]:
    """The custom table, if any, and the record that the options describe.

    Raises:
        FluteError: an option breaks a rule.
    """
    from ..config import ModelSpec
    from ..spec import CUSTOM_TABLE, NAMED_TABLES, QuantSpec

    vector_size, values = 1, None
    if table is not None and table.endswith(".json"):
        values = read_table(Path(table))
        vector_size = 1 if values.dim() == 1 else 2
        width = (values.shape[0].bit_length() - 1) // vector_size
        bits, name = width if bits is None else bits, CUSTOM_TABLE
    elif table is None:
        bits = 4 if bits is None else bits
        name = f"nf{bits}" if bits in (2, 3, 4) else "nf4"  # QuantSpec says what is wrong with other bits
    else:
        name = table
        if bits is None:
            bits = int(table[-1]) if table in NAMED_TABLES else 4  # QuantSpec knows what to say about other names
    spec = QuantSpec(bits=bits, group_size=group_size, table=name, vector_size=vector_size)
    changes = dict(parse_override(text) for text in override)
    return values, ModelSpec(spec, changes, tuple(skip), lm_head, experts=True)


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
