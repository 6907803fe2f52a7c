"""Compare what a folder's headers hold with what its config.json promises; no tensor is read or allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelSpec
from ..errors import CheckpointError, SpecError
from ..spec import CUSTOM_TABLE, QuantSpec
from .architecture import Architecture
from .files import CONFIG, inside, read_json, refuse
from .shards import TensorInfo, joined, read_headers

_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: name, (N, K) or (E, N, K), spec, bytes on disk (of all tensors), bits per weight."""

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec
    nbytes: int

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Real bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Report:
    """What a checkpoint holds.

    Args:
        record: its quantization_config.
        layers: its quantized layers.
        dense_bytes: bytes of everything that is not quantized (embeddings, norms, biases, ...).
    """

    folder: Path
    record: ModelSpec
    layers: tuple[LayerReport, ...]
    dense_bytes: int

    @property
    def quantized_weights(self) -> int:
        """Weights stored as codes."""
        return sum(layer.weights for layer in self.layers)

    @property
    def quantized_bytes(self) -> int:
        """Bytes of codes, scales and tables."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.quantized_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Real bits per quantized weight, scales and tables included."""
        return 8 * self.quantized_bytes / max(1, self.quantized_weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [
            {"name": layer.name, "shape": list(layer.shape), **layer.spec.to_dict(), "bytes": layer.nbytes,
             "bits_per_weight": layer.bits_per_weight}
            for layer in self.layers
        ]  # fmt: skip
        return {
            "folder": str(self.folder),
            "quantization_config": self.record.to_dict(),
            "layers": layers,
            "quantized_weights": self.quantized_weights,
            "quantized_bytes": self.quantized_bytes,
            "dense_bytes": self.dense_bytes,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
        }


def read_record(folder: Path) -> ModelSpec:
    """The checked ``quantization_config`` of a checkpoint.

    Raises:
        CheckpointError: there is none, or it breaks a rule; the line names the file.
    """
    values = read_json(inside(folder, CONFIG)).get("quantization_config")
    if values is None:
        raise CheckpointError(f"{folder / CONFIG} has no quantization_config; this model is not quantized")
    try:
        return ModelSpec.from_dict(values)
    except SpecError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def check(folder: Path, record: ModelSpec, architecture: Architecture) -> Report:
    """Hold the headers of ``folder`` against what the model must consist of.

    Raises:
        CheckpointError: one line with everything that is missing, superfluous, or of the wrong shape or dtype.
    """
    found: dict[str, list[TensorInfo]] = {}
    parts = set()
    for name, entry in read_headers(folder).items():
        target, part = architecture.rename(name)
        found.setdefault(target, []).append(entry)
        if part:
            parts.add(target)
    problems: list[str] = []
    layers = tuple(_check_layer(name, architecture, found, problems) for name in architecture.linears)
    dense = _check_dense(architecture, found, parts, problems)
    if problems:
        refuse(folder, problems)
    return Report(folder, record, layers, dense)


def _check_layer(
    name: str, architecture: Architecture, found: Mapping[str, list[TensorInfo]], problems: list[str]
) -> LayerReport:
    spec, whole, names = architecture.specs[name], architecture.linears[name], architecture.names(name)
    *rows, width = whole
    try:
        spec.check_layer(name, rows[-1], width)
    except SpecError as error:
        problems.append(str(error))
        return LayerReport(name, whole, spec, 0)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        names.codes: (("U8",), (*rows, spec.row_bytes(width))),
        names.scales: (_FLOATS, (*rows, spec.num_groups(width))),
    }
    if spec.table == CUSTOM_TABLE:
        wanted[names.table] = (_FLOATS, spec.table_shape)
    if spec.zero_points:
        wanted[names.zeros] = wanted[names.scales]
    nbytes = 0
    for tensor, (dtypes, shape) in wanted.items():
        if tensor not in found:
            problems.append(f"{tensor} is missing")
            continue
        entry = joined(found[tensor], shape)
        if entry.dtype not in dtypes or entry.shape != shape:
            problems.append(f"{tensor} is {entry.dtype} {entry.shape}, expected {' or '.join(dtypes)} {shape}")
        else:
            nbytes += entry.nbytes
    return LayerReport(name, whole, spec, nbytes)


def _check_dense(
    architecture: Architecture, found: Mapping[str, list[TensorInfo]], parts: set[str], problems: list[str]
) -> int:
    """Everything but codes, scales and tables; returns its bytes. Tensors stored in parts are left to the loader."""
    ours = {part for name in architecture.linears for part in architecture.names(name)[:2]}
    ours |= {architecture.names(name).table for name, spec in architecture.specs.items() if spec.table == CUSTOM_TABLE}
    ours |= {architecture.names(name).zeros for name, spec in architecture.specs.items() if spec.zero_points}
    for name, shape in architecture.tensors.items():
        if name in ours or name in parts:
            continue
        if name not in found:
            if not parts and architecture.tied.get(name) not in found:
                problems.append(f"{name} is missing")
        elif found[name][0].shape != shape or found[name][0].dtype == "U8":
            problems.append(f"{name} is {found[name][0].dtype} {found[name][0].shape}, expected floats {shape}")
    nbytes = 0
    for name, entries in found.items():
        if name in ours:
            continue
        nbytes += sum(entry.nbytes for entry in entries)
        if name not in architecture.tensors and name not in parts and not architecture.ignored(name):
            problems.append(f"{name} is not part of this model")
    return nbytes
