"""Signal to quantization noise of each layer's weights, straight from the files: no model is built or run.

With W the dense weight and W^ what codes, scales and table stand for, decoded in float32::

    SQNR = 10 log10( sum W^2 / sum (W - W^)^2 )          in dB; 6 dB more is half the error

Rotated layers are rotated back before they are compared, so W^ is always of W's own channels (a rotation changes no
norm, so the figure is the same in rotated channels). A method that folds scales into the layer before (awq) has
quantized another W: `Distances.changed` shows it where the scales went into a norm.

A layer at a time is in memory, in slices of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.architecture import Architecture
from ..checkpoint.files import inside
from ..checkpoint.shards import DTYPES, TensorInfo, open_shard, read_headers
from ..checkpoint.validate import Report
from ..errors import CheckpointError
from ..integrations import folders
from ..packing import unpack_codes
from ..quantize import dequantize
from ..spec import CUSTOM_TABLE, QuantSpec

_WEIGHTS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Distances:
    """What was found.

    Attributes:
        sqnr: layer -> dB, worst first; inf without any error.
        left: layer -> why it was not compared.
        changed: norms and biases that are not the dense model's, so that weights around them may not be either.
    """

    sqnr: dict[str, float]
    left: dict[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


class _Tensors:
    """The tensors of a folder by their names in the model; each file is opened once, memory-mapped."""

    def __init__(self, folder: Path, architecture: Architecture, stack: ExitStack) -> None:
        self._folder, self._stack, self._files = folder, stack, dict[str, Any]()
        self.found: dict[str, list[tuple[str, TensorInfo]]] = {}
        for name, entry in sorted(read_headers(folder).items()):
            self.found.setdefault(architecture.rename(name)[0], []).append((name, entry))
        self.found |= {name: self.found[other] for name, other in architecture.tied.items() if other in self.found}

    def parts(self, name: str) -> list[Any]:
        """The tensors that make up ``name``, usually one, each as a slice that has not been read."""
        made = []
        for on_disk, entry in self.found.get(name, []):
            if entry.file not in self._files:
                self._files[entry.file] = self._stack.enter_context(open_shard(inside(self._folder, entry.file)))
            made.append(self._files[entry.file].get_slice(on_disk))
        return made


def distances(
    report: Report, dense: Path, progress: Callable[[str, int], None] = lambda name, weights: None
) -> Distances:
    """SQNR of every quantized layer of a checkpoint against the model in ``dense``.

    Args:
        report: of the checkpoint, from `folders.validate`. dense: a folder of safetensors.
        progress: called after every layer with its name and number of weights.

    Raises:
        CheckpointError: ``dense`` is damaged, or not the model that the checkpoint was made from.
    """
    folder = report.folder
    if folders.is_quantized(dense):
        raise CheckpointError(f"{dense} is quantized itself; give the dense model that {folder} was made from")
    ours, theirs = (folders.architecture(place, report.record) for place in (folder, dense))
    found: dict[str, float] = {}
    left: dict[str, str] = {}
    with ExitStack() as stack:
        made, source = _Tensors(folder, ours, stack), _Tensors(dense, theirs, stack)
        for layer in report.layers:
            names = ours.names(layer.name)
            codes, scales, weights = made.parts(names.codes), made.parts(names.scales), source.parts(names.codes)
            if not weights or theirs.tensors.get(names.codes) != layer.shape:
                raise CheckpointError(f"{dense} has no weight {layer.shape} of layer {layer.name!r}; give the dense "
                                      f"model that {folder} was made from")  # fmt: skip
            if not len(codes) == len(scales) == len(weights):
                left[layer.name] = "its matrices are divided differently among tensors in the two folders"
                continue
            table = made.parts(names.table)[0][:].float() if layer.spec.table == CUSTOM_TABLE else None
            energy = torch.zeros(2, dtype=torch.float64)
            zeros = [made.parts(names.zeros)] if layer.spec.zero_points else []
            for one in zip(codes, scales, weights, *zeros, strict=True):
                energy += sum(_energies(layer.spec, table, *one), torch.zeros(2, dtype=torch.float64))
            found[layer.name] = decibels(*energy.tolist())
            progress(layer.name, layer.weights)
        changed = tuple(_changed(made, source))
    return Distances(dict(sorted(found.items(), key=lambda item: item[1])), left, changed)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _energies(spec: QuantSpec, table: torch.Tensor | None, *parts: Any) -> Iterator[torch.Tensor]:
    """(sum W^2, sum (W - W^)^2) in float64 of each slice of rows of codes, scales, W (and zero points), or stacks."""
    stacked = len(parts[0].get_shape()) == 3
    rows, width = parts[2].get_shape()[-2:]
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for one in range(parts[0].get_shape()[0]) if stacked else (None,):
        for start in range(0, rows, step):
            here: Any = slice(start, start + step) if one is None else (one, slice(start, start + step))
            codes, scales, weight, *zeros = (part[here] for part in parts)
            codes = unpack_codes(codes, spec.code_bits, spec.row_codes(width))
            made = dequantize(codes, scales, spec, table=table, zeros=next(iter(zeros), None), dtype=torch.float32)
            weight = weight.double()
            yield torch.stack([weight.square().sum(), (weight - made).square().sum()])


def _changed(made: _Tensors, source: _Tensors) -> Iterator[str]:
    """Vectors that both models have and that differ, apart from being rounded to another dtype."""
    for name, ((_, entry), *more) in made.found.items():
        if more or len(entry.shape) != 1 or name not in source.found:
            continue
        (one,), (other, *_) = made.parts(name), source.parts(name)
        if tuple(other.get_shape()) == entry.shape and not torch.equal(one[:], other[:].to(DTYPES[entry.dtype])):
            yield name
