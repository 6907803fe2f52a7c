"""Run a decoder block by block and see what goes into its linear layers.

Works for any model that is a stack of blocks in an ``nn.ModuleList``, each called with the hidden state that the one
before it returned. What else a block is called with (masks, rotary embeddings) is recorded once, since all windows have
the same shape; a model whose blocks are not such a chain, or get something that depends on the tokens, is refused and
not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import CalibrationError, IntegrationError
from ..hadamard import transform

_TOKENS_AT_ONCE = 2048
_KEPT_BYTES = 2 << 30


class Call(NamedTuple):
    """What a block is called with besides the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Stack(NamedTuple):
    """``prefix``: name of the ModuleList, ``blocks``: its children, ``calls``: how each is called; ``hidden``: inputs
    (B, L, D) float32 of the first block, batch by batch."""

    prefix: str
    blocks: list[nn.Module]
    calls: list[Call]
    hidden: list[torch.Tensor]


class _Enough(Exception):  # no error: the rest of a forward pass is not needed
    pass


def find_stack(model: nn.Module, names: Iterable[str]) -> str:
    """Name of the outermost ModuleList that holds the layers ``names``; the one with most of them.

    Raises:
        IntegrationError: no ModuleList holds any.
    """
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    wanted = list(names)
    held = {stack: sum(name.startswith(f"{stack}.") for name in wanted) for stack in outer}
    best = max(held, key=lambda stack: held[stack], default=None)
    if best is None or not held[best]:
        raise IntegrationError(f"{type(model).__name__} has no stack of blocks to calibrate; use method 'rtn'")
    return best


def batches(windows: torch.Tensor, tokens: int = _TOKENS_AT_ONCE) -> list[torch.Tensor]:
    """Windows (S, L) in equal batches of about ``tokens`` tokens, so that one recorded call fits them all."""
    size = max(1, min(len(windows), tokens // windows.shape[1]))
    while len(windows) % size:
        size -= 1
    return list(windows.split(size))


@torch.no_grad()
def record(model: Any, prefix: str, windows: torch.Tensor, tokens: int = _TOKENS_AT_ONCE) -> Stack:
    """Hidden states before the first block and the calls of all blocks.

    Args:
        model: a causal model of transformers, dense.
        prefix: from `find_stack`.
        windows: int64 (S, L).
        tokens: how many to a batch, about.

    Raises:
        IntegrationError: the blocks are no chain. CalibrationError: the embedding gives NaN.
    """
    stack = model.get_submodule(prefix)
    blocks = list(stack)
    parts = batches(windows, tokens)
    first = _calls(model, blocks, parts[0], prefix)
    if len(parts) > 1 and not _alike(first, _calls(model, blocks, parts[1], prefix)):
        raise IntegrationError(
            f"blocks of {prefix!r} are called with values that depend on the tokens; block-by-block calibration cannot "
            "serve this model, use method 'rtn'"
        )
    hidden = [_first_input(model, blocks[0], part) for part in parts]
    if not all(bool(torch.isfinite(part).all()) for part in hidden):
        raise CalibrationError(
            f"the model gives NaN or Inf before the first block of {prefix!r}; its weights are damaged"
        )
    return Stack(prefix, blocks, [_floats(call) for call in first], hidden)


def hidden_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden state (B, L, D) that a block is called with."""
    return arguments[0] if arguments else keywords["hidden_states"]


def _call_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
    return Call(arguments[1:], {key: value for key, value in keywords.items() if key != "hidden_states"})


def _calls(model: Any, blocks: list[nn.Module], tokens: torch.Tensor, prefix: str) -> list[Call]:
    """How each block is called, without running any but the first: the others return what they are given."""
    calls: list[Call] = []
    last: list[torch.Tensor] = []
    forwards = [block.forward for block in blocks]

    def stand_in(*arguments: Any, **keywords: Any) -> Any:
        given = hidden_of(arguments, keywords)
        if last and last[0] is not given:
            raise IntegrationError(
                f"block {len(calls)} of {prefix!r} is not called with what the block before it returned; block-by-"
                "block calibration cannot serve this model, use method 'rtn'"
            )
        calls.append(_call_of(arguments, keywords))
        if len(calls) == len(blocks):
            raise _Enough
        last[:] = [given]
        return (given,) if as_tuple[0] else given

    as_tuple: list[bool] = []

    def first(*arguments: Any, **keywords: Any) -> Any:
        as_tuple.append(isinstance(forwards[0](*arguments, **keywords), tuple))
        return stand_in(*arguments, **keywords)

    try:
        for block in blocks:
            block.forward = first if block is blocks[0] else stand_in
        model(input_ids=tokens.to(model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        for block in blocks:
            del block.forward
    if len(calls) != len(blocks):
        raise IntegrationError(f"{len(calls)} calls for {len(blocks)} blocks of {prefix!r}; use method 'rtn'")
    return calls


def _first_input(model: Any, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(hidden_of(arguments, keywords).float())
        raise _Enough

    with _removing([block.register_forward_pre_hook(stop, with_kwargs=True)]), suppress(_Enough):
        model(input_ids=tokens.to(model.device), use_cache=False)
    return seen[0]


@contextmanager
def _removing(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    return value


def _floats(call: Call) -> Call:
    """Floating-point tensors in float32: the arithmetic of calibration."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return Call(_map(call.arguments, change), _map(call.keywords, change))


def to_device(call: Call, device: torch.device) -> Call:
    """The same call with its tensors on ``device``."""
    return Call(_map(call.arguments, lambda t: t.to(device)), _map(call.keywords, lambda t: t.to(device)))


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _alike(one: list[Call], other: list[Call]) -> bool:
    pairs = zip(_tensors([tuple(call) for call in one]), _tensors([tuple(call) for call in other]), strict=False)
    return all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer ``name`` of a block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def block_output(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The block's hidden state (B, L, D), with gradients."""
    output = block(hidden, *call.arguments, **call.keywords)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The block's hidden state (B, L, D)."""
    return block_output(block, hidden, call)


@torch.no_grad()
def input_of(block: nn.Module, name: str, hidden: torch.Tensor, call: Call) -> torch.Tensor | None:
    """What goes into the layer ``name`` of the block, (T, K) float32; None if it is not reached. Stops there."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])
        raise _Enough

    with _removing([block.get_submodule(name).register_forward_pre_hook(stop)]), suppress(_Enough):
        run_block(block, hidden, call)
    return seen[0].reshape(-1, seen[0].shape[-1]) if seen else None


@torch.no_grad()
def stages(block: nn.Module, names: Iterable[str], hidden: torch.Tensor, call: Call) -> list[list[str]]:
    """Layers of a block grouped by common input, in the order in which they run; those that did not run come last."""
    wanted = list(names)
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for tensor, group in seen:
                if tensor is arguments[0]:
                    group.append(name)
                    return
            seen.append((arguments[0], [name]))

        return see

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    with _removing(hooks):
        run_block(block, hidden, call)
    reached = [list(dict.fromkeys(group)) for _, group in seen]
    idle = [name for name in wanted if not any(name in group for group in reached)]
    return reached + [[name] for name in idle]


class Moments(NamedTuple):
    """Sums over calibration tokens for one common input.

    ``hessian``: X^^T X^ (K, K) float64, X^ the quantized model's inputs. ``drift``: (X - X^)^T X^ float64, X the dense
    model's, or None.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None

    def rotated(self, block: int) -> Moments:
        """The same of inputs rotated in blocks: H M H."""
        hessian, drift = (None if each is None else transform(transform(each, block).T, block).T for each in self)
        assert hessian is not None
        return Moments(hessian, drift)


def _keeper(seen: dict[str, torch.Tensor], name: str, device: torch.device) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).to(device)

    return keep


class DenseInputs:
    """What goes into the layers ``names`` of a dense block, and what comes out of it, from one run over all batches.

    Inputs are kept beside the hidden states while they take less than 2 GB, else the block is run again for each.
    """

    def __init__(self, block: nn.Module, names: list[str], hidden: list[torch.Tensor], call: Call) -> None:
        self.block, self.hidden, self.call = block, hidden, call
        self.outputs: list[torch.Tensor] = []
        self.device = next(block.parameters()).device
        widths = sum(linear_of(block, name).in_features for name in names)
        tokens = sum(part.shape[0] * part.shape[1] for part in hidden)
        self.kept: list[dict[str, torch.Tensor]] | None = [] if 4 * tokens * widths < _KEPT_BYTES else None
        for part in hidden:
            seen: dict[str, torch.Tensor] = {}
            hooks = []
            for name in names if self.kept is not None else ():
                hooks.append(block.get_submodule(name).register_forward_pre_hook(_keeper(seen, name, part.device)))
            with _removing(hooks):
                self.outputs.append(run_block(block, part.to(self.device), call).to(part.device))
            if self.kept is not None:
                self.kept.append(seen)

    def of(self, name: str, index: int) -> torch.Tensor | None:
        """The input (T, K) of ``name`` in batch ``index``; None if it is not reached."""
        if self.kept is not None:
            found = self.kept[index].get(name)
            return None if found is None else found.to(self.device)
        return input_of(self.block, name, self.hidden[index].to(self.device), self.call)


@torch.no_grad()
def moments(
    block: nn.Module, truth: DenseInputs | None, name: str, hidden: list[torch.Tensor], call: Call
) -> Moments | None:
    """Moments of the input of layer ``name``; None if no token reached it.

    Args:
        block: with the layers before ``name`` quantized.
        truth: inputs of the same block dense, or None: no drift.
        hidden: what goes into the block, batch by batch, on any device.

    Raises:
        CalibrationError: NaN or Inf in the input.
    """
    device = next(block.parameters()).device
    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    for index, part in enumerate(hidden):
        x = input_of(block, name, part.to(device), call)
        if x is None:
            continue
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"the input of {name!r} is NaN or Inf on the calibration text; repair the checkpoint"
            )
        square = (x.T @ x).double()
        hessian = square if hessian is None else hessian + square
        true = truth.of(name, index) if truth is not None else None
        if true is not None and true.shape == x.shape:
            difference = ((true - x).T @ x).double()
            drift = difference if drift is None else drift + difference
    return None if hessian is None else Moments(hessian, drift)
