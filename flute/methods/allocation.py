"""Bits for every layer from an average for all of them: more where errors cost more.

By the linearity theorem (see `sensitivity`) the cost of a choice is a sum over layers, alpha_l t_l^2(bits), and so is
its size, weights times bits: the choice of least cost within a size is a knapsack problem
(Malinovskii et al. 2024, section 5), solved here exactly. Layers that get the same input and are joined into one launch
by `flute.integrations.fusion`, or into one matrix by vLLM, have one spec, and so have the experts of a mixture.

The average counts code bits, as ``bits`` does everywhere: an average of 3.25 lies a quarter of the way from a model of
3 bits to one of 4. Scales and tables come on top; scales are as many for every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any

import torch

from ..config import ModelSpec, changed
from ..errors import CalibrationError, SpecError
from ..integrations.fusion import FAMILIES
from ..integrations.modules import choose
from ..quantize import dequantize, quantize
from ..spec import CUSTOM_TABLE, QuantSpec
from .sensitivity import divergence, log_probabilities, own_text, weights_replaced

BITS = (2, 3, 4)
PROBE = 3  # bits of the rounding whose harm is measured
TOKENS = 512


@dataclass(frozen=True)
class Allocation:
    """``record`` with a spec for every layer; ``bits`` the average that came of it (at most what was asked for);
    ``predicted`` sum of alpha t^2; ``uniform`` the same for the spec asked for and the next smaller number of bits."""

    record: ModelSpec
    bits: float
    predicted: float
    uniform: float


def allocate(
    model: Any,
    record: ModelSpec,
    bits: float,
    windows: torch.Tensor | None = None,
    *,
    scale: str = "auto",
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda name, weights: None,
) -> Allocation:
    """Choose 2, 3 or 4 bits for every layer of a dense causal model of transformers, and where not to rotate.

    Args:
        model: dense, all of it in memory; as it was when this returns.
        record: which layers, and a spec whose ``bits`` are replaced; named tables follow, ``"custom"`` stands for
            tables learned later and is judged by a Gaussian grid; see `families`. No overrides.
        bits: the average, from 2 to 4.
        windows: token ids int64 (S, L) of a text, of which about 512 tokens are read; None: the model writes its own.
        scale: of the rounding whose harm is measured, as in `flute.quantize.quantize`.
        seed: of the model's own text.
        progress: called after every layer with its weights.

    Raises:
        SpecError: ``bits`` is outside, or there are overrides. CalibrationError: the model gives NaN, or has no layer.
    """
    if not BITS[0] <= bits <= BITS[-1]:
        raise SpecError(f"an average of {bits} bits is not possible; use {BITS[0]} to {BITS[-1]}")
    if record.overrides:
        raise SpecError("overrides do not go with an average of bits, which gives every layer its own; use one of them")
    choice = choose(model, record)
    if not choice.specs:
        raise CalibrationError(f"{type(model).__name__} has no layer to share {bits} bits among; see skip patterns")
    windows = own_text(model, seed=seed) if windows is None else windows[: max(1, TOKENS // windows.shape[1])]
    truth = log_probabilities(model, windows)
    groups, costs, harms = joined(choice.specs), [], []
    for group in groups:
        names = {name: name if name in choice.experts else f"{name}.weight" for name in group}
        weights = {names[name]: model.get_parameter(names[name]).detach() for name in group}
        size = sum(weight.numel() for weight in weights.values())
        found, spent = [], []
        for family in families(record.spec):
            found += _harms(model, weights, family, scale, windows, truth)
            spent += [size * each for each in BITS]
        harms.append(found)
        costs.append(spent)
        for name in group:
            progress(name, weights[names[name]].numel())
    return _allocation(record, bits, groups, costs, harms)


def families(spec: QuantSpec) -> list[QuantSpec]:
    """What a layer may be: as asked for, and instead of rotated Gaussian grids also plain NormalFloat.

    Rotation spreads an error over inputs of which a few may be a hundred times the others (those of the first token,
    for one). Where weights of those are next to nothing they were next to exact before; such layers stay as they are.
    """
    plain = (
        [QuantSpec(spec.bits, spec.group_size, f"nf{spec.bits}")] if spec.hadamard_size and spec.unit_variance else []
    )
    return [spec, *plain]


def _harms(
    model: Any,
    weights: Mapping[str, torch.Tensor],
    family: QuantSpec,
    scale: str,
    windows: torch.Tensor,
    truth: torch.Tensor,
) -> list[float]:
    """alpha t^2 of layers that have one spec, for each of BITS."""
    errors, harm = {}, 0.0
    for bits in BITS:
        spec = changed(family, {"bits": bits})
        rounded = {name: _rounded(name, weight, spec, scale) for name, weight in weights.items()}
        errors[bits] = _relative_error(weights, rounded)
        if bits == PROBE:
            with weights_replaced(model, rounded):
                harm = divergence(model, windows, truth)
    return [harm * errors[bits] / max(errors[PROBE], 1e-30) for bits in BITS]


def _allocation(
    record: ModelSpec, bits: float, groups: list[list[str]], costs: list[list[int]], harms: list[list[float]]
) -> Allocation:
    options = [changed(family, {"bits": each}) for family in families(record.spec) for each in BITS]
    total = sum(cost[0] for cost in costs) // BITS[0]
    chosen = knapsack(costs, harms, floor(bits * total))
    base = options[BITS.index(min(BITS, key=lambda each: abs(each - bits)))]
    overrides = {
        name: {key: value for key, value in asdict(options[option]).items() if value != getattr(base, key)}
        for group, option in zip(groups, chosen, strict=True)
        for name in group
        if options[option] != base
    }
    made = ModelSpec(base, overrides, record.modules_to_not_convert, record.lm_head, record.experts)
    spent = sum(cost[option] for cost, option in zip(costs, chosen, strict=True))
    predicted = sum(harm[option] for harm, option in zip(harms, chosen, strict=True))
    uniform = sum(harm[BITS.index(floor(bits))] for harm in harms)
    return Allocation(made, spent / total, predicted, uniform)


def joined(names: Iterable[str]) -> list[list[str]]:
    """Names of layers in groups that have one spec, in order: by `fusion.FAMILIES`, and all experts of a mixture."""
    groups: dict[object, list[str]] = {}
    for name in names:
        before, experts, _ = name.partition(".experts.")
        parent, _, own = name.rpartition(".")
        family = next((family for family in FAMILIES if own in family), own)
        groups.setdefault((before,) if experts else (parent, family), []).append(name)
    return list(groups.values())


def knapsack(costs: Sequence[Sequence[int]], harms: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One option of each group, with the least sum of ``harms`` among those whose ``costs`` sum to at most ``budget``.

    Exact, by dynamic programming over the sums of costs that can occur; of those that cost more and harm no less than
    another none is kept. Layers have few different sizes, so there are few sums.

    Args:
        costs, harms: for every group, one number per option.

    Raises:
        SpecError: the cheapest options cost more than the budget.
    """
    least = [min(each) for each in costs]
    rest = sum(least)
    if rest > budget:
        raise SpecError(f"the smallest choice takes {rest:,} bits, the budget is {budget:,}; raise the average")
    spent, harm = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail = []  # for every group: of each kept sum, the sum before and the option
    for cost, each, own in zip(costs, harms, least, strict=True):
        rest -= own
        sums = (spent[:, None] + torch.tensor(cost, dtype=torch.int64)).flatten()
        harms_now = (harm[:, None] + torch.tensor(each, dtype=torch.float64)).flatten()
        order = torch.argsort(harms_now, stable=True)
        order = order[torch.argsort(sums[order], stable=True)]  # by cost, then by harm
        sorted_harms = harms_now[order]
        before = torch.cat((torch.tensor([torch.inf], dtype=torch.float64), sorted_harms.cummin(0).values[:-1]))
        kept = order[(sorted_harms < before) & (sums[order] + rest <= budget)]
        spent, harm = sums[kept], harms_now[kept]
        trail.append((kept // len(cost), kept % len(cost)))
    place, chosen = len(spent) - 1, []  # the most expensive sum that was kept harms least
    for parents, options in reversed(trail):
        chosen.append(int(options[place]))
        place = int(parents[place])
    return chosen[::-1]


def _rounded(name: str, weight: torch.Tensor, spec: QuantSpec, scale: str) -> torch.Tensor:
    """W^ in float32, of the shape of ``weight`` (..., N, K)."""
    if spec.table == CUSTOM_TABLE:  # to be learned; the grid of pairs is what that starts from
        family = "gausspair" if spec.vector_size == 2 else "gauss"
        spec = replace(spec, table=f"{family}{spec.bits}")
    spec = spec.fitted(weight.shape[-1])
    flat = weight.float().reshape(-1, weight.shape[-1])
    made = quantize(flat, spec, scale=scale, name=name)
    return dequantize(*made, spec, dtype=torch.float32).view(weight.shape)


def _relative_error(weights: Mapping[str, torch.Tensor], rounded: Mapping[str, torch.Tensor]) -> float:
    """t^2 of layers taken together."""
    wrong = sum(float((weight.float() - rounded[name]).square().sum()) for name, weight in weights.items())
    return wrong / max(sum(float(weight.float().square().sum()) for weight in weights.values()), 1e-30)
