"""FlatQuant from a dense model's folder to a quantized one, and files of matrices.

The new folder appears whole or not at all; blocks that are done lie beside it meanwhile, so that a killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoint.atomic import Workplace, copy_files, whole_file
from ..checkpoint.plan import small_files
from ..checkpoint.shards import open_shard
from ..errors import CheckpointError
from ..flatquant.matrices import Matrices
from ..flatquant.spec import FlatSpec
from ..integrations import folders, saving
from ..integrations.flatquant import mark_flat
from .calibration import token_windows
from .flat_gptq import Feedback
from .flat_start import Start
from .flat_train import OnStep, Schedule
from .flatquant import FlatReport, apply, calibrate


@dataclass(frozen=True)
class FlatJob:
    """What to do to a model.

    Args:
        spec: bits. start, schedule: how transforms begin and are learned.
        samples, window, batch, seed: of the calibration windows: how many, tokens in each, windows to a step.
        gptq: round weights with error feedback afterwards, so; None: to nearest.
        matrices: take them from this file instead of learning (then start and schedule do not matter).
    """

    spec: FlatSpec
    start: Start = field(default_factory=Start)
    schedule: Schedule = field(default_factory=Schedule)
    samples: int = 128
    window: int = 2048
    batch: int = 4
    seed: int = 0
    gptq: Feedback | None = None
    matrices: Path | None = None


def learn(
    model: Any, windows: torch.Tensor | None, job: FlatJob, *, device: str, state: Path | None, on_step: OnStep
) -> tuple[list[Matrices], FlatReport]:
    """Matrices for ``job.spec``: from its file, or by calibration.

    Raises:
        FluteError: no windows to learn from; see also `calibrate` and `load_matrices`.
    """
    if job.gptq is not None and windows is None:
        raise CheckpointError("GPTQ rounds by what a text does to layers; give --calibration FILE, or leave --gptq out")
    if job.matrices is not None:
        made, learned_for = load_matrices(job.matrices)
        if learned_for is not None:
            made = [each.adapted(learned_for, job.spec) for each in made]
        return made, FlatReport()
    if windows is None:
        raise CheckpointError(
            "FlatQuant learns from text; give --calibration FILE, or --matrices FILE of an earlier run "
            "(the published flags: --cali_dataset, --matrix_path)"
        )
    return calibrate(
        model, job.spec, windows, job.start, job.schedule, batch=job.batch, device=device, state=state, on_step=on_step
    )


def quantize(
    model: Any, job: FlatJob, made: list[Matrices], windows: torch.Tensor | None, *, device: str, real: bool = True
) -> None:
    """`apply` as ``job`` says."""
    text, feedback = (None, Feedback()) if job.gptq is None else (windows, job.gptq)
    apply(model, job.spec, made, real=real, windows=text, feedback=feedback, batch=job.batch, device=device)


def flatquant_folder(
    source: Path,
    out: Path,
    job: FlatJob,
    texts: Mapping[str, str],
    *,
    device: str = "cpu",
    force: bool = False,
    save_to: Path | None = None,
    on_step: OnStep = lambda done, total, loss: None,
    version: str = "",
) -> FlatReport:
    """Quantize the dense model in ``source`` into the new folder ``out``.

    Args:
        texts: name -> calibration text; may be empty when matrices are given and no GPTQ is asked for.
        device: where the arithmetic is done. force: replace an existing checkpoint.
        save_to: also write the matrices to this file.

    Raises:
        FluteError: one line; ``out`` is then as it was.
    """
    job.spec.check_storable()
    facts = json.loads(json.dumps({"source": str(source), "job": asdict(job), "flute": version}, default=str))
    with Workplace(Path(out).expanduser().absolute(), facts, force=force) as work, work.filled():
        model, tokenizer = folders.load(folders.Found(source), dtype=None)
        stored = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16
        if device == "cpu":
            _cast(model, torch.float32)  # arithmetic in 16 bits is slow there
        windows = (
            token_windows(tokenizer, texts, samples=job.samples, length=job.window, seed=job.seed) if texts else None
        )
        made, report = learn(model, windows, job, device=device, state=work.root / "blocks", on_step=on_step)
        if save_to is not None:
            save_matrices(save_to, made, job.spec)
        _cast(model, stored)
        quantize(model, job, made, windows, device=device)
        mark_flat(model, job.spec)
        saving.describe(model, name=work.out.name)
        model.save_pretrained(work.folder)
        copy_files(source, small_files(source), work.folder)
    return report


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies, which are buffers, would be wrong positions in 16 bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_matrices(path: Path, matrices: list[Matrices], spec: FlatSpec) -> None:
    """All blocks' matrices in one safetensors file, with the bits that they were learned for."""
    tensors = {f"{index}.{name}": t for index, each in enumerate(matrices) for name, t in each.to_tensors().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(
            save({name: t.cpu().contiguous() for name, t in tensors.items()}, {"spec": json.dumps(spec.to_dict())})
        )


def load_matrices(path: Path) -> tuple[list[Matrices], FlatSpec | None]:
    """Matrices of `save_matrices`, or upstream's ``flat_matrices.pth``; the bits they were learned for, if it says.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    if path.suffix == ".pth":
        from ..integrations.flat_upstream import read_matrices

        return read_matrices(path), None
    by_block: dict[int, dict[str, torch.Tensor]] = {}
    with open_shard(path) as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            index, _, rest = name.partition(".")
            if not index.isdigit():
                raise CheckpointError(f"{path} holds {name!r}; it is no file of FlatQuant's matrices")
            by_block.setdefault(int(index), {})[rest] = file.get_tensor(name)
        said = (file.metadata() or {}).get("spec")
    if said is None or sorted(by_block) != list(range(len(by_block))):
        raise CheckpointError(f"{path} is no file of FlatQuant's matrices, or lacks blocks; calibrate again")
    return [Matrices.from_tensors(by_block[index]) for index in range(len(by_block))], FlatSpec.from_dict(
        json.loads(said)
    )
