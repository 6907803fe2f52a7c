"""`FlatConfig`: a FlatQuant checkpoint as vLLM asks for it, module by module.

An object of this class travels to vLLM's workers. Linear layers of decoder blocks get a `FlatLinearMethod`, everything
else is vLLM's own: norms, which hold diagonals of transforms, rotary embedding, attention, and its cache of keys and
values in 16 bits (or fp8), which are therefore not rounded to ``k_bits`` and ``v_bits``; queries neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ...errors import IntegrationError
from ...flatquant.spec import QUANT_METHOD, FlatSpec
from .config import OwnConfig
from .names import flat_renames, flat_site


@register_quantization_config(QUANT_METHOD)
class FlatConfig(OwnConfig):
    """How many bits a model has.

    Args:
        spec: what config.json says; None (a dense model and ``--quantization flatquant``) is refused.

    Raises:
        IntegrationError: no spec.
    """

    def __init__(self, spec: FlatSpec | None = None) -> None:
        super().__init__()
        if spec is None:
            raise IntegrationError(
                "this model is not quantized, and FlatQuant has to be calibrated; run: flute flatquant MODEL -o DIR, "
                "and serve DIR"
            )
        self.spec, self.heads = spec, 0

    @classmethod
    def get_name(cls) -> str:
        """flatquant."""
        return QUANT_METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlatConfig:
        """From ``quantization_config``.

        Raises:
            SpecError: it breaks a rule.
        """
        spec = FlatSpec.from_dict(config)
        spec.check_storable()
        return cls(spec)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn how many heads there are; hold the files of a local folder against the model, before anything is
        allocated.

        Raises:
            CheckpointError: a file is damaged, or a tensor is missing, superfluous, or of another shape or dtype.
        """
        self.heads = hf_config.get_text_config().num_attention_heads
        folder = Path(model_name)
        if any(folder.glob("*.safetensors*")):
            from ..flat_report import report  # transformers and its models

            report(folder)

    @staticmethod
    def get_cache_scale_mapper() -> Any:
        """vLLM's names of the checkpoint's tensors; a loader adds these rules to those of its model."""
        from vllm.model_executor.models.utils import WeightsMapper

        return OwnConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_regex=flat_renames())

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that makes and runs the weights of ``layer``; None where vLLM's own is right.

        Raises:
            IntegrationError: LoRA is on; or the layers behind one transform are not one module.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .flat_linear import FlatLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        site = flat_site(self.packed_modules_mapping, prefix)
        if site is None:
            return UnquantizedLinearMethod()
        if get_current_vllm_config().lora_config is not None:
            raise IntegrationError(
                "LoRA adapters are made for the dense model, and FlatQuant has diagonals and transforms between its "
                "layers; serve without --enable-lora"
            )
        return FlatLinearMethod(prefix, self.spec, site, self.heads)
