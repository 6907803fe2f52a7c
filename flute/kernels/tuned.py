"""What tuning found, kept on disk: which launch was the fastest for a problem on a GPU. Pure file logic, no CUDA.

There is one JSON file per `Machine` (GPU, driver, source of the kernels) in ``tuned/`` of the cache directory, so
nothing measured with another driver or another version of the kernels is ever believed. The file says which machine it
is about and carries a SHA-256 of its entries: torn, damaged, foreign or from another version, it counts as absent and
is replaced by the next write. Writers merge: each takes the file's lock, reads what is there, adds its own, and
publishes the whole by fsync and rename, so any number of processes may tune at once and readers never wait. Without a
usable disk results hold for the process that measured them.

An entry names a plan by its label and never describes it: whoever reads it looks the label up among the launches that
are legal for the problem (`choice`), so a wrong entry can cost time but cannot make a wrong launch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from .. import settings
from ..errors import FluteError, TuneError

_FORMAT = 1
_LOCK_SECONDS = 30.0  # a writer holds the lock for milliseconds
_MOST_BYTES = 1 << 24  # some 80,000 entries; whatever is larger was not written here
_SOURCES = (".py", ".cu", ".cuh")


class Machine(NamedTuple):
    """What a timing holds for: the GPU's name, the driver's version, and `source_hash`."""

    device: str
    driver: str
    source: str


class Problem(NamedTuple):
    """What a plan is chosen for: y (m, n) = x (m, k) . W^T; ``m`` is the last of its bucket (`choice.bucket`).

    Of a spec only bits and group (never -1) count: every table is a table of pairs to the kernels, whatever is in it.
    """

    m: int
    n: int
    k: int
    bits: int
    group: int
    dtype: str


class Verdict(NamedTuple):
    """What was found at the last M of a bucket: label of the plan to run, microseconds of it and of the analytic one.

    ``plan`` is None where the analytic choice stays; ``first`` is the fewest tokens that the plan is good for.
    """

    plan: str | None
    us: float
    analytic_us: float
    first: int = 1


Verdicts = dict[Problem, Verdict]
_held: dict[Machine, Verdicts] = {}  # measured by this process
_seen: dict[Path, tuple[tuple[int, int, int], Verdicts]] = {}  # read by this process: state of the file, what it held


@cache
def source_hash(compiler: str) -> str:
    """SHA-256 over everything here that a kernel or a plan may depend on, and the compiler's version."""
    digest = hashlib.sha256(compiler.encode())
    here = resources.files(__package__)
    for folder in (here, here / "cuda"):
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.name.endswith(_SOURCES):
                digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


# ---- reading -------------------------------------------------------------------------------------------------------


def lookup(machine: Machine, problem: Problem) -> Verdict | None:
    """What is known about ``problem`` on ``machine``; a file that changed since the last look is read again."""
    return _held.get(machine, {}).get(problem) or _on_disk(machine).get(problem)


def stored() -> Iterator[tuple[Machine, Verdicts]]:
    """Everything on disk, of whatever machine."""
    for path in _files():
        if (found := _read(path)) is not None:
            yield found


def _folder() -> Path:
    return settings.cache_dir() / "tuned"


def _files() -> list[Path]:
    try:
        return sorted(_folder().glob("*.json"))
    except (FluteError, OSError):
        return []


def _path(machine: Machine) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in machine.device)[:60]
    return _folder() / f"{name}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"


def _on_disk(machine: Machine) -> Verdicts:
    try:
        path = _path(machine)
        found = path.stat()
    except (FluteError, OSError):
        return {}
    state = (found.st_mtime_ns, found.st_size, found.st_ino)
    if path not in _seen or _seen[path][0] != state:
        _seen[path] = (state, _of(machine, path))
    return _seen[path][1]


def _of(machine: Machine, path: Path) -> Verdicts:
    read = _read(path)
    return read[1] if read is not None and read[0] == machine else {}


def _read(path: Path) -> tuple[Machine, Verdicts] | None:
    """What the file holds, None where it is absent or anything about it is not as `_write` leaves it."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            return None
        values = json.loads(text)
        if values["format"] != _FORMAT or values["sha256"] != _digest(values["entries"]):
            return None
        machine = Machine(*(_typed(values[field], str) for field in Machine._fields))
        return machine, dict(map(_entry, values["entries"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return None


def _entry(values: Mapping[str, Any]) -> tuple[Problem, Verdict]:
    m, n, k, bits, group = sizes = [_typed(values[field], int) for field in Problem._fields[:-1]]
    us, analytic_us = times = [_typed(values[field], float) for field in ("us", "analytic_us")]
    first = _typed(values["first"], int)
    if min(*sizes, first) < 1 or not all(math.isfinite(time) and time > 0 for time in times):
        raise ValueError("a size or a time is not positive")
    chosen = values["plan"] if values["plan"] is None else _typed(values["plan"], str)
    return Problem(m, n, k, bits, group, _typed(values["dtype"], str)), Verdict(chosen, us, analytic_us, first)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _digest(entries: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


# ---- writing -------------------------------------------------------------------------------------------------------


def keep(machine: Machine, found: Mapping[Problem, Verdict]) -> None:
    """Add results to what is kept, in place of older ones about the same problems.

    Raises:
        TuneError: the disk does not take them; they hold in this process all the same.
    """
    _held.setdefault(machine, {}).update(found)
    try:
        path = _path(machine)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with FileLock(str(path) + ".lock", timeout=_LOCK_SECONDS):
            _write(path, machine, _of(machine, path) | dict(found))
    except (FluteError, OSError, Timeout) as error:
        raise TuneError(f"tuned plans are not kept, they end with this process: {error}") from None


def _write(path: Path, machine: Machine, verdicts: Verdicts) -> None:
    entries = [{**problem._asdict(), **verdict._asdict()} for problem, verdict in sorted(verdicts.items())]
    values = {"format": _FORMAT, **machine._asdict(), "sha256": _digest(entries), "entries": entries}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tuned-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def clear() -> int:
    """Forget everything, on disk and in this process; how many files were removed."""
    _held.clear()
    _seen.clear()
    files = _files()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)
