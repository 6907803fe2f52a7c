"""Losses of a whole model while its scales are learned, and what they keep instead of computing it again.

The dense model's side of `kl` does not change from step to step. Its hidden states behind the last block are kept on
the host (tokens x hidden size values, where logits would be tokens x vocabulary), and only what comes behind the blocks
is run again. Of the learning model's blocks either all is kept that the backward pass needs, or, where that would be
too much, only what goes in, and the rest is computed twice. Neither changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..learned import dense_weights
from .capture import hidden_of

_KEPT_BYTES = 2 << 30  # of hidden states, and of activations


def nll(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean -log p(token | tokens before it in its window) over tokens (B, L) but the first of each window."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def kl(model: Any, tokens: torch.Tensor, dense: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
    """Mean KL(dense || quantized) of the next-token distributions over all positions of tokens (B, L).

    Args:
        dense: gives the dense model's logits (B, L, V); None: the model is run with its dense weights.
    """
    with torch.no_grad():
        logits = dense_logits(model, tokens) if dense is None else dense()
        truth = logits.float().log_softmax(-1).flatten(0, 1)
    guess = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(guess, truth, log_target=True, reduction="batchmean")


@torch.no_grad()
def dense_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, V) of the model before it was quantized."""
    with dense_weights(model):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@contextmanager
def _forwards(blocks: list[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]  # another such context's, or a library's hook
    try:
        for block in blocks:
            block.forward = change(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


class DenseLogits:
    """Logits of the dense model for the batches ``parts``, by number, from hidden states that are kept.

    Where blocks are no chain that ends in the model's head, or the states take more than 2 GB, nothing is kept and the
    dense model is run each time: the first batch tells, whose logits must come out the same to the bit.
    """

    def __init__(self, model: Any, blocks: list[nn.Module], parts: list[torch.Tensor]) -> None:
        self.model, self.blocks, self.parts = model, blocks, parts
        self.kept: dict[int, Any] = {}
        first = self._run(0)
        self.keeps = self.kept[0].nbytes * len(parts) <= _KEPT_BYTES and torch.equal(self._behind(0), first)

    def __call__(self, index: int) -> torch.Tensor:
        """(B, L, V) of batch ``index``."""
        if not self.keeps:
            return dense_logits(self.model, self.parts[index])
        return self._behind(index) if index in self.kept else self._run(index)

    def _run(self, index: int) -> torch.Tensor:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self.tuples = isinstance(output, tuple)
            self.kept[index] = (output[0] if self.tuples else output).cpu()

        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            return dense_logits(self.model, self.parts[index])
        finally:
            hook.remove()

    @torch.no_grad()
    def _behind(self, index: int) -> torch.Tensor:
        hidden = self.kept[index].to(self.model.device)
        output = (hidden,) if self.tuples else hidden
        with _forwards(self.blocks, lambda forward: lambda *arguments, **keywords: output):
            return dense_logits(self.model, self.parts[index])


@contextmanager
def recomputing(model: Any, blocks: list[nn.Module], tokens: torch.Tensor) -> Iterator[None]:
    """Inside ``blocks`` nothing is kept for the backward pass but what goes in, if all of it, of a batch like
    ``tokens`` (B, L), would take more than 2 GB. Works on any block, and in eval mode, where dropout does not disturb.
    """
    if activation_bytes(model, blocks, tokens) <= _KEPT_BYTES:
        yield
        return
    with _forwards(blocks, lambda forward: partial(checkpoint, forward, use_reentrant=False)):
        yield


@torch.no_grad()
def activation_bytes(model: Any, blocks: list[nn.Module], tokens: torch.Tensor) -> int:
    """What all blocks would keep for the backward pass, from what the first keeps of the batch ``tokens`` (B, L)."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def count(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            hidden_of(arguments, keywords).requires_grad_(True)  # as it is in all blocks but the first
            with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
                return forward(*arguments, **keywords)

        return run

    with _forwards(blocks[:1], count):
        model(input_ids=tokens, use_cache=False)
    own = {parameter.untyped_storage().data_ptr() for parameter in blocks[0].parameters()}
    return len(blocks) * sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
