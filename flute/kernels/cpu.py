"""The CPU kernel's Python side: finds the compiled `_cpu.c` beside this file, and hands it pointers through ctypes.

The library is an optional extension: without a C compiler flute installs all the same, `available()` is False and the
caller takes the PyTorch code. It is not a Python module (no PyInit symbol): nothing but this file loads it.

Threads: as many as ``torch.get_num_threads()``, from PyTorch's own OpenMP pool where that can be found in the process.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import CompileError

_VERSION = 2  # of the C functions' arguments; a library built from other sources is not called
_STRIP = 256  # _cpu.c wants x in strips of so many weights
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SUFFIXES = (".so", ".pyd", ".dylib")

_loaded: ctypes.CDLL | None = None
_reason = ""  # why _loaded is None, once that is known
portable = False  # True leaves AVX2 aside, so that tests reach the code other machines run


def load(path: Path | None = None) -> None:
    """Load the library at `path`, by default the one beside this file.

    Raises:
        CompileError: there is none, it cannot be loaded, or it was built from other sources.
    """
    global _loaded
    if path is None:
        found = sorted(p for p in Path(__file__).parent.glob("_cpu*") if p.suffix in _SUFFIXES)
        if not found:
            raise CompileError("the CPU kernel was not built; install a C compiler and reinstall flute-engine")
        path = found[0]
    try:
        library = ctypes.CDLL(str(path))
        version = library.flute_cpu_version()
    except (OSError, AttributeError) as error:
        raise CompileError(f"CPU kernel {path} cannot be loaded: {error}; reinstall flute-engine") from None
    if version != _VERSION:
        raise CompileError(f"CPU kernel {path} has version {version}, not {_VERSION}; reinstall flute-engine")
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64}
    settings = "iiiipi"  # bits, vector_size, dtype, threads, GOMP_parallel, portable
    library.flute_cpu_linear.argtypes = [kinds[kind] for kind in "pppppp" + "llll" + settings]
    library.flute_cpu_dequantize.argtypes = [kinds[kind] for kind in "pppp" + "lll" + settings]
    library.flute_cpu_linear.restype = library.flute_cpu_dequantize.restype = None
    _loaded = library


def available() -> bool:
    """Whether the compiled kernel is here; looks for it once."""
    global _reason
    if _loaded is None and not _reason:
        try:
            load()
        except CompileError as error:
            _reason = str(error)
    return _loaded is not None


def build_hint() -> str:
    """Why the kernel is not available and what to do; empty if it is."""
    return "" if available() else _reason


def lut_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    vector_size: int,
) -> torch.Tensor:
    """y (M, N) = x . W^T + bias, summed in float32 and rounded once to x's dtype.

    A token's result is the same bits whatever M and the number of threads. For M above 32 the weights are decoded again
    every 32 tokens; some way above that, `dequantize` and a dense matmul are faster.

    Args:
        x: (M, K) float32, float16 or bfloat16. weight: uint8 (N, row_bytes). scales: (N, ceil(K / group_size)).
        table: (2**bits,) or (2**(2*bits), 2). bias: (N,) or None. All but weight in one dtype; checked by the caller.
        group_size: weights per scale, positive.

    Raises:
        CompileError: the kernel is not available.
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    strips = _strips(x)
    wide = None if bias is None else bias.float().contiguous()
    weight, scales, values = weight.contiguous(), scales.contiguous(), table.float().contiguous()
    _library().flute_cpu_linear(
        y.data_ptr(), strips.data_ptr(), weight.data_ptr(), scales.data_ptr(), values.data_ptr(),
        None if wide is None else wide.data_ptr(), m, n, k, group_size, bits, vector_size, _DTYPES[scales.dtype],
        torch.get_num_threads(), _openmp(), portable,
    )  # fmt: skip
    return y


def dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    vector_size: int,
) -> torch.Tensor:
    """W (N, K) = table[codes] * scales in the scales' dtype, each product rounded to float32 and then to that dtype.

    Arguments as in `lut_linear`; in_features is K.
    """
    n = weight.shape[0]
    dense = scales.new_empty(n, in_features)
    if dense.numel():
        weight, scales, values = weight.contiguous(), scales.contiguous(), table.float().contiguous()
        _library().flute_cpu_dequantize(
            dense.data_ptr(), weight.data_ptr(), scales.data_ptr(), values.data_ptr(), n, in_features, group_size,
            bits, vector_size, _DTYPES[scales.dtype], torch.get_num_threads(), _openmp(), portable,
        )  # fmt: skip
    return dense


def _strips(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) -> float32 (ceil(K / 256), M, 256), zero beyond K: what a strip of weights meets lies together."""
    m, k = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -k % _STRIP))
    return wide.view(m, -1, _STRIP).transpose(0, 1).contiguous()


def _library() -> ctypes.CDLL:
    if _loaded is None and not available():
        raise CompileError(build_hint())
    assert _loaded is not None
    return _loaded


@cache
def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch loaded, or None (macOS, builds without OpenMP)."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None
