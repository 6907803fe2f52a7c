"""One decode step of a transformers model, made for measuring: a static cache, no work of the host in between.

The same for every method: keys shared by heads are not copied for each, a prompt that fills its cache has no mask.

All decoder layers run one function, which torch compiles once for all of them (compiled as methods of the model each
layer would be compiled by itself, because each knows its number), so that norms, rotations and activations are fused
alike whatever the linear layers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .caches import CodesSlot, Parts, count_token, empty_cache, fill, holds_codes, parts, set_length


def _layer_step(
    layer: nn.Module, hidden: torch.Tensor, slot_of: Callable[..., Any], cached: Parts,
    mask: torch.Tensor | None, rotation: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    slot = slot_of(*cached)
    made = layer(hidden, attention_mask=mask, past_key_values=slot, use_cache=True, position_embeddings=rotation)
    return made[0] if isinstance(made, tuple) else made


class _Layer(nn.Module):
    """A decoder layer in the place of the model's own: decode steps go through ``step``, all else as before."""

    def __init__(self, layer: nn.Module, index: int, step: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.index, self.step = layer, index, step

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        cache = given.get("past_key_values")
        if hidden_states.shape[1] != 1 or cache is None:
            if cache is not None and hidden_states.shape[1] == cache.layers[self.index].max_cache_len:
                given["attention_mask"] = None  # the prompt fills the cache: causal, which torch is faster at
            return self.layer(hidden_states, **given)
        slot_of, cached = parts(cache.layers[self.index], given["position_ids"].view(-1))
        mask = None if slot_of is CodesSlot else given.get("attention_mask")  # lengths hide what is not there yet
        return self.step(self.layer, hidden_states, slot_of, cached, mask, given["position_embeddings"])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, **given: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """torch's attention. For one token, heads that share keys are rows of one query, so no key is copied for each."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **given)
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], -1, width)
    made = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return made.reshape(batch, 1, heads, width), None


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by torch, with kernels that are launched before the one ahead ends, where torch can do so.

    `TORCHINDUCTOR_ENABLE_PDL=1` does the same for any program. Without it every launch waits for the last block of
    the one before, and our kernels, which read weights before they need x, have nothing to read them beside.
    """
    from torch._inductor import config

    return torch.compile(function, options={"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {})


def share_layer_step(model: Any, *, compiled: bool, attention: bool = False) -> None:
    """Send decode steps of all layers of ``model`` through one function, compiled by torch or not.

    ``attention``: with this library's attention of few queries; else with torch's, but over int4 keys and values.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from ..integrations.attention import ATTENTION

    AttentionInterface.register("shared_keys", _attention)
    AttentionMaskInterface.register("shared_keys", sdpa_mask)
    model.set_attn_implementation(ATTENTION if attention or holds_codes(model) else "shared_keys")
    step = _compiled(_layer_step) if compiled else _layer_step
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = _Layer(layer, index, step)
    if compiled and hasattr(decoder, "norm"):
        decoder.norm.forward = _compiled(decoder.norm.forward)


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit's token; compiled it is shared among many blocks, which torch's own kernel does not do."""
    return logits.argmax(-1)


class Decoder:
    """``step()`` decodes one token for every sequence of a batch, after ``prompt`` tokens of random content."""

    def __init__(self, model: Any, batch: int, prompt: int, room: int, *, compiled: bool = False) -> None:
        self.model, self.prompt = model, prompt
        self.most_likely = _compiled(_most_likely) if compiled else _most_likely
        self.cache = empty_cache(model, batch, prompt + room)
        fill(self.cache)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.rewind()

    def rewind(self) -> None:
        """Forget what was decoded."""
        set_length(self.cache, self.prompt)

    def step(self) -> None:
        """One token for every sequence; no work of the host is needed in between, so it can be captured."""
        logits = self.model(self.tokens, past_key_values=self.cache, use_cache=True).logits
        self.tokens.copy_(self.most_likely(logits[:, -1:]))
        count_token(self.cache)
