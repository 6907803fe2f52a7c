"""FlatQuant: one block learns to give what it gave, rounded (section 3.4 of the paper, with a few repairs).

The loss is the squared error of the block's output, divided by its own value, so that its size does not matter (the
gradient is that of its logarithm). AdamW, clips ten times as fast as the rest, a cosine to a thousandth of the first
rate, no weight decay. The state after the epoch with the least mean loss is kept, unless the start was better. A step
with a loss or gradient that is not finite is left out; after a second one in a row, or if parameters are not finite,
they go back to what was kept, at half the rate. All is reported, nothing of it ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.func import functional_call

from ..errors import CalibrationError
from ..flatquant.fold import Tensors
from ..flatquant.learned import Learned
from .capture import Call

_WARMUP_STEPS, _WARMUP_START, _LAST_RATE = 16, 0.01, 1e-3

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss of this one


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        epochs: passes over the calibration windows; 0: nothing is learned.
        lr: first rate of transforms and diagonals. warmup: come up to it in 16 steps.
        amp: run blocks in bfloat16 (their parameters stay float32).

    Raises:
        CalibrationError: a value outside its limits.
    """

    epochs: int = 15
    lr: float = 5e-3
    warmup: bool = False
    amp: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 0 < self.lr < math.inf:
            raise CalibrationError(f"epochs={self.epochs}, flat_lr={self.lr}: give 0 or more epochs, a rate above zero")

    def rate(self, step: int, steps: int) -> float:
        """Share of the first rate at a step."""
        share = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * step / max(1, steps))) / 2
        if self.warmup and step < _WARMUP_STEPS:
            share *= _WARMUP_START + (1 - _WARMUP_START) * step / _WARMUP_STEPS
        return share


@dataclass
class Trained:
    """``before``, ``after``: mean squared error of the block's output over the calibration text, relative to its mean
    square; ``notes``: what was stepped back from."""

    before: float
    after: float
    notes: list[str] = field(default_factory=list)


class Job:
    """A flattened block, its inputs and the outputs it should have, batch by batch on any device."""

    def __init__(
        self,
        block: nn.Module,
        dense: Mapping[str, torch.Tensor],
        call: Call,
        hidden: list[torch.Tensor],
        truth: list[torch.Tensor],
        *,
        amp: bool = False,
    ) -> None:
        self.block, self.dense, self.call, self.hidden, self.truth, self.amp = block, dense, call, hidden, truth, amp
        self.device = next(block.parameters()).device
        self.power = sum(float(part.square().mean()) for part in truth) / len(truth)

    def loss(self, learned: Learned, index: int) -> torch.Tensor:
        """Mean squared error of batch ``index``."""
        return self._squared(learned.tensors(self.dense), index)

    def _squared(self, tensors: Tensors, index: int) -> torch.Tensor:
        given = (self.hidden[index].to(self.device, non_blocking=True), *self.call.arguments)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output = functional_call(self.block, tensors, given, self.call.keywords)
        output = output[0] if isinstance(output, tuple) else output
        return (output.float() - self.truth[index].to(self.device, non_blocking=True)).square().mean()

    @torch.no_grad()
    def error(self, learned: Learned) -> float:
        """Relative squared error over all batches."""
        tensors = learned.tensors(self.dense)  # folded once for all of them
        total = sum(float(self._squared(tensors, index)) for index in range(len(self.hidden)))
        return total / len(self.hidden) / max(self.power, 1e-30)


def train(job: Job, learned: Learned, schedule: Schedule, on_step: OnStep = lambda done, total, loss: None) -> Trained:
    """Learn, in place; the best state is what remains.

    Raises:
        CalibrationError: the loss is not finite before the first step.
    """
    result = Trained(job.error(learned), 0.0)
    if not math.isfinite(result.before):
        raise CalibrationError("the quantized block gives NaN before anything is learned; load the model in float32")
    groups = learned.groups(schedule.lr)
    if not schedule.epochs or not groups:
        result.after = result.before
        return result
    optimizer = torch.optim.AdamW(groups)
    firsts, slowdown = [group["lr"] for group in optimizer.param_groups], 1.0
    first = best = _state(learned)
    least, done, lost, steps = math.inf, 0, 0, schedule.epochs * len(job.hidden)
    for _ in range(schedule.epochs):
        total, counted = 0.0, 0
        for index in range(len(job.hidden)):
            for group, rate in zip(optimizer.param_groups, firsts, strict=True):
                group["lr"] = rate * slowdown * schedule.rate(done, steps)
            value = _step(job, learned, optimizer, index)
            done += 1
            lost = 0 if math.isfinite(value) else lost + 1
            if lost == 1:
                result.notes.append(f"step {done} of {steps} left out: its loss or gradient was not finite")
            elif lost or not _finite(learned):
                learned.load_state_dict(best)
                optimizer.state.clear()
                slowdown, lost = slowdown / 2, 0
                result.notes.append(f"stepped back after step {done} of {steps}: numbers were not finite")
            else:
                total, counted = total + value, counted + 1
            on_step(done, steps, value / max(job.power, 1e-30))
        if counted and not lost and total / counted < least:
            least, best = total / counted, _state(learned)
    learned.load_state_dict(best)
    result.after = job.error(learned)
    if not result.after < result.before:
        learned.load_state_dict(first)
        result.after = result.before
        result.notes.append("nothing learned: no state was better than the start")
    return result


def _step(job: Job, learned: Learned, optimizer: torch.optim.Optimizer, index: int) -> float:
    """One step; the loss before it, NaN if nothing was done."""
    optimizer.zero_grad(set_to_none=True)
    loss = job.loss(learned, index)
    (loss / loss.detach().clamp_min(1e-30)).backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sums = torch.stack([loss.detach(), *(gradient.sum() for gradient in gradients)])
    if not bool(torch.isfinite(sums).all()):
        return math.nan
    optimizer.step()
    return float(loss.detach())


def _finite(learned: Learned) -> bool:
    return bool(torch.stack([parameter.detach().sum() for parameter in learned.parameters()]).isfinite().all())


def _state(learned: Learned) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learned.state_dict().items()}
