"""Perplexity of a language model on a text.

The protocol of the papers on quantization: the whole text is tokenized once, cut into windows of ``seq_len`` tokens
that do not overlap, and within each window every token but the first is predicted from those before it::

    perplexity = exp( sum of -log p(token | tokens before it in the window) / number of predicted tokens )

The tokenizer adds what it adds by itself: usually one BOS at the beginning of the text, none at the other windows. A
last window that is not full is dropped; a text shorter than one window is taken as one window of its own length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FluteError

TOKENS_AT_ONCE = 256  # rows of logits in float32: 256 x 128k x 4 B = 131 MB
PROTOCOL = "text tokenized once, windows do not overlap, last partial window dropped"


@dataclass(frozen=True)
class Perplexity:
    """The result: ``tokens`` predicted in ``windows`` of ``seq_len``, ``seconds`` spent in the model."""

    perplexity: float
    tokens: int
    seconds: float
    windows: int
    seq_len: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the whole text, with the special tokens that the tokenizer adds by itself."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def context_length(model: Any, wanted: int) -> int:
    """``wanted``, or the longest context that the model was made for if that is shorter."""
    config = model.config.get_text_config()
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Callable[[int], Any] | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens``, by the protocol above.

    Args:
        model: a causal model of transformers; its device and dtype are used.
        tokens: from `encode`.
        seq_len: tokens in a window.
        max_windows: only the first so many windows.
        progress: called after every window with windows done and in total.
        cache: makes a cache for so many tokens, through which keys and values then go; None: no cache.

    Raises:
        FluteError: fewer than two tokens or windows of fewer than two, or the model gives NaN.
    """
    parts = cut(tokens, seq_len, max_windows)
    loss, started = 0.0, time.perf_counter()
    for index, part in enumerate(parts):
        window = torch.tensor(part, device=model.device)
        logits = window_logits(model, window, None if cache is None else cache(len(part)))
        loss += window_loss(logits, window[1:])
        progress(index + 1, len(parts))
    return total(model, loss, parts, time.perf_counter() - started)


def cut(tokens: Sequence[int], seq_len: int, max_windows: int | None) -> list[Sequence[int]]:
    """The windows of the protocol.

    Raises:
        FluteError: there is nothing to predict.
    """
    if seq_len < 2 or len(tokens) < 2:
        raise FluteError(f"{len(tokens)} tokens in windows of {seq_len}: nothing to predict; give a longer text")
    seq_len = min(seq_len, len(tokens))
    windows = len(tokens) // seq_len
    windows = windows if max_windows is None else max(1, min(windows, max_windows))
    return [tokens[index * seq_len : (index + 1) * seq_len] for index in range(windows)]


@torch.inference_mode()
def window_logits(model: Any, window: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits (T - 1, V) that predict all tokens of a window (T,) but the first, by way of ``cache`` if there is one."""
    logits: torch.Tensor = model(input_ids=window[None], past_key_values=cache, use_cache=cache is not None).logits
    return logits[0, :-1]


@torch.inference_mode()
def window_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log p of targets (T,) under logits (T, V), in float32 per token and float64 in the sum."""
    loss = 0.0
    for rows, those in zip(logits.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        loss += float(torch.nn.functional.cross_entropy(rows.float(), those, reduction="none").double().sum())
    return loss


def total(model: Any, loss: float, windows: Sequence[Sequence[int]], seconds: float) -> Perplexity:
    """The result of a summed loss over ``windows``.

    Raises:
        FluteError: the loss is NaN.
    """
    if math.isnan(loss):
        raise FluteError(f"the model gives NaN on this text in {model.dtype}; load it in another dtype")
    seq_len = len(windows[0])
    predicted = len(windows) * (seq_len - 1)
    mean = loss / predicted
    result = math.exp(mean) if mean < 700 else math.inf  # exp(710) is more than a float holds
    return Perplexity(result, predicted, seconds, len(windows), seq_len)
