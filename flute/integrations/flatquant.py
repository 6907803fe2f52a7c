"""transformers: ``quant_method: "flatquant"``, loaded by plain ``AutoModelForCausalLM.from_pretrained(folder)``.

Blocks are flattened on the meta device, the files' headers are compared with what then waits for tensors, and the
loader fills in transforms, clips and integer weights like any other tensor. No code comes with a checkpoint. Importing
this module registers the method; `flute._autoload` does so for users who never import flute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.files import refuse
from ..checkpoint.shards import TensorInfo, read_header
from ..errors import CheckpointError, IntegrationError
from ..flatquant.spec import QUANT_METHOD, FlatSpec
from .versions import check_transformers

_FLOATS = ("F16", "BF16", "F32")
_INTEGERS = {torch.uint8: ("U8",), torch.int8: ("I8",), torch.int32: ("I32",)}


class FlatQuantConfig(QuantizationConfigMixin):
    """What a FlatQuant checkpoint says about itself.

    Args:
        spec: bits of everything; see `FlatSpec`.
    """

    quant_method: Any

    def __init__(self, spec: FlatSpec) -> None:
        self.quant_method, self.spec = QUANT_METHOD, spec

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a config.json, strictly.

        Raises:
            SpecError: an unknown key, another version, a value out of its limits.
        """
        config = cls(FlatSpec.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` for config.json."""
        return self.spec.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class FlatQuantHfQuantizer(HfQuantizer):
    """transformers calls these methods while it loads a checkpoint; see `HfQuantizer` for the contract."""

    requires_calibration = True
    quantization_config: FlatQuantConfig

    @property
    def is_trainable(self) -> bool:
        """Integers do not train."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is built; from now on a model may ask for flute's attention."""
        check_transformers()
        from .attention import register  # late: it needs more of transformers than may be there yet

        register()
        if not self.pre_quantized:
            raise IntegrationError("FlatQuant has to be calibrated: run flute flatquant MODEL -o OUT and load OUT")
        self.quantization_config.spec.check_storable()
        device_map = kwargs.get("device_map")
        devices = {str(each) for each in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise IntegrationError(
                "device_map offloads layers to 'cpu' or 'disk', and FlatQuant's blocks run where they lie; give "
                "a device_map of GPUs that hold the model, or device_map='cpu'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ..flatquant.modules import FLOAT32
        from .flatblocks import blocks_of, flatten

        for block in blocks_of(model)[1]:
            flatten(block, self.quantization_config.spec, real=True)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter._is_hf_initialized = True  # needs no random numbers
        strict = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = strict | set(FLOAT32)
        files = kwargs.get("checkpoint_files") or ()
        if files:  # none when the caller passes a state dict
            check_files(model, files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ..flatquant.joint import Joint
        from ..flatquant.modules import IntLinear, freeze
        from ..linear import LutLinear
        from .loading import finish_layer

        for name, layer in model.named_modules():
            if isinstance(layer, LutLinear):
                finish_layer(name, layer)
            elif isinstance(layer, IntLinear):
                layer.arrange()
        for layer in model.modules():
            if isinstance(layer, Joint):
                layer.join()
        freeze(model)
        _attach(model, self.quantization_config.spec, dense=False)
        return model


def check_files(model: Any, files: Sequence[str]) -> None:
    """Compare the headers of a checkpoint with a flattened model on the meta device.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, superfluous, or of another shape or dtype.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; flute reads quantized weights from safetensors only")
        found |= read_header(Path(file))
    expected, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
    problems = [f"tensor {name!r} is not part of this model" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            if name not in tied:
                problems.append(f"tensor {name!r} is missing")
            continue
        allowed = _INTEGERS.get(tensor.dtype, _FLOATS)
        entry = found[name]
        if entry.dtype not in allowed or entry.shape != tuple(tensor.shape):
            rule = f"{tuple(tensor.shape)} of {' or '.join(allowed)}"
            problems.append(f"tensor {name!r} in {entry.file} is {entry.shape} of {entry.dtype}, not {rule}")
    if problems:
        refuse(Path(files[0]).parent, problems)


def mark_flat(model: Any, spec: FlatSpec) -> None:
    """Tell transformers that ``model``, whose blocks were flattened in memory, is quantized: it can be saved."""
    config = FlatQuantConfig(spec)
    model.hf_quantizer = FlatQuantHfQuantizer(config)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    _attach(model, spec, dense=True)


def _attach(model: Any, spec: FlatSpec, *, dense: bool) -> None:
    """Saving and pushing write a card."""
    from . import described, saving

    saving.attach(model, described.tags(QUANT_METHOD, spec.w_bits), dense=dense)


def register() -> None:
    """Make transformers know ``quant_method: "flatquant"``. Does nothing the second time."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, FlatQuantConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, FlatQuantHfQuantizer)


register()
