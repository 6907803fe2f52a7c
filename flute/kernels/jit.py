"""Source text -> cubin -> loaded kernel, at run time, with NVRTC.

A kernel is named by its file and its macros. Its text is: the macros, ``types.cuh``, what the macros ask for (BITS:
``pipeline.cuh``, the layout's device header and ``common.cuh``; CODE_BITS: ``pipeline.cuh`` and ``integers.cuh``;
RANGES: ``pipeline.cuh`` and ``ranges.cuh``; TOKENS, COLUMNS: `wgmma`; FACTOR: `walsh`), what single files
need (`_ALSO`), and the file. NVRTC (NVIDIA's cuda-core) compiles it for the
exact GPU, never to PTX, so an older driver still takes it. Cubins are kept on disk under a name that hashes everything
they depend on: text, options, architecture, NVRTC version. Each file starts with the SHA-256 of the rest and is
published by rename, so a torn, damaged or foreign file is simply a miss; when several processes meet a cold kernel, one
compiles and the others wait for its lock. Without a usable disk, memory is used.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import settings
from ..errors import CompileError, FluteError
from . import layout, walsh, wgmma

_LOCK_SECONDS = 60.0  # a compile takes under a second; whoever waits this long compiles for itself
_OPTIONS = ("std=c++17",)
_ALSO = {  # what single files need
    "decode.cu": ("stage.cuh", "stream.cuh"),
    "kv_attention.cu": ("parts.cuh", "kv_rows.cuh"),
    "decode_attention.cu": ("pipeline.cuh", "parts.cuh"),
}
_loading = threading.RLock()


@lru_cache(maxsize=1)
def _import_core() -> Any:
    try:
        with _loading:  # cuda-core's import is not safe in two threads at once
            from cuda import core
            from cuda.bindings import nvrtc

            return core, nvrtc
    except (ImportError, RuntimeError) as error:
        raise CompileError(
            f"kernels cannot be compiled: {error}; NVRTC comes with torch's CUDA wheels, or run: "
            "pip install 'flute-engine[cuda]'"
        ) from None


@lru_cache(maxsize=1)
def nvrtc_version() -> str:
    """Version of the NVRTC in use, such as "13.0".

    Raises:
        CompileError: there is none.
    """
    _, nvrtc = _import_core()
    try:
        error, major, minor = nvrtc.nvrtcVersion()
    except Exception as missing:  # noqa: BLE001, the bindings raise several types when the library is not found
        raise CompileError(
            f"NVRTC is not on this machine ({str(missing).splitlines()[0]}); run: pip install 'flute-engine[cuda]'"
        ) from None
    if int(error) != 0:
        raise CompileError(f"NVRTC does not answer (error {int(error)}); reinstall nvidia-cuda-nvrtc")
    return f"{major}.{minor}"


def source(file: str, macros: dict[str, int]) -> str:
    """The complete CUDA C++ text of ``file`` (in ``flute/kernels/cuda``) with ``macros``; BITS brings the layout."""
    folder = resources.files(__package__) / "cuda"
    head = [f"#define {name} {value}" for name, value in macros.items()]
    head.append((folder / "types.cuh").read_text())
    if {"BITS", "CODE_BITS", "RANGES"} & set(macros):
        head.append((folder / "pipeline.cuh").read_text())
    if "BITS" in macros:
        head += [layout.device_header(macros["BITS"]), (folder / "common.cuh").read_text()]
    if "CODE_BITS" in macros:
        head.append((folder / "integers.cuh").read_text())
    if "RANGES" in macros:
        head.append((folder / "ranges.cuh").read_text())
    head += [(folder / name).read_text() for name in _ALSO.get(file, ())]
    if file == "integer_matmul.cu":
        head.append(wgmma.integer_header(macros["COLUMNS"]))
    if "TOKENS" in macros:
        wide = wgmma.device_header(macros["TOKENS"], bool(macros["BF16"]))
        head += [wide, (folder / "work.cuh").read_text()]
    if "FACTOR" in macros:
        head.append(walsh.device_header(macros["FACTOR"]))
    return "\n".join([*head, (folder / file).read_text()])


def compile_cubin(text: str, arch: str, *, log: Any = None) -> bytes:
    """Compile CUDA C++ for ``arch`` ("sm_90"); needs no GPU.

    Args:
        log: object with ``write``; receives the compiler's report (registers, spills) when given.

    Raises:
        CompileError: the text does not compile, with the first lines of the log; or there is no NVRTC.
    """
    core, _ = _import_core()
    options = core.ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"] if log is not None else None)
    try:
        compiled = core.Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:  # noqa: BLE001, cuda-core's errors have no common base
        first = " | ".join(line for line in str(error).splitlines()[:20] if line.strip())
        raise CompileError(f"kernel does not compile for {arch}: {first}") from None
    return bytes(compiled.code)


def _key(text: str, arch: str) -> str:
    parts = (text, arch, nvrtc_version(), str(layout.LAYOUT_VERSION), *_OPTIONS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:32], stored[32:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".cubin-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def cubin(text: str, arch: str) -> bytes:
    """The cubin of ``text`` for ``arch``, from disk when it was compiled before.

    Raises:
        CompileError: as `compile_cubin`.
    """
    try:
        folder = settings.cache_dir() / "cubins"
        folder.mkdir(mode=0o700, exist_ok=True)
    except (FluteError, OSError):
        return compile_cubin(text, arch)
    path = folder / f"{_key(text, arch)}.cubin"
    found = _read(path)
    if found is not None:
        return found
    try:
        with FileLock(str(path) + ".lock", timeout=_LOCK_SECONDS):
            found = _read(path)
            if found is None:
                found = compile_cubin(text, arch)
                _write(path, found)
            return found
    except (Timeout, OSError):  # a stuck neighbour, a full or read-only disk: do without it
        return found or compile_cubin(text, arch)


@cache
def _module(file: str, macros: tuple[tuple[str, int], ...], arch: str) -> Any:
    core, _ = _import_core()
    return core.ObjectCode.from_cubin(cubin(source(file, dict(macros)), arch))


def load(file: str, macros: tuple[tuple[str, int], ...], arch: str, name: str) -> Any:
    """The kernel ``name`` of ``file``, compiled for ``arch`` and loaded: a ``cuda.core.Kernel``.

    Raises:
        CompileError: it cannot be compiled or the driver does not take it.
    """
    with _loading:  # lru_cache alone would compile twice when two threads meet a cold kernel
        try:
            return _module(file, macros, arch).get_kernel(name)
        except CompileError:
            raise
        except Exception as error:  # noqa: BLE001, cuda-core's errors have no common base
            raise CompileError(f"driver refuses kernel {name} for {arch}: {str(error).splitlines()[0]}") from None
