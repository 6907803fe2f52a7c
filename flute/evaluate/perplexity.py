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

_TOKENS_AT_ONCE = 256  # rows of logits in float32: 256 x 128k x 4 B = 131 MB
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
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens``, by the protocol above.

    Args:
        model: a causal model of transformers; its device and dtype are used.
        tokens: from `encode`.
        seq_len: tokens in a window.
        max_windows: only the first so many windows.
        progress: called after every window with windows done and in total.

    Raises:
        FluteError: fewer than two tokens or windows of fewer than two, or the model gives NaN.
    """
    if seq_len < 2 or len(tokens) < 2:
        raise FluteError(f"{len(tokens)} tokens in windows of {seq_len}: nothing to predict; give a longer text")
    seq_len = min(seq_len, len(tokens))
    total = len(tokens) // seq_len
    total = total if max_windows is None else max(1, min(total, max_windows))
    loss, started = 0.0, time.perf_counter()
    for index in range(total):
        window = torch.tensor(tokens[index * seq_len : (index + 1) * seq_len], device=model.device)
        loss += _window_loss(model, window)
        progress(index + 1, total)
    predicted = total * (seq_len - 1)
    if math.isnan(loss):
        raise FluteError(f"the model gives NaN on this text in {model.dtype}; load it in another dtype")
    mean = loss / predicted
    result = math.exp(mean) if mean < 700 else math.inf  # exp(710) is more than a float holds
    return Perplexity(result, predicted, time.perf_counter() - started, total, seq_len)


@torch.inference_mode()
def _window_loss(model: Any, window: torch.Tensor) -> float:
    """Sum of -log p over a window (T,), in float32 per token and float64 in the sum."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    loss = 0.0
    for rows, targets in zip(logits.split(_TOKENS_AT_ONCE), window[1:].split(_TOKENS_AT_ONCE), strict=True):
        each = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
        loss += float(each.double().sum())
    return loss
