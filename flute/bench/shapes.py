"""Models by name: the few numbers of their config.json that decide the shapes of their linear layers.

A weight is N x K (outputs x inputs). Beside the matrices of the checkpoint, `linears` lists those that inference
engines make of them by stacking rows: ``qkv`` and ``gate_up``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import FluteError

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family; fields as in its config.json, ``rope`` without ``rope_theta``."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    rope: tuple[tuple[str, Any], ...] = ()

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K) of every kind of linear layer in a decoder layer, the stacked ones included."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "qkv": (q + 2 * kv, hidden),
            "q": (q, hidden),
            "k, v": (kv, hidden),
            "o": (hidden, q),
            "gate_up": (2 * inner, hidden),
            "gate, up": (inner, hidden),
            "down": (hidden, inner),
        }


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> ModelShape:
    common = dict(num_key_value_heads=8, head_dim=128, vocab_size=128256, rope_theta=5e5, rms_norm_eps=1e-5)
    rope = tuple(({**_LLAMA_3_ROPE, "factor": more.pop("factor", 8.0)}).items())
    return ModelShape("llama", hidden, inner, layers, heads, max_position_embeddings=131072, rope=rope, **common | more)


def _qwen3(hidden: int, inner: int, layers: int, heads: int) -> ModelShape:
    return ModelShape("qwen3", hidden, inner, layers, heads, 8, 128, 151936, 1e6, 1e-6, 40960)


MODELS = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, factor=32.0),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, tie_word_embeddings=True, factor=32.0),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "mistral-7b": ModelShape("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 1e6, 1e-5, 32768),
}


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``"llama-3.1-8b,8192x8192"`` -> [(N, K), ...] in that order, each once.

    Raises:
        FluteError: neither the name of a model nor NxK.
    """
    found: list[tuple[int, int]] = []
    for word in text.split(","):
        name = word.strip().lower()
        pair = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if pair:
            found.append((int(pair[1]), int(pair[2])))
        elif name in MODELS:
            found.extend(MODELS[name].linears().values())
        else:
            raise FluteError(f"--shapes {word.strip()!r}: give NxK such as 4096x14336, or one of {', '.join(MODELS)}")
    return list(dict.fromkeys(found))
