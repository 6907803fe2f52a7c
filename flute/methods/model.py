"""`quantize_model`: a loaded transformers model, block by block, with calibration.

Two streams of hidden states run through the blocks: what the quantized model computes and, where the recipe asks for
it, what the dense one would have. Within a block the layers are taken in the order in which they run, each calibrated
on the output of those that are quantized already. One block at a time is in float32 on ``device``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelSpec
from ..errors import CalibrationError, IntegrationError
from ..hadamard import transform
from ..integrations.modules import Choice, check_patterns, choose
from ..learned import LearnedLinear, check_unrotated, learned_layers
from ..linear import LutLinear
from ..quantize import quantize
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import resolve_table
from .awq import fold_block
from .calibration import check_windows
from .capture import (
    Call,
    DenseInputs,
    Moments,
    find_stack,
    linear_of,
    moments,
    record,
    run_block,
    stages,
    to_device,
)
from .codebook import learn_table
from .learn import Learned, Learning, OnStep, learn_model
from .recipes import RECIPES, Recipe, Solved, solve
from .stacks import RoundedStack, place_stacks, round_stack

Progress = Callable[[str, int], None]  # name of a layer, and how many of its weights are now done


@dataclass(frozen=True)
class LayerResult:
    """What happened to a layer: ``error`` is its output's squared error, relative, on the calibration text (None where
    there was none); ``note`` says what was done otherwise than asked."""

    name: str
    spec: QuantSpec
    error: float | None
    damping: float
    seconds: float
    note: str = ""


@dataclass
class MethodReport:
    """Layers in order, what was folded or not, seconds in all; of method ``"nfl"`` what came of learning."""

    method: str
    layers: list[LayerResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    learned: Learned | None = None


@dataclass(frozen=True)
class _Job:
    """What stays the same while blocks go by."""

    specs: Mapping[str, QuantSpec]
    recipe: Recipe
    table: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device
    head_dim: int
    report: MethodReport
    progress: Progress
    learning: Learning
    dense: dict[str, torch.Tensor] = field(default_factory=dict)  # weights of solved layers whose scales are learned

    def own(self, spec: QuantSpec) -> torch.Tensor | None:
        """The caller's custom table, for a spec that has one."""
        return self.table if spec.table == CUSTOM_TABLE else None


def quantize_model(
    model: Any,
    spec: QuantSpec | ModelSpec,
    windows: torch.Tensor | None = None,
    *,
    method: str = "gptq",
    table: torch.Tensor | None = None,
    act_order: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress = lambda name, weights: None,
    learning: Learning | None = None,
    state: Path | None = None,
    on_step: OnStep = lambda done, total, loss: None,
) -> MethodReport:
    """Quantize a dense causal model of transformers in place; ``save_pretrained`` then writes a checkpoint of flute.

    Args:
        model: dense, all of it in memory.
        spec: of every layer, or a `ModelSpec` with patterns.
        windows: token ids int64 (S, L), from `calibration.token_windows`; not needed for ``"rtn"``.
        method: a name in `recipes.RECIPES`.
        table: the custom table, where a spec is custom; left out, ``"best"`` learns one per layer.
        act_order: where there is error feedback, round the most important columns first, else from left to right.
        dtype: of scales, tables and the finished model; default the model's own.
        device: where the arithmetic is done; default where the model is.
        progress: called after every layer.
        learning, state, on_step: where scales are learned, see `learn.learn_model`.

    Raises:
        FluteError: a spec that does not fit, bad windows, NaN. The model is then partly quantized: load it anew.
    """
    started = time.perf_counter()
    recipe = replace(recipe_of(method), act_order=act_order)
    asked = spec if isinstance(spec, ModelSpec) else ModelSpec(spec)
    check_patterns(model, asked)
    choice = choose(model, asked)
    if not choice.specs:
        raise IntegrationError(f"{type(model).__name__} has no linear layer to quantize under this spec")
    for each in set(choice.specs.values()):
        if each.table != CUSTOM_TABLE or table is not None or not recipe.learns_tables:
            resolve_table(each, table if each.table == CUSTOM_TABLE else None)  # refused now, not after an hour
    if recipe.learns_scales:
        _check_learnable(choice)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise IntegrationError("the model is offloaded; load all of it into memory to quantize it")
    job = _Job(
        choice.specs, recipe, table, dtype or model.dtype, torch.device(device or model.device),
        _head_dim(model.config.get_text_config()), MethodReport(method), progress, learning or Learning(),
    )  # fmt: skip
    was_training = model.training
    model.eval()
    stacks = {name: _stack(model, name, job) for name in choice.experts}
    specs = {name: each for name, each in choice.specs.items() if name not in stacks}
    if recipe.solves:
        _calibrated(model, job, windows, list(specs))
    for name, each in specs.items() if recipe.solves or not recipe.calibrated else ():
        if type(model.get_submodule(name)) is nn.Linear:
            _uncalibrated(model, name, each, job)
    if recipe.learns_scales:
        specs |= _learned(model, job, specs, windows, state, on_step)
    place_stacks(model, {name: choice.specs[name] for name in stacks}, stacks)
    from ..integrations.huggingface import mark_quantized

    mark_quantized(model, asked.resolved(choice.specs | specs, choice.dense, experts=bool(stacks)))
    for parameter in model.parameters():  # not buffers: rotary frequencies in 16 bits would be wrong positions
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(job.dtype)
    model.train(was_training)
    job.report.seconds = time.perf_counter() - started
    return job.report


def recipe_of(method: str) -> Recipe:
    """The recipe called ``method``.

    Raises:
        CalibrationError: there is none of that name.
    """
    if method not in RECIPES:
        raise CalibrationError(f"method {method!r} is unknown; use one of {', '.join(RECIPES)}")
    return RECIPES[method]


def _head_dim(config: Any) -> int:
    """Channels of an attention head, 0 if the config does not tell."""
    heads = getattr(config, "num_attention_heads", None) or 0
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _check_learnable(choice: Choice) -> None:
    if choice.experts:
        raise IntegrationError(
            f"{choice.experts[0]!r} is a stack of experts, whose scales cannot be learned; leave experts out "
            "with a skip pattern, or use another method"
        )
    for name, spec in choice.specs.items():
        check_unrotated(spec, name)


def _learned(
    model: Any,
    job: _Job,
    specs: Mapping[str, QuantSpec],
    windows: torch.Tensor | None,
    state: Path | None,
    on_step: OnStep,
) -> dict[str, QuantSpec]:
    """Learn scales and finish the layers; their specs, which a learned table changes."""
    if windows is None:
        raise CalibrationError(f"method {job.report.method!r} needs calibration windows; see token_windows")
    home = model.device
    model.to(job.device)
    if model.dtype == torch.float16:
        model.float()  # gradients in float16 underflow
    left = {name: spec for name, spec in specs.items() if not isinstance(model.get_submodule(name), LutLinear)}
    job.report.learned = learn_model(
        model, left, windows, job.learning, table=job.table, dtype=job.dtype, state=state, on_step=on_step
    )
    solved = {layer.name: layer for layer in job.report.layers}
    for name, layer in learned_layers(model).items():
        spec = left[name] = layer.stored_spec
        model.set_submodule(name, layer.finished(job.dtype))
        if name not in solved:
            job.progress(name, layer.weight.numel())
        solved[name] = replace(solved.get(name, LayerResult(name, spec, None, 0.0, 0.0)), spec=spec)
    model.to(home)
    job.report.layers[:] = solved.values()
    job.report.notes += job.report.learned.notes
    return left


def _calibrated(model: Any, job: _Job, windows: torch.Tensor | None, linears: list[str]) -> None:
    if windows is None:
        raise CalibrationError(f"method {job.report.method!r} needs calibration windows; see token_windows")
    config = model.config.get_text_config()
    check_windows(windows, config.vocab_size, getattr(config, "max_position_embeddings", None))
    prefix = find_stack(model, linears)
    stack = record(model, prefix, windows)
    hidden = stack.hidden
    dense_hidden = list(hidden) if job.recipe.match_dense else []
    for index, (block, call) in enumerate(zip(stack.blocks, stack.calls, strict=True)):
        where = f"{prefix}.{index}"
        names = [name.removeprefix(f"{where}.") for name in linears if name.startswith(f"{where}.")]
        home, kept = next(block.parameters()).device, {n: p.dtype for n, p in block.named_parameters()}
        block.to(job.device, torch.float32)
        call = to_device(call, job.device)
        solved = _solve_block(where, block, names, hidden, dense_hidden, call, job)
        for name, result in solved.items():
            block.set_submodule(name, _finished(f"{where}.{name}", block.get_submodule(name), result, job))
        for name, parameter in block.named_parameters():
            if name in kept and parameter.is_floating_point():  # codes that took the place of a weight stay bytes
                parameter.data = parameter.data.to(kept[name])
        block.to(home)


def _solve_block(
    where: str,
    block: nn.Module,
    names: list[str],
    hidden: list[torch.Tensor],
    dense_hidden: list[torch.Tensor],
    call: Call,
    job: _Job,
) -> dict[str, Solved]:
    """Solve the layers of a block in order, and move both streams past it (in place, batch by batch)."""
    groups = stages(block, names, hidden[0].to(job.device), call) if names else []
    if job.recipe.fold and groups:
        _fold(where, block, groups, hidden, call, job)
    dense = copy.deepcopy(block) if dense_hidden else None
    truth = DenseInputs(dense, [group[0] for group in groups], dense_hidden, call) if dense is not None else None
    solved: dict[str, Solved] = {}
    for group in groups:
        known = moments(block, truth, group[0], hidden, call)
        for name in group:
            if known is not None:
                solved[name] = _solve_layer(f"{where}.{name}", block.get_submodule(name), known, job)
        for name in group:  # layers with one input do not see each other: all are solved before any is changed
            if name in solved:
                if job.recipe.learns_scales:
                    job.dense[f"{where}.{name}"] = linear_of(block, name).weight.data
                block.get_submodule(name).weight.data = solved[name].weight
    for index, part in enumerate(hidden):
        hidden[index] = run_block(block, part.to(job.device), call).to(part.device)
    if truth is not None:
        dense_hidden[:] = truth.outputs
    return solved


def _fold(
    where: str, block: nn.Module, groups: list[list[str]], hidden: list[torch.Tensor], call: Call, job: _Job
) -> None:
    specs = {name: job.specs[f"{where}.{name}"] for group in groups for name in group}
    chosen, left = fold_block(
        block, groups, specs, hidden, call, head_dim=job.head_dim, scale_dtype=job.dtype, table=job.table
    )
    folded = ", ".join(f"{name} {alpha:.1f}" for name, alpha in chosen.items())
    job.report.notes.append(f"{where}: alpha {folded or 'none'}" + (f"; not folded: {', '.join(left)}" if left else ""))


def _solve_layer(name: str, linear: nn.Module, known: Moments, job: _Job) -> Solved:
    assert isinstance(linear, nn.Linear)
    started, spec = time.perf_counter(), job.specs[name]
    result = solve(linear.weight, known, spec, job.recipe, table=job.own(spec), scale_dtype=job.dtype, name=name)
    note = f"{result.dead} of {linear.in_features} inputs are always zero" if result.dead else ""
    seconds = time.perf_counter() - started
    job.report.layers.append(LayerResult(name, spec, result.error, result.damping, seconds, note))
    job.progress(name, linear.weight.numel())
    return result


def _finished(name: str, linear: nn.Module, result: Solved, job: _Job) -> nn.Module:
    """The layer with the solved codes: as it will be stored, or as its scales will be learned."""
    assert isinstance(linear, nn.Linear)
    if not job.recipe.learns_scales:
        return _lut_layer(linear, job.specs[name], result, job)
    linear.weight.data = job.dense.pop(name)
    return LearnedLinear(
        linear, job.specs[name], table=result.table, start=result.quantized, dtype=job.dtype,
        learn_table=job.learning.learn_table, name=name,
    )  # fmt: skip


def _lut_layer(linear: nn.Module, spec: QuantSpec, result: Solved, job: _Job) -> LutLinear:
    assert isinstance(linear, nn.Linear)
    layer = LutLinear(linear.in_features, linear.out_features, spec, device=linear.weight.device, dtype=job.dtype)
    if result.table is not None:
        layer.table.copy_(result.table)
    layer.bias = linear.bias
    return layer.store(result.quantized).train(linear.training)


def _stack(model: Any, name: str, job: _Job) -> RoundedStack:
    spec, parameter = job.specs[name], model.get_parameter(name)
    made = round_stack(
        parameter, spec, table=job.own(spec), scale=job.recipe.scale, dtype=job.dtype, device=job.device, name=name
    )
    note = "rounded to nearest: experts are not calibrated" if job.recipe.calibrated else ""
    job.report.layers.append(LayerResult(name, spec, None, 0.0, made.seconds, note))
    job.progress(name, parameter.numel())
    return made


def _uncalibrated(model: Any, name: str, spec: QuantSpec, job: _Job) -> None:
    """Round a layer to nearest: the method asked for it, or no calibration token reached the layer."""
    from ..integrations.modules import output_head, untie_head

    linear = model.get_submodule(name)
    started, weight = time.perf_counter(), linear.weight.detach().float()
    table = job.own(spec)
    if table is None and spec.table == CUSTOM_TABLE:
        ones = torch.ones(weight.shape[1], device=weight.device)
        seen = transform(weight, spec.hadamard_size) if spec.hadamard_size else weight
        table = learn_table(seen, spec, ones, scale_dtype=job.dtype, name=name).table
    made = quantize(weight, spec, table=table, scale=job.recipe.scale, scale_dtype=job.dtype, name=name)
    if name == output_head(model):
        untie_head(model, name)
    result = Solved(made, None if table is None else resolve_table(spec, table), weight, 0.0, 0.0, 0)
    model.set_submodule(name, _lut_layer(linear, spec, result, job))
    note = "rounded to nearest: no calibration token reached it" if job.recipe.calibrated else ""
    job.report.layers.append(LayerResult(name, spec, None, 0.0, time.perf_counter() - started, note))
    job.progress(name, weight.numel())
