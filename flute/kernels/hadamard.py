"""The operator ``flute::hadamard``, known to torch: blocks of x's last dimension times the orthonormal Hadamard matrix.

    y (..., K) = x (..., K) . diag(H, ..., H)        H (block_size, block_size) as in `flute.hadamard`

H is symmetric and its own inverse for every size, so the operator is its own inverse and its own gradient. CUDA: one
launch of ``cuda/hadamard.cu``, except for what `walsh` cannot cut or no shared memory holds, which plain torch does.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch

from ..errors import OperatorError
from ..hadamard import split, transform
from . import cuda, walsh

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_library = torch.library.Library("flute", "FRAGMENT")
_library.define("hadamard(Tensor x, int block_size) -> Tensor")


def _check(x: torch.Tensor, block_size: int) -> None:
    split(block_size)
    if x.dim() == 0 or x.shape[-1] % block_size:
        last = "is a scalar" if x.dim() == 0 else f"has a last dimension of {x.shape[-1]}"
        raise OperatorError(f"flute.hadamard: x {last}; block_size={block_size} must divide it")
    if x.dtype not in _DTYPES:
        raise OperatorError(f"flute.hadamard: x is {x.dtype}; use float16, bfloat16, float32 or float64")


def _hadamard_cpu(x: torch.Tensor, block_size: int) -> torch.Tensor:
    _check(x, block_size)
    return transform(x, block_size)


def _has_clusters(device: int) -> bool:
    return int(cuda._arch(device).removeprefix("sm_")) >= 90


@lru_cache(maxsize=1024)
def _choose(device: int, size: int, elements: int) -> walsh.Cut | None:
    return walsh.choose(size, elements, _sms(device), cuda._shared_bytes(device), _has_clusters(device))


@cache
def _sms(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _hadamard_cuda(x: torch.Tensor, block_size: int) -> torch.Tensor:
    _check(x, block_size)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    cut = None if x.dtype == torch.float64 else _choose(x.device.index, block_size, x.numel())
    return transform(x, block_size) if cut is None else _launch(x, cut)


@cache
def _kernel(device: int, cut: walsh.Cut, dtype: torch.dtype) -> Any:
    return cuda._kernel(device, "hadamard.cu", cut.macros(str(dtype).removeprefix("torch.")), "hadamard")


def _launch(x: torch.Tensor, cut: walsh.Cut) -> torch.Tensor:
    x, device = cuda._aligned(x), x.device
    y = torch.empty_like(x)
    kernel = _kernel(device.index, cut, x.dtype)
    chunks = -(-x.numel() // cut.chunk)
    config = cuda._config((chunks, 1), cut.threads, cut.shared_bytes, cut.split, _has_clusters(device.index))
    ahead = walsh.ahead(cut.size, x.element_size(), _sms(device.index))
    cuda._launch(device.index, config, kernel, x.data_ptr(), y.data_ptr(), x.numel() // 2, ahead)
    return y


def _hadamard_fake(x: torch.Tensor, block_size: int) -> torch.Tensor:
    _check(x, block_size)
    return x.new_empty(x.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.block_size = inputs[1]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.flute.hadamard(grad, ctx.block_size), None  # type: ignore[attr-defined]


_library.impl("hadamard", _hadamard_cpu, "CPU")
_library.impl("hadamard", _hadamard_cuda, "CUDA")
torch.library.register_fake("flute::hadamard", _hadamard_fake, lib=_library)
torch.library.register_autograd("flute::hadamard", _backward, setup_context=_setup_context, lib=_library)


def hadamard(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every ``block_size`` neighbours along x's last dimension, rotated by H; sums in float32, rounded once.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64; any strides, any leading dimensions, also empty.
        block_size: 2^k, 12 * 2^k, 20 * 2^k or 28 * 2^k up to 32768, a divisor of K.

    Returns:
        (..., K) in x's dtype, contiguous, the same bits on every run. Applied twice it gives back x, but for rounding.

    Raises:
        OperatorError: no such block size, it does not divide K, or no such dtype.
    """
    return torch.ops.flute.hadamard(x, block_size)
