"""Text from a model, and how fast it comes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Generated:
    """A continuation: its text, number of new tokens, and the seconds they took, the prompt's own pass included."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, stop_early: bool = True) -> Generated:
    """Continue ``prompt`` greedily: the likeliest token each time, so the same text on every run.

    Args:
        model, tokenizer: of transformers.
        prompt: the text to continue.
        max_new_tokens: at most so many tokens.
        stop_early: end at the model's end token; False makes exactly ``max_new_tokens``, for measuring.
    """
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
    limits |= {"top_k": None, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id or 0}
    if not stop_early:
        limits["min_new_tokens"] = max_new_tokens
    _wait(model)
    started = time.perf_counter()
    with torch.no_grad():
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **limits)
    _wait(model)
    seconds = time.perf_counter() - started
    new = output[0, inputs.shape[1] :]
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
