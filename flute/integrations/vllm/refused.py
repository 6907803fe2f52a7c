"""What our names for ``--quantization`` and our checkpoints meet in a version of vLLM that the plugin does not know.

Registered in the plugin's place, so that other models go on working, and ours say why they do not.
"""

from __future__ import annotations

from typing import Any, NoReturn

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...config import QUANT_METHOD
from ...errors import IntegrationError
from ...flatquant.spec import QUANT_METHOD as FLATQUANT
from . import NAMES


@register_quantization_config(QUANT_METHOD)
@register_quantization_config(FLATQUANT)
class RefusedConfig(QuantizationConfig):
    """Says which versions are supported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """As ``from_config``."""
        raise IntegrationError(f"this is vLLM {vllm.__version__}; flute {_own_version()} serves with {NAMES}")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoReturn:
        """Raises IntegrationError."""
        cls()
        raise AssertionError("not reached")


def _own_version() -> str:
    from ... import __version__

    return __version__
