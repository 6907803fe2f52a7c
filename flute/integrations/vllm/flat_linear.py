"""`FlatLinearMethod`: a linear module of vLLM behind one of FlatQuant's transforms.

    x -> Site: x (left (x) right), rounded token by token -> products of codes with integer weights, `IntegerMethod`
                                   in 16 bits             -> table weights, `LutLinearMethod`, or vLLM's dense ones

The `Site` and the layers are the very modules that run in transformers; q, k, v and gate, up share the activation and
are one product, or one each where each clips the activation by itself. While a checkpoint is loaded, the module's
``transform`` and weights wait for tensors like those of `LutLinearMethod`.

Ranks that share columns (o_proj, down_proj) have a slice of x each, and a transform mixes all of x: they gather x,
transform and round it alike, and multiply their own columns of it; vLLM adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from ...errors import SpecError
from ...flatquant.fold import SITE_OF
from ...flatquant.learned import clips, site_bits
from ...flatquant.modules import Activation, Codes, IntLinear, Site
from ...flatquant.sizes import factor_sizes
from ...flatquant.spec import FlatSpec
from ...spec import QuantSpec
from .linear import LutLinearMethod
from .names import flat_transform
from .parameters import NumbersParameter, Part, PartsParameter, WholeParameter, check_came, fixed


@register_weight_loader_v2_supported_method
class FlatLinearMethod(LinearMethodBase):
    """Makes, fills and runs a transform and the weights behind it.

    Args:
        name: of the module.
        spec: of the model.
        site: where it is, of `flatquant.fold.SITE_OF`.
        heads: of queries, in the whole model.
    """

    def __init__(self, name: str, spec: FlatSpec, site: str, heads: int) -> None:
        self.spec, self.site, self.heads = spec, site, heads
        self.transform = flat_transform(name, site)
        self.rounds = site_bits(spec, site) < 16
        bits = spec.weight_bits(next(layer for layer, each in SITE_OF.items() if each == site))
        self.weights: LinearMethodBase
        if self.rounds:
            self.weights = IntegerMethod(name, bits, spec, clips(spec, site))
        elif bits < 16:
            self.weights = LutLinearMethod(name, [QuantSpec(bits, spec.w_groupsize, f"int{bits}")])
        else:
            self.weights = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """As vLLM calls it.

        Raises:
            SpecError: this many ranks cannot share the columns.
        """
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        self.weights.create_weights(layer, *sizes, params_dtype, **extra)
        self.columns = _columns(layer, input_size_per_partition, input_size)
        rows, columns = factor_sizes(input_size)
        if self.site == "out":
            rows, columns = self.heads, input_size // self.heads if self.spec.separate_vtrans else 0
        layer.transform = Site(
            rows if rows > 1 else 0, columns, site_bits(self.spec, self.site), symmetric=not self.spec.a_asym,
            clips=clips(self.spec, self.site), real=True, device="meta", dtype=params_dtype,
        )  # fmt: skip
        for name, part in list(layer.transform.named_parameters()):
            setattr(layer.transform, name, WholeParameter(part.shape, part.dtype, name=f"{self.transform}.{name}"))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what came into the order for its device.

        Raises:
            CheckpointError: something did not come, or is not finite.
        """
        self.weights.process_weights_after_loading(layer)
        came = dict(layer.transform.named_parameters())
        check_came(self.transform, came)
        for name, part in came.items():
            setattr(layer.transform, name, fixed(part.data))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, K of this rank) -> (tokens, N of this rank)."""
        if self.columns is None:
            made = layer.transform(x)
        else:
            made = [_cut(each, self.columns) for each in layer.transform(tensor_model_parallel_all_gather(x))]
        return self.weights.apply(layer, made if self.rounds else made[0], bias)


class IntegerMethod(LinearMethodBase):
    """Integer weights of a module, as `IntLinear`.

    Args:
        name: of the module.
        bits: of the weights.
        spec: of the model.
        activations: how many its parts get: one for all of them, or one each.
    """

    def __init__(self, name: str, bits: int, spec: FlatSpec, activations: int) -> None:
        self.name, self.bits, self.spec, self.activations = name, bits, spec, activations

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        """As vLLM calls it.

        Raises:
            SpecError: this many ranks cannot share the columns.
        """
        each = 2 if self.bits <= 4 else 1  # codes in a byte
        if input_size_per_partition % each:
            raise SpecError(
                f"layer {self.name!r}: {input_size_per_partition} of {input_size} columns per rank do not fill whole "
                f"bytes at {self.bits} bits; use fewer ranks"
            )
        width, whole = input_size_per_partition // each, input_size // each
        own = _columns(layer, width, whole) or slice(None)
        codes = [Part(rows, width, whole, lambda held: held[:, own]) for rows in output_partition_sizes]
        numbers = [Part(rows, 1, 1, lambda held: held) for rows in output_partition_sizes]
        made: dict[str, Any] = {"weight_loader": weight_loader, "name": self.name}
        layer.weight = PartsParameter(codes, torch.uint8 if each == 2 else torch.int8, **made)
        layer.weight_scale = NumbersParameter(numbers, torch.float32, **made)
        layer.weight_zero = NumbersParameter(numbers, torch.int32, **made) if self.spec.w_asym else None
        self.in_features = input_size_per_partition

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what came into the order for its device and let the buffers go.

        Raises:
            CheckpointError: something did not come, or is not finite.
        """
        names = ("weight", "weight_scale", *(["weight_zero"] if self.spec.w_asym else []))
        came: dict[str, PartsParameter] = {name: getattr(layer, name) for name in names}
        check_came(self.name, came)
        del layer.weight, layer.weight_scale, layer.weight_zero
        parts = range(len(came["weight"].parts))
        layer.integers = nn.ModuleList()
        for places in [parts] if self.activations == 1 else [[place] for place in parts]:
            held = {name: torch.cat([one.part(place) for place in places]) for name, one in came.items()}
            layer.integers.append(self._filled(**held))

    def _filled(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None = None
    ) -> IntLinear:
        """The layer of these rows, arranged for their device."""
        w_asym, a_asym = self.spec.w_asym, self.spec.a_asym
        made = IntLinear(self.in_features, len(weight), self.bits, w_asym=w_asym, a_asym=a_asym, device="meta")
        made.weight, made.weight_scale = fixed(weight), fixed(weight_scale.flatten())
        made.weight_zero = None if weight_zero is None else fixed(weight_zero.flatten())
        made.arrange()
        return made

    def apply(self, layer: Any, x: Sequence[Codes], bias: torch.Tensor | None = None) -> torch.Tensor:
        """One activation for all parts or one for each, (tokens, K) -> (tokens, N)."""
        start, made = 0, []
        for codes, part in zip(x, layer.integers, strict=True):
            end = start + part.out_features
            made.append(part.product(codes, None if bias is None else bias[start:end]))
            start = end
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _columns(layer: Any, own: int, whole: int) -> slice | None:
    """Which of the ``whole`` columns are this rank's ``own``; None: all of them."""
    return None if own == whole else slice(layer.tp_rank * own, (layer.tp_rank + 1) * own)


def _cut(made: Activation, columns: slice) -> Activation:
    """These columns of an activation; tokens keep their scales and zeros."""
    if isinstance(made, torch.Tensor):
        return made[..., columns].contiguous()
    return made._replace(codes=made.codes[:, columns].contiguous())
