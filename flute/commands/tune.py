"""``flute tune``: measure which launches are the fastest for a model's layers on this GPU, and keep them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FluteError, TuneError
from .common import JsonOption, QuietOption, note, parse_dtype, print_json, print_table, progress_bar, quiet_libraries

if TYPE_CHECKING:
    import torch

    from ..kernels.tuned import Problem, Verdicts
    from ..spec import QuantSpec
    from ..tune import Result


def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder, a hub id, or the word tiny.", show_default=False)
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="NxK,NxK,...", help="Weights instead of a model's.", show_default=False)
    ] = None,
    bits: Annotated[str, typer.Option(help="2, 3, 4, or several: 4,3; a quantized model says itself.")] = "4",
    group_size: Annotated[int, typer.Option(help="Likewise; weights along K that share a scale.")] = 64,
    tokens: Annotated[str, typer.Option("--tokens", "-m", help="Numbers of tokens.")] = "1,2,4,8,16,32,64",
    dtype: Annotated[str, typer.Option(help="auto: the model's own, else float16.")] = "auto",
    candidates: Annotated[int, typer.Option(min=1, help="Launches to try, of each kernel.")] = 12,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is known.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured; needs no GPU.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show what is kept, of all GPUs.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget what is kept, of all GPUs.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure launches of the kernels on this GPU and keep the fastest for every later process.

    Nothing has to be tuned: the choice by arithmetic is good without. What is found depends on GPU, driver and version
    and lies in the cache directory, never in a checkpoint. After tuning, sums may differ in the last bit.
    """
    if show or clear:
        if (show and clear) or model is not None or shapes is not None:
            raise FluteError("--show and --clear stand alone; give neither MODEL nor --shapes nor both of them")
        _show(as_json) if show else _clear(as_json)
        return
    if (model is None) == (shapes is None):
        raise FluteError("what is to be tuned? give MODEL, or --shapes such as 4096x4096,14336x4096 (one of them)")
    wanted = _problems(model, shapes, bits, group_size, tokens, dtype)
    if dry_run:
        _print([_row(problem) for problem in wanted], as_json)
        return
    from ..bench import tuning

    tuning.check_gpu()
    results, unkept = [], None
    with progress_bar(len(wanted), "problem", quiet=quiet) as bar:
        try:
            for result in tuning.tune(wanted, candidates=candidates, again=again):
                results.append(result)
                bar.update()
        except TuneError as error:  # after the last result: show them first
            unkept = error
    _print([_row(result.problem) | _found(result) for result in results], as_json)
    wrong = [f"{result.problem}: {', '.join(result.wrong)}" for result in results if result.wrong]
    if wrong:
        raise FluteError(f"launches gave wrong answers and were left out; please report it: {'; '.join(wrong)}")
    if unkept is not None:
        raise unkept
    faster = sum(result.verdict is not None and result.verdict.plan is not None for result in results)
    note(f"{len(results)} problems, {faster} faster than by arithmetic", quiet=quiet or as_json)


# ---- what to tune --------------------------------------------------------------------------------------------------


def _problems(
    model: str | None, shapes: str | None, bits: str, group_size: int, tokens: str, dtype: str
) -> list[Problem]:
    numbers, chosen = _whole("--tokens", tokens), parse_dtype(dtype)
    specs = [_spec(width, group_size) for width in _whole("--bits", bits)]
    import torch

    from ..bench import tuning
    from ..kernels import layout

    if shapes is not None:
        pairs = _shapes(shapes)
        found = [tuning.problems(pairs, numbers, spec, chosen or torch.float16) for spec in specs]
    else:
        assert model is not None
        own, layers = _layers(model, specs)
        taken = [(shape, spec) for shape, spec in layers if layout.supports(spec.group_size, shape[1])]
        found = [tuning.problems([shape], numbers, spec, chosen or own) for shape, spec in taken]
    distinct = list(dict.fromkeys(problem for some in found for problem in some))
    if not distinct:
        raise FluteError(f"{model}: no layer has groups that a CUDA kernel takes (multiples of 32, or the whole row)")
    return distinct


def _layers(model: str, specs: list[QuantSpec]) -> tuple[torch.dtype, Iterator[tuple[tuple[int, int], QuantSpec]]]:
    """dtype of a model's activations, (N, K) and spec of its quantized layers; a dense one's as if it had ``specs``."""
    quiet_libraries()
    import torch
    from transformers import AutoConfig

    from ..config import ModelSpec
    from ..integrations import folders

    found = folders.find(model)
    if found.gguf is not None:
        raise FluteError(f"{model}: give --shapes for a GGUF file, or quantize it first")
    own = getattr(AutoConfig.from_pretrained(found.folder, trust_remote_code=False), "dtype", None)
    if folders.is_quantized(found.folder):
        layers = [(layer.shape, layer.spec) for layer in folders.validate(found.folder).layers]
    else:
        made = [folders.architecture(found.folder, ModelSpec(spec)) for spec in specs]
        layers = [(shape, one.specs[name]) for one in made for name, shape in one.linears.items()]
    every = (
        ((shape[0], shape[1]), spec) for shape, spec in layers if len(shape) == 2
    )  # stacks of experts are not tuned
    return own if own in (torch.float16, torch.bfloat16) else torch.float16, every


def _spec(bits: int, group_size: int) -> QuantSpec:
    from ..spec import CUSTOM_TABLE, QuantSpec

    return QuantSpec(bits, group_size, CUSTOM_TABLE)


def _whole(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise FluteError(f"{option} {text!r} is no list of whole numbers; for example 1,2,4") from None


def _shapes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", part) for part in text.split(",")]
    if not all(found):
        raise FluteError(f"--shapes {text!r} is no list of NxK; for example 4096x4096,14336x4096")
    return [(int(one[1]), int(one[2])) for one in found if one]


# ---- what to say ---------------------------------------------------------------------------------------------------


def _row(problem: Problem) -> dict[str, Any]:
    return problem._asdict()


def _found(result: Result) -> dict[str, Any]:
    verdict = result.verdict
    if verdict is None:
        why = "every launch gave wrong answers" if result.wrong else "no kernel takes it"
        return {"analytic_us": None, "us": None, "gain": None, "plan": why, "measured": result.measured}
    return {
        "analytic_us": round(verdict.analytic_us, 3),
        "us": round(verdict.us, 3),
        "gain": round(result.gain, 3),
        "plan": verdict.plan or f"as by arithmetic: {result.analytic}",
        "measured": result.measured,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    cells = [{"problem": _name(row), **row} for row in rows]
    columns = [
        (title, form)
        for title, form in (("problem", "{}"), ("analytic_us", "{:.2f}"), ("us", "{:.2f}"), ("gain", "{:.3f}"),
                            ("measured", "{}"), ("plan", "{}"))
        if title in (cells[0] if cells else ())
    ]  # fmt: skip
    if columns:
        body = [["-" if row[title] is None else form.format(row[title]) for title, form in columns] for row in cells]
        print_table([title.replace("_", " ") for title, _ in columns], body)


def _name(row: dict[str, Any]) -> str:
    return f"{row['n']}x{row['k']} {row['bits']}bit g{row['group']} {row['dtype']} M<={row['m']}"


def _kept() -> list[tuple[str, str, bool, Verdicts]]:
    """GPU, driver, whether the kernels are still the same, and what is known."""
    from ..errors import CompileError
    from ..kernels import jit, tuned

    try:
        now = tuned.source_hash(jit.nvrtc_version())
    except CompileError:
        now = ""
    return [(here.device, here.driver, here.source == now, known) for here, known in tuned.stored()]


def _show(as_json: bool) -> None:
    kept = _kept()
    files: list[dict[str, Any]] = []
    for device, driver, current, known in kept:
        rows = [
            {**problem._asdict(), "analytic_us": v.analytic_us, "us": v.us, "gain": v.analytic_us / v.us,
             "plan": v.plan or "as by arithmetic"}
            for problem, v in sorted(known.items())
        ]  # fmt: skip
        files.append({"device": device, "driver": driver, "current": current, "entries": rows})
    if as_json:
        print_json(files)
        return
    for file in files:
        state = "" if file["current"] else "; of other kernels or another compiler, not used"
        print(f"{file['device']}, driver {file['driver']}: {len(file['entries'])} problems{state}")
        _print(file["entries"], False)
    if not files:
        print("nothing is kept")


def _clear(as_json: bool) -> None:
    from ..kernels import tuned

    removed = tuned.clear()
    print_json({"removed": removed}) if as_json else print(f"{removed} files removed")
