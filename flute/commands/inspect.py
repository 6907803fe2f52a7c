"""``flute inspect``: what a checkpoint holds, layer by layer, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, print_json, print_table, quiet_libraries


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of flute.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint strictly and show its layers: shape, spec, bytes, bits per weight. Reads no weights."""
    quiet_libraries()
    from ..integrations import folders

    report = folders.validate(folder.expanduser())
    if as_json:
        print_json(report.to_dict())
        return
    rows = [
        [layer.name, " x ".join(map(str, layer.shape)), str(layer.spec), f"{layer.nbytes:,}",
         f"{layer.bits_per_weight:.3f}"]
        for layer in report.layers
    ]  # fmt: skip
    print_table(["layer", "shape ((E x) N x K)", "spec", "bytes", "bits/weight"], rows)
    print(
        f"{len(report.layers)} quantized layers: {report.quantized_weights:,} weights, "
        f"{report.quantized_bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight"
    )
    print(f"everything else: {report.dense_bytes:,} bytes; in total {report.nbytes:,} bytes")
