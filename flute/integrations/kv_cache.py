"""`Int4Cache`: a static cache for transformers that holds keys and values as int4 codes, one scale a token and head.

Drop-in: ``model(..., past_key_values=Int4Cache(model.config, 4096))`` or ``model.generate(..., past_key_values=...)``.
Every attention then gets keys and values back as they were quantized, the tokens of a prompt too, so that a perplexity
measured with it really is that of the quantized cache. After ``model.set_attn_implementation("flute")`` a step of
few tokens reads the codes themselves (``flute::kv_attention``), and nothing is written out in 16 bits. Lengths are
counted on the device: a step may be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticLayer

from ..errors import IntegrationError
from ..kernels.attention import Store, kv_append
from .attention import ATTENTION, Held

Clips = tuple["torch.Tensor | None", "torch.Tensor | None"]


class Int4Layer(StaticLayer):
    """Codes of one layer. ``lengths`` int32 (B,) is shared by all layers of a device, and the first one counts."""

    def __init__(
        self, max_cache_len: int, counted: dict[torch.device, torch.Tensor], symmetric: tuple[bool, bool], clips: Clips
    ) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.counted, self.symmetric, self.clips = counted, symmetric, clips
        self.reads_codes = False
        self.is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Room for ``max_cache_len`` tokens, of the shapes, on the device of the first keys and values."""
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.counts = self.device not in self.counted
        self.lengths = self.counted.setdefault(self.device, torch.zeros(batch, dtype=torch.int32, device=self.device))
        stores = []
        for states, symmetric, clip in zip((key_states, value_states), self.symmetric, self.clips, strict=True):
            clip = None if clip is None else clip.detach().to(self.device, torch.float32)
            stores.append(Store.empty(batch, heads, self.max_cache_len, states.shape[-1], symmetric, self.device, clip))
        self.key_store, self.value_store = stores
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantize and keep; returns all keys and values (B, H, max_cache_len, D), or `Held` codes for `attention`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.counts:
            self.lengths.add_(key_states.shape[-2])
        kv_append(key_states, value_states, self.key_store, self.value_store, self.lengths)
        if self.reads_codes:
            return Held(self.key_store, self.lengths), Held(self.value_store, self.lengths)
        return self.key_store.dequantize(self.dtype), self.value_store.dequantize(self.dtype)

    def get_seq_length(self) -> int:
        """Tokens seen, a tensor of the device as in transformers' static layers."""
        return cast(int, self.lengths[0]) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        if self.is_initialized:
            self.lengths.zero_()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was."""
        if self.is_initialized:
            order = beam_idx.to(self.device)
            for store in (self.key_store, self.value_store):
                for kept in (store.codes, store.scale, store.zero):
                    if kept is not None:
                        kept.copy_(kept.index_select(0, order))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.key_store.nbytes + self.value_store.nbytes if self.is_initialized else 0


class Int4Cache(Cache):
    """Quantized keys and values of a whole model.

    It ``rounds`` by itself: blocks need not round what they give it.

    Args:
        config: the model's; says how many layers there are and which attention runs.
        max_cache_len: the most tokens of a sequence.
        symmetric: whether (keys, values) are quantized symmetrically.
        clips: for each layer (keys, values), each (2,) ratios of (largest, smallest) value or None; None for none.

    Raises:
        IntegrationError: clips do not fit the number of layers.
    """

    rounds = True

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        symmetric: tuple[bool, bool] = (False, False),
        clips: Sequence[Clips] | None = None,
    ) -> None:
        text = config.get_text_config(decoder=True)
        count = text.num_hidden_layers
        if clips is not None and len(clips) != count:
            raise IntegrationError(f"Int4Cache: {len(clips)} pairs of clips for {count} layers; give one a layer")
        counted: dict[torch.device, torch.Tensor] = {}
        each = clips or [(None, None)] * count
        self._config = text
        self._own = [Int4Layer(max_cache_len, counted, symmetric, pair) for pair in each]
        super().__init__(layers=list(self._own))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As every cache of transformers; codes are handed out only to the attention that reads them."""
        self._own[layer_idx].reads_codes = self._config._attn_implementation == ATTENTION
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self._own)
