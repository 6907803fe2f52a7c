"""transformers' decoder blocks with the places where FlatQuant transforms and rounds.

`FlatAttention` and `FlatMLP` take over the layers of the modules they replace, under the same names, and compute the
same. They are for blocks like Llama's: q, k, v, o projections, a rotary embedding over whole heads, optional norms of
queries and keys, RMSNorm with a weight, a gated MLP; grouped queries, biases and sliding windows included. That is
Llama, Mistral, Qwen2 and Qwen3. Whether a model is such a one is not told by its name: `check_block` runs both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..errors import IntegrationError
from ..flatquant.fold import MODULE_OF, SITE_OF, BlockShape
from ..flatquant.joint import Joint, joint_product, products
from ..flatquant.learned import clips, rows_of, site_bits
from ..flatquant.modules import DeferredNorm, Heads, IntLinear, Site, project
from ..flatquant.sizes import factor_sizes
from ..flatquant.spec import FlatSpec
from ..linear import LutLinear
from ..spec import QuantSpec
from .attend import attend
from .kv_cache import Int4Cache
from .retyped import with_forward

_TOLERANCE = 1e-4  # relative, float32
_NORMS = ("input_layernorm", "post_attention_layernorm")


class FlatAttention(Joint):
    """Attention whose inputs, keys, values and output go through transforms.

    Keys and values are transformed and rounded before they reach a cache, so any of transformers' caches holds what the
    int4 cache would; that one rounds by itself, which it says with an attribute ``rounds``.

    Args:
        attention: the module to take over. shape: of the block. modules: `Site`s and `Heads` by their names here.
    """

    joint = ("q_proj", "k_proj", "v_proj")
    input_transform: Site
    output_transform: Site
    heads: Heads
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(self, attention: Any, shape: BlockShape, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.config, self.layer_idx, self.shape = attention.config, attention.layer_idx, shape
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal, self.scaling = True, attention.scaling
        self.attention_dropout = getattr(attention, "attention_dropout", 0.0)
        windows = attention if hasattr(attention, "sliding_window") else attention.config
        self.sliding_window = getattr(windows, "sliding_window", None)
        for name in ("q_norm", "k_norm"):  # not every model has them
            self.register_module(name, None)
        for name, child in [*attention.named_children(), *modules.items()]:
            self.add_module(name, child)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As transformers calls it: hidden (B, L, D) -> hidden, added to ``residual``; attention weights or None."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        made = products(layers, self.input_transform(hidden_states))
        q, k, v = (each.unflatten(-1, (-1, self.shape.head_dim)) for each in made)
        q, k = (each if norm is None else norm(each) for each, norm in ((q, self.q_norm), (k, self.k_norm)))
        q, k = self.heads(q, k, *position_embeddings)
        v = self.heads.turned_values(v.transpose(1, 2))
        if not getattr(past_key_values, "rounds", False):
            k, v = self.heads.rounded(k, v)
        out, weights = attend(
            self, q, k, v, attention_mask, past_key_values, sliding_window=self.sliding_window, **kwargs
        )
        return project(self.o_proj, self.output_transform(out)[0], residual), weights


class FlatMLP(Joint):
    """down(act(gate(x)) * up(x)) whose two inputs go through transforms; the second does SiLU and product, too."""

    joint = ("gate_proj", "up_proj")
    input_transform: Site
    down_transform: Site
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: Any, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self.silu = isinstance(mlp.act_fn, (nn.SiLU, type(ACT2FN["silu"])))
        for name, child in [*mlp.named_children(), *modules.items()]:
            self.add_module(name, child)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), added to ``residual``."""
        layers, inputs = (self.gate_proj, self.up_proj), self.input_transform(x)
        inner = joint_product(layers, inputs) if self.silu and self.down_transform.gives_codes else None
        if inner is not None:
            made = self.down_transform(inner, gated=True)
        else:
            gate, up = products(layers, inputs)
            made = self.down_transform(self.act_fn(gate) * up)
        return project(self.down_proj, made[0], residual)


def _forward(
    block: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A block of Llama's kind whose norms are part of the transforms, and residuals of the products."""
    hidden_states, _ = block.self_attn(
        hidden_states, position_embeddings, attention_mask, past_key_values, hidden_states,
        position_ids=position_ids, use_cache=use_cache, **kwargs,
    )  # fmt: skip
    return block.mlp(hidden_states, hidden_states)


def blocks_of(model: Any) -> tuple[str, list[nn.Module]]:
    """The name of the decoder's list of blocks, and the blocks.

    Raises:
        IntegrationError: there is none, or its blocks have other layers than these.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise IntegrationError(f"{type(model).__name__} has no decoder with layers; FlatQuant is for decoders")
    for index, block in enumerate(blocks):
        layers = dict(block.named_modules())
        lacking = [name for name in (*SITE_OF, *_NORMS) if name not in layers]
        if lacking:
            raise IntegrationError(
                f"block {index} of {type(model).__name__} has no {lacking[0]!r}; FlatQuant is for blocks like Llama's, "
                "Mistral's, Qwen2's and Qwen3's"
            )
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    return prefix, list(blocks)


def shape_of(block: Any) -> BlockShape:
    """Sizes of a block that is not taken over yet."""
    attention, mlp = block.self_attn, block.mlp
    size = attention.head_dim
    return BlockShape(
        attention.q_proj.in_features, mlp.down_proj.in_features,
        attention.q_proj.out_features // size, attention.k_proj.out_features // size, size,
    )  # fmt: skip


def flatten(block: Any, spec: FlatSpec, *, transforms: bool = True, real: bool = False) -> None:
    """Put `FlatAttention` and `FlatMLP` into a block of transformers, in place; all transforms are the identity.

    Args:
        transforms: room for transforms; else sites only round (the baseline without any).
        real: with layers of integer (or table) weights instead of the dense ones, on the block's device; the two norms
            become part of the transforms behind them, the two residuals of the products.
    """
    shape, weight = shape_of(block), block.self_attn.q_proj.weight
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if real:
        for name in SITE_OF:
            if spec.weight_bits(name) < 16:
                bias = block.get_submodule(name).bias is not None
                block.set_submodule(name, _layer(spec, shape, name, bias, where))
    modules: dict[str, dict[str, nn.Module]] = {"self_attn": {}, "mlp": {}}
    for site, path in MODULE_OF.items():
        rows, columns = factor_sizes(shape.features(site)) if site != "out" else (shape.heads, 0)
        owner, _, name = path.partition(".")
        modules[owner][name] = Site(
            rows if transforms and rows > 1 else 0, columns if transforms else 0, site_bits(spec, site),
            symmetric=not spec.a_asym, clips=clips(spec, site), real=real, **where,
        )  # fmt: skip
    modules["self_attn"]["heads"] = Heads(
        shape.head_dim if transforms and spec.turns_keys else 0, shape.kv_heads, (spec.k_bits, spec.v_bits),
        (not spec.k_asym, not spec.v_asym), head_dim=shape.head_dim, offset=spec.key_offset, q_bits=spec.q_bits,
        q_symmetric=not spec.q_asym, values=transforms and spec.separate_vtrans, real=real, **where,
    )  # fmt: skip
    for name, owner in zip(_NORMS, ("self_attn", "mlp"), strict=True) if real else ():
        norm = block.get_submodule(name)
        deferred = DeferredNorm(norm.weight, norm.variance_epsilon)
        block.set_submodule(name, deferred)
        cast(Site, modules[owner]["input_transform"]).after(deferred)
    block.self_attn = FlatAttention(block.self_attn, shape, modules["self_attn"]).train(block.training)
    block.mlp = FlatMLP(block.mlp, modules["mlp"]).train(block.training)
    if real:
        block.__class__ = with_forward(type(block), _forward)  # type: ignore[arg-type]  # classes are hashable


def _layer(spec: FlatSpec, shape: BlockShape, name: str, bias: bool, where: dict[str, Any]) -> nn.Module:
    """The layer that runs weights of this many bits on activations of that many."""
    bits, rows, columns = spec.weight_bits(name), rows_of(shape, name), shape.features(SITE_OF[name])
    if spec.activation_bits(name) < 16:
        return IntLinear(columns, rows, bits, bias=bias, w_asym=spec.w_asym, a_asym=spec.a_asym, **where)
    return LutLinear(columns, rows, QuantSpec(bits, spec.w_groupsize, f"int{bits}"), bias=bias, **where)


@torch.no_grad()
def check_block(truth: torch.Tensor, found: torch.Tensor, where: str) -> None:
    """Refuse a block that `flatten` changed: what it gave before and after, both in float32.

    Raises:
        IntegrationError: outputs differ.
    """
    error = float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
    if not error < _TOLERANCE:
        raise IntegrationError(
            f"block {where!r} computes something else than Llama's, Mistral's, Qwen2's or Qwen3's (relative difference "
            f"{error:.1e}); FlatQuant does not know it, use flute quantize"
        )


@torch.no_grad()
def check_norms(block: nn.Module, where: str) -> None:
    """Refuse norms that are no x / |x| times a weight: diagonals could not be folded into them.

    Raises:
        IntegrationError: such a norm, Gemma's (1 + weight) for one.
    """
    for name in _NORMS:
        norm = block.get_submodule(name)
        weight = cast(torch.Tensor, norm.weight)
        x = torch.ones_like(weight) * torch.linspace(-2, 2, len(weight), device=weight.device)
        wanted = x * x.square().mean().rsqrt() * weight
        if not torch.allclose(norm(x[None, None])[0, 0].float(), wanted.float(), rtol=1e-2, atol=1e-3):
            raise IntegrationError(
                f"{name} of block {where!r} is no RMSNorm times a weight, as Llama's is; FlatQuant does not know this "
                "model, use flute quantize"
            )


def int4_cache(model: Any, tokens: int) -> Int4Cache:
    """A cache of int4 codes for a flattened model, with its clips, for ``past_key_values=``.

    Raises:
        IntegrationError: the model's keys and values have other than 4 bits.
    """
    heads = [part for part in model.get_decoder().modules() if isinstance(part, Heads)]  # one a block, in order
    if any(each.bits != (4, 4) for each in heads):
        raise IntegrationError(f"keys and values have {heads[0].bits} bits; the int4 cache is for 4 and 4")
    return Int4Cache(model.config, tokens, heads[0].symmetric, [(each.k_clip, each.v_clip) for each in heads])
