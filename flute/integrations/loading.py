"""What happens to a model's linear layers between transformers' first and last word while it loads a checkpoint.

Two ways lead to the same `LutLinear`:

* a quantized checkpoint: the layers are swapped on the meta device, the files' headers are compared with them before
  anything is allocated, and the loader fills in codes and scales like any other tensor;
* a dense checkpoint: each layer waits as a `LutLinear` whose ``weight`` still is the dense placeholder (the loader
  casts to the placeholder's dtype, so it must be a float), and `Quantize` turns each tensor into codes and scales as it
  comes off the disk, one at a time. Host memory: the quantized model and about one dense tensor.

Under tensor parallelism parameters are DTensors and ops see this rank's part; the results get the placement of the
dense weight. Tables are buffers, which are never sharded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from ..checkpoint.files import refuse
from ..checkpoint.shards import TensorInfo, joined, read_header
from ..errors import CheckpointError, FluteError
from ..experts import LutExperts
from ..linear import LutLinear
from ..packing import pack_codes
from ..parallel import check_columns, is_cut, local, placed_like
from ..quantize import quantize
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import named_table, resolve_table
from ..zero_points import lut_linear
from . import mixtures

_FLOATS = ("F16", "BF16", "F32")


# ---- before loading --------------------------------------------------------------------------------------------------


def swap_linears(model: nn.Module, specs: Mapping[str, QuantSpec], *, pre_quantized: bool) -> None:
    """Put a `LutLinear` in the place of every named linear of a model on the meta device."""
    for name, spec in specs.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = lut_linear(
            linear.in_features, linear.out_features, spec,
            bias=linear.bias is not None, device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        if pre_quantized:
            # offloaded ones stay on meta, where the loader would draw random numbers
            for parameter in layer.parameters():
                _mark_loaded(parameter)
        else:
            layer.weight = linear.weight
            layer.register_parameter("scales", None)
            layer.register_buffer("table", layer.table, persistent=False)
        model.set_submodule(name, layer)


def check_files(model: Any, files: Sequence[str], conversions: Sequence[Any]) -> None:
    """Compare the headers of a quantized checkpoint with the layers that wait for its tensors, on the meta device.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing or of another shape or dtype; all in one line.
    """
    found = _found_tensors(model, files, conversions)
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, (LutLinear, LutExperts)):
            problems += _layer_problems(name, module, found)
        elif _dtype(found, f"{name}.{mixtures.PROJECTIONS[0]}") == "U8":
            problems.append(f"experts {name!r} are quantized, but config.json says they are dense")
        elif isinstance(module, nn.Linear) and (f"{name}.scales" in found or _dtype(found, f"{name}.weight") == "U8"):
            problems.append(f"layer {name!r} is quantized, but config.json says it is dense")
    if not any(isinstance(conversion, WeightConverter) for conversion in conversions):
        problems += _lost_parameters(model, found)
    if problems:
        refuse(Path(files[0]).parent, problems)


def _found_tensors(model: Any, files: Sequence[str], conversions: Sequence[Any]) -> dict[str, list[TensorInfo]]:
    """Header entries of all files under the names that the loader will give them; of some tensors files hold parts."""
    ours = copy.deepcopy(list(conversions))  # renaming leaves marks that are the loader's to make
    renamings = [entry for entry in ours if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in ours if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    found: dict[str, list[TensorInfo]] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; flute reads quantized weights from safetensors only")
        for key, entry in sorted(read_header(Path(file)).items()):
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if name not in expected and key in expected:
                name, _ = rename_source_key(key, [], [], model.base_model_prefix, expected)
            found.setdefault(name, []).append(entry)
    return found


def _dtype(found: Mapping[str, list[TensorInfo]], name: str) -> str | None:
    return found[name][0].dtype if name in found else None


def _layer_problems(name: str, layer: LutLinear | LutExperts, found: Mapping[str, list[TensorInfo]]) -> list[str]:
    problems = []
    for part, tensor in layer.state_dict().items():
        key, allowed, shape = f"{name}.{part}", ("U8",) if tensor.dtype == torch.uint8 else _FLOATS, tuple(tensor.shape)
        if key not in found:
            problems.append(f"tensor {key!r} is missing")
            continue
        entry = joined(found[key], shape)
        if entry.dtype not in allowed or entry.shape != shape:
            spec = layer.spec if isinstance(layer, LutLinear) else layer.specs[part.rpartition("_")[0]]
            rule = f"{shape} of {' or '.join(allowed)} for {spec}"
            problems.append(f"tensor {key!r} in {entry.file} is {tuple(entry.shape)} of {entry.dtype}, not {rule}")
    return problems


def _lost_parameters(model: Any, found: Mapping[str, list[TensorInfo]]) -> list[str]:
    """Missing dense tensors. transformers would draw them at random, which is right for a new head and nothing else."""
    saved_from_this = type(model).__name__ in (model.config.architectures or ())
    base = model if saved_from_this else getattr(model, model.base_model_prefix, model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)")
    names = [
        prefix + name
        for name, _ in base.named_parameters()
        if not isinstance(_owner(base, name), (LutLinear, LutExperts))
    ]
    return [f"tensor {n!r} is missing" for n in names if n not in found and n not in tied and not ignored.search(n)]


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


# ---- while loading ---------------------------------------------------------------------------------------------------


class Quantize(ConversionOps):
    """Dense weight in, codes and scales out, set on the waiting layer.

    transformers collects exceptions of its ops and ends with one of its own, so a refusal is kept in ``failures`` and
    raised after loading, when the caller is ours again.
    """

    def __init__(self, scale: str, table: torch.Tensor | None, failures: list[FluteError]) -> None:
        self.scale, self.table, self.failures = scale, table, failures

    def convert(  # type: ignore[override]  # the loader calls it with these keywords
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Returns nothing to set: names such as ``scales`` are not in the dense model that the loader knows."""
        (value,) = input_dict.values()
        dense = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        module, _, parameter = full_layer_name.rpartition(".")
        layer: Any = model.get_submodule(module)
        try:
            if not self.failures and isinstance(layer, LutExperts):
                self._fill_stack(name, layer, dense)
            elif not self.failures:
                self._fill(name, layer, dense)
        except FluteError as error:
            self.failures.append(error)
        if self.failures:
            setattr(layer, parameter, nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False))
        _mark_loaded(getattr(layer, parameter))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    def _fill(self, name: str, layer: LutLinear, dense: torch.Tensor) -> None:
        waiting = layer.weight
        shape = local(waiting).shape
        if dense.shape != shape:
            raise CheckpointError(f"layer {name!r}: weight is {tuple(dense.shape)}; the model needs {tuple(shape)}")
        table = self.table if layer.spec.table == CUSTOM_TABLE else None
        if is_cut(waiting) and dense.shape[1] != layer.in_features:
            check_columns(name, layer.spec, layer.in_features, dense.shape[1])
        made = quantize(dense, layer.spec, table=table, scale=self.scale, scale_dtype=dense.dtype, name=name)
        layer.weight = _fixed(placed_like(waiting, pack_codes(made.codes, layer.spec.code_bits)))
        layer.scales = _fixed(placed_like(waiting, made.scales))
        _mark_loaded(layer.scales)
        values = resolve_table(layer.spec, table).to(device=dense.device, dtype=dense.dtype)
        layer.register_buffer("table", values, persistent=layer.spec.table == CUSTOM_TABLE)
        if not is_cut(waiting):  # of a part, `finish_layer` still asks for its columns
            layer.arrange()

    def _fill_stack(self, name: str, layer: LutExperts, dense: torch.Tensor) -> None:
        role = mixtures.owner(name)[1]
        waiting = getattr(layer, f"{role}_proj")
        shape = local(waiting).shape
        if dense.shape != shape:
            raise CheckpointError(f"layer {name!r} is {tuple(dense.shape)}; the model needs {tuple(shape)}")
        mixtures.check_shards(mixtures.owner(name)[0], layer)
        layer.fill(role, dense, table=self.table, scale=self.scale, name=name)
        _mark_loaded(getattr(layer, f"{role}_scales"))


def _mark_loaded(parameter: torch.Tensor) -> None:
    """transformers' own mark: this parameter needs no random numbers."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# ---- after loading ---------------------------------------------------------------------------------------------------


def finish_layer(name: str, layer: LutLinear) -> None:
    """The last touches: the named table (which no file holds), no gradients, sane scales, kernel order on a GPU.

    Raises:
        CheckpointError: the layer got no weight, or scales, table or zero points are not finite.
        IntegrationError: tensor parallelism cuts through a group.
    """
    if layer.scales is None:
        raise CheckpointError(f"layer {name!r}: the checkpoint has no tensor {name + '.weight'!r}")
    zeros = ("zeros",) if layer.spec.zero_points else ()
    for part in ("weight", "scales", *zeros):
        getattr(layer, part).requires_grad_(False)
    if layer.spec.table != CUSTOM_TABLE and not layer.table.is_meta:
        layer.table = named_table(layer.spec.table).to(device=layer.table.device, dtype=layer.scales.dtype)
    if layer.weight.is_meta:  # an offloaded layer comes to the device in the checkpoint's order, call by call
        return
    row_bytes = 0 if layer.in_kernel_order else local(layer.weight).shape[1]
    if is_cut(layer.weight) and row_bytes != layer.spec.row_bytes(layer.in_features):
        check_columns(name, layer.spec, layer.in_features, row_bytes * 8 // layer.spec.bits)
    for part in ("scales", "table", *zeros):
        if not bool(torch.isfinite(local(getattr(layer, part))).all()):
            raise CheckpointError(f"layer {name!r}: {part} hold NaN or Inf in {layer.scales.dtype}")
    layer.arrange()


def dense_linear(layer: LutLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """The nn.Linear that computes what ``layer`` computes."""
    weight = layer.dequantize()
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype or weight.dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype or weight.dtype))
    return linear.train(layer.training)
