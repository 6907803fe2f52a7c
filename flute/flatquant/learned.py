"""Everything that is learned of one block: factors, diagonals, clips; and the block's tensors as they follow from it.

Training runs on the folded form (`fold`): what is learned is what is saved, and there is no second definition of the
quantized model. Clips are logistic functions of what is learned (section 3.3); 0.982 until they are set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .factors import Factor, Pair, Parts, pairs
from .fake import fake
from .fold import FACTORS_OF, SITE_OF, BlockShape, Tensors, fold, key_offset, online, parameter_of_clip
from .matrices import Matrices
from .rounding import clipped_rows, grouped
from .spec import FlatSpec

_CLIP_START = 4.0
_CONSUMERS = {site: sum(each == site for each in SITE_OF.values()) for site in FACTORS_OF}


class Learned(nn.Module):
    """Parameters of a block.

    Args:
        parts: where each factor begins, by the names in `fold.FACTORS_OF` and ``key``; those left out do not exist.
        scales: where each diagonal begins, positive; likewise.
        key_mean: (kv_heads, d), if keys have an offset.
        direct: learn factors entry by entry.
        clip_weights, clip_activations: learn these clips; else nothing is clipped.
    """

    key_mean: torch.Tensor | None

    def __init__(
        self,
        spec: FlatSpec,
        shape: BlockShape,
        parts: Mapping[str, Parts],
        scales: Tensors,
        key_mean: torch.Tensor | None = None,
        *,
        direct: bool = False,
        clip_weights: bool = True,
        clip_activations: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.factors = nn.ModuleDict({name: Factor(each, direct=direct) for name, each in parts.items()})
        self.log_scales = nn.ParameterDict({name: nn.Parameter(each.float().log()) for name, each in scales.items()})
        self.register_buffer("key_mean", key_mean)
        self.clips, self.row_clips = nn.ParameterDict(), nn.ParameterDict()
        if clip_activations:
            for site in FACTORS_OF:
                if site_bits(spec, site) < 16:
                    self.clips[site] = _logits(clips(spec, site))
            for name, bits in (("query", spec.q_bits), ("key", spec.k_bits), ("value", spec.v_bits)):
                if bits < 16:
                    self.clips[name] = _logits()
        for name in SITE_OF if clip_weights else ():
            if spec.weight_bits(name) < 16:
                self.row_clips[_key(name)] = _logits(rows_of(shape, name))
        if device is not None:
            self.to(device)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for the optimizer: clips learn ten times as fast; nothing decays."""
        slow = [*self.factors.parameters(), *self.log_scales.parameters()]
        fast = [*self.clips.parameters(), *self.row_clips.parameters()]
        return [
            {"params": part, "lr": rate, "weight_decay": 0.0} for part, rate in ((slow, lr), (fast, 10 * lr)) if part
        ]

    def made(self) -> dict[str, Pair]:
        """All factors, with gradients."""
        return pairs({name: factor for name, factor in self.factors.items() if isinstance(factor, Factor)})

    def scales(self) -> Tensors:
        """All diagonals c."""
        return {name: log.exp() for name, log in self.log_scales.items()}

    def row_ratios(self) -> Tensors:
        """Clips of weights (N, 2), by layer."""
        return {name: self.row_clips[_key(name)].sigmoid() for name in SITE_OF if _key(name) in self.row_clips}

    def tensors(self, dense: Mapping[str, torch.Tensor]) -> Tensors:
        """All tensors of the block that differ from ``dense`` (float32), weights rounded; with gradients."""
        made, apart = self.made(), self.spec.separate_vtrans
        found = fold(dense, made, self.scales(), self.shape, separate_values=apart)
        found |= online(made, separate_values=apart)
        found |= {parameter_of_clip(name): logits.sigmoid() for name, logits in self.clips.items()}
        if self.key_mean is not None:
            found |= key_offset(made, self.key_mean)
        ratios = self.row_ratios()
        for name in SITE_OF:
            found[f"{name}.weight"] = self._rounded(name, found[f"{name}.weight"], ratios.get(name))
        return found

    def _rounded(self, name: str, weight: torch.Tensor, clip: torch.Tensor | None) -> torch.Tensor:
        bits, symmetric = self.spec.weight_bits(name), not self.spec.w_asym
        if self.spec.w_groupsize < 0:
            return fake(weight, bits, symmetric=symmetric, clip=clip, clamped=True)
        groups = grouped(clipped_rows(weight, clip), self.spec.w_groupsize)  # clips are the row's, grids the groups'
        return fake(groups, bits, symmetric=symmetric).flatten(1)

    @torch.no_grad()
    def matrices(self) -> Matrices:
        """What was learned, as plain numbers."""
        clips = {name: logits.sigmoid() for name, logits in self.clips.items()}
        means = {} if self.key_mean is None else {"key": self.key_mean}
        factors = {name: pair.forward.clone() for name, pair in self.made().items()}
        return Matrices(factors, self.scales(), clips, self.row_ratios(), means)


def rows_of(shape: BlockShape, name: str) -> int:
    """Outputs of a layer."""
    kv, q = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    known = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    return known.get(name, shape.inner if name in ("mlp.gate_proj", "mlp.up_proj") else shape.hidden)


def clips(spec: FlatSpec, site: str) -> int:
    """Clip pairs of a site: one, or one for each consumer."""
    return _CONSUMERS[site] if spec.separate_clips else 1


def site_bits(spec: FlatSpec, site: str) -> int:
    """Bits of the activation of a site."""
    return spec.activation_bits("mlp.down_proj" if site == "down" else site)


def _logits(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full((*shape, 2), _CLIP_START))


def _key(name: str) -> str:
    """A layer's name as a key of nn.ParameterDict, which has no dots."""
    return name.rpartition(".")[2]
