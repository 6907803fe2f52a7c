"""How far a model's predictions are from the dense model's, on the positions that perplexity is measured on.

With p of the dense model and q of the other, at each predicted token::

    KL(p || q) = sum over the vocabulary of p (log p - log q)          in nats; the mean over tokens is reported
    agreement  = share of the tokens at which argmax p = argmax q

KL sees every change of a distribution where perplexity sees only the probability of the text's own token, in which
losses and lucky gains cancel. Both models run on one window after the other, so one window's logits are what is held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FluteError
from .perplexity import TOKENS_AT_ONCE, Perplexity, cut, total, window_logits, window_loss


@dataclass(frozen=True)
class Divergence:
    """Mean ``kl`` in nats per token, ``agreement`` from 0 to 1, and the perplexities of both on the same windows."""

    kl: float
    agreement: float
    model: Perplexity
    dense: Perplexity


def divergence(
    model: Any,
    dense: Any,
    tokens: Sequence[int],
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Compare ``model`` with ``dense`` on ``tokens``, by the protocol of `flute.evaluate.perplexity`.

    Args:
        model, dense: causal models of transformers with one vocabulary, on one device.
        tokens, seq_len, max_windows, progress: as in `flute.evaluate.perplexity.perplexity`.

    Raises:
        FluteError: nothing to predict, vocabularies of different sizes, or a model gives NaN.
    """
    parts = cut(tokens, seq_len, max_windows)
    kl, agreed = 0.0, 0
    losses, seconds = [0.0, 0.0], [0.0, 0.0]
    for index, part in enumerate(parts):
        logits = []
        for which, one in enumerate((model, dense)):
            started = time.perf_counter()
            window = torch.tensor(part, device=one.device)
            logits.append(window_logits(one, window))
            losses[which] += window_loss(logits[-1], window[1:])  # which also waits for the GPU
            seconds[which] += time.perf_counter() - started
        more, same = compare_logits(*logits)
        kl, agreed = kl + more, agreed + same
        progress(index + 1, len(parts))
    found = [total(one, losses[i], parts, seconds[i]) for i, one in enumerate((model, dense))]
    return Divergence(kl / found[0].tokens, agreed / found[0].tokens, *found)


@torch.inference_mode()
def compare_logits(model: torch.Tensor, dense: torch.Tensor) -> tuple[float, int]:
    """Sum of KL(dense || model) in nats, and how many likeliest tokens agree, over logits (T, V).

    Softmax in float32, sums in float64. A token that the dense model excludes (p = 0) adds nothing.

    Raises:
        FluteError: the shapes differ.
    """
    if model.shape != dense.shape:
        raise FluteError(
            f"one model has {model.shape[-1]} tokens in its vocabulary, the other {dense.shape[-1]}; "
            "compare a model with the dense model that it was made from"
        )
    kl, agreed = 0.0, 0
    for q_rows, p_rows in zip(model.split(TOKENS_AT_ONCE), dense.split(TOKENS_AT_ONCE), strict=True):
        log_q, log_p = q_rows.float().log_softmax(-1), p_rows.float().log_softmax(-1)
        p = log_p.exp()
        kl += float(torch.where(p > 0, p * (log_p - log_q), 0).sum(-1, dtype=torch.float64).sum())
        agreed += int((q_rows.argmax(-1) == p_rows.argmax(-1)).sum())
    return kl, agreed
