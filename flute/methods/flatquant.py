"""FlatQuant on a whole model: `calibrate` learns matrices block by block, `apply` makes the quantized model of them.

Each block is calibrated on what the dense model gives it, against what the dense block makes of that; errors of blocks
before it play no part, so blocks are independent and a killed run goes on with the next one. A copy of one block at a
time is in float32 on ``device``; the model itself stays as it is until `apply`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.atomic import whole_file
from ..errors import CalibrationError, CheckpointError
from ..flatquant.fold import SITE_OF, Tensors
from ..flatquant.matrices import Matrices
from ..flatquant.modules import IntLinear
from ..flatquant.rounding import Grid, codes, decode
from ..flatquant.spec import FlatSpec
from ..integrations.flatblocks import blocks_of, check_block, check_norms, flatten, shape_of
from ..linear import LutLinear
from ..packing import pack_codes
from .calibration import check_windows
from .capture import Call, Stack, record, run_block, to_device
from .flat_clips import search_clips
from .flat_gptq import Feedback, round_block
from .flat_start import Seen, Start, begin, unrounded, watch
from .flat_train import Job, OnStep, Schedule, Trained, train
from .learn import within

_IGNORED_STEP: OnStep = lambda done, total, loss: None  # noqa: E731


@dataclass
class FlatReport:
    """``blocks``: what came of each; ``notes``: what did not go as asked, by block."""

    blocks: list[Trained] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """All blocks' notes, with their numbers."""
        return [f"block {index}: {note}" for index, block in enumerate(self.blocks) for note in block.notes]


def calibrate(
    model: Any,
    spec: FlatSpec,
    windows: torch.Tensor,
    start: Start | None = None,
    schedule: Schedule | None = None,
    *,
    batch: int = 4,
    device: torch.device | str | None = None,
    state: Path | None = None,
    on_step: OnStep = _IGNORED_STEP,
) -> tuple[list[Matrices], FlatReport]:
    """Learn the matrices of every block; the model is left as it is.

    Args:
        model: a causal model of transformers, dense.
        spec: bits to learn for.
        windows: token ids int64 (S, L), from `token_windows`.
        start, schedule: what is learned and from where; how long and how fast.
        batch: windows to a step.
        device: where the arithmetic is done; default where the model is.
        state: a folder in which blocks that are done are kept, and from which an interrupted run goes on.
        on_step: called after every step, with steps done and in all.

    Raises:
        FluteError: a model of another kind, bad windows, NaN in the dense model.
    """
    start, schedule = start or Start(), schedule or Schedule()
    where, prefix, stack = _recorded(model, windows, batch, device)
    job = {
        "spec": spec.to_dict(), "start": asdict(start), "schedule": asdict(schedule), "batch": batch,
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "model": _digest(model),
    }  # fmt: skip
    home = stack.hidden[0].device
    report, found, hidden = FlatReport(), [], [_kept(part.to(where), home) for part in stack.hidden]
    for index, (original, recorded) in enumerate(zip(stack.blocks, stack.calls, strict=True)):
        call = to_device(recorded, where)
        block = copy.deepcopy(original).to(where, torch.float32)
        dense, seen, truth = _watched(f"{prefix}.{index}", block, spec, call, hidden, home, schedule.amp)
        kept = _load(state, index, job)
        if kept is None:
            learned = begin(start, spec, shape_of(original), dense, seen)
            search_clips(learned, dense, seen)
            done = partial(within, on_step, index, len(stack.blocks))
            trained = train(Job(block, dense, call, hidden, truth, amp=schedule.amp), learned, schedule, done)
            kept = learned.matrices(), trained
            _save(state, index, job, *kept)
        found.append(kept[0].to("cpu"))
        report.blocks.append(kept[1])
        hidden = truth
        del block, dense, seen
    return found, report


def _kept(hidden: torch.Tensor, home: torch.device) -> torch.Tensor:
    """``hidden`` where it waits for its turn; in host memory that a GPU reads without the host's help."""
    if hidden.is_cuda and home.type == "cpu":
        return torch.empty_like(hidden, device=home, pin_memory=True).copy_(hidden)
    return hidden.to(home)


def _recorded(
    model: Any, windows: torch.Tensor, batch: int, device: torch.device | str | None
) -> tuple[torch.device, str, Stack]:
    config = model.config.get_text_config()
    check_windows(windows, config.vocab_size, getattr(config, "max_position_embeddings", None))
    prefix, _ = blocks_of(model)
    return torch.device(device or model.device), prefix, record(model, prefix, windows, batch * windows.shape[1])


def _watched(
    where: str, block: nn.Module, spec: FlatSpec, call: Call, hidden: list[torch.Tensor], home: torch.device, amp: bool
) -> tuple[dict[str, torch.Tensor], Seen, list[torch.Tensor]]:
    """Flatten a block and run it unrounded over the whole text, once: its dense tensors, what its sites see, and what
    it gives, which is what the block is to learn and what the next one gets."""
    block.requires_grad_(False)
    dense: dict[str, torch.Tensor] = dict(block.named_parameters())
    device = next(iter(dense.values())).device
    check_norms(block, where)
    first = run_block(block, hidden[0].to(device), call)
    flatten(block, spec)
    truth: list[torch.Tensor] = []

    def run(index: int) -> None:
        truth.append(_kept(run_block(block, hidden[index].to(device, non_blocking=True), call).float(), home))

    with unrounded(block):
        check_block(first, run_block(block, hidden[0].to(device), call), where)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        seen = watch(block, run, len(hidden))
    return dense, seen, truth


def _digest(model: Any) -> str:
    """Of the model's config and one weight of each block: enough to tell models apart."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for block in blocks_of(model)[1]:
        weight = next(block.parameters()).detach().float().cpu()
        digest.update(weight.flatten()[:4096].numpy().tobytes())
    return digest.hexdigest()


# ---- what is kept of a block -----------------------------------------------------------------------------------------


def _save(state: Path | None, index: int, job: dict[str, Any], matrices: Matrices, trained: Trained) -> None:
    if state is None:
        return
    from safetensors.torch import save

    state.mkdir(parents=True, exist_ok=True)
    metadata = {"job": json.dumps(job, sort_keys=True), "trained": json.dumps(asdict(trained))}
    with whole_file(state / f"{index}.safetensors") as file:
        file.write(save({name: t.cpu().contiguous() for name, t in matrices.to_tensors().items()}, metadata))


def _load(state: Path | None, index: int, job: dict[str, Any]) -> tuple[Matrices, Trained] | None:
    path = None if state is None else state / f"{index}.safetensors"
    if path is None or not path.exists():
        return None
    from ..checkpoint.shards import open_shard

    with open_shard(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("job") != json.dumps(job, sort_keys=True):
            raise CheckpointError(
                f"{path} was left by a run with other options, text or model; remove it to begin anew"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    return Matrices.from_tensors(tensors), Trained(**json.loads(metadata["trained"]))


# ---- the quantized model ---------------------------------------------------------------------------------------------


@torch.no_grad()
def apply(
    model: Any,
    spec: FlatSpec,
    matrices: list[Matrices],
    *,
    real: bool = True,
    windows: torch.Tensor | None = None,
    feedback: Feedback = Feedback(),  # noqa: B008  (frozen)
    batch: int = 4,
    device: torch.device | str | None = None,
) -> None:
    """Quantize a dense model in place, with the matrices of its blocks.

    Args:
        model: a causal model of transformers, dense.
        spec: bits; those the matrices were learned for, or `Matrices.adapted` to.
        real: integer weights and codes, which can be saved; else the same numbers in the model's own dtype.
        windows: token ids (S, L): round weights with error ``feedback`` (GPTQ) on them; None: to nearest.
        batch, device: as in `calibrate`.

    Raises:
        FluteError: matrices that do not fit the model, bits that cannot be stored.
    """
    if real:
        spec.check_storable()
    _, blocks = blocks_of(model)
    if len(matrices) != len(blocks):
        raise CalibrationError(f"matrices of {len(matrices)} blocks for a model of {len(blocks)}; calibrate this model")
    where = torch.device(device or model.device)
    stack = None if windows is None else _recorded(model, windows, batch, device)[2]
    hidden = [] if stack is None else stack.hidden
    for index, block in enumerate(blocks):
        dtype, home = model.dtype, next(block.parameters()).device
        block.to(where)
        dense, shape = dict(block.named_parameters()), shape_of(block)
        own = matrices[index].to(where)
        has_transforms = bool(own.factors)
        kept, weights = own.folded(dense, spec, shape, dtype)
        scale_types = {name: torch.float32 if spec.activation_bits(name) < 16 else dtype for name in SITE_OF}
        grids = {
            name: own.weight_grid(weight, name, spec, scale_types[name])
            for name, weight in weights.items()
            if spec.weight_bits(name) < 16
        }
        units = {name: codes(rows, made, spec.weight_bits(name)) for name, (rows, made) in grids.items()}
        plain: Tensors = {f"{name}.weight": weight for name, weight in weights.items()}
        if stack is not None:
            trial = copy.deepcopy(block).float()
            flatten(trial, spec, transforms=has_transforms)
            _fill(trial, kept | plain)
            call = to_device(stack.calls[index], where)
            units = round_block(trial, grids, spec, hidden, call, feedback)
            hidden = [run_block(trial, part.to(where), call).to(part.device) for part in hidden]
        # a checkpoint's blocks have room for factors, whether there are any or not
        flatten(block, spec, transforms=real or has_transforms, real=real)
        values = {f"{name}.weight": decode(units[name], grids[name][1]).flatten(1) for name in grids}
        _fill(block, kept | (plain if real else plain | values), skip=set(values) if real else set())
        for name in grids if real else ():
            _store(block.get_submodule(name), units[name].flatten(1), grids[name][1])
        block.to(home)


def _fill(block: nn.Module, tensors: Tensors, skip: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Set parameters of a flattened block, each in its own dtype; the names must be there."""
    for name, tensor in tensors.items():
        if name in skip:
            continue
        parameter = block.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise CalibrationError(
                f"matrices hold {name!r} of {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}; they "
                "belong to another model, or clips are separate in one and not in the other"
            )
        parameter.data = tensor.to(parameter.device, parameter.dtype)


def _store(layer: nn.Module, units: torch.Tensor, made: Grid) -> None:
    """Codes (N, K), whole numbers, and their grid into a layer of integer or table weights."""
    if isinstance(layer, IntLinear):
        layer.store(units, made)
        return
    assert isinstance(layer, LutLinear)
    bits = layer.spec.bits
    layer.weight.data = pack_codes((units + (1 << (bits - 1))).to(torch.uint8), bits)
    layer.scales.data = made.scale.squeeze(-1).to(layer.scales.dtype)
    layer.arrange()
