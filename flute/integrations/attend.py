"""What the attention of a decoder block does between its products, for attentions that are not transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values go to the cache, queries to the function that the model is set to.

    Args:
        attention: the module, with ``config``, ``layer_idx``, ``scaling``, ``attention_dropout`` and what else that
            function reads of it.
        q: (B, H, L, D), turned. k, v: (B, heads of keys, L, D).
        mask: as transformers made it for that function. cache: any of transformers', or None.
        given: for that function.

    Returns:
        (B, L, H * D) contiguous in q's dtype, and the weights where that function gives them.
    """
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, _eager)
    dropout = attention.attention_dropout if attention.training else 0.0
    out, weights = function(attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **given)
    return out.reshape(q.shape[0], q.shape[2], -1).contiguous(), weights


def _eager(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, for ``attn_implementation="eager"``."""
    k, v = (each.repeat_interleave(module.num_key_value_groups, 1) for each in (k, v))
    scores = q @ k.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (nn.functional.dropout(weights, dropout) @ v).transpose(1, 2), weights
