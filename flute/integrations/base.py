"""Upstream FLUTE's documented way in, under its own names: ``prepare_model_flute`` and the command

  python -m flute.integrations.base --pretrained_model_name_or_path M --save_directory OUT --num_bits 4 --group_size 32

Tables are NormalFloat (nf2, nf3, nf4), as they were there. New code says ``FluteConfig`` or ``flute quantize`` instead.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoint.atomic import Workplace, write_json
from ..errors import FluteError, IntegrationError
from ..learned import LearnedLinear, choose_codes
from ..linear import LutLinear
from ..quantize import Quantized, dequantize, quantize
from ..spec import QuantSpec
from ..tables import named_table
from .convert import bitsandbytes
from .fusion import fuse
from .hooks import attach_hook, release_hook
from .modules import quantizable


def nf_spec(num_bits: int, group_size: int) -> QuantSpec:
    """The spec that upstream's two numbers stand for."""
    return QuantSpec.from_dict({"bits": num_bits, "group_size": group_size})


def prepare_model_flute(
    name: str,
    module: nn.Module,
    num_bits: int,
    group_size: int,
    example_batch_size: int | None = None,
    fake: bool = False,
    handle_hooks: bool = False,
    prepare_bnb_layers: bool = True,
    default_bnb_dtype: torch.dtype | None = None,
    custom_scales_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Quantize every nn.Linear below ``module``, in place; layers from `learn_scales` with the scales learned.

    Args:
        name: the name of ``module`` in its model; prefix of the names in messages and in ``custom_scales_dict``.
        module: e.g. ``model.model.layers``. To save the model afterwards, load it with FluteConfig instead, which also
            writes what was done into config.json.
        num_bits, group_size: the spec; the table is ``nf<num_bits>``.
        example_batch_size: accepted and not needed; kernels are not tuned to one batch size.
        fake: keep nn.Linear, with the weights that the quantized ones stand for.
        handle_hooks: move accelerate's hooks (``device_map``) over to the new layers.
        prepare_bnb_layers: convert bitsandbytes' 4-bit layers, whose codes are kept; False leaves them as they are.
        default_bnb_dtype: dtype of those that were quantized from float32; None: float16. Others keep theirs. Scales
            are float32 in bitsandbytes and are rounded to it; ``flute convert`` writes them as they are.
        custom_scales_dict: full layer name -> scales (N, G) to use instead of absmax.

    Raises:
        SpecError, QuantizeError, IntegrationError: naming the layer; layers before it are then already quantized.
    """
    from .mixtures import stacks

    spec = nf_spec(num_bits, group_size)
    scales = dict(custom_scales_dict or {})
    for child_name, child in list(module.named_modules()):
        full_name = f"{name}.{child_name}" if child_name else name
        if type(child).__module__.startswith("bitsandbytes"):
            if not prepare_bnb_layers or not isinstance(child, nn.Linear):
                continue
        elif type(child) not in (nn.Linear, LearnedLinear) or not child_name:
            continue
        hook = release_hook(full_name, child) if handle_hooks else None
        if child.weight.is_meta:
            raise IntegrationError(
                f"layer {full_name!r} is offloaded; pass handle_hooks=True, or load the model without it"
            )
        if type(child).__module__.startswith("bitsandbytes"):
            made = _from_bitsandbytes(full_name, child, spec, default_bnb_dtype, fake)
        elif isinstance(child, LearnedLinear):
            made = _learned(full_name, child, spec, fake)
        else:
            made = _quantized(full_name, child, spec, scales.pop(full_name, None), fake)
        made.train(child.training)
        module.set_submodule(child_name, made)
        attach_hook(made, hook)
    fuse(module)
    for child_name in stacks(module, module.modules()):
        warnings.warn(
            f"{name}.{child_name} stays dense: only nn.Linear is quantized here; load the model with FluteConfig to "
            "quantize experts",
            stacklevel=2,
        )
    if scales:
        raise IntegrationError(f"custom_scales_dict has {', '.join(sorted(scales))}: no such linear layer in {name!r}")


def _quantized(name: str, linear: nn.Linear, spec: QuantSpec, scales: torch.Tensor | None, fake: bool) -> nn.Linear:
    weight = linear.weight.detach()
    if scales is None:
        made = quantize(weight, spec, scale_dtype=weight.dtype, name=name)
    else:
        made = _with_scales(name, weight, spec, scales)
    if fake:
        linear.weight.data = dequantize(*made, spec, dtype=weight.dtype)
        return linear
    spec.check_layer(name, *weight.shape)
    layer = LutLinear(linear.in_features, linear.out_features, spec, device=weight.device, dtype=weight.dtype)
    layer.bias = linear.bias
    return layer.store(made)


def _learned(name: str, layer: LearnedLinear, spec: QuantSpec, fake: bool) -> nn.Linear:
    if layer.spec != spec:
        raise IntegrationError(
            f"layer {name!r}: its scales were learned for {layer.spec}, not for {spec}; give the same"
        )
    made = layer.finished(layer.weight.dtype)
    if not fake:
        return made
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features, linear.bias = layer.in_features, layer.out_features, layer.bias
    linear.weight = nn.Parameter(made.dequantize(), requires_grad=False)
    return linear


def _from_bitsandbytes(
    name: str, layer: nn.Linear, spec: QuantSpec, dtype: torch.dtype | None, fake: bool
) -> nn.Linear:
    from .loading import dense_linear

    made = bitsandbytes.converted(name, layer, dtype)
    if (made.spec.bits, made.spec.group(made.in_features)) != (spec.bits, spec.group(made.in_features)):
        raise IntegrationError(
            f"layer {name!r} has {made.spec.bits} bits in groups of {made.spec.group(made.in_features)} at "
            f"bitsandbytes; num_bits and group_size say {spec}"
        )
    return dense_linear(made) if fake else made


def _with_scales(name: str, weight: torch.Tensor, spec: QuantSpec, scales: torch.Tensor) -> Quantized:
    """Codes (N, K) nearest under given scales (N, G)."""
    rows, width = weight.shape
    if scales.numel() != rows * spec.num_groups(width) or not bool(torch.isfinite(scales).all()):
        raise IntegrationError(
            f"layer {name!r}: custom scales {tuple(scales.shape)} do not fit; {spec} needs finite scales of shape "
            f"({rows}, {spec.num_groups(width)})"
        )
    stored = scales.detach().reshape(rows, -1).to(device=weight.device, dtype=weight.dtype)
    table = named_table(spec.table).to(device=weight.device, dtype=weight.dtype).float()
    return Quantized(choose_codes(weight, stored, table, spec.group(width)), stored)


def quantize_hf_model(
    pretrained_model_name_or_path: str,
    save_directory: str,
    num_bits: int,
    group_size: int,
    torch_dtype: str = "auto",
    example_batch_size: int | None = None,
    fake: bool = False,
) -> None:
    """Load a model, quantize its decoder layers, save it with its tokenizer and upstream's ``flute_config.json``.

    Raises:
        FluteError: bad numbers, an output folder that holds something, weights that cannot be quantized.
    """
    from transformers import AutoModelForCausalLM

    from . import saving
    from .huggingface import FluteConfig

    spec = nf_spec(num_bits, group_size)
    target = Path(save_directory).expanduser().absolute()
    if target.exists():
        try:
            target.rmdir()  # an empty folder is as good as none
        except OSError:
            raise IntegrationError(
                f"{target} exists and is not an empty folder; choose another save_directory"
            ) from None
    if fake:
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, dtype=torch_dtype)
        for name in quantizable(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            _quantized(name, linear, spec, None, fake=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path, dtype=torch_dtype, quantization_config=FluteConfig(spec)
        )
    config = {"version": __version__, "num_bits": num_bits, "group_size": group_size}
    job = {"source": pretrained_model_name_or_path, "dtype": torch_dtype, "fake": fake, **config}
    with Workplace(target, job) as work, work.filled():
        if not fake:
            saving.describe(model, name=target.name)
            write_json(work.folder / "flute_config.json", config)
        model.save_pretrained(work.folder)
        _save_tokenizer(pretrained_model_name_or_path, work.folder)


def _save_tokenizer(source: str, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError):
        warnings.warn(f"{source} has no tokenizer to copy", stacklevel=2)
        return
    tokenizer.save_pretrained(target)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m flute.integrations.base", description=quantize_hf_model.__doc__)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="a folder or a hub id")
    parser.add_argument("--save_directory", required=True, help="must not exist, or be empty")
    parser.add_argument("--num_bits", type=int, required=True, help="2, 3 or 4")
    parser.add_argument("--group_size", type=int, required=True, help="32, 64, 128, 256, ... or -1 for whole rows")
    parser.add_argument("--torch_dtype", default="auto", help="auto, float16, bfloat16 or float32")
    parser.add_argument("--example_batch_size", type=int, help="accepted and not needed")
    parser.add_argument("--fake", action="store_true", help="save dense weights that have the quantized values")
    given = parser.parse_args(arguments)
    try:
        quantize_hf_model(**vars(given))
    except FluteError as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "error: interrupted\n")


if __name__ == "__main__":
    main()
