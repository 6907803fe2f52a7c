"""Transforms into weights: the block that remains needs only what cannot be folded.

Of a block x -> norm -> q, k, v -> attention -> o -> norm -> gate, up -> down (all names as in Llama):

    input_layernorm              times c_attn                           q, k, v: W <- (W / c)(P^-T (x) P^-T)
    v_proj rows (and bias)       times c_value, then P_v per head      o: W <- (W / c)(P_o^-T (x) P_v^-T)
    post_attention_layernorm     times c_mlp                            gate, up: likewise
    up_proj rows (and bias)      times c_down                           down: likewise

P_v thus costs nothing when the model runs, and neither does any diagonal; P_o, which mixes heads, stays before o_proj.
(With ``separate_values`` v_proj is left alone and P_v stays, too: upstream's --separate_vtrans.)
(FlatQuant, section 3.3 and appendix B. The diagonal c_value between v_proj and o_proj is an addition.) Pure functions,
in whatever dtype the tensors have: float32 with gradients while they are learned, float64 when it is for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.tokens import transform
from .factors import Pair

Tensors = dict[str, torch.Tensor]

# where the input of a layer is transformed, and by which factors
SITE_OF = {
    "self_attn.q_proj": "attn", "self_attn.k_proj": "attn", "self_attn.v_proj": "attn", "self_attn.o_proj": "out",
    "mlp.gate_proj": "mlp", "mlp.up_proj": "mlp", "mlp.down_proj": "down",
}  # fmt: skip
FACTORS_OF = {
    "attn": ("attn_left", "attn_right"), "out": ("out_left", "out_right"),
    "mlp": ("mlp_left", "mlp_right"), "down": ("down_left", "down_right"),
}  # fmt: skip
MODULE_OF = {
    "attn": "self_attn.input_transform", "out": "self_attn.output_transform",
    "mlp": "mlp.input_transform", "down": "mlp.down_transform",
}  # fmt: skip
_NORM_OF = {"attn": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block: ``hidden``, ``inner`` (of the MLP), numbers of heads, and channels of a head."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    def features(self, site: str) -> int:
        """Width of the activation there."""
        return {"out": self.heads * self.head_dim, "down": self.inner}.get(site, self.hidden)

    def per_query_head(self, values: torch.Tensor) -> torch.Tensor:
        """(kv_heads * d,) -> (heads * d,): what each head of queries reads."""
        each = values.view(self.kv_heads, 1, self.head_dim)
        return each.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)


def fold(
    dense: Mapping[str, torch.Tensor],
    made: Mapping[str, Pair],
    scales: Tensors,
    shape: BlockShape,
    *,
    separate_values: bool = False,
) -> Tensors:
    """Weights, biases and norms of the block with transforms ``made`` and diagonals ``scales`` folded in.

    Args:
        dense: tensors of the block by name; others than those above are left out.
        made: by the names in `FACTORS_OF`; a missing one is the identity.
        scales: c by site (``attn``, ``mlp``, ``down``) and ``value``; a missing one is 1.
        separate_values: P_v is not folded into v_proj.
    """
    out: Tensors = {}
    inputs = dict(scales)
    if "value" in scales:
        inputs["out"] = shape.per_query_head(scales["value"])
    for site, norm in _NORM_OF.items():
        out[norm] = dense[norm] * scales[site] if site in scales else dense[norm]
    for name, site in SITE_OF.items():
        weight, bias = dense[f"{name}.weight"], dense.get(f"{name}.bias")
        if site in inputs:
            weight = weight / inputs[site]
        left, right = (made[part].inverse if part in made else None for part in FACTORS_OF[site])
        weight = transform(weight, left, right, None, 0.0)
        rows = {"self_attn.v_proj": scales.get("value"), "mlp.up_proj": scales.get("down")}.get(name)
        if rows is not None:
            weight, bias = weight * rows.unsqueeze(-1), None if bias is None else bias * rows
        if name == "self_attn.v_proj" and "out_right" in made and not separate_values:
            turn = made["out_right"].forward
            weight = (turn.mT @ weight.view(shape.kv_heads, shape.head_dim, -1)).flatten(0, 1)
            bias = None if bias is None else (bias.view(shape.kv_heads, -1) @ turn).flatten()
        out[f"{name}.weight"] = weight
        if bias is not None:
            out[f"{name}.bias"] = bias
    return out


def online(made: Mapping[str, Pair], *, separate_values: bool = False) -> Tensors:
    """What stays: the parameters of the block's `Site` and `Heads` modules."""
    found: Tensors = {}
    for site, (left, right) in FACTORS_OF.items():
        for part, name in (("left", left), ("right", right)):
            if name in made and name != "out_right":
                found[f"{MODULE_OF[site]}.{part}"] = made[name].forward
    if "key" in made:
        found |= {"self_attn.heads.key": made["key"].forward, "self_attn.heads.query": made["key"].inverse}
    if separate_values and "out_right" in made:
        found["self_attn.heads.value"] = made["out_right"].forward
    return found


def key_offset(made: Mapping[str, Pair], mean: torch.Tensor) -> Tensors:
    """The parameter that is subtracted from transformed keys: the mean key (kv_heads, d), transformed."""
    return {"self_attn.heads.offset": mean @ made["key"].forward if "key" in made else mean}


def parameter_of_clip(name: str) -> str:
    """The parameter that holds a clip, of a site or of ``query``, ``key`` or ``value``."""
    return f"{MODULE_OF[name]}.clip" if name in MODULE_OF else f"self_attn.heads.{name[0]}_clip"
