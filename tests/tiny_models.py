"""Random models small enough to build in a test: no size is a power of two, every layer has what its family has."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A causal language model of ``family`` with random weights and biases."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": False, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name))
    return model


def saved(folder: Path, family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    """Such a model in ``folder``."""
    build(family, dtype, **changes).save_pretrained(folder)
    return str(folder)


def load(folder: str | Path, **keywords: Any) -> Any:
    """What a user writes."""
    return AutoModelForCausalLM.from_pretrained(folder, **keywords)


def prompt() -> torch.Tensor:
    """Token ids (2, 7)."""
    return torch.arange(3, 17).view(2, 7)


def dense_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )
