"""`LutConfig`: the ``quantization_config`` of a checkpoint as vLLM asks for it, module by module.

An object of this class travels to vLLM's workers. Methods are imported when the first module asks: while plugins are
loaded, vLLM is not ready for them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from ...checkpoint.shards import read_headers
from ...config import QUANT_METHOD, ModelSpec
from ...errors import IntegrationError
from .names import expert_specs, linear_specs


class OwnConfig(QuantizationConfig):
    """What is the same for all our methods."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """16 bits; on the CPU float32, too."""
        return [torch.float16, torch.bfloat16, *([torch.float32] if current_platform.is_cpu() else [])]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []


@register_quantization_config(QUANT_METHOD)
class LutConfig(OwnConfig):
    """How a model is quantized.

    Args:
        record: what config.json says; None (a dense model and ``--quantization flute``) is refused.

    Raises:
        IntegrationError: no record.
    """

    def __init__(self, record: ModelSpec | None = None) -> None:
        super().__init__()
        if record is None:
            raise IntegrationError(
                "this model is not quantized, and is not quantized while it loads; run: flute quantize MODEL -o DIR, "
                "and serve DIR"
            )
        self.record = record

    # ---- what vLLM asks about the method -----------------------------------------------------------------------------

    @classmethod
    def get_name(cls) -> str:
        """flute."""
        return QUANT_METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LutConfig:
        """From ``quantization_config``.

        Raises:
            SpecError: it breaks a rule.
        """
        return cls(ModelSpec.from_dict(config))

    # ---- what vLLM tells about the model -----------------------------------------------------------------------------

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look at the files of a local folder before anything is allocated.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        folder = Path(model_name)
        if any(folder.glob("*.safetensors*")):
            read_headers(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as the checkpoint has them -> names as vLLM's model has them."""
        self.record = replace(
            self.record,
            overrides=hf_to_vllm_mapper.apply_dict(self.record.overrides),
            modules_to_not_convert=tuple(hf_to_vllm_mapper.apply_list(list(self.record.modules_to_not_convert))),
        )

    # ---- modules -----------------------------------------------------------------------------------------------------

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that makes and runs the weights of ``layer``; None where vLLM's own is right.

        Raises:
            SpecError: parts of one module are partly dense.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from .experts import LutExpertsMethod
        from .linear import LutLinearMethod

        if isinstance(layer, LinearBase):
            specs = linear_specs(self.record, self.packed_modules_mapping, prefix)
            return LutLinearMethod(prefix, specs) if specs else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            head = self.record.spec_for(prefix) if self.record.lm_head else None
            return LutLinearMethod(prefix, [head]) if head else None
        if isinstance(layer, RoutedExperts):
            specs = expert_specs(self.record, prefix)
            return LutExpertsMethod(layer, prefix, specs) if specs else UnquantizedFusedMoEMethod(layer.moe_config)
        return None
