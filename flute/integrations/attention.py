"""``attn_implementation="flute"``: transformers' attention where few tokens are asked, as in every step of decoding.

    model = AutoModelForCausalLM.from_pretrained("MODEL", attn_implementation="flute", device_map="auto")

Steps of up to 8 tokens read the cache by `flute.kernels.decode_attention`, or, where an `Int4Cache` holds codes, by
``flute::kv_attention``; prompts and all that those do not take (other devices, dtypes, masks of numbers, gradients,
soft-capped scores) go to torch's own attention, as with ``"sdpa"``. Any cache, any mask of true and false.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import IntegrationError
from ..kernels.attention import Store, kv_attention
from ..kernels.decode_attention import decode_attention

ATTENTION = "flute"  # the name to give to set_attn_implementation
_FEW_TOKENS = 8  # up to here these kernels are asked; beyond, torch's are faster
_TORCHS = ("softcap", "position_bias", "cache")  # what models may ask for that torch's attention does, or refuses


class Held(NamedTuple):
    """All keys, or values, of a layer as their codes; what an `Int4Cache` hands to the attention that reads them."""

    store: Store
    lengths: torch.Tensor


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Held,
    value: torch.Tensor | Held,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query (B, H, T, D) to (B, T, H, D).

    Over codes, the mask of a step of few tokens may hide tokens on the left only (padded prompts), besides what is
    causal.

    Raises:
        IntegrationError: the model has attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise IntegrationError('attention "flute": this model has attention sinks; give attn_implementation="eager"')
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = query.shape[2] <= _FEW_TOKENS and all(kwargs.get(name) is None for name in _TORCHS)
    if isinstance(key, Held) and isinstance(value, Held):
        reaches_back = sliding_window is None or sliding_window >= key.store.codes.shape[2]
        if plain and reaches_back:
            starts = None if attention_mask is None else _starts(attention_mask, query.shape[0])
            mixed = kv_attention(query, key.store, value.store, key.lengths, scaling, starts)
            return mixed.transpose(1, 2), None
        key, value = key.store.dequantize(query.dtype), value.store.dequantize(query.dtype)
    assert isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)
    if plain and _takes(query, key, value, attention_mask) and not kwargs.get("dropout"):
        return decode_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `decode_attention` may stand for torch's: no mask means that nothing is hidden for one token only."""
    if query.device.type != "cuda" or query.requires_grad or key.requires_grad or value.requires_grad:
        return False
    if mask is None:
        return query.shape[2] == 1
    return mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[3] == key.shape[2]


def _starts(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """int32 (B,): the first token that the last query may see. Found once a step: all layers get the same mask.

    (Compilers make equal expressions one, and trace no attribute.)
    """
    found = None if torch.compiler.is_compiling() else getattr(mask, "flute_starts", None)
    if found is None:
        last = mask[:, 0, -1]
        visible = last if last.dtype == torch.bool else last == 0
        found = visible.int().argmax(-1).to(torch.int32).expand(batch).contiguous()
        if not torch.compiler.is_compiling():
            cast(Any, mask).flute_starts = found
    return found


def register() -> None:
    """Make transformers know the name. Does nothing the second time."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


register()
