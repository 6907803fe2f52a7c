"""Caches of a decode step that is to be measured: all memory there from the start, lengths counted on the device.

A step sees one layer's part as plain tensors (`parts`), so that one compiled function serves all layers, and makes of
them a `Slot` that writes the new keys and values and hands out what attention reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Parts = tuple["torch.Tensor | None", ...]


class Slot:
    """A layer's part of a static cache: writes at ``position`` and hands out all keys and values."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """As caches of transformers."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class CodesSlot:
    """A layer's part of an `Int4Cache`: quantizes what comes and hands out codes."""

    rounds = True

    def __init__(self, *parts: Any) -> None:
        from ..kernels.attention import Store

        self.stores, self.lengths = (Store(*parts[:4]), Store(*parts[4:8])), parts[8]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """As caches of transformers."""
        from ..integrations.attention import Held
        from ..kernels.attention import kv_append

        kv_append(keys, values, *self.stores, self.lengths)
        return Held(self.stores[0], self.lengths), Held(self.stores[1], self.lengths)


def _coded(layer: Any) -> bool:
    return hasattr(layer, "key_store")


def empty_cache(model: Any, batch: int, length: int) -> Any:
    """A cache of ``length`` tokens with all its memory, of zeros: of int4 codes where the model rounds to them."""
    from transformers import StaticCache

    from ..integrations.flatblocks import int4_cache

    config = model.config.get_text_config(decoder=True)
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    cache: Any = int4_cache(model, length) if holds_codes(model) else StaticCache(config=config, max_cache_len=length)
    like = torch.empty(batch, heads, 0, width, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
    return cache


def holds_codes(model: Any) -> bool:
    """Whether keys and values of ``model`` have 4 bits."""
    from ..flatquant.modules import Heads

    return any(isinstance(part, Heads) and part.bits == (4, 4) for part in model.modules())


def parts(layer: Any, position: torch.Tensor) -> tuple[Callable[..., Any], Parts]:
    """What makes the slot of a step that writes at ``position``, and of which tensors; counts the step's token."""
    if not _coded(layer):
        # views: the cache marks its tensors as addresses to compile for, and there is one pair for every layer
        return Slot, (layer.keys.view_as(layer.keys), layer.values.view_as(layer.values), position)
    if layer.counts:
        layer.lengths.add_(1)
    stores = (layer.key_store, layer.value_store)
    tensors = [part for store in stores for part in (store.codes, store.scale, store.zero, store.clip)]
    return CodesSlot, (*tensors, layer.lengths)


def set_length(cache: Any, tokens: int) -> None:
    """Make ``cache`` one that holds ``tokens`` tokens."""
    for layer in cache.layers:
        if not _coded(layer):
            layer.cumulative_length.fill_(tokens)
        elif layer.counts:  # for all layers
            layer.lengths.fill_(tokens)


def count_token(cache: Any) -> None:
    """One token more, after a step; int4 caches count for themselves."""
    counted = [layer.cumulative_length for layer in cache.layers if not _coded(layer)]
    if counted:
        torch._foreach_add_(counted, 1)


def fill(cache: Any) -> None:
    """Random keys and values."""
    for layer in cache.layers:
        if not _coded(layer):
            layer.keys.normal_()
            layer.values.normal_()
            continue
        for store in (layer.key_store, layer.value_store):
            store.codes.random_(0, 256)
            store.scale.fill_(0.2)


def nbytes(cache: Any) -> int:
    """Bytes of all keys and values."""
    return sum(layer.nbytes if _coded(layer) else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
