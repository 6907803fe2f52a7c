"""Rows of figures as CSV: one line on where they come from, a header, and a line per row, whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import whole_file
from ..errors import FluteError

_READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "str": str,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


def write_rows(path: Path, origin: str, rows: Sequence[Any], *, digits: int = 4) -> None:
    """Write ``rows``, dataclasses of one type, under the comment ``# origin``. None is written as nothing."""
    text = io.StringIO(newline="")
    text.write(f"# {origin}\n")
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _short(value, digits) for name, value in asdict(row).items()})
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def read_rows(path: Path, *kinds: Any) -> tuple[str, list[Any]]:
    """What `write_rows` wrote: the origin, and rows of that one of ``kinds`` whose fields the header names.

    Fields that were added since the file was written may be missing at the end of its header; they have their defaults.

    Raises:
        FluteError: the file cannot be read, or is no such file.
    """
    try:
        origin, *lines = path.read_text(encoding="utf-8").splitlines()
        header, *found = list(csv.reader(lines))
        (kind,) = [kind for kind in kinds if [field.name for field in fields(kind)][: len(header)] == header]
        readers = [_READ[str(field.type)] for field in fields(kind)[: len(header)]]
        rows = [kind(*[read(text) for read, text in zip(readers, row, strict=True)]) for row in found]
    except OSError as error:
        raise FluteError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):  # TypeError: a field without default is missing
        raise FluteError(f"{path} is not a file of flute bench, or of another version; measure again") from None
    return origin.removeprefix("# "), rows


def _short(value: Any, digits: int) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def output_file(output: Path, name: str) -> Path:
    """``output`` itself if it is called .csv, else ``name``.csv in the folder ``output``, which is made.

    Raises:
        FluteError: the folder cannot be made.
    """
    path = output if output.suffix == ".csv" else output / f"{name}.csv"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluteError(f"{path.parent} cannot be made: {error.strerror}; choose another --output") from None
    return path
