"""Perplexities of a FlatQuant model, each labelled with what happened to its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..flatquant.modules import unrounded_cache
from ..integrations.flatblocks import int4_cache
from .perplexity import context_length, perplexity


def perplexities(
    model: Any, tokens: Sequence[int], *, seq_len: int = 2048, max_windows: int | None = None
) -> dict[str, float]:
    """Perplexities by label: with keys and values as the model has them, through the int4 cache, and unrounded.

    Args:
        model: flattened. tokens, seq_len, max_windows: as in `perplexity`.
    """
    length = context_length(model, seq_len)
    bits = model.get_decoder().layers[0].self_attn.heads.bits

    def measured(**options: Any) -> float:
        return perplexity(model, tokens, seq_len=length, max_windows=max_windows, **options).perplexity

    found = {f"perplexity, K{bits[0]} V{bits[1]} simulated": measured()}
    if bits == (4, 4):
        found["perplexity, int4 KV cache in use"] = measured(cache=lambda n: int4_cache(model, n))
    if bits != (16, 16):
        with unrounded_cache(model):
            found["perplexity, keys and values not quantized"] = measured()
    return found
