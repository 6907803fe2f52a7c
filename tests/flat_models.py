"""FlatQuant models in folders, as a user finds them."""

from pathlib import Path
from typing import Any

import tiny_models
import torch

from flute.flatquant.matrices import Matrices
from flute.flatquant.spec import FlatSpec
from flute.integrations.flatquant import mark_flat
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate


def save(folder: Path, model: Any, spec: FlatSpec, matrices: list[Matrices]) -> None:
    """Make ``model`` one of ``spec`` and write it."""
    apply(model, spec, matrices)
    mark_flat(model, spec)
    model.save_pretrained(folder)


def save_calibrated(
    folder: Path, spec: FlatSpec, windows: torch.Tensor, family: str, calm: float = 1.0, **options: Any
) -> Any:
    """A tiny model of ``family`` in float16, its projections ``calm`` times as large, with the transforms that
    calibration begins with; returns it."""
    model = tiny_models.build(family, **options)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.mul_(calm)
    matrices, _ = calibrate(model, spec, windows, None, Schedule(epochs=0), batch=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    save(folder, model, spec, matrices)
    return model
