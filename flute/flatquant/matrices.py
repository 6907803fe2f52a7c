"""`Matrices`: what was learned of a block, as plain numbers; the form that is kept, exchanged and folded for good.

One calibration serves several numbers of bits ("train one, get more", FlatQuant, table 15): transforms and diagonals
belong to the model, only clips belong to a number of bits and are left out where that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CalibrationError, CheckpointError
from .factors import Pair
from .fold import SITE_OF, BlockShape, Tensors, fold, key_offset, online, parameter_of_clip
from .rounding import Grid, clipped_rows, grid, grouped
from .spec import FlatSpec

_KINDS = ("factors", "scales", "clips", "row_clips", "means")


@dataclass
class Matrices:
    """Of one block: ``factors`` P by name, ``scales`` c, ``clips`` ratios (clips, 2) by site and (2,) of ``query``,
    ``key`` and ``value``, ``row_clips`` ratios (N, 2) by layer, ``means`` (kv_heads, d) of ``key``; all may lack
    entries."""

    factors: Tensors = field(default_factory=dict)
    scales: Tensors = field(default_factory=dict)
    clips: Tensors = field(default_factory=dict)
    row_clips: Tensors = field(default_factory=dict)
    means: Tensors = field(default_factory=dict)

    def to_tensors(self) -> Tensors:
        """One flat dict, for a file."""
        return {f"{kind}.{name}": tensor for kind in _KINDS for name, tensor in getattr(self, kind).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Matrices:
        """The inverse of `to_tensors`.

        Raises:
            CheckpointError: a name that is none of these, or numbers that are not finite.
        """
        made = cls()
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind not in _KINDS or not rest:
                raise CheckpointError(f"tensor {name!r} is none of FlatQuant's matrices; calibrate again")
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"tensor {name!r} holds NaN or Inf; calibrate again")
            getattr(made, kind)[rest] = tensor
        return made

    def to(self, device: torch.device | str) -> Matrices:
        """The same on another device."""
        return Matrices.from_tensors({name: tensor.to(device) for name, tensor in self.to_tensors().items()})

    def adapted(self, learned: FlatSpec, spec: FlatSpec) -> Matrices:
        """The same for other numbers of bits than it was ``learned`` with."""
        clips = {
            name: ratio
            for name, ratio in self.clips.items()
            if _clip_facts(learned, name) == _clip_facts(spec, name) and learned.separate_clips == spec.separate_clips
        }
        rows = {
            name: ratio
            for name, ratio in self.row_clips.items()
            if (learned.weight_bits(name), learned.w_asym) == (spec.weight_bits(name), spec.w_asym)
        }
        return Matrices(self.factors, self.scales, clips, rows, self.means)

    def folded(
        self, dense: Mapping[str, torch.Tensor], spec: FlatSpec, shape: BlockShape, dtype: torch.dtype
    ) -> tuple[Tensors, Tensors]:
        """The block for good.

        Args:
            dense: tensors of the block by name.
            dtype: of the model: transforms are rounded to it first, and what is folded is the inverse of that.

        Returns:
            Tensors to keep, by their names in a flattened block, and weights still to be rounded by layer; all float64.

        Raises:
            CalibrationError: a transform has no inverse, or ``spec`` subtracts mean keys and there are none.
        """
        if spec.key_offset and "key" not in self.means:
            raise CalibrationError("these matrices hold no mean keys; learn them with --key_offset, or leave it out")
        made = {name: Pair.of(matrix.to(dtype).double()) for name, matrix in self.factors.items()}
        wide = {name: tensor.double() for name, tensor in dense.items()}
        scales, apart = {name: scale.double() for name, scale in self.scales.items()}, spec.separate_vtrans
        out = fold(wide, made, scales, shape, separate_values=apart)
        weights = {name: out.pop(f"{name}.weight") for name in SITE_OF}
        if not spec.turns_keys:
            made.pop("key", None)
        out |= online(made, separate_values=apart)
        out |= {parameter_of_clip(name): ratio.double() for name, ratio in self.clips.items()}
        if spec.key_offset:
            out |= key_offset(made, self.means["key"].double())
        return out, weights

    def weight_grid(
        self, weight: torch.Tensor, name: str, spec: FlatSpec, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, Grid]:
        """Clipped rows of a folded weight in groups (N, K / group, group), float32, and their grid with scales in
        ``dtype``."""
        rows = grouped(clipped_rows(weight.float(), self.row_clips.get(name)), spec.w_groupsize)
        return rows, grid(rows, spec.weight_bits(name), symmetric=not spec.w_asym, dtype=dtype)


def _clip_facts(spec: FlatSpec, name: str) -> tuple[int, bool]:
    """Bits and kind of the grid that a clip belongs to."""
    if name in ("query", "key", "value"):
        return getattr(spec, f"{name[0]}_bits"), getattr(spec, f"{name[0]}_asym")
    return spec.activation_bits("mlp.down_proj" if name == "down" else name), spec.a_asym
