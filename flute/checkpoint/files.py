"""Files of a model folder, which may come from anybody: strict JSON and names that stay inside the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError

CONFIG = "config.json"
MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 32
_SHOWN_PROBLEMS = 12


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``: at most 16 MiB and 32 levels, no key twice, no NaN.

    Raises:
        CheckpointError: the file is missing, too large or not such an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; JSON of a model has at most {MAX_JSON_BYTES:,}")
        found = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a folder that holds a model") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels; it is not read") from None
    except CheckpointError:
        raise
    except ValueError as error:  # also UnicodeDecodeError and what the two hooks say
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; a JSON object is needed")
    if _deeper(found, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels; it is not read")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return made


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a JSON value")
    return float(name)  # Infinity: real configs of some architectures hold it


def _deeper(value: Any, levels: int) -> bool:
    level: list[Any] = [value]
    for _ in range(levels + 1):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def inside(folder: Path, name: object) -> Path:
    """``folder/name`` where ``name`` is a bare file name; links may lead elsewhere only as the hub's cache lays them.

    Raises:
        CheckpointError: the name has directories in it, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or len(name) > 255 or name in (".", "..") or set(name) & set("/\\\0:"):
        raise CheckpointError(f"{folder} names the file {str(name)[:80]!r}; only bare names inside the folder are read")
    path = folder / name
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        cache = home.parent.parent / "blobs"  # models--x--y/snapshots/<revision>/file -> models--x--y/blobs/<hash>
        if target.parent not in (home, cache):
            raise CheckpointError(f"{path} is a link to {target}, outside the folder; copy the file into the folder")
    return path


def refuse(where: Path | str, problems: Sequence[str]) -> NoReturn:
    """Raise one CheckpointError line that tells all problems of ``where`` (the first dozen in words)."""
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    raise CheckpointError(f"{where}: {count}{shown}" + (f"; and {more} more" if more > 0 else ""))
