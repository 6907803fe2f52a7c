"""What the commands share: quiet libraries, tables, JSON, progress."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FluteError

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

JsonOption = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="A .csv file, or a folder for it.")]
PlotOption = Annotated[bool, typer.Option("--plot", help="Also a .png of the same name (needs matplotlib).")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a .gguf file, or the word tiny.", show_default=False)
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as many as torch likes.")]


def quiet_libraries(threads: int = 0) -> None:
    """transformers' bars, warnings and logs would bury our one line; errors still come, as exceptions."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if threads:
        torch.set_num_threads(threads)


def check_device(device: str) -> str:
    """Raise FluteError if ``device`` is not here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise FluteError(f"--device {device}: use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise FluteError("--device cuda: torch sees no GPU; use --device cpu, and flute doctor to find out why")
    return device


def parse_dtype(name: str) -> torch.dtype | None:
    """A torch dtype, None for "auto"."""
    import torch

    names = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in names:
        raise FluteError(f"--dtype {name}: use one of {', '.join(names)}")
    return names[name]


def read_text(path: Path) -> str:
    """A text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FluteError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise FluteError(f"{path} cannot be read: {error.strerror}") from None


def make_room(output: Path) -> None:
    """Make the folder that ``output`` will lie in.

    Raises:
        FluteError: the system refuses.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluteError(f"{output.parent} cannot be made: {error.strerror}; choose another -o") from None


def print_json(values: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(values, indent=2, ensure_ascii=False))


def note(text: str, *, quiet: bool = False) -> None:
    """A line for the user on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, never cut: first column to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = sum(max(len(row[i]) for row in [header, *rows]) + 3 for i in range(len(header)))
    Console(width=max(width, 80), markup=False, highlight=False, emoji=False).print(table)


def close(path: Path, draw: Any, rows: Sequence[Any], origin: str) -> None:
    """Say what a measurement wrote; with ``draw`` a picture of the rows that have figures too."""
    written = [path]
    if draw is not None:
        written.append(draw([row for row in rows if getattr(row, "batch", 1)], path.with_suffix(".png"), origin))
    print("written: " + ", ".join(map(str, written)))


def progress_bar(total: int, unit: str, *, quiet: bool, scale: bool = False) -> tqdm[Any]:
    """A bar on stderr with speed and time left; nothing when quiet or not a terminal."""
    from tqdm import tqdm

    silent = quiet or not sys.stderr.isatty()
    return tqdm(total=total, unit=unit, unit_scale=scale, disable=silent, file=sys.stderr, dynamic_ncols=True)
