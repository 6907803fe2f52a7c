"""How much the model suffers where a layer is wrong: alpha of the linearity theorem, measured one group at a time.

For errors that are small and look random, what they cost the model adds up over layers (Malinovskii et al. 2024,
"Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", section 3)::

    KL(dense || quantized)  ~  sum over l of  alpha_l t_l^2,        t_l^2 = |W_l - W^_l|^2 / |W_l|^2

KL is the mean divergence of the next-token distributions, alpha_l is KL / t_l^2 with layer l alone quantized. The
theorem takes any error of that kind, and the paper Gaussian noise; here it is the rounding error of the format itself,
so that a format whose errors lie where they harm less gets its due.

Without a text the model reads what it wrote: a random first token, the rest drawn from its own distribution (Liu et al.
2023, LLM-QAT, section 3.1). Random tokens throughout would be cheaper, but no model was made for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..evaluate.perplexity import context_length

OWN_SAMPLES, OWN_LENGTH = 8, 64


@torch.no_grad()
def own_text(model: Any, *, samples: int = OWN_SAMPLES, length: int = OWN_LENGTH, seed: int = 0) -> torch.Tensor:
    """Tokens int64 (samples, length) that the model writes, on the CPU; the same for the same seed and device.

    Args:
        model: a causal model of transformers.
        samples, length: how many, and how long; a shorter context shortens them.
    """
    config, length = model.config.get_text_config(), context_length(model, length)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        first = torch.randint(config.vocab_size, (samples, 1)).to(model.device)
        made = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=length - 1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return made.cpu()


@torch.no_grad()
def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities float32 (S * L, V) on windows (S, L), one window at a time."""
    logits = [model(input_ids=part.to(model.device), use_cache=False).logits[0] for part in windows.split(1)]
    return torch.cat([part.float().log_softmax(-1) for part in logits])


def divergence(model: Any, windows: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean KL(truth || model) over all positions of windows (S, L).

    Args:
        truth: `log_probabilities` of the dense model.

    Raises:
        CalibrationError: it is not finite.
    """
    found = log_probabilities(model, windows)
    value = float(nn.functional.kl_div(found, truth, log_target=True, reduction="batchmean"))
    if not -1e-3 < value < float("inf"):  # rounding alone may make it slightly negative
        raise CalibrationError(f"the divergence of the quantized model is {value}; the model gives NaN on this text")
    return max(value, 0.0)


@contextmanager
def weights_replaced(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with other parameters, by name, while the context lasts; tied ones elsewhere stay as they are."""
    kept = {name: model.get_parameter(name) for name in weights}
    try:
        for name, weight in weights.items():
            _put(model, name, nn.Parameter(weight.to(kept[name].dtype), requires_grad=False))
        yield
    finally:
        for name, parameter in kept.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner).register_parameter(own, parameter)
