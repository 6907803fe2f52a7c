"""Launches of ``cuda/decode.cu`` with what `fused` puts around a product, and which problems it takes."""

from __future__ import annotations

from ctypes import c_float
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from ..errors import OperatorError
from ..spec import whole_group
from . import cuda, layout, ops, plan

MOST_TOKENS = 4  # every block norms all tokens by itself
# what `ops.lut_linear` has behind x: weight, scales, table, bias, out_features, bits, group_size
Linear: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, int, int]


@lru_cache(maxsize=4096)
def _plan(problem: cuda._Problem, norm: bool, gated: bool) -> plan.Plan | None:
    """The decode kernel's plan, as of the bare product where that may be.

    With gates a unit has a tile of both; for a residual the kernel of one tile and two blocks to an SM has no register.
    """
    device, m, n, k, bits, group, _ = problem
    if not cuda.gpu(device).has_clusters or m > MOST_TOKENS or k % 8 or (gated and n % (2 * layout.TILE_ROWS)):
        return None
    found = (cuda.choose(*problem), *plan.candidates(cuda.gpu(device), m, n, k, bits, group))
    fitting = (one for one in found if isinstance(one, plan.Plan) and (one.row_tiles == 2 or (norm and not gated)))
    return next(fitting, None)


@lru_cache(maxsize=4096)
def _prepared(problem: cuda._Problem, norm: bool, gated: bool) -> cuda._Prepared | None:
    chosen = _plan(problem, norm, gated)
    if chosen is None:
        return None
    return cuda._prepare_decode(problem, chosen, (("NORM", int(norm)), ("GATED", int(gated))))


_checked: dict[tuple[Any, ...], cuda._Prepared | None] = {}  # what was checked once is only looked up


def _launch(
    x: torch.Tensor, linear: Linear, gain: torch.Tensor | None, gated: bool, residual: torch.Tensor | None
) -> cuda._Prepared | None:
    more = tuple(None if one is None else (one.shape, one.dtype, one.get_device()) for one in (gain, residual))
    key = (cuda._signature(x, *linear), gated, more)
    if key not in _checked:
        k, (weight, *_, n, bits, group_size) = ops.check(x, *linear), linear
        wanted = {"gain": (gain, (k,)), "residual": (residual, (*x.shape[:-1], n // 2 if gated else n))}
        for name, (one, shape) in wanted.items():
            if one is not None and (tuple(one.shape), one.dtype, one.device) != (shape, x.dtype, x.device):
                given = f"{name} {tuple(one.shape)} {one.dtype} on {one.device}"
                raise OperatorError(f"flute.lut_fused: {given}; needs {shape} {x.dtype} on {x.device}")
        group = whole_group(group_size, k)
        problem = (x.get_device(), x.numel() // k, n, k, bits, group, x.dtype == torch.bfloat16)
        fits = x.numel() and weight.dim() == 3 and x.dtype != torch.float32
        if len(_checked) >= cuda._MOST_LAUNCHES:
            _checked.clear()
        _checked[key] = _prepared(problem, gain is not None, gated) if fits else None
    return _checked[key]


def lut_fused(
    x: torch.Tensor,
    linear: Linear,
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """`fused.lut_fused` in one launch; None where it takes more than one.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    launch = _launch(x, linear, gain, gated, residual)
    return None if launch is None else run(launch, x, *linear[:4], gain, eps, gated, residual)


def run(
    launch: cuda._Prepared,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The launch, on operands of its problem."""
    n = launch.problem[2]
    y = x.new_empty(*x.shape[:-1], n // 2 if gated else n)
    # copies that must be made live until the launch: names hold them, not only their addresses
    x, weight, scales, table = (cuda._aligned(one) for one in (x, weight, scales, table))
    bias, residual = (None if one is None else one.contiguous() for one in (bias, residual))
    gain = None if gain is None else cuda._aligned(gain)
    operands = (weight.data_ptr(), scales.data_ptr(), table.data_ptr(), int(table.dim() == 2), x.data_ptr())
    cuda._launch(
        launch.problem[0], launch.config, launch.kernel, *operands, cuda._pointer(bias), y.data_ptr(), 0,
        *launch.sizes, cuda._pointer(residual), cuda._pointer(gain), c_float(eps),
    )  # fmt: skip
    return y
