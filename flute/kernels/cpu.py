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

_VERSION = 3  # of the C functions' arguments; a library built from other sources is not called
_STRIP = 256  # _cpu.c cuts x into strips of so many weights
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SUFFIXES = (".so", ".pyd", ".dylib")

_loaded: ctypes.CDLL | None = None
_reason = ""  # why _loaded is None, once that is known
instructions: int | None = None  # set to less than best(), tests reach what other machines run


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
    settings = "iiiipi"  # bits, vector_size, dtype, threads, GOMP_parallel, instruction set
    library.flute_cpu_linear.argtypes = [kinds[kind] for kind in "ppppppp" + "llll" + settings]
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


def most_tokens(dtype: torch.dtype, weights: int) -> int:
    """Up to which M `lut_linear` is taken to be no slower than `dequantize` and PyTorch's matmul, for N * K weights.

    It ends where PyTorch has matrix instructions for the dtype or a better float32 matmul, and later for large weights:
    the dense copy is then fresh memory for every call.
    """
    large = weights >= 1 << 25
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        return 32 if large else 8
    if best() == 2 and dtype != torch.bfloat16:
        return 64 if large else 16
    return 32 if dtype == torch.float32 and weights < 1 << 20 else 64


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

    Results are the same bits for any number of threads. A token's result does not depend on what else is in its batch,
    except that batches of more than 8 tokens round at other places than smaller ones. For M above 64 the weights are
    decoded again every 64 tokens.

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
    x, weight, scales, table = x.contiguous(), weight.contiguous(), scales.contiguous(), table.contiguous()
    bias = None if bias is None else bias.contiguous()
    strips = torch.empty(m * -(-k // _STRIP) * _STRIP, dtype=torch.float32)
    _library().flute_cpu_linear(
        y.data_ptr(), x.data_ptr(), strips.data_ptr(), weight.data_ptr(), scales.data_ptr(), table.data_ptr(),
        None if bias is None else bias.data_ptr(), m, n, k, group_size, bits, vector_size, _DTYPES[scales.dtype],
        torch.get_num_threads(), _openmp(), _set(),
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
        weight, scales, table = weight.contiguous(), scales.contiguous(), table.contiguous()
        _library().flute_cpu_dequantize(
            dense.data_ptr(), weight.data_ptr(), scales.data_ptr(), table.data_ptr(), n, in_features, group_size,
            bits, vector_size, _DTYPES[scales.dtype], torch.get_num_threads(), _openmp(), _set(),
        )  # fmt: skip
    return dense


def _library() -> ctypes.CDLL:
    if _loaded is None and not available():
        raise CompileError(build_hint())
    assert _loaded is not None
    return _loaded


@cache
def best() -> int:
    """The best set of instructions that the kernel has code for here: 0 plain C, 1 AVX2 or NEON, 2 AVX-512."""
    return _library().flute_cpu_best()


def _set() -> int:
    return best() if instructions is None else instructions


@cache
def _multiplies_bfloat16() -> bool:
    return bool(_library().flute_cpu_multiplies_bfloat16())


@cache
def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch loaded, or None (macOS, builds without OpenMP)."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None
