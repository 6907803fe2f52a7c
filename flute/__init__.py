"""flute: quantize an LLM's linear layers to 2-4 bits with any lookup table, W ~ table[codes] * scales, and run it.

Importing this package loads neither torch, CUDA nor transformers: the public names below are looked up on first use.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

_PUBLIC = {
    "FluteConfig": "flute.integrations.huggingface",
    "FluteError": "flute.errors",
    "LutLinear": "flute.linear",
    "QuantSpec": "flute.spec",
    "dequantize": "flute.quantize",
    "lut_linear": "flute.kernels.ops",
    "qgemm": "flute.integrations.gemm",
    "qgemm_hadamard": "flute.integrations.gemm",
    "quantize": "flute.quantize",
}

__all__ = [
    "FluteConfig", "FluteError", "LutLinear", "QuantSpec", "__version__", "dequantize", "lut_linear", "qgemm",
    "qgemm_hadamard", "quantize",
]  # fmt: skip

if TYPE_CHECKING:
    from flute.errors import FluteError
    from flute.integrations.gemm import qgemm, qgemm_hadamard
    from flute.integrations.huggingface import FluteConfig
    from flute.kernels.ops import lut_linear
    from flute.linear import LutLinear
    from flute.quantize import dequantize, quantize
    from flute.spec import QuantSpec


class _Package(ModuleType):
    """Importing the module `flute.quantize` binds it over the function of that name; the function is to win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flute' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """transformers learns quant_method "flute" when it is imported; a failure here must not break `import flute`."""
    try:
        from flute import _autoload
    except ImportError:  # pragma: no cover
        return
    _autoload.register()


_register()
