"""What a method's name stands for, and a layer's way through it.

A layer is solved in five steps, each of which a recipe may leave out: dense target, table, scales, codes with error
feedback, rounds of refinement. See `hessian`, `codebook`, `flute.quantize`, `gptq` and `refine`. Folding (`awq`)
happens before, to the whole block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..errors import QuantizeError
from ..hadamard import transform
from ..quantize import Quantized, quantize, spread
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import resolve_table
from .capture import Moments
from .codebook import learn_table
from .gptq import as_pairs, decode, round_with_feedback
from .hessian import damped, dense_target, loss
from .refine import fit_scales, fit_table, sweep_codes


@dataclass(frozen=True)
class Recipe:
    """How layers are quantized.

    Args:
        summary: one line for people.
        calibrated: needs calibration windows.
        fold: fold activation-aware scales into the layer before, where the graph allows.
        scale: how scales begin, ``"auto"``, ``"absmax"`` or ``"mse"`` (weighted by H's diagonal where that is known).
        feedback: choose codes with error feedback; act_order: most important columns first, else from left to right.
        rounds: of refining scales, learned table and codes.
        match_dense: share of the way from W to the dense target (see `hessian.dense_target`).
        learns_tables: a custom spec without a table gets one of its own per layer.
        learns_scales: scales are learned by gradient descent in the end, see `learn`: of the codes that ``feedback``
            chose, or without it of those nearest in every step.
    """

    summary: str
    calibrated: bool = True
    fold: bool = False
    scale: str = "auto"
    feedback: bool = False
    act_order: bool = True
    rounds: int = 0
    match_dense: float = 0.0
    learns_tables: bool = False
    learns_scales: bool = False

    @property
    def solves(self) -> bool:
        """Whether layers are solved one by one, on calibration text."""
        return self.calibrated and (self.feedback or not self.learns_scales)


RECIPES = {
    "rtn": Recipe("round to nearest, no calibration", calibrated=False),
    "gptq": Recipe("rounding with error feedback, scales searched under the Hessian's diagonal",
                   scale="mse", feedback=True),
    "awq": Recipe("activation-aware scales folded into the layer before, then rtn", fold=True, scale="mse"),
    "awq+gptq": Recipe("awq, then gptq", fold=True, scale="mse", feedback=True),
    "best": Recipe("a table per layer learned by k-means, gptq towards the dense model's outputs, then rounds of "
                   "refining scales, table and codes under the Hessian",
                   scale="mse", feedback=True, rounds=2, match_dense=1.0, learns_tables=True),
    "nfl": Recipe("scales learned by gradient descent through the whole model", learns_scales=True),
    "higgs": Recipe("rotated weights rounded to an optimal Gaussian grid, no calibration (specs of `higgs_spec`)",
                    calibrated=False),
}  # fmt: skip
RECIPES |= {
    f"{name}+nfl": replace(RECIPES[name], learns_scales=True,
                           summary=f"{name}, then scales learned through the whole model, its codes kept")
    for name in ("gptq", "awq+gptq", "best")
}  # fmt: skip


class Solved(NamedTuple):
    """``quantized`` codes and scales; ``table`` the layer's own float32 table or None; ``weight`` W^ (N, K) float32;
    ``error`` squared output error against the target, relative to the output; ``damping`` share; ``dead`` inputs."""

    quantized: Quantized
    table: torch.Tensor | None
    weight: torch.Tensor
    error: float
    damping: float
    dead: int


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    known: Moments,
    spec: QuantSpec,
    recipe: Recipe,
    *,
    table: torch.Tensor | None = None,
    scale_dtype: torch.dtype,
    name: str = "weight",
) -> Solved:
    """Quantize W (N, K) with what is known of its input.

    Args:
        weight: (N, K), any float dtype.
        known: moments of the layer's input.
        spec: bits, group, table, vector size.
        recipe: the steps.
        table: the custom table; None with a custom spec: it is learned, where the recipe does so.
        scale_dtype: of the stored scales and table.

    Raises:
        QuantizeError: weights or H are not finite. SpecError: a custom table is missing.
    """
    weight = weight.detach().float()
    if known.hessian.shape[0] != weight.shape[1]:
        raise QuantizeError(f"layer {name!r}: H is {tuple(known.hessian.shape)} for a weight {tuple(weight.shape)}")
    if spec.hadamard_size:  # the same layer, seen in rotated channels
        turned = solve(
            transform(weight, spec.hadamard_size), known.rotated(spec.hadamard_size), spec.unrotated, recipe,
            table=table, scale_dtype=scale_dtype, name=name,
        )  # fmt: skip
        return turned._replace(weight=transform(turned.weight, spec.hadamard_size))
    made = damped(known.hessian, name=name)
    importance = made.matrix.diagonal()
    shift = None if known.drift is None else weight.double() @ known.drift
    target = dense_target(weight, made, shift, recipe.match_dense)
    group, width = spec.group(weight.shape[1]), weight.shape[1]
    learned = table is None and spec.table == CUSTOM_TABLE and recipe.learns_tables
    if learned:
        own, scales = learn_table(target, spec, importance, scale_dtype=scale_dtype, name=name)
    else:
        own = resolve_table(spec, table).to(weight.device)
        begun = quantize(
            target, spec, table=table, scale=recipe.scale, scale_dtype=scale_dtype, importance=importance, name=name,
        )  # fmt: skip
        scales = begun.scales
    values = as_pairs(own.to(scale_dtype).float())
    if recipe.feedback or learned:
        codes = round_with_feedback(target, made, spread(scales, group, width), values, act_order=recipe.act_order)
    else:
        codes = begun.codes.long()
    for _ in range(recipe.rounds):
        scales = fit_scales(target, made.matrix, codes, scales, values, group)
        if learned:
            values = fit_table(target, made.matrix, codes, spread(scales, group, width), values, scale_dtype)
        codes = sweep_codes(target, made.matrix, codes, spread(scales, group, width), values)
    rounded = decode(codes, spread(scales, group, width), values)
    error = float(loss(target - rounded, made.matrix).sum() / loss(weight, made.matrix).sum().clamp_min(1e-30))
    kept = values.view(spec.table_shape) if spec.table == CUSTOM_TABLE else None
    return Solved(Quantized(codes.to(torch.uint8), scales), kept, rounded, error, made.share, made.dead)
