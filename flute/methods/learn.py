"""Learn scales by gradient descent: the loop, and what can be its loss.

``"nll"`` and ``"kl"`` learn all layers at once, on the loss of the whole model: next-token negative log-likelihood, or
the divergence KL(dense || quantized) of the next-token distributions. ``"block"`` learns one block after another, on
the squared error of its output against the dense model's: where the whole model's backward pass is too large.

The state with the least loss over the whole calibration set is kept, and the start is one of them: learning never ends
worse than it began, on that set. A step whose loss or gradient is not finite ends it there. With the same seed, device
and number of threads a run gives the same bytes, also when it was interrupted and goes on from its state on the disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, IntegrationError
from ..integrations.modules import output_head, untie_head
from ..learned import LearnedLinear, dense_weights, held_codes, learned_layers
from ..spec import CUSTOM_TABLE, QuantSpec
from .calibration import check_windows
from .capture import Call, batches, block_output, find_stack, record, run_block, to_device
from .losses import DenseLogits, kl, nll, recomputing
from .progress import State

_BATCH_TOKENS = 512  # of a step over the whole model
_FIRST_STEP = 5e-3  # of a layer's mean scale
_KEPT = {2: 1.0, 3: 0.3, 4: 0.1}  # by bits: the part of it where codes are kept

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss of this one
OBJECTIVES = ("nll", "kl", "block")


@dataclass(frozen=True)
class Learning:
    """How to learn.

    Args:
        epochs: passes over the calibration windows.
        lr: first step size of Adam, falling to zero with a cosine; None: 5e-3, and less of it the more bits where codes
            are kept (`_KEPT`): errors of another method's make up for each other, the finer the codes the more, which
            larger steps undo before they learn.
        relative: ``lr`` is in units of each layer's mean scale (and of its table's range), else absolute.
        objective: ``"nll"``, ``"kl"`` or ``"block"``.
        scale: where scales begin, ``"absmax"`` or ``"mse"``.
        learn_table: also learn a table per layer.
        fixed_codes: keep the codes chosen at the start.
        seed: of the order of batches.
        save_every: steps between states written to the disk.

    Raises:
        CalibrationError: a value is outside its limits.
    """

    epochs: int = 2
    lr: float | None = None
    relative: bool = True
    objective: str = "kl"
    scale: str = "mse"
    learn_table: bool = False
    fixed_codes: bool = False
    seed: int = 0
    save_every: int = 10

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.rate() < math.inf or self.save_every < 1:
            raise CalibrationError(
                f"epochs={self.epochs}, lr={self.lr}, save_every={self.save_every}: all must be above zero"
            )
        if self.lr is None and not self.relative:
            raise CalibrationError("relative=False wants an lr: there is no absolute step that suits every model")
        if self.objective not in OBJECTIVES:
            raise CalibrationError(f"objective={self.objective!r} is unknown; use {', '.join(OBJECTIVES)}")
        if not isinstance(self.learn_table, bool):
            raise CalibrationError(
                f"learn_table={self.learn_table!r}: give True for a table per layer, or False; tables per row gain "
                "less than smaller groups of the same bits, see docs/quality.md"
            )

    def rate(self, kept_bits: int | None = None) -> float:
        """The first step where codes of so many bits are kept, or (None) chosen anew."""
        return self.lr if self.lr is not None else _FIRST_STEP * (1.0 if kept_bits is None else _KEPT[kept_bits])


@dataclass
class Learned:
    """What came of it: the calibration loss before and after (sums over blocks, for ``"block"``), at which step the
    kept state was reached, steps made, and what did not go as asked."""

    before: float
    after: float
    best_step: int
    steps: int
    notes: list[str] = field(default_factory=list)


def learn_model(
    model: Any,
    specs: Mapping[str, QuantSpec],
    windows: torch.Tensor,
    learning: Learning,
    *,
    table: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    state: Path | None = None,
    on_step: OnStep = lambda done, total, loss: None,
) -> Learned:
    """Replace the layers ``specs`` of a causal model by `LearnedLinear` where they are not, and learn their scales.

    Args:
        model: of transformers, in float32 or bfloat16, where the arithmetic is to be done.
        specs: name -> spec.
        windows: token ids int64 (S, L), from `token_windows`.
        learning: how. table: the custom table, where a spec is custom.
        dtype: in which scales and tables will be stored; default the model's.
        state: a folder for states, from which an interrupted run goes on; None: none are written.
        on_step: called after every step.

    Raises:
        FluteError: a spec that does not fit, bad windows, a state of another run, a loss that is not finite before the
            first step. The model is then partly replaced: load it anew.
    """
    config = model.config.get_text_config()
    check_windows(windows, config.vocab_size, getattr(config, "max_position_embeddings", None))
    if model.dtype == torch.float16:
        raise CalibrationError("gradients of a float16 model underflow; load it in bfloat16 or float32 to learn scales")
    _replace(model, specs, learning, table, dtype or model.dtype)
    job = {
        "learning": asdict(learning),
        "specs": {name: str(spec) for name, spec in specs.items()},
        "windows": _digest([windows]),
        "start": _digest(layer.scales for layer in learned_layers(model).values()),
        "torch": torch.__version__,
    }
    training, frozen = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        run = _by_block if learning.objective == "block" else _end_to_end
        return run(model, windows, learning, job, state, on_step)
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen.get(name, False))


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(
    model: Any, specs: Mapping[str, QuantSpec], learning: Learning, table: torch.Tensor | None, dtype: torch.dtype
) -> None:
    for name, spec in specs.items():
        linear = model.get_submodule(name)
        if isinstance(linear, LearnedLinear):  # begun by another method
            continue
        if not isinstance(linear, nn.Linear) or linear.weight.is_meta:
            raise IntegrationError(
                f"layer {name!r} is a {type(linear).__name__}; scales are learned of linear layers in memory only: "
                "leave it out with a skip pattern, or choose another method"
            )
        if name == output_head(model):
            untie_head(model, name)
        layer = LearnedLinear(
            linear, spec, table=table if spec.table == CUSTOM_TABLE else None, scale=learning.scale, dtype=dtype,
            learn_table=learning.learn_table, fixed_codes=learning.fixed_codes, name=name,
        )  # fmt: skip
        layer.weight.requires_grad_(False)
        model.set_submodule(name, layer)


# ---- whole model, or block by block --------------------------------------------------------------------------------


def _end_to_end(
    model: Any, windows: torch.Tensor, learning: Learning, job: dict[str, Any], state: Path | None, on_step: OnStep
) -> Learned:
    parts = [part.to(model.device) for part in batches(windows, _BATCH_TOKENS)]
    layers = learned_layers(model)
    blocks = list(model.get_submodule(find_stack(model, layers)))
    dense = DenseLogits(model, blocks, parts) if learning.objective == "kl" else None

    def loss(index: int) -> torch.Tensor:
        return nll(model, parts[index]) if dense is None else kl(model, parts[index], partial(dense, index))

    place = None if state is None else State(state / "model.safetensors", job)
    for layer in layers.values():
        layer.scales.requires_grad_(True)
    with recomputing(model, blocks, parts[0]):
        return learn(layers, len(parts), loss, learning, place, on_step)


def _by_block(
    model: Any, windows: torch.Tensor, learning: Learning, job: dict[str, Any], state: Path | None, on_step: OnStep
) -> Learned:
    prefix = find_stack(model, learned_layers(model))
    with dense_weights(model):
        stack = record(model, prefix, windows)
    hidden, truth, total, blocks = stack.hidden, list(stack.hidden), Learned(0.0, 0.0, 0, 0), len(stack.blocks)
    for index, (block, recorded) in enumerate(zip(stack.blocks, stack.calls, strict=True)):
        call = to_device(recorded, model.device)
        kept = {name: parameter.dtype for name, parameter in block.named_parameters()}
        block.float()
        with dense_weights(block):
            truth = [run_block(block, part, call) for part in truth]
        place = None if state is None else State(state / f"{index}.safetensors", job | {"block": index})
        loss = partial(_distance, block, call, hidden, truth)
        made = learn(learned_layers(block), len(hidden), loss, learning, place, partial(within, on_step, index, blocks))
        total.before, total.after = total.before + made.before, total.after + made.after
        total.steps, total.best_step = total.steps + made.steps, total.best_step + made.best_step
        total.notes += [f"{prefix}.{index}: {note}" for note in made.notes]
        hidden = [run_block(block, part, call) for part in hidden]
        for name, parameter in block.named_parameters():
            parameter.data = parameter.data.to(kept[name])
    outside = [name for name in learned_layers(model) if not name.startswith(f"{prefix}.")]
    if outside:
        total.notes.append(f"rounded to nearest, since they lie in no block: {', '.join(outside)}")
    return total


def _distance(
    block: nn.Module, call: Call, hidden: list[torch.Tensor], truth: list[torch.Tensor], index: int
) -> torch.Tensor:
    """Squared error of the block's output on batch ``index``, relative to the squares of the dense model's."""
    difference = block_output(block, hidden[index], call) - truth[index]
    return difference.square().mean() / truth[index].square().mean().clamp_min(1e-30)


def within(on_step: OnStep, index: int, blocks: int, done: int, steps: int, loss: float) -> None:
    """Tell ``on_step`` of a step of block ``index``, one of ``blocks`` that take ``steps`` each."""
    on_step(index * steps + done, blocks * steps, loss)


# ---- the loop --------------------------------------------------------------------------------------------------------


def learn(
    layers: Mapping[str, LearnedLinear],
    count: int,
    loss: Callable[[int], torch.Tensor],
    learning: Learning,
    state: State | None = None,
    on_step: OnStep = lambda done, total, loss: None,
) -> Learned:
    """Adam over the scales (and tables) of ``layers``; they end in the best state that was seen.

    Args:
        layers: name -> layer.
        count: batches, all of one size.
        loss: number of a batch -> scalar.
        learning: how.
        state: where to write states and to go on from.
        on_step: called after every step.

    Raises:
        CalibrationError: the loss is not finite before the first step.
    """
    named = {
        f"{name}.{kind}": p
        for name, layer in layers.items()
        for kind, p in zip(("scales", "table"), layer.learnable(), strict=False)
    }
    for parameter in named.values():
        parameter.requires_grad_(True)
    groups = [{"params": [p], "rate": _rate(p, one, learning)} for one in layers.values() for p in one.learnable()]
    optimizer = torch.optim.Adam(groups, foreach=False)
    total = learning.epochs * count if named else 0
    found = state.load(named, optimizer) if state else None
    if found is None:
        start = _mean(layers, loss, count)
        if not math.isfinite(start):
            raise CalibrationError(
                f"the calibration loss is {start} before the first step; the model gives NaN on this text"
            )
        made, best = Learned(start, start, 0, 0), {name: p.detach().clone() for name, p in named.items()}
    else:
        made, best = Learned(**found[0]), found[1]
        made.notes = [*made.notes, f"went on at step {made.steps}"] if made.steps < total else made.notes
    while made.steps < total:
        epoch, position = divmod(made.steps, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(learning.seed + epoch)).tolist()
        value = _step(optimizer, named, partial(loss, order[position]), made.steps / total)
        if value is None:
            made.notes.append(f"loss or gradient not finite at step {made.steps + 1} of {total}: learning ended there")
            break
        made.steps += 1
        on_step(made.steps, total, value)
        if made.steps % count == 0:
            now = _mean(layers, loss, count)
            if now < made.after:
                made.after, made.best_step = now, made.steps
                best = {name: p.detach().clone() for name, p in named.items()}
        if state and (made.steps % learning.save_every == 0 or made.steps == total):
            state.save(asdict(made), best, named, optimizer)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(best[name]).requires_grad_(False)
    return made


def _rate(parameter: torch.Tensor, layer: LearnedLinear, learning: Learning) -> float:
    unit = float(parameter.detach().abs().mean()) if learning.relative else 1.0
    return learning.rate(None if layer.fixed is None else layer.spec.bits) * unit


def _step(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], loss: Callable[[], torch.Tensor], done: float
) -> float | None:
    """One step at ``done`` of the schedule; its loss. None, and nothing moved, if a value is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * done))
    optimizer.zero_grad(set_to_none=True)
    value = loss()
    if not bool(torch.isfinite(value)):
        return None
    value.backward()
    if not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in named.values()):
        return None
    optimizer.step()
    return float(value.detach())


@torch.no_grad()
def _mean(layers: Mapping[str, LearnedLinear], loss: Callable[[int], torch.Tensor], count: int) -> float:
    with held_codes(layers.values()):
        return sum(float(loss(index)) for index in range(count)) / count
