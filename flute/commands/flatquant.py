"""``flute flatquant``: a dense model to a checkpoint with learned transforms and few bits for everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import FluteError
from .common import (
    DeviceOption,
    ModelArgument,
    QuietOption,
    ThreadsOption,
    check_device,
    note,
    progress_bar,
    quiet_libraries,
    read_text,
)
from .method_options import CalibrationOption, SamplesOption, WindowOption

if TYPE_CHECKING:
    from ..methods.flat_folder import FlatJob
    from ..methods.flatquant import FlatReport


def flatquant(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    calibration: CalibrationOption = None,
    preset: Annotated[str, typer.Option(help="w4a4kv4, w4a4kv4-down8, w4a8kv4, w8a8, w4a16 or w3a16.")] = "w4a4kv4",
    samples: SamplesOption = 128,
    window: WindowOption = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows to a step.")] = 4,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the windows.")] = 15,
    lr: Annotated[float, typer.Option(help="First rate of transforms; clips learn ten times as fast.")] = 5e-3,
    start: Annotated[str, typer.Option(help="Transforms begin as: moments, hadamard, identity.")] = "moments",
    gptq: Annotated[bool, typer.Option("--gptq", help="Round weights with error feedback afterwards.")] = False,
    separate_clips: Annotated[
        bool, typer.Option("--separate-clips", help="Each layer clips its own activation, as upstream; slower.")
    ] = False,
    key_offset: Annotated[
        bool, typer.Option("--key-offset", help="Subtract mean keys: for models with large key biases.")
    ] = False,
    matrices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take matrices of an earlier run, or a flat_matrices.pth.")
    ] = None,
    save_matrices: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the matrices here too.")] = None,
    amp: Annotated[
        bool | None,
        typer.Option("--amp/--no-amp", help="Run blocks in bfloat16 while learning; a GPU does.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Calibrate MODEL and write a checkpoint that transformers loads; a killed run goes on when it is repeated.

    A checkpoint of the published program (packed_int4) is converted instead.
    ``python -m flute.flatquant`` takes the flags of the published program instead; docs/flatquant.md compares them.
    """
    quiet_libraries(threads)
    from ..flatquant.spec import PRESETS
    from ..integrations import card, described, flat_upstream, folders
    from ..methods.flat_folder import Feedback, FlatJob, Schedule, Start

    if flat_upstream.is_published(source := folders.find(model).folder):
        blocks = flat_upstream.convert(source, output, force=force)
        card.write(described.of_folder(output.expanduser()))
        print(f"{output}: {blocks} blocks of a published packed_int4 checkpoint, converted")
        return
    if preset not in PRESETS:
        raise FluteError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    spec = replace(PRESETS[preset], separate_clips=separate_clips, key_offset=key_offset)
    job = FlatJob(
        spec, Start(factors=start), Schedule(epochs, lr, amp=device == "cuda" if amp is None else amp), samples, window,
        batch, seed, Feedback() if gptq else None, matrices,
    )  # fmt: skip
    texts = {str(path): read_text(path) for path in calibration or []}
    run(model, output, job, texts, device=device, force=force, save_to=save_matrices, quiet=quiet)


def run(
    model: str,
    output: Path,
    job: FlatJob,
    texts: dict[str, str],
    *,
    device: str,
    force: bool,
    save_to: Path | None,
    quiet: bool,
) -> FlatReport:
    """Make the folder, with a bar, and say what came of it."""
    from ..checkpoint.atomic import refuse_existing
    from ..integrations import card, described, folders
    from ..methods.flat_folder import flatquant_folder

    check_device(device)
    output = output.expanduser().absolute()
    refuse_existing(output, force=force)
    with progress_bar(0, "step", quiet=quiet) as bar:
        options: dict[str, Any] = {"device": device, "force": force, "save_to": save_to, "version": __version__}
        report = flatquant_folder(folders.find(model).folder, output, job, texts, on_step=stepper(bar), **options)
    card.write(described.of_folder(output), base=model)
    for line in report.notes:
        note(line, quiet=quiet)
    if report.blocks:
        before, after = (sum(getattr(block, name) for block in report.blocks) for name in ("before", "after"))
        print(f"squared error of blocks, relative, summed: {before:.4f} at the start, {after:.4f} learned")
    print(f"{output}: written")
    return report


def stepper(bar: Any) -> Any:
    """``on_step`` that moves a progress bar, which may have missed steps of blocks that were done before."""

    def on_step(done: int, total: int, loss: float) -> None:
        bar.total = total
        bar.set_postfix(error=f"{loss:.2e}", refresh=False)
        bar.update(done - bar.n)

    return on_step
