"""A rank's part of a tensor that tensor parallelism cuts (a DTensor), for modules that hold whole tensors as well.

torch.distributed is not in every torch build and is slow to import, so a DTensor is known by its attributes here.
"""

from __future__ import annotations

import torch

from .errors import IntegrationError
from .spec import QuantSpec


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, any other tensor itself."""
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def check_columns(name: str, spec: QuantSpec, in_features: int, columns: int) -> None:
    """A rank's columns must hold whole groups, bytes and rotated blocks, else they are cut at different places.

    Raises:
        IntegrationError: they do not; the line names layer ``name``.
    """
    group, block = spec.group(in_features), spec.hadamard_size
    where = f"layer {name!r}: {columns} of {in_features} columns per rank"
    if block and columns % block:
        raise IntegrationError(
            f"{where} do not hold whole Hadamard blocks of {block}; use fewer ranks or a smaller hadamard_size"
        )
    if columns % group or columns * spec.bits % 8:
        raise IntegrationError(f"{where} do not hold whole groups of {group}; use fewer ranks or a smaller group_size")


def placed_like(model: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` as this rank's part of a DTensor with the mesh and placement of ``model``; itself if that is none.

    The part may have another shape and type than that of ``model``: what is the same is which ranks hold which.
    """
    if not is_cut(model):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, model.device_mesh, model.placements, run_check=False)  # type: ignore[attr-defined]
