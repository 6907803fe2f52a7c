"""transformers: ``FluteConfig`` and the quantizer behind ``quant_method: "flute"``.

    AutoModelForCausalLM.from_pretrained(folder)                                            a quantized checkpoint
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=FluteConfig(bits=4))    quantize while loading
    model.save_pretrained(folder)                                                           canonical bytes, any device

Importing this module registers both with transformers; `flute._autoload` does so for users who never import flute.
The heavy work is in `loading`, which is imported when a model is loaded and not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import QUANT_METHOD, ModelSpec
from ..errors import CheckpointError, FluteError, IntegrationError, SpecError
from ..quantize import SCALE_METHODS
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import resolve_table
from .versions import check_transformers

if TYPE_CHECKING:
    from torch import nn


class FluteConfig(QuantizationConfigMixin):
    """How to quantize a model while loading it, and what a quantized checkpoint says about itself.

    Args:
        bits: 2, 3 or 4; or a whole `QuantSpec`, and then no other field of it.
        group_size, table, vector_size: as in `QuantSpec`; ``table`` defaults to ``nf<bits>``.
        overrides: pattern -> spec or changed fields, e.g. ``{"*.down_proj": {"bits": 3}}``. Patterns are exact names,
            globs with ``*``, or ``re:`` and a regular expression (see `flute.config`).
        modules_to_not_convert: patterns of layers left dense.
        lm_head: quantize the output head too. If it shares its weight with the embedding it gets its own.
        experts: quantize the stacked weights of mixtures of experts too.
        scale: ``"auto"``, ``"absmax"``, ``"rms"``, or ``"mse"`` for the least squared error. Only for quantizing.
        fuse: on a GPU, layers that get the same x (q, k, v; gate, up) share one launch (`flute.integrations.fusion`).
            Not written to the checkpoint; what was loaded from one is put apart by ``separate(model)`` from there.
        table_values: the custom table, ``(2**bits,)`` or ``(2**(2*bits), 2)`` numbers, when a spec says ``"custom"``.

    Raises:
        SpecError: a value breaks a rule.
    """

    quant_method: Any  # an enum of the methods transformers knows, or any other name

    def __init__(
        self,
        bits: int | QuantSpec = 4,
        group_size: int = 64,
        table: str | None = None,
        vector_size: int = 1,
        *,
        overrides: Mapping[str, Any] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        lm_head: bool = False,
        experts: bool = True,
        scale: str = "auto",
        fuse: bool = True,
        table_values: Any = None,
    ) -> None:
        self.quant_method, self.fuse = QUANT_METHOD, fuse
        if isinstance(bits, QuantSpec):
            spec = bits
        else:
            values = {"bits": bits, "group_size": group_size, "vector_size": vector_size}
            spec = QuantSpec.from_dict(values if table is None else {**values, "table": table})
        changes = {
            pattern: change.to_dict() if isinstance(change, QuantSpec) else change
            for pattern, change in (overrides or {}).items()
        }
        self.record = ModelSpec(spec, changes, tuple(modules_to_not_convert or ()), lm_head, experts)
        if scale not in SCALE_METHODS:
            raise SpecError(f"scale={scale!r} is unknown; use one of {', '.join(SCALE_METHODS)}")
        self.scale = scale
        self.table_values = None
        if table_values is not None:
            values_as_tensor = torch.as_tensor(table_values, dtype=torch.float32, device="cpu")
            if spec.table == CUSTOM_TABLE:
                resolve_table(spec, values_as_tensor)
            self.table_values = values_as_tensor.tolist()

    @property
    def spec(self) -> QuantSpec:
        """The spec of every layer without an override."""
        return self.record.spec

    @classmethod
    def of(cls, record: ModelSpec) -> FluteConfig:
        """The config that stands for ``record``."""
        config = cls(record.spec)
        config.record = record
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the ``quantization_config`` of a config.json, strictly.

        Raises:
            SpecError: an unknown key, another version, a value out of its limits.
        """
        config = cls.of(ModelSpec.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` for config.json."""
        return self.record.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class FluteHfQuantizer(HfQuantizer):
    """transformers calls these methods, in this order, while it loads a model; see `HfQuantizer` for the contract."""

    requires_calibration = False
    quantization_config: FluteConfig

    def __init__(self, quantization_config: FluteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._specs: dict[str, QuantSpec] = {}  # what will be LutLinears, by name
        self._waiting: frozenset[str] = frozenset()  # parameters to quantize as they are loaded
        self._tied_head: str | None = None  # an output head to quantize once it has its weight
        self._experts: frozenset[str] = frozenset()  # those of _specs that are projections of stacked experts
        self._unchecked: tuple[Any, Sequence[str]] | None = None
        self._failures: list[FluteError] = []

    # ---- what transformers asks ------------------------------------------------------------------------------------

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top; the codes themselves do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operator is known to torch.compile."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is built; from now on a model may ask for flute's attention."""
        check_transformers()
        from .attention import register  # late: it needs more of transformers than may be there yet

        register()
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise IntegrationError(
                "device_map offloads to 'disk' while a dense model is quantized; quantize and save it first, then load "
                "the result with this device_map"
            )

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element as it will be held: the size that ``device_map="auto"`` plans with."""
        if param_name not in self._waiting:
            return param.element_size()
        spec = self._specs[param_name.removesuffix(".weight")]
        return spec.bits_per_weight(param.shape[-1], 8 * param.element_size()) / 8

    # ---- before the weights ----------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from . import loading, mixtures, modules

        record = self.quantization_config.record
        if not self.pre_quantized:
            modules.check_patterns(model, record)
        choice = modules.choose(model, record, stored=self.pre_quantized)
        if not choice.specs:
            raise IntegrationError(f"{type(model).__name__} has no linear layer to quantize under this config")
        for line in () if self.pre_quantized else mixtures.told(choice.left):
            warnings.warn(line, stacklevel=2)
        self._check_tables(choice.specs)
        self._specs, self._experts = dict(choice.specs), frozenset(choice.experts)
        head = modules.output_head(model)
        if head in self._specs and f"{head}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
            if self.pre_quantized:
                raise CheckpointError(
                    "config.json says lm_head: true and tie_word_embeddings: true; a quantized output head cannot "
                    "share its weight with the embedding"
                )
            self._tied_head = head
        placed = {name: spec for name, spec in self._specs.items() if name != self._tied_head}
        experts = {name: placed.pop(name) for name in choice.experts}
        loading.swap_linears(model, placed, pre_quantized=self.pre_quantized)
        mixtures.swap(model, experts, pre_quantized=self.pre_quantized)
        if self.pre_quantized:
            mixtures.plan_scales(model, experts)
            self._unchecked = (model, kwargs.get("checkpoint_files") or ())
        else:
            self._waiting = frozenset([*experts, *(f"{name}.weight" for name in placed)])
            # a new config: the caller's own still has its patterns and may serve for another model
            resolved = FluteConfig.of(record.resolved(self._specs, choice.dense, experts=bool(experts)))
            given = self.quantization_config
            resolved.scale, resolved.table_values, resolved.fuse = given.scale, given.table_values, given.fuse
            self.quantization_config = resolved
        return model

    def _check_tables(self, specs: Mapping[str, QuantSpec]) -> None:
        if self.pre_quantized:
            return
        for name, spec in specs.items():
            if spec.table == CUSTOM_TABLE:
                try:
                    resolve_table(spec, self._table())
                except SpecError as error:
                    raise SpecError(f"layer {name!r}: {error}; give it as FluteConfig(table_values=...)") from None

    def _table(self) -> torch.Tensor | None:
        values = self.quantization_config.table_values
        return None if values is None else torch.tensor(values, device="cpu")  # a meta device is in force

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """The first moment at which the loader's renamings are known: check the files, before memory is allocated."""
        conversions = super().update_weight_conversions(weight_conversions, *args)
        if self.pre_quantized and self._experts:
            from . import mixtures

            conversions = [*conversions, *mixtures.scale_converters(conversions)]
        if self._unchecked is not None:
            from . import loading

            model, files = self._unchecked
            self._unchecked = None
            if files:  # none when the caller passes a state dict
                loading.check_files(model, files, conversions)
        return conversions

    # ---- the weights -----------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether this dense tensor is to be quantized."""
        return param_name in self._waiting

    def get_quantize_ops(self) -> Any:
        """The op that does it."""
        from .loading import Quantize

        return Quantize(self.quantization_config.scale, self._table(), self._failures)

    # ---- after the weights -----------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ..experts import LutExperts
        from ..linear import LutLinear
        from . import fusion, loading, mixtures

        if self._failures:
            raise self._failures[0]
        if self._tied_head is not None:
            self._quantize_tied_head(model, self._tied_head)
        for name in self._specs.keys() - self._experts:
            layer = model.get_submodule(name)
            assert isinstance(layer, LutLinear)
            loading.finish_layer(name, layer)
        for name in {mixtures.owner(projection)[0] for projection in self._experts}:
            experts = model.get_submodule(name)
            assert isinstance(experts, LutExperts)
            mixtures.finish(name, experts, model.dtype)
        if self._experts and not self.pre_quantized:  # what saving cuts apart, it cuts with the scales
            model._weight_conversions += mixtures.scale_converters(model._weight_conversions)
        if self.quantization_config.fuse:
            fusion.fuse(model)
        _attach(model, self.quantization_config, dense=not self.pre_quantized)
        return model

    def _quantize_tied_head(self, model: Any, name: str) -> None:
        from ..linear import LutLinear
        from .hooks import attach_hook, release_hook
        from .modules import untie_head

        warnings.warn(
            f"{name} shared its weight with the embedding; quantized it has its own, and the embedding stays dense "
            "(tie_word_embeddings is now false)",
            stacklevel=2,
        )
        head = model.get_submodule(name)
        hook = release_hook(name, head)
        spec = self._specs[name]
        table = self._table() if spec.table == CUSTOM_TABLE else None
        layer = LutLinear.from_linear(head, spec, table=table, scale=self.quantization_config.scale, name=name)
        model.set_submodule(name, layer)
        attach_hook(layer, hook)
        untie_head(model, name)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """``model.dequantize()``: every LutLinear and LutExperts becomes the dense module it stands for."""
        from ..experts import LutExperts
        from ..linear import LutLinear
        from . import described, saving
        from .hooks import attach_hook, release_hook
        from .loading import dense_linear
        from .mixtures import dense_experts

        # a config that was never written to a file may hold the name
        kind: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, (LutLinear, LutExperts))]:
            hook = release_hook(name, layer)
            dense = dense_linear(layer, kind) if isinstance(layer, LutLinear) else dense_experts(layer, kind)
            model.set_submodule(name, dense)
            attach_hook(dense, hook)
        saving.detach(model, described.tags(QUANT_METHOD, self.quantization_config.spec.bits))
        return model


def _attach(model: Any, config: FluteConfig, *, dense: bool) -> None:
    """Saving and pushing write a card (imported late, like all that is heavy)."""
    from . import described, saving

    saving.attach(model, described.tags(QUANT_METHOD, config.spec.bits), dense=dense)


def mark_quantized(model: Any, record: ModelSpec) -> None:
    """Tell transformers that ``model``, whose layers were made LutLinears in memory, is quantized: it can be saved.

    Args:
        record: with exact names, as a checkpoint holds it.
    """
    config = FluteConfig.of(record)
    model.hf_quantizer = FluteHfQuantizer(config)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    _attach(model, config, dense=True)


def register() -> None:
    """Make transformers know ``quant_method: "flute"``, and mend its "higgs". Does nothing the second time."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, FluteConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, FluteHfQuantizer)
    if "higgs" in AUTO_QUANTIZER_MAPPING:
        from .higgs_quantizer import FluteHiggsQuantizer

        AUTO_QUANTIZER_MAPPING["higgs"] = FluteHiggsQuantizer


def from_pretrained(repo_id: str, **kwargs: Any) -> Any:
    """Upstream FLUTE's documented loader: its own checkpoints (``flute_config.json``) and ours.

    An upstream checkpoint is converted (`flute.integrations.convert`) into a temporary folder, which takes as much disk
    as the checkpoint, at every load; ``flute convert`` does it once.

    Args:
        repo_id: a folder or a hub id.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``, ``revision`` among them; ``example_batch_size``
            is accepted and not needed, kernels are not tuned per batch size.

    Raises:
        CheckpointError: an upstream checkpoint that is damaged, or does not tell its tile.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.hub import cached_file

    kwargs.pop("example_batch_size", None)
    hub = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    legacy = cached_file(repo_id, "flute_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if legacy is None or hasattr(AutoConfig.from_pretrained(repo_id, **hub), "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(repo_id, **kwargs)
    from . import folders
    from .convert.folder import convert
    from .convert.source import open_source

    subfolder = hub.pop("subfolder", None)
    if subfolder:
        raise IntegrationError(
            f"{repo_id}/{subfolder} is an upstream checkpoint in a subfolder; flute convert it first"
        )
    options = {key: value for key, value in kwargs.items() if key not in hub}
    with TemporaryDirectory(prefix="flute-") as place:
        with open_source(folders.find(repo_id, **hub), Path(place)) as source:
            convert(source, Path(place) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(place) / "model", **options)


register()
