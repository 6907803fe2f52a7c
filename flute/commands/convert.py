"""``flute convert``: somebody else's quantized checkpoint to one of ours, without changing a weight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from .common import (
    JsonOption,
    QuietOption,
    ThreadsOption,
    make_room,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
)

if TYPE_CHECKING:
    from ..integrations.convert.folder import Conversion, Converted


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A quantized folder, a hub id, or a .gguf file.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    tile: Annotated[
        int | None, typer.Option(help="32 or 64: tile of an upstream FLUTE checkpoint that does not tell it.")
    ] = None,
    dense_fallback: Annotated[
        bool, typer.Option("--dense-fallback", help="Keep layers dense that cannot be represented exactly.")
    ] = False,
    threads: ThreadsOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SOURCE, and print what each layer became.

    Reads bitsandbytes (nf4, fp4), GPTQ, AWQ, HQQ, compressed-tensors, GGUF, HIGGS of transformers, and the original
    FLUTE. Every layer is compared with its owner's dequantization; what would differ is refused by name. See
    docs/convert.md.
    """
    from ..checkpoint.atomic import refuse_existing

    refuse_existing(output := output.expanduser().absolute(), force=force)
    quiet_libraries(threads)
    from ..integrations import card, described, folders
    from ..integrations.convert import folder
    from ..integrations.convert.source import open_source

    started = time.perf_counter()
    found = folders.find(source, revision=revision)
    make_room(output)
    with open_source(found, output.parent, tile=tile) as opened, progress_bar(0, "w", quiet=quiet, scale=True) as bar:

        def progress(name: str, weights: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(weights)

        options: dict[str, Any] = {"dense_fallback": dense_fallback, "force": force, "version": __version__}
        try:
            made = folder.convert(opened, output, progress=progress, **options)
        except folder.Refused as refusal:
            if not quiet:
                _print_layers(refusal.layers)
            raise
        kind = opened.kind
    card.write(described.of_report(made.report))
    figures = {
        "output": str(output),
        "from": kind,
        "dtype": str(made.dtype).removeprefix("torch."),
        "layers": [_figures(layer) for layer in made.layers],
        "bytes": made.report.nbytes,
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        print_json(figures)
    else:
        _print(figures, made, quiet=quiet)


def _figures(layer: Converted) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "spec": None if layer.spec is None else layer.spec.to_dict(),
        "dense_because": layer.why if layer.spec is None else None,
        "scales": None if layer.scales is None else str(layer.scales).removeprefix("torch."),
        "rounded_at_load": layer.rounded,
    }


def _print_layers(layers: Sequence[Converted]) -> None:
    rows = [
        [
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"dense: {layer.why}" if layer.spec is None else str(layer.spec),
            "-" if layer.scales is None else str(layer.scales).removeprefix("torch."),
            f"{100 * layer.rounded / layer.weights:.1f} %",
        ]
        for layer in layers
    ]
    print_table(["layer", "N x K", "spec", "scales", "rounded at load"], rows)


def _print(figures: dict[str, Any], made: Conversion, *, quiet: bool) -> None:
    if not quiet:
        _print_layers(made.layers)
    dense = Counter(layer.why for layer in made.layers if layer.spec is None)
    quantized = len(made.layers) - dense.total()
    print(
        f"{figures['output']}: {quantized} layers from {figures['from']}, equal to their owner's weights; "
        f"{figures['bytes'] / 1e6:.1f} MB, {figures['seconds']:.1f} s"
    )
    for why, count in dense.items():
        print(f"{count} layers stay dense: {why}")
    if any(layer.rounded for layer in made.layers):
        print(
            f"scales are float32, exact on disk; loaded in {figures['dtype']} they are rounded, which changes the "
            "share of weights in the last column"
        )
