"""Decoder blocks whose norms, activation and residuals are part of their products while few tokens are decoded.

    q, k, v = norm(h) [Wq; Wk; Wv]^T            h' = h + attention(q, k, v) Wo^T
    g, u = norm'(h') [Wgate; Wup]^T             h'' = h' + (silu(g) * u) Wdown^T

Each product is one `flute.kernels.fused.lut_fused`, rounded as the modules round that it stands for. In eager mode a
step of few tokens takes the time that the host needs for its launches: some fifteen a block fewer. Compiled by torch
the small steps are a launch each, which runs while the next product's weights are on their way; there nothing is to be
gained (docs/kernel-log.md, section 15), and blocks run as they were.

For Llama, Mistral, Qwen2 and Qwen3 of transformers. Nothing of a block changes but its class: it keeps its modules,
their names and its state dict, and in all other steps it runs transformers' own forward. That is decided in every step,
since adapters, hooks, other dtypes or other layers may have come in between: modules that are not called must have
nothing more that a call would run. (transformers hooks every attention when a model is asked for hidden states or
attention weights, and leaves its hooks there: from then on blocks run as they were.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.modules import module as hooks
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ..kernels.fused import MOST_TOKENS, lut_fused
from ..kernels.heads import turned
from ..linear import LutLinear
from ..parallel import is_cut
from ..together import Together
from .attend import attend
from .retyped import with_forward


class _Parts(NamedTuple):
    """Classes of what a block consists of."""

    attention: Any
    mlp: Any
    norm: Any


_KINDS: dict[type, _Parts] = {
    llama.LlamaDecoderLayer: _Parts(llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralDecoderLayer: _Parts(mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    qwen2.Qwen2DecoderLayer: _Parts(qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    qwen3.Qwen3DecoderLayer: _Parts(qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
}
_Held: TypeAlias = Mapping[str, torch.Tensor | None]  # weight, scales, bias
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def take_over(model: nn.Module) -> None:
    """Let the known blocks of ``model`` run as above. Those whose classes somebody has patched are left alone."""
    for block in model.modules():
        kind: Any = type(block)
        if kind in _KINDS and all(_is_own(each, kind.__module__) for each in (kind, *_KINDS[kind])):
            block.__class__ = with_forward(kind, _forward)


def give_back(model: nn.Module) -> None:
    """Undo `take_over`."""
    for block in model.modules():
        kind: Any = type(block).__base__
        if kind in _KINDS and type(block) is with_forward(kind, _forward):
            block.__class__ = kind


def _is_own(part: Any, home: str) -> bool:
    return part.__module__ == part.forward.__module__ == home


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
    kind: Any = next(each for each in type(block).__mro__ if each in _KINDS)  # whatever others have put on top of it
    if position_embeddings is None or (held := _fitting(block, _KINDS[kind], hidden_states)) is None:
        made: torch.Tensor = kind.forward(
            block, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        return made
    hidden, attention, mlp = hidden_states.contiguous(), block.self_attn, block.mlp
    joint = _product(hidden, attention.q_proj, held[0], norm=block.input_layernorm)
    heads = joint.unflatten(-1, (-1, attention.head_dim))
    sizes = [attention._modules[name].rows // attention.head_dim for name in _QKV]
    if kind is qwen3.Qwen3DecoderLayer:
        q, k, v = heads.split(sizes, -2)
        q, k = (turned(each, *position_embeddings) for each in (attention.q_norm(q), attention.k_norm(k)))
    else:  # both at once: it is the host that takes the time
        q, k = turned(heads[..., : sizes[0] + sizes[1], :], *position_embeddings).split(sizes[:2], -2)
        v = heads[..., sizes[0] + sizes[1] :, :]
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    windows = attention.config if kind is mistral.MistralDecoderLayer else attention  # Llama's has none
    out, _ = attend(
        attention, q, k, v, attention_mask, past_key_values, position_ids=position_ids, use_cache=use_cache,
        sliding_window=getattr(windows, "sliding_window", None), **kwargs,
    )  # fmt: skip
    hidden = _product(out, attention.o_proj, attention.o_proj._parameters, residual=hidden)
    inner = _product(hidden, mlp.gate_proj, held[1], norm=block.post_attention_layernorm, gated=True)
    return _product(inner, mlp.down_proj, mlp.down_proj._parameters, residual=hidden)


def _product(
    x: torch.Tensor, layer: Any, held: _Held, *, norm: Any = None, gated: bool = False, residual: Any = None
) -> torch.Tensor:
    """`lut_fused` of a layer, or of the group whose first one it is; ``held``: its codes, scales and bias."""
    weight, scales, bias, table, spec = held["weight"], held["scales"], held["bias"], layer.table, layer.spec
    assert weight is not None and scales is not None
    rows = layer.rows if held is layer._parameters else sum(layer.together.sizes)
    return lut_fused(
        x, weight, scales, table, bias, rows, spec.bits, spec.group_size,
        gain=None if norm is None else norm.weight, eps=0.0 if norm is None else norm.variance_epsilon,
        gated=gated, residual=residual,
    )  # fmt: skip


# ---- whether it is such a step ---------------------------------------------------------------------------------------


def _fitting(block: Any, parts: _Parts, x: torch.Tensor) -> tuple[_Held, _Held] | None:
    """What q, k, v hold and what gate, up hold, each as one; None where the block must run as it is.

    This is work of the host for every block and step: plain loops, and dictionaries of modules.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or block.training:
        return None
    if not 0 < x.numel() <= MOST_TOKENS * x.shape[-1]:
        return None
    if torch._C._is_any_autocast_enabled() or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return None
    modules, dtype = block._modules, x.dtype
    attention, mlp = modules["self_attn"], modules["mlp"]
    if type(attention) is not parts.attention or type(mlp) is not parts.mlp:
        return None
    for norm in (modules["input_layernorm"], modules["post_attention_layernorm"]):
        if type(norm) is not parts.norm or norm._parameters["weight"].dtype != dtype or not _is_bare(norm):
            return None
    heads, inner = attention._modules, mlp._modules
    act = inner.get("act_fn")
    if type(act) not in _SILU or not (_is_bare(act) and _is_bare(attention) and _is_bare(mlp)):
        return None
    qkv, gate_up = [heads[name] for name in _QKV], [inner[name] for name in _GATE_UP]
    for layer in (*qkv, heads["o_proj"], *gate_up, inner["down_proj"]):
        if not _suits(layer, dtype):
            return None
    both = _whole(qkv), _whole(gate_up)
    return None if both[0] is None or both[1] is None else (both[0], both[1])


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs the forward of its class and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _suits(layer: Any, dtype: torch.dtype) -> bool:
    """Whether ``layer`` is nothing but a product of x in ``dtype``."""
    if type(layer) is not LutLinear or not _is_bare(layer) or layer.spec.hadamard_size:
        return False
    held: dict[str, Any] = {**layer._parameters, **layer._buffers}
    if held["scales"].dtype != dtype or held["table"].dtype != dtype or is_cut(held["weight"]):
        return False
    return held["bias"] is None or held["bias"].dtype == dtype


def _whole(layers: Sequence[Any]) -> _Held | None:
    """What these layers hold as one, if they are all of one group, in its order, where `lut_fused` has a kernel."""
    together: Together | None = layers[0].together
    if together is None or not together.joined or len(together.sizes) != len(layers):
        return None
    for place, layer in enumerate(layers):
        if layer.together is not together or layer.place != place:
            return None
    return together.whole() if together.has_clusters or together.anywhere else None
