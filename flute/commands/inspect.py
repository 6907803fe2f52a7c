"""``flute inspect``: what a checkpoint holds, layer by layer, from its headers; with a dense model, how near it is."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonOption, note, print_json, print_table, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..checkpoint.validate import Report
    from ..evaluate.sqnr import Distances


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint of flute: a folder or a hub id.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model it was made from: show each layer's SQNR, worst first."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint strictly and show its layers: shape, spec, bytes, bits per weight.

    Reads headers alone; with --against also the weights, one layer at a time. SQNR is 10 log10(sum W^2 / sum of squared
    errors) in dB.
    """
    quiet_libraries()
    from ..integrations import folders
    from .flat_inspect import show

    on_hub = folders.is_hub_id(checkpoint)
    folder = folders.find(checkpoint).folder if on_hub else Path(checkpoint).expanduser()
    if folders.is_flat(folder):
        show(folder, against=against, as_json=as_json)
        return
    report = folders.validate(folder)
    found = None if against is None else _distances(report, against)
    if as_json:
        print_json(report.to_dict() if found is None else {**report.to_dict(), **_figures(found)})
        return
    rows = {
        layer.name: [layer.name, " x ".join(map(str, layer.shape)), str(layer.spec), f"{layer.nbytes:,}",
                     f"{layer.bits_per_weight:.3f}"]
        for layer in report.layers
    }  # fmt: skip
    header = ["layer", "shape ((E x) N x K)", "spec", "bytes", "bits/weight"]
    if found is None:
        print_table(header, list(rows.values()))
    else:
        print_table([*header, "SQNR dB"], [[*rows[name], f"{value:.2f}"] for name, value in found.sqnr.items()])
        _print_summary(found)
    print(
        f"{len(report.layers)} quantized layers: {report.quantized_weights:,} weights, "
        f"{report.quantized_bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight"
    )
    print(f"everything else: {report.dense_bytes:,} bytes; in total {report.nbytes:,} bytes")


def _distances(report: Report, against: str) -> Distances:
    from ..evaluate.sqnr import distances
    from ..integrations import folders

    with (
        tempfile.TemporaryDirectory() as work,
        folders.dense_folder(folders.find(against), Path(work)) as dense,
        progress_bar(report.quantized_weights, "w", quiet=False, scale=True) as bar,
    ):

        def progress(name: str, weights: int) -> None:
            bar.update(weights)

        return distances(report, dense, progress)


def _figures(found: Distances) -> dict[str, object]:
    """JSON has no infinity: a layer without any error has null."""
    values = {name: value if math.isfinite(value) else None for name, value in found.sqnr.items()}
    return {"sqnr_db": values, "not_compared": found.left, "changed": list(found.changed)}


def _print_summary(found: Distances) -> None:
    names, values = list(found.sqnr), list(found.sqnr.values())
    if values:
        print(
            f"SQNR of {len(values)} layers: min {values[0]:.2f} dB ({names[0]}), mean {sum(values) / len(values):.2f}, "
            f"max {values[-1]:.2f} ({names[-1]})"
        )
    for name, why in found.left.items():
        note(f"{name} is not compared: {why}")
    if found.changed:
        note(
            f"{len(found.changed)} norms or biases are not the dense model's ({found.changed[0]}, ...): where scales "
            "were folded, weights are others too, and their SQNR says nothing"
        )
