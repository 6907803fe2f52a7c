"""Folders that appear at once or not at all.

A job works in ``OUT.partial/`` beside its target::

    OUT.partial/job.json    what is being made (the fingerprint); locked while somebody works here
    OUT.partial/folder/     the files; each is written under another name, fsynced and renamed

and `Workplace.finish` fsyncs the folder, renames it to ``OUT`` and removes the rest. Whoever sees ``OUT`` sees all of
it, also after a power loss. Files get the rights that the user's umask gives any new file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from safetensors import SafetensorError

from ..errors import CheckpointError, FluteError
from .files import read_json

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_METHODS = ("flute", "flatquant")  # of checkpoints that are ours to replace


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is complete and on the disk; on an error nothing is left.

    Raises:
        CheckpointError: the disk is full, read-only, ...; the line names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another output folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copy files by name, each whole or not at all.

    Raises:
        CheckpointError: one cannot be read, or not be written.
    """
    for name in names:
        try:
            file = open(source / name, "rb")  # noqa: SIM115  (closed by the next statement)
        except OSError as error:
            raise CheckpointError(f"{source / name} cannot be read: {error.strerror}") from None
        with file, whole_file(folder / name) as target:
            shutil.copyfileobj(file, target)


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power loss, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError if the disk of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed; make room or use another disk"
        )


class Workplace:
    """``OUT.partial/``: where a job works, alone, until `finish`. A context manager that holds the lock.

    Args:
        out: the folder to make.
        job: says what is made, plain JSON; a workplace left by a killed run is taken over only if it had the same job.
        force: replace an existing checkpoint, and throw away another job's leftovers.

    Raises:
        CheckpointError: ``out`` exists, another process works on it, or the leftovers belong to another job.
    """

    def __init__(self, out: Path, job: dict[str, Any], *, force: bool = False) -> None:
        self.out, self.job, self.force = out, job, force
        self.root = out.with_name(out.name + ".partial")
        self.folder = self.root / "folder"
        self.resumed = False
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Workplace:
        refuse_existing(self.out, force=self.force)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._take_over()
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self._release()
            raise CheckpointError(f"{self.root} cannot be made: {error.strerror or error}; choose another -o") from None
        except CheckpointError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _take_lock(self) -> None:
        self._lock = open(self.root / "lock", "ab")  # noqa: SIM115  (held until _release)
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock, as with most programs there
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.root} is in use by another process; wait, or choose another -o") from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_over(self) -> None:
        """Go on with what a killed run left, if it was the same job."""
        note = self.root / "job.json"
        if note.exists() or self.folder.exists():
            try:
                same = read_json(note) == self.job
            except CheckpointError:
                same = False
            if same and self.folder.is_dir():
                self.resumed = True
                return
            if not same and not self.force:
                raise CheckpointError(
                    f"{self.root} was left by a run with another model, other options or another version; "
                    "repeat that run, remove the folder, or use --force"
                )
            shutil.rmtree(self.folder, ignore_errors=True)
        write_json(note, self.job)

    def discard(self) -> None:
        """Remove everything: the job can never end well."""
        self._release()
        shutil.rmtree(self.root, ignore_errors=True)

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Inside, `folder` is filled; behind it comes `finish`. Any of our own errors discards what is there.

        Raises:
            CheckpointError: the system refuses to write (an OSError, or safetensors' word for it); what is there stays,
                for the same job to go on.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.folder} cannot be written: {why}; make room") from error
        except FluteError:
            self.discard()  # data and weights will be no better next time
            raise
        self.finish()

    def finish(self) -> None:
        """Give the folder its name, on the disk, and tidy up.

        Raises:
            CheckpointError: the target appeared meanwhile, or the system refuses the rename.
        """
        refuse_existing(self.out, force=self.force)
        try:
            sync_directory(self.folder)
            if os.path.lexists(self.out):
                _exchange(self.folder, self.out)  # now self.folder is the old checkpoint, which goes with the rest
            else:
                os.rename(self.folder, self.out)
            sync_directory(self.out.parent)
        except OSError as error:
            raise CheckpointError(f"{self.out} cannot be made: {error.strerror or error}; choose another -o") from None
        self.discard()


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise CheckpointError if ``out`` exists; with ``force`` only if it is not a checkpoint of flute."""
    if not os.path.lexists(out):
        return
    if not force:
        raise CheckpointError(f"{out} exists; choose another output folder, or --force to replace it")
    try:
        config = read_json(out / "config.json").get("quantization_config")
    except CheckpointError:
        config = None
    if out.is_symlink() or not isinstance(config, dict) or config.get("quant_method") not in _METHODS:
        raise CheckpointError(f"{out} is not a checkpoint of flute, so --force leaves it alone; remove it yourself")


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can (Linux), else in two."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is not None and call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_name("replaced")
    os.rename(old, aside)
    os.rename(new, old)
