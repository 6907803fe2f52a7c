"""``flute inspect`` of a FlatQuant checkpoint: layers, bits, transforms, keys and values, bytes."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import FluteError
from .common import print_json, print_table


def show(folder: Path, *, against: str | None, as_json: bool) -> None:
    """Check the folder and print what it holds.

    Raises:
        FluteError: the checkpoint breaks a rule; or weights are to be compared, which cannot be.
    """
    from ..integrations.flat_report import report

    if against is not None:
        raise FluteError(
            f"--against {against}: FlatQuant folds transforms and diagonals into weights that {folder} does not hold "
            f"apart, so there is no dense weight to compare with; flute eval {folder} --against {against} --text FILE "
            "compares the models"
        )
    found = report(folder)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        [layer.name, " x ".join(map(str, layer.shape)), str(layer.weight_bits), str(layer.activation_bits),
         " x ".join(map(str, layer.transform)) or "none", f"{layer.nbytes:,}",
         f"{8 * layer.nbytes / math.prod(layer.shape):.3f}"]
        for layer in found.layers
    ]  # fmt: skip
    print_table(["layer", "shape (N x K)", "weight bits", "activation bits", "transform", "bytes", "bits/weight"], rows)
    print(
        f"{len(found.layers)} layers: {found.weights:,} weights, {found.layer_bytes:,} bytes, "
        f"{8 * found.layer_bytes / found.weights:.3f} bits per weight"
    )
    spec = found.spec
    grids = {"keys": (spec.k_bits, spec.k_asym), "values": (spec.v_bits, spec.v_asym)}
    if spec.q_bits < 16:
        grids["queries"] = (spec.q_bits, spec.q_asym)
    print(", ".join(f"{name} {_grid(*each)}" for name, each in grids.items()) + _behind(found.head_transform))
    print(
        f"transforms and clips: {found.transform_bytes:,} bytes; everything else: {found.dense_bytes:,} bytes; "
        f"in total {found.nbytes:,} bytes"
    )


def _grid(bits: int, asymmetric: bool) -> str:
    if bits >= 16:
        return "not quantized"
    return f"{bits} bits, {'asymmetric' if asymmetric else 'symmetric'}"


def _behind(size: int) -> str:
    return f"; keys and queries behind a transform of {size} x {size}" if size else ""
