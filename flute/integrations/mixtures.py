"""Mixtures of experts as transformers holds them: which become `LutExperts`, and how their files are read and written.

transformers keeps the experts of a layer as two 3-D parameters, ``gate_up_proj`` and ``down_proj``, whatever the files
hold: often a matrix per expert (``experts.3.w1.weight``), which "weight converters" stack while loading and cut apart
while saving. Codes are stacked and cut along the same dimensions as weights, since a row of codes is a row of weights,
so those converters serve for codes as they are; scales and zero points get converters of their own, made from them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, SplitModulelist, WeightConverter

from ..errors import CheckpointError, IntegrationError
from ..experts import ROLES, LutExperts
from ..parallel import check_columns, is_cut, local, placed_like
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import named_table
from ..zero_experts import lut_experts

PROJECTIONS = tuple(f"{role}_proj" for role in ROLES)
_STACKING = ("MergeModulelist", "Concatenate")  # of whole rows: experts along 0, gate and up along 1
_OF_GROUPS = ("scales", "zeros")  # (N, G) of a matrix beside its codes


def _of_groups(spec: QuantSpec) -> tuple[str, ...]:
    return _OF_GROUPS if spec.zero_points else _OF_GROUPS[:1]


class Gate:
    """(S, 2 I) -> (S, I) as the module that was replaced did it. Keeps that module, without its weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, pair: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, cast(Any, self.module)._apply_gate(pair))


# ---- which modules ---------------------------------------------------------------------------------------------------


def stacks(model: nn.Module, inside: Iterable[nn.Module]) -> dict[str, str]:
    """Every module with stacked weights (3-D parameters), and why it has to stay dense, if it has to.

    Args:
        model: a transformers model, also on the meta device.
        inside: the modules to look at.
    """
    wanted = {id(module) for module in inside}
    converters = _converters(model)
    found = {}
    for name, module in model.named_modules():
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        if id(module) in wanted and not isinstance(module, _ConvNd) and any(_is_stack(tensor) for tensor in own):
            found[name] = _obstacle(module) or _obstacle_on_disk(name, converters)
    return found


def _is_stack(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 3 and tensor.is_floating_point() and min(tensor.shape) > 1


def _obstacle(module: Any) -> str:
    """What `LutExperts` does not do of what this module does; empty if it does it all."""
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    if not hasattr(module, "_apply_gate") or not hasattr(module, "has_gate"):
        return f"{type(module).__name__} is no experts module that transformers describes"
    if module.is_transposed or module.has_bias or not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} has transposed weights, biases, norms or no gate"
    if names != set(PROJECTIONS):
        return f"{type(module).__name__} holds {', '.join(sorted(names))}; gate_up_proj and down_proj alone are known"
    (experts, two, hidden), down = module.gate_up_proj.shape, tuple(module.down_proj.shape)
    return "" if down == (experts, hidden, two // 2) and two % 2 == 0 else f"down_proj {down} does not fit gate_up_proj"


def _converters(model: nn.Module) -> list[Any]:
    if not hasattr(model, "config"):
        return []
    mapping = get_model_conversion_mapping(cast(Any, model)) or []
    return [entry for entry in mapping if isinstance(entry, WeightConverter)]


def _makes(converter: Any, projection: str) -> bool:
    """Whether ``converter`` makes this parameter (a name, or what names end with)."""
    targets = [re.sub(r"[\\^$]", "", target) for target in converter.target_patterns]
    return any(projection.endswith(target) or target.endswith(projection) for target in targets)


def _obstacle_on_disk(name: str, converters: Iterable[Any]) -> str:
    for converter in converters:
        if any(_makes(converter, f"{name}.{projection}") for projection in PROJECTIONS) and not _stacks_rows(converter):
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            return f"its files hold another form of the weights ({operations}), which codes do not take"
    return ""


def _stacks_rows(converter: Any) -> bool:
    dims = {type(operation).__name__: getattr(operation, "dim", None) for operation in converter.operations}
    rows = all(dims.get(kind, dim) == dim for dim, kind in enumerate(_STACKING)) and set(dims) <= set(_STACKING)
    return rows and all(source.endswith(".weight") for source in converter.source_patterns)


class StackScales(MergeModulelist):
    """Scales or zero points (N, G) of every expert -> (E, N, G)."""

    @property
    def reverse_op(self) -> CutScales:
        """While saving."""
        return CutScales(self.dim)


class CutScales(SplitModulelist):
    """The inverse: (E, N, G) -> (N, G) of every expert, also where transformers (up to 5.17) takes away a G of 1."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """As the converters call it."""
        made = super().convert(*args, **kwargs)
        return {name: scales.view(scales.shape[0], -1) for name, scales in made.items()}

    @property
    def reverse_op(self) -> StackScales:
        """While loading."""
        return StackScales(self.dim)


def scale_converters(conversions: Iterable[Any]) -> list[Any]:
    """For every converter that stacks experts' weights one that stacks their scales, and one for their zero points.

    They take the files' ``.scales`` and ``.zeros``.
    """
    made = []
    for entry in conversions:
        if not isinstance(entry, WeightConverter) or not any(_makes(entry, projection) for projection in PROJECTIONS):
            continue
        if not _stacks_rows(entry):
            continue
        made += [_converter(entry, part) for part in _OF_GROUPS]
    return made


def _converter(entry: WeightConverter, part: str) -> WeightConverter:
    sources = [f"{source.removesuffix('.weight')}.{part}" for source in entry.source_patterns]
    targets = [f"{target.removesuffix('_proj')}_{part}" for target in entry.target_patterns]
    operations = [StackScales(op.dim) if type(op) is MergeModulelist else copy.copy(op) for op in entry.operations]
    made = WeightConverter(sources, targets, operations=operations)
    for where in ("scope_prefix", "base_model_prefix"):
        if hasattr(entry, where):
            setattr(made, where, getattr(entry, where))
    return made


# ---- swapping --------------------------------------------------------------------------------------------------------


def owner(name: str) -> tuple[str, str]:
    """``a.experts.down_proj`` -> its module and its role."""
    module, _, projection = name.rpartition(".")
    return module, projection.removesuffix("_proj")


def swap(model: nn.Module, specs: Mapping[str, QuantSpec], *, pre_quantized: bool) -> None:
    """Put `LutExperts` in the place of the experts named in ``specs`` (by projection), on the meta device.

    Unless ``pre_quantized``, they wait with the dense parameters, as `loading.swap_linears` has it.
    """
    for name in {owner(projection)[0] for projection in specs}:
        dense: Any = model.get_submodule(name)
        experts, two, hidden = dense.gate_up_proj.shape
        made = lut_experts(
            experts, hidden, two // 2, {role: specs[f"{name}.{role}_proj"] for role in ROLES},
            gate=Gate(dense), device="meta", dtype=dense.gate_up_proj.dtype,
        )  # fmt: skip
        for role in ROLES:
            weight = getattr(dense, f"{role}_proj")
            delattr(dense, f"{role}_proj")
            if not pre_quantized:
                made.register_parameter(f"{role}_proj", weight)
                made.register_parameter(f"{role}_scales", None)
                made.register_buffer(f"{role}_table", getattr(made, f"{role}_table"), persistent=False)
        for parameter in made.parameters() if pre_quantized else ():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # no random numbers for offloaded ones
        model.set_submodule(name, made.train(dense.training))


def plan_scales(model: Any, specs: Mapping[str, QuantSpec]) -> None:
    """Let transformers' plan for tensor parallelism cut scales and zero points as it cuts their projections."""
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    for name, spec in specs.items():
        planned = re.sub(r"\.\d+(?=\.|$)", ".*", name)  # plans have a star for the number of a layer
        if planned in plan:
            plan |= {f"{planned.removesuffix('_proj')}_{part}": plan[planned] for part in _of_groups(spec)}


def finish(name: str, experts: LutExperts, dtype: torch.dtype) -> None:
    """The last touches after loading, as `loading.finish_layer` does them for a linear layer.

    Scales, zero points and tables get the model's ``dtype``: transformers (up to 5.17) leaves what it stacked in that
    of the files.

    Raises:
        CheckpointError: weights are missing, or scales, zero points or tables are not finite.
        IntegrationError: the ranks cannot share it.
    """
    check_shards(name, experts)
    for role, spec in experts.specs.items():
        if getattr(experts, f"{role}_scales") is None:
            raise CheckpointError(f"layer {name!r}: the checkpoint has no tensor for {role}_proj")
        getattr(experts, f"{role}_proj").requires_grad_(False)
        parts = _of_groups(spec)
        for part in parts:
            held = getattr(experts, f"{role}_{part}")
            if held.dtype != dtype:
                held = nn.Parameter(placed_like(held, local(held).to(dtype)), requires_grad=False)
                setattr(experts, f"{role}_{part}", held)
            held.requires_grad_(False)
        table = getattr(experts, f"{role}_table")
        if not table.is_meta:
            values = table if spec.table == CUSTOM_TABLE else named_table(spec.table)
            setattr(experts, f"{role}_table", values.to(device=table.device, dtype=dtype))
        for part in (*parts, "table"):
            held = local(getattr(experts, f"{role}_{part}"))
            if not held.is_meta and not bool(torch.isfinite(held).all()):
                raise CheckpointError(f"layer {name!r}: {role}_{part} hold NaN or Inf in {dtype}")
    experts.arrange()


def check_shards(name: str, experts: LutExperts) -> None:
    """Ranks share rows of gate and up and columns of down: those of down must be whole groups, in whole bytes.

    Raises:
        IntegrationError: they are not, or ranks share experts instead.
    """
    weight, inner = experts.gate_up_proj, experts.intermediate
    if not is_cut(weight) or experts.in_kernel_order("gate_up"):
        return
    held, two, _ = local(weight).shape
    if held != weight.shape[0]:
        raise IntegrationError(
            f"layer {name!r}: quantized experts cannot be spread by expert parallelism; use tensor parallelism alone, "
            "or leave the experts dense (modules_to_not_convert)"
        )
    if two != 2 * inner:
        check_columns(f"{name}.down_proj", experts.specs["down"], inner, two // 2)


def dense_experts(experts: LutExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """The module that ``experts`` took the place of, with the weights that the codes stand for."""
    gate = experts.gate
    assert isinstance(gate, Gate), "made by swap()"
    for role in ROLES:
        weight = experts.dequantize(role)
        setattr(gate.module, f"{role}_proj", nn.Parameter(weight.to(dtype or weight.dtype)))
    return gate.module.train(experts.training)


def told(left: Mapping[str, str]) -> list[str]:
    """One line for each reason why stacks of weights stay in 16 bits."""
    lines = []
    for reason in sorted(set(left.values())):
        names = [name for name, why in left.items() if why == reason]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others} stay dense: {reason}")
    return lines
