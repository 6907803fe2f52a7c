"""transformers' quantizer for ``quant_method: "higgs"``, with what is broken in its releases put right.

HiggsConfig, HiggsLinear, the rounding and the files are transformers' own and stay so. This subclass takes the
quantizer's place in transformers' registry, since no release of 4.57 and 5.x can both quantize while loading and load
what it saved:

* 4.57 takes codes that it has loaded for dense weights and quantizes them once more, which ends in an error.
* 5.x has no step that quantizes while loading, and up to 5.17 a ``dequantize`` that cannot be called.
* All: HiggsLinear has a bias and never adds it. Where ``hadamard_size`` does not divide K, columns are added to a layer
  when it is quantized, but not when it is made to be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizer_higgs import HiggsHfQuantizer

from .hooks import attach_hook, release_hook


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from transformers.integrations import HiggsLinear

    return ((name, module) for name, module in model.named_modules() if isinstance(module, HiggsLinear))


def _place(like: torch.Tensor, *shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device), requires_grad=False)


def _add_bias(layer: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
    return y + layer.bias


def _quantizing_step(settings: Any) -> Any:
    """transformers 5 has steps for what becomes of a tensor while it is loaded; this one calls its own rounding."""
    from transformers.core_model_loading import ConversionOps
    from transformers.integrations.higgs import quantize_with_higgs

    class Quantize(ConversionOps):
        def convert(  # type: ignore[override]  # the loader calls it with these keywords
            self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
        ) -> dict[str, torch.Tensor]:
            (dense,) = input_dict.values()
            name = full_layer_name.removesuffix(".weight")
            made = quantize_with_higgs(
                dense[0] if isinstance(dense, list) else dense,
                settings.bits, settings.p, settings.group_size, settings.hadamard_size,
            )  # fmt: skip
            settings.tune_metadata[name] = made.pop("tune_metadata").to_dict()
            layer, missing = model.get_submodule(name), kwargs.get("missing_keys")
            for key, tensor in made.items():
                setattr(layer, key, nn.Parameter(tensor, requires_grad=False))
                getattr(layer, key)._is_hf_initialized = True
                if missing is not None:
                    missing.discard(f"{name}.{key}")
            return {}

    return Quantize()


class FluteHiggsQuantizer(HiggsHfQuantizer):
    """`HiggsHfQuantizer` that quantizes while loading in transformers 5 too, and loads what it saved in 4.57 too."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        settings = self.quantization_config
        for _, layer in _layers(model):
            rows, width = layer.out_features, layer.in_features
            if not self.pre_quantized:  # transformers 5 casts a weight to the dtype of its place before it quantizes it
                layer.weight = _place(layer.weight, rows, width, dtype=layer.scales.dtype)
            elif width % settings.hadamard_size:
                width += -width % settings.hadamard_size
                layer.weight = _place(layer.weight, rows * settings.bits // 16, width, dtype=torch.int16)
                layer.scales = _place(layer.scales, rows, width // settings.group_size, dtype=layer.scales.dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is a dense weight to be quantized; in a quantized checkpoint none is."""
        return not self.pre_quantized and super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """What transformers 5 runs for the tensors that need it."""
        return _quantizing_step(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from . import described, saving

        super()._process_model_after_weight_loading(model, **kwargs)
        for _, layer in _layers(model):
            if layer.bias is not None and "bias" not in type(layer).forward.__code__.co_names:
                layer.register_forward_hook(_add_bias)
        tags = described.tags(described.HIGGS, self.quantization_config.bits)
        saving.attach(model, tags, dense=not self.pre_quantized)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """``model.dequantize()``: every HiggsLinear becomes the dense layer that it stands for."""
        if isinstance(dtype, str):  # as config.json has it
            dtype = getattr(torch, dtype)
        from . import described, saving
        from .gemm import reconstruct

        for name, layer in list(_layers(model)):
            weight = reconstruct(
                layer.weight, layer.scales, layer.tables, layer.tables2, layer.num_bits, layer.group_size,
                layer.tune_metadata.template_id, layer.hadamard_size,
            )[:, : layer.in_features]  # fmt: skip
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight.to(dtype or weight.dtype).contiguous())
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.to(dense.weight.dtype))
            hook = release_hook(name, layer)
            model.set_submodule(name, dense)
            attach_hook(dense, hook)
        saving.detach(model, described.tags(described.HIGGS, self.quantization_config.bits))
        return model
