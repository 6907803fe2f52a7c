"""PEFT: adapters train on a quantized model as they are; merging them into it needs a word from us.

PEFT's own ``prepare_model_for_kbit_training`` makes everything float32, which GPU kernels take under autocast only, and
leaves gradient checkpointing off, since it does not know us. `prepare_model_for_kbit_training` here is what it is for.

A stock ``LoraConfig`` accepts `LutLinear` because it is an nn.Linear, and ``merge_and_unload()`` would then add floats
to packed codes, which torch refuses. Two ways to merge, both by decode, add, quantize again in the same spec:

    merge_and_unload(peft_model)                     any LoRA model on top of LutLinears, however it was made
    get_peft_model(model, mergeable(LoraConfig()))   PEFT's own peft_model.merge_and_unload() works

Quantizing again rounds: the merged model is near the adapted one, not equal to it. rsLoRA is LoRA with another factor
and goes alike. DoRA, PiSSA, OLoRA and other adapter types than LoRA that need the dense weight do not run on codes;
``model.dequantize()`` has dense weights for them. Never merge (IA)^3: PEFT would scale the codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..errors import IntegrationError
from ..linear import LutLinear
from ..quantize import quantize
from ..spec import CUSTOM_TABLE


class LutLoraLinear(LoraLinear):
    """LoRA on a LutLinear, which can be merged and not unmerged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the decoded weight and quantize it again."""
        names = check_adapters_to_merge(self, adapter_names)
        if names:
            _merge("LoRA layer", self, names)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Raises IntegrationError: what rounding took away does not come back."""
        raise IntegrationError("a quantized layer cannot be unmerged; load the checkpoint and the adapter again")

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Plain LoRA alone.

        Raises:
            IntegrationError: DoRA and the like.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise IntegrationError(
                f"{type(variant).__name__} needs the dense weight in every step; use plain LoRA or rsLoRA on quantized "
                "layers, or train on model.dequantize()"
            )


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """PEFT's function of this name, for our layers: freeze the model, and recompute activations in the backward pass.

    Nothing changes its dtype: adapters are float32 by themselves, and norms compute in float32 inside.

    Args:
        model: quantized, of transformers.
        use_gradient_checkpointing: recompute activations.
        gradient_checkpointing_kwargs: of torch's checkpoint; default ``{"use_reentrant": False}``.

    Returns:
        The same model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        settings = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if settings.get("use_reentrant", True):  # that kind has a gradient only where an input has one
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


def mergeable(config: LoraConfig) -> LoraConfig:
    """Make ``config`` use `LutLoraLinear` for quantized layers. Returns the same config."""
    config._register_custom_module({LutLinear: LutLoraLinear})
    return config


def merge_and_unload(peft_model: Any, adapter_names: Sequence[str] | None = None) -> Any:
    """Merge LoRA adapters into quantized (and dense) layers and return the model without PEFT.

    Args:
        peft_model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter_names: which adapters; default the active ones.

    Raises:
        IntegrationError: another kind of adapter, or a variant of LoRA (DoRA, a bias of its own) that is no plain
            product A B; a layer with zero points.
    """
    for name, layer in peft_model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            kind = type(layer).__module__.split(".")[-2]
            raise IntegrationError(
                f"layer {name!r}: {kind} is no LoRA, which alone is merged into codes; keep the adapter apart, "
                "or merge it into model.dequantize()"
            )
    warnings.warn("merging quantizes the layers again, which rounds; measure the merged model", stacklevel=2)
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer.get_base_layer(), LutLinear):
            names = check_adapters_to_merge(layer, list(adapter_names) if adapter_names else None)
            _merge(name, layer, names)
        else:
            layer.merge(adapter_names=list(adapter_names) if adapter_names else None)
    return peft_model.unload()


@torch.no_grad()
def _merge(name: str, lora: Any, adapters: Sequence[str]) -> None:
    base = lora.get_base_layer()
    if base.spec.zero_points:
        raise IntegrationError(
            f"layer {name!r} has zero points of its first owner's, and nothing is quantized so here; keep the adapter "
            "apart, or merge it into model.dequantize()"
        )
    weight = base.dequantize().float()
    for adapter in adapters:
        if adapter not in lora.lora_A:
            continue
        if adapter in lora.lora_variant or lora.lora_bias.get(adapter):
            raise IntegrationError(
                f"layer {name!r}: adapter {adapter!r} is not plain LoRA and cannot be merged into codes"
            )
        weight += lora.get_delta_weight(adapter).to(weight)
    table = base.table.float() if base.spec.table == CUSTOM_TABLE else None
    # the root mean square of rounded weights is smaller than that of the weights they once were
    scale = "mse" if base.spec.unit_variance else "absmax"
    made = quantize(weight, base.spec, table=table, scale=scale, scale_dtype=base.scales.dtype, name=name)
    base.store(made)
