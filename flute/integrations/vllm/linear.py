"""`LutLinearMethod`: linear modules of vLLM, and its output head, with weights as codes, scales and tables.

While a checkpoint is loaded, a module has the parameters ``weight``, ``scales`` and, for tables of its own, ``table``:
the names in the files. Then neighbouring parts that are stored alike become one `LutLinear`, in the order that suits
the device: all of q, k and v as a rule, and as many as there are different specs or tables otherwise. A product is one
call of ``flute::lut_linear`` for each of them, a single node for torch.compile and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from ...errors import IntegrationError, SpecError
from ...kernels import ops
from ...kernels.hadamard import hadamard
from ...linear import LutLinear
from ...spec import CUSTOM_TABLE, QuantSpec
from ...tables import named_table
from ...zero_points import ZeroPointLinear, lut_linear
from .parameters import Part, PartsParameter, TablesParameter, check_came, fixed, pair
from .slicing import runs, share


@register_weight_loader_v2_supported_method
class LutLinearMethod(LinearMethodBase):
    """Makes, fills and runs the weights of one module.

    Args:
        name: of the module.
        specs: of the checkpoint's layers in it, in their order; one where the checkpoint has one layer, too.
    """

    def __init__(self, name: str, specs: Sequence[QuantSpec]) -> None:
        self.name, self.specs = name, tuple(specs)

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
            SpecError: this many ranks cannot share the columns, or it is not clear which part is stored how.
        """
        ranks = input_size // input_size_per_partition
        rank = layer.tp_rank if ranks > 1 else 0
        specs = self._spread(len(output_partition_sizes))
        shares = [share(self.name, spec, input_size, rank, ranks) for spec in specs]
        cut = zip(output_partition_sizes, specs, shares, strict=True)
        codes, scales = zip(*(pair(rows, spec, input_size, own) for rows, spec, own in cut), strict=True)
        layer.weight = PartsParameter(codes, torch.uint8, weight_loader=weight_loader, name=self.name)
        layer.scales = PartsParameter(scales, params_dtype, weight_loader=weight_loader, name=self.name)
        shapes = [spec.table_shape if spec.table == CUSTOM_TABLE else None for spec in specs]
        layer.table = TablesParameter(shapes, params_dtype, name=self.name) if any(shapes) else None
        some = any(spec.zero_points for spec in specs)
        layer.zeros = self._zeros(scales, specs, params_dtype, weight_loader) if some else None
        layer.shares = shares

    def _zeros(
        self, parts: Sequence[Part], specs: Sequence[QuantSpec], dtype: torch.dtype, loader: Callable[..., None]
    ) -> PartsParameter:
        """Zero points, cut like scales; of parts without, zeros that wait for nothing."""
        made = PartsParameter(parts, dtype, weight_loader=loader, name=self.name)
        made.waiting = sum(spec.zero_points for spec in specs)
        for place, spec in enumerate(specs):
            if not spec.zero_points:
                made.part(place).zero_()
        return made

    def _spread(self, parts: int) -> list[QuantSpec]:
        """A spec for each part."""
        if len(self.specs) == parts:
            return list(self.specs)
        if len(set(self.specs)) > 1:
            raise SpecError(
                f"layer {self.name!r}: {len(self.specs)} layers of different specs become {parts} parts in vLLM; "
                "quantize them in one spec"
            )
        return [self.specs[0]] * parts

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what came into the order for its device and let the buffers go.

        Raises:
            CheckpointError: something did not come, or is not finite.
        """
        weight, scales, tables, zeros, shares = layer.weight, layer.scales, layer.table, layer.zeros, layer.shares
        named = {"weight": weight, "scales": scales, "table": tables, "zeros": zeros}
        check_came(self.name, {key: held for key, held in named.items() if held is not None})
        own = [None if tables is None else tables.part(place) for place in range(len(shares))]
        keys = [(of.spec, None if table is None else table.tolist()) for of, table in zip(shares, own, strict=True)]
        del layer.weight, layer.scales, layer.table, layer.zeros, layer.shares
        layer.runs = nn.ModuleList()
        for places in runs(keys):
            first = places[0]
            codes, scaled = (torch.cat([held.part(place) for place in places]) for held in (weight, scales))
            made = lut_linear(
                shares[first].in_features, len(codes), shares[first].spec, device="meta", dtype=scales.dtype
            )
            if isinstance(made, ZeroPointLinear):
                made.zeros = fixed(torch.cat([zeros.part(place) for place in places]))
            layer.runs.append(_filled(made, codes, scaled, own[first]))
        layer.weight = layer.runs[0].weight  # LoRA and MLA ask every module for one

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, K) -> (tokens, N of this rank)."""
        start, parts = 0, []
        for run in layer.runs:
            end = start + run.out_features
            parts.append(_product(run, x, None if bias is None else bias[start:end]))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Not of a quantized head.

        Raises:
            IntegrationError: always.
        """
        raise IntegrationError(
            f"layer {self.name!r} is quantized, but config.json ties it to the embedding; tie_word_embeddings must be "
            "false"
        )


def _product(run: LutLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    spec = run.spec
    x = hadamard(x, spec.hadamard_size) if spec.hadamard_size else x
    y = ops.apply(x, run.weight, run.scales, run.table, bias, run.out_features, spec.bits, spec.group_size)
    return run.shifted(y, x) if isinstance(run, ZeroPointLinear) else y


def _filled(made: LutLinear, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor | None) -> LutLinear:
    """The layer ``made`` with these codes (N, row_bytes), scales (N, G) and table, arranged for their device."""
    made.weight, made.scales = fixed(codes), fixed(scales)
    values = named_table(made.spec.table) if table is None else table.clone()
    made.table = values.to(device=codes.device, dtype=scales.dtype)
    return made.arrange()
