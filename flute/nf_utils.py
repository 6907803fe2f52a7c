"""Upstream FLUTE's ``flute.nf_utils`` by name: NormalFloat tables and rounding to the nearest of their values.

    scale = max |w| of a group        code = number of pivots below w / scale        w^ = values[code] * scale

Groups are ``blocksize`` neighbours of the tensor as it lies in memory. A group of zeros decodes to zeros. New code says
`flute.quantize`, which also takes rows whose last group is short.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

from .tables import named_table

_OUTERMOST = 0.5 * (1 / 32 + 1 / 30)  # probability of the outermost value of a symmetric table


def get_values_pivots(
    bits: int = 4, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (2**bits,) of the NormalFloat table and their midpoints (2**bits - 1,), on the GPU if there is one.

    Args:
        symmetric: quantiles at evenly spaced probabilities without a zero, instead of ``nf<bits>``.
    """
    values = named_table(f"nf{bits}")
    if symmetric:
        last = (1 << bits) - 1
        spread = [_OUTERMOST + (1 - 2 * _OUTERMOST) * i / last for i in range(last + 1)]
        values = torch.tensor([NormalDist().inv_cdf(p) for p in spread], dtype=torch.float64)
        values = (values / values.abs().max()).to(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return values.to(device, dtype), ((values[1:] + values[:-1]) / 2).to(device, dtype)


def manual_nf4(
    inp: torch.Tensor,
    absmax: torch.Tensor | None = None,
    bits: int = 4,
    blocksize: int = 128,
    return_stats: bool = False,
    values: torch.Tensor | None = None,
    pivots: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tensor rounded to ``values`` times the scales of its groups.

    Args:
        inp: any shape of a multiple of ``blocksize`` elements.
        absmax: scales to be used instead, one a group.
        values, pivots: a table and its midpoints; default those of ``nf<bits>``.

    Returns:
        The rounded tensor; with ``return_stats`` also codes int64 of its shape and scales (groups,).
    """
    if values is None or pivots is None:
        values, pivots = get_values_pivots(bits)
    values, pivots = values.to(inp.device), pivots.to(inp.device)
    groups = inp.reshape(-1, blocksize)
    scales = groups.abs().amax(1, keepdim=True) if absmax is None else absmax.reshape(-1, 1)
    unit = torch.where(scales == 0, torch.zeros_like(groups), groups / scales)
    codes = torch.bucketize(unit.to(pivots.dtype), pivots)
    rounded = (values[codes] * scales).view(inp.shape)
    return (rounded, codes.view(inp.shape), scales.squeeze(1)) if return_stats else rounded


def nf_quantize(
    W: torch.Tensor, num_bits: int, group_size: int, custom_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W -> the rounded tensor, codes int64 of its shape, scales (groups,), and the table ``nf<num_bits>``."""
    values, pivots = get_values_pivots(num_bits)
    done = manual_nf4(W, custom_scales, num_bits, group_size, True, values, pivots)
    return (*done, values.to(W.device))


def nf_quantize_2(W: torch.Tensor, num_bits: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """W rounded like `nf_quantize`, with table and scales in ``dtype`` and their product rounded to it."""
    _, codes, scales, values = nf_quantize(W, num_bits, group_size)
    return (values.to(dtype)[codes.view(-1, group_size)] * scales.to(dtype).unsqueeze(1)).view(W.shape)
