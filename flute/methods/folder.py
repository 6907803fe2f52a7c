"""From a dense model folder to a quantized one with a calibrated method.

The whole dense model is loaded into host memory, quantized block by block on ``device``, and saved; the folder appears
whole or not at all. (Rounding to nearest needs no calibration and no such memory: `flute.checkpoint.streaming`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import Workplace, check_space, copy_files
from ..checkpoint.plan import Plan
from ..config import ModelSpec
from ..integrations import folders, saving
from .allocation import Allocation, allocate
from .calibration import check_windows, token_windows
from .learn import Learning, OnStep
from .model import MethodReport, Progress, quantize_model


def allocate_folder(
    source: Path,
    record: ModelSpec,
    *,
    bits: float,
    texts: Mapping[str, str],
    samples: int = 64,
    window: int = 512,
    seed: int = 0,
    scale: str = "auto",
    device: str = "cpu",
    progress: Progress = lambda name, weights: None,
) -> Allocation:
    """Bits for every layer of the dense model in the folder ``source``, see `allocation.allocate`.

    Args:
        source: the folder. record: as for `allocate`.
        bits: the average.
        texts: name -> text; empty: the model writes its own.
        samples, window, seed: of the windows, see `token_windows`; their first 512 tokens or so are read.
        scale: as in `allocate`.
        device: where the model runs; in float32 on a CPU.

    Raises:
        FluteError: one line.
    """
    model, tokenizer = folders.load(
        folders.Found(source), device=device, dtype=torch.float32 if device == "cpu" else None
    )
    windows = None
    if texts:
        config = model.config.get_text_config()
        windows = token_windows(tokenizer, texts, samples=samples, length=window, seed=seed)
        check_windows(windows, config.vocab_size, getattr(config, "max_position_embeddings", None))
    return allocate(model, record, bits, windows, scale=scale, seed=seed, progress=progress)


def quantize_folder(
    plan: Plan,
    out: Path,
    record: ModelSpec,
    texts: Mapping[str, str],
    *,
    method: str,
    table: torch.Tensor | None = None,
    act_order: bool = True,
    samples: int = 64,
    window: int = 512,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda name, weights: None,
    learning: Learning | None = None,
    on_step: OnStep = lambda done, total, loss: None,
    version: str = "",
) -> MethodReport:
    """Quantize the model of ``plan`` into the new folder ``out``.

    Args:
        plan: what `make_plan` said of a dense model's folder and ``record``. out: the folder to make.
        record: how; patterns allowed.
        texts: name -> calibration text.
        method, table, act_order: as in `quantize_model`.
        samples, window, seed: of the calibration windows, see `token_windows`.
        device: where the arithmetic is done; float32, but for what comes before the blocks on a GPU.
        force: replace an existing checkpoint.
        learning, on_step: as in `quantize_model`; a killed run goes on where it was when it is repeated.

    Raises:
        FluteError: one line; ``out`` is then as it was.
    """
    options: dict[str, Any] = {"method": method, "samples": samples, "window": window, "seed": seed, "flute": version}
    options["act_order"] = act_order
    if learning is not None:
        options["learning"] = asdict(learning)
    with Workplace(Path(out).expanduser().absolute(), plan.fingerprint(**options), force=force) as work, work.filled():
        check_space(work.root, plan.nbytes)
        model, tokenizer = folders.load(folders.Found(plan.source), dtype=torch.float32 if device == "cpu" else None)
        windows = token_windows(tokenizer, texts, samples=samples, length=window, seed=seed)
        report = quantize_model(
            model,
            record,
            windows,
            method=method,
            table=table,
            act_order=act_order,
            dtype=plan.scale_dtype,
            device=device,
            progress=progress,
            learning=learning,
            state=work.root / "learning",
            on_step=on_step,
        )
        if len(windows) < samples:
            report.notes.append(f"the text holds {len(windows)} windows of {window} tokens, {samples} were asked for")
        saving.describe(model, name=work.out.name)
        model.save_pretrained(work.folder)
        copy_files(plan.source, plan.small_files, work.folder)
    return report
