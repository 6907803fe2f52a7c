"""`LutExpertsMethod`: the experts of a mixture in vLLM, as `LutExperts` (two launches for all of them on Hopper).

A checkpoint holds a matrix per expert; ``experts.3.w1.weight``, ``.scales`` and, with zero points, ``.zeros`` come to
this rank's slice of the stacks ``w13_weight``, ``w13_scales`` and ``w13_zeros``: gate and up share rows among the
ranks, down shares columns, and vLLM adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts

from ...errors import IntegrationError
from ...spec import CUSTOM_TABLE, QuantSpec
from ...tables import named_table
from ...zero_experts import lut_experts
from .parameters import Part, blank, check_came, fixed, pair
from .slicing import share

_STEMS = {"gate_up": "w13", "down": "w2"}  # our roles and vLLM's names


def _ends(spec: QuantSpec) -> tuple[str, ...]:
    return "weight", "scales", *(["zeros"] if spec.zero_points else [])


class StackParameter(nn.Parameter):
    """Codes (uint8), scales or zero points of one projection of all experts: (E, rows, columns) of this rank.

    Args:
        experts: E.
        parts: one below the other, in every expert: gate and up, or down alone.
        dtype: of the buffer.
    """

    def __new__(cls, experts: int, parts: Sequence[Part], dtype: torch.dtype) -> StackParameter:
        """The buffer, as a Parameter."""
        shape = experts, sum(part.rows for part in parts), parts[0].columns
        return super().__new__(cls, blank(shape, dtype), requires_grad=False)

    def __init__(self, experts: int, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self.parts, self.waiting = tuple(parts), experts * len(parts)
        self.weight_loader: Callable[..., Any]

    def held(self) -> Iterator[torch.Tensor]:
        """Everything."""
        yield self.data


class LutExpertsMethod(FusedMoEMethodBase):
    """Makes, fills and runs the weights of one module of experts.

    Args:
        layer: the module.
        name: its name.
        specs: of gate_up and down.

    Raises:
        IntegrationError: the module asks for what is not there: naming it.
    """

    def __init__(self, layer: RoutedExperts, name: str, specs: Sequence[QuantSpec]) -> None:
        super().__init__(layer.moe_config)
        self.name, self.specs = name, dict(zip(_STEMS, specs, strict=True))
        activation = getattr(layer.activation, "value", layer.activation)
        obstacles = {
            "expert parallelism": layer.moe_config.moe_parallel_config.use_ep,
            "tables of their own": any(spec.table == CUSTOM_TABLE for spec in specs),
            "biases": self.moe.has_bias,
            f"the activation {activation}": activation != "silu" or layer.swiglu_limit is not None,
            "routing weights on the input": layer.apply_router_weight_on_input,
        }
        found = [what for what, there in obstacles.items() if there]
        if found:
            raise IntegrationError(
                f"layer {name!r}: quantized experts with {' and '.join(found)} are not served; leave them dense "
                "(FluteConfig(experts=False))"
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """As vLLM calls it.

        Raises:
            SpecError: this many ranks cannot share the columns of ``down``.
        """
        ranks, rank, inner = self.moe.tp_size, self.moe.tp_rank, intermediate_size_per_partition
        shapes = {"gate_up": (inner, hidden_size, 0, 1), "down": (hidden_size, inner * ranks, rank, ranks)}
        self.local = {}
        for role, (rows, width, *place) in shapes.items():
            spec = self.specs[role]
            own = share(f"{self.name}.{role}_proj", spec, width, *place)
            self.local[role] = own.spec
            count = 2 if role == "gate_up" else 1
            codes, scales = pair(rows, spec, width, own)
            for end in _ends(spec):
                part, dtype = (codes, torch.uint8) if end == "weight" else (scales, params_dtype)
                parameter = StackParameter(num_experts, [part] * count, dtype)
                parameter.weight_loader = self._load
                layer.register_parameter(f"{_STEMS[role]}_{end}", parameter)
        self.sizes = num_experts, hidden_size, inner

    def _load(
        self,
        param: StackParameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """One matrix of one expert; vLLM calls gate, down and up w1, w2 and w3."""
        place, share_of_rows = (0, 0) if shard_id == "w2" else (int(shard_id == "w3"), self.moe.tp_rank)
        part = param.parts[place]
        target = param.data[expert_id].narrow(0, place * part.rows, part.rows)
        part.copy(f"{self.name} ({weight_name})", loaded_weight, share_of_rows, target)
        param.waiting -= 1
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Put what came into the order for its device and let the buffers go.

        Raises:
            CheckpointError: something did not come, or is not finite.
        """
        names = [f"{stem}_{end}" for role, stem in _STEMS.items() for end in _ends(self.local[role])]
        check_came(self.name, {name: getattr(layer, name) for name in names})
        scales = layer.w2_scales
        made = lut_experts(*self.sizes, self.local, device="meta", dtype=scales.dtype)
        for role, stem in _STEMS.items():
            made.put(role, *(getattr(layer, f"{stem}_{end}").data for end in ("weight", "scales")))
            if self.local[role].zero_points:
                setattr(made, f"{role}_zeros", fixed(getattr(layer, f"{stem}_zeros").data))
            table = named_table(self.local[role].table).to(device=scales.device, dtype=scales.dtype)
            setattr(made, f"{role}_table", table)
        for name in names:
            delattr(layer, name)
        layer.lut = made.arrange()
        layer.w2_weight = made.down_proj  # LoRA asks every module for one

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels are not used."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """(tokens, H) -> (tokens, H), this rank's summand."""
        made = layer.lut(x, topk_ids, topk_weights)
        assert isinstance(made, torch.Tensor)
        return made
