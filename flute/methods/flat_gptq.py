"""FlatQuant with GPTQ: weights of one flattened block rounded with error feedback on its own quantized inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import CalibrationError
from ..flatquant.fold import SITE_OF, Tensors
from ..flatquant.rounding import Grid, decode, limits
from ..flatquant.spec import FlatSpec
from .capture import Call, linear_of, moments
from .gptq import round_with_feedback
from .hessian import DAMPING, damped


@dataclass(frozen=True)
class Feedback:
    """How GPTQ rounds.

    Args:
        damping: share of the Hessian's mean diagonal that is added to it. act_order: most important columns first.

    Raises:
        CalibrationError: a damping that is no positive number.
    """

    damping: float = DAMPING
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise CalibrationError(f"percdamp={self.damping} is no share of a diagonal; use a number such as 0.01")


def round_block(
    block: nn.Module,
    grids: Mapping[str, tuple[torch.Tensor, Grid]],
    spec: FlatSpec,
    hidden: list[torch.Tensor],
    call: Call,
    feedback: Feedback,
) -> Tensors:
    """Codes float32, shaped as the rows, of each layer in ``grids``; the block's weights become what they stand for,
    in order.

    Args:
        block: flattened, float32, with folded dense weights; sites round.
        grids: clipped rows (N, groups, K / groups) and their grid, by layer.
        hidden: what goes into the block, batch by batch, from quantized blocks before it.
    """
    found: Tensors = {}
    known: dict[str, torch.Tensor] = {}
    for name in SITE_OF:
        if name not in grids:
            continue
        rows, made = grids[name]
        bits, zero = spec.weight_bits(name), made.zero
        site = SITE_OF[name]
        if site not in known or spec.separate_clips:
            seen = moments(block, None, name, hidden, call)
            assert seen is not None  # every block runs all of these layers
            known[site] = seen.hessian
        low, high = limits(bits, symmetric=zero is None)
        table = torch.arange(low, high + 1, dtype=torch.float32, device=rows.device).unsqueeze(-1)
        if zero is not None:  # a zero point of its own per row shifts the row instead of the table
            rows = rows + zero * made.scale
        hessian = damped(known[site], share=feedback.damping, name=name)
        wide = made.scale.expand_as(rows).float().flatten(1)
        picked = round_with_feedback(rows.flatten(1), hessian, wide, table, act_order=feedback.act_order)
        found[name] = picked.view_as(rows).float() + low
        linear_of(block, name).weight.data = decode(found[name], made).float().flatten(1)
    return found
