"""Which linear layers of a model are quantized: chosen by the role they play, not by lists of class names.

A layer is taken if it is a plain ``nn.Linear`` inside a stack of layers (an ``nn.ModuleList``) of the text decoder:
that is attention and MLP of every architecture. What stays dense, and why:

* the output head, unless asked for (its errors reach the logits directly), and embeddings, which are no linears;
* vision and audio towers and projectors, which lie outside the decoder: small, and sensitive;
* routers of mixtures of experts (``gate``, ``router``, ``shared_expert_gate``) and layers of fewer than 8 outputs:
  their few weights decide where tokens go;
* what the model itself wants in float32, and subclasses of nn.Linear, whose forward is not known here.

Stacked experts in those stacks are taken too, if `LutExperts` can stand for them (see `mixtures`); their two
projections are layers by the names of the parameters (``model.layers.0.mlp.experts.down_proj``), and are quantized both
or neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from ..config import ModelSpec, matches
from ..errors import SpecError
from ..spec import QuantSpec

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_FEW_OUTPUTS = 8


class Choice(NamedTuple):
    """What is quantized.

    ``specs``: spec of every layer to quantize, by name. ``dense``: names of every other linear layer and stack.
    ``experts``: those of ``specs`` that are projections of stacked experts. ``left``: stacks that have to stay dense,
    and why.
    """

    specs: dict[str, QuantSpec]
    dense: tuple[str, ...]
    experts: tuple[str, ...] = ()
    left: dict[str, str] = {}  # noqa: RUF012  (never changed)


def output_head(model: nn.Module) -> str | None:
    """Name of the linear layer that makes the logits, None if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Linear):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def untie_head(model: Any, name: str) -> None:
    """Make a model forget that its output head ``name`` shares its weight with the embedding."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def quantizable(model: nn.Module, *, lm_head: bool = False) -> list[str]:
    """Names of the layers of ``model`` that flute quantizes, in the model's order.

    Args:
        model: any module, also on the meta device; a transformers model tells more about itself.
        lm_head: take the output head too.
    """
    head = output_head(model)
    in_stack = _inside_stacks(_decoder(model))
    kept = _kept_in_float32(model)
    names = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        parts = set(name.split("."))
        if name == head:
            taken = lm_head
        else:
            taken = id(module) in in_stack and not parts & ROUTERS and module.out_features >= _FEW_OUTPUTS
        if taken and not parts & kept:
            names.append(name)
    return names


def choose(model: nn.Module, record: ModelSpec, *, stored: bool = False) -> Choice:
    """What ``record`` says about each linear layer of ``model``.

    Args:
        stored: ``record`` is a checkpoint's, whose Hadamard blocks are as they are; else they are the most to take.

    Raises:
        SpecError: a layer cannot be stored in its spec, or patterns contradict each other.
    """
    specs = {}
    for name in quantizable(model, lm_head=record.lm_head):
        spec = record.spec_for(name, *aliases(model, name))
        if spec is not None:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            spec = spec if stored else spec.fitted(linear.in_features)
            spec.check_layer(name, linear.out_features, linear.in_features)
            specs[name] = spec
    dense = [name for name in _linears(model) if name not in specs]
    experts: dict[str, QuantSpec] = {}
    left = {}
    for name, obstacle in expert_stacks(model).items() if record.experts else ():
        found = {} if obstacle else _expert_specs(model, name, record, stored=stored)
        experts |= found
        dense += [] if found else [name]
        if obstacle and not record.is_dense(name, *aliases(model, name)):
            left[name] = obstacle
    return Choice(specs | experts, tuple(dense), tuple(experts), left)


def expert_stacks(model: nn.Module) -> dict[str, str]:
    """Modules of the decoder with stacked weights, and why they have to stay dense if they have to; see `mixtures`."""
    from . import mixtures

    decoder, kept = _decoder(model), _kept_in_float32(model)
    inside = [module for stack in decoder.modules() if isinstance(stack, nn.ModuleList) for module in stack.modules()]
    found = mixtures.stacks(model, inside)
    return {
        name: "the model wants it in float32" if kept & set(name.split(".")) else why for name, why in found.items()
    }


def _expert_specs(model: nn.Module, name: str, record: ModelSpec, *, stored: bool) -> dict[str, QuantSpec]:
    """Specs of both projections of one experts module, none if they stay dense."""
    found = {}
    for projection, weight in model.get_submodule(name).named_parameters():
        full = f"{name}.{projection}"
        spec = record.spec_for(full, *aliases(model, full), name, *aliases(model, name))
        if spec is not None:
            spec = spec if stored else spec.fitted(weight.shape[-1])
            spec.check_layer(full, *weight.shape[1:])
            found[full] = spec
    if len(found) == 1:
        raise SpecError(
            f"modules_to_not_convert leaves one projection of {name!r} dense and not the other ({next(iter(found))}); "
            f"experts are quantized whole, name {name!r}"
        )
    return found


def check_patterns(model: nn.Module, record: ModelSpec) -> None:
    """Refuse a pattern that names no linear layer: a typing error there would quantize what was to be left alone.

    Raises:
        SpecError: naming the pattern.
    """
    stacks = expert_stacks(model)
    projections = [f"{stack}.{name}" for stack in stacks for name, _ in model.get_submodule(stack).named_parameters()]
    known = [*_linears(model), *stacks, *projections]
    names = [alias for name in known for alias in (name, *aliases(model, name))]
    for field, patterns in (("modules_to_not_convert", record.modules_to_not_convert), ("overrides", record.overrides)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                hint = f"; for all layers below it write {pattern + '.*'!r}" if _is_parent(pattern, names) else ""
                raise SpecError(f"{field} has {pattern!r}, which names no linear layer of this model{hint}")


def aliases(model: nn.Module, name: str) -> tuple[str, ...]:
    """The other name of a module: with or without the prefix that separates a model from its headless base."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return ()
    return (name.removeprefix(prefix + "."),) if name.startswith(prefix + ".") else (f"{prefix}.{name}",)


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _is_parent(pattern: str, names: Iterable[str]) -> bool:
    return any(name.startswith(pattern + ".") for name in names)


def _decoder(model: nn.Module) -> nn.Module:
    """The text decoder of a transformers model, else the module itself."""
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if callable(getter) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _inside_stacks(decoder: nn.Module) -> set[int]:
    """ids of every module below an nn.ModuleList."""
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return {id(module) for stack in stacks for module in stack.modules()}


def _kept_in_float32(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, attribute, None) or ())
    return names
