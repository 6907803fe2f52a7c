"""``flute flatness``: channel norms of a block before and after transforms, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FluteError
from .common import ModelArgument, ThreadsOption, quiet_libraries, read_text

if TYPE_CHECKING:
    from ..methods.flatness import Curves


def flatness(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG to write.", show_default=False)],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text for the activations.", show_default=False)],
    matrices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Matrices of flute flatquant, or a flat_matrices.pth.")
    ] = None,
    block: Annotated[int, typer.Option(min=0, help="Which decoder block.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 4,
    window: Annotated[int, typer.Option(min=2, help="Tokens in such a window.")] = 512,
    threads: ThreadsOption = 0,
) -> None:
    """Draw how flat activations and weights of a block are: without transforms, with Hadamard, with learned ones."""
    quiet_libraries(threads)
    import torch

    from ..integrations import folders
    from ..methods.calibration import token_windows
    from ..methods.flat_folder import load_matrices
    from ..methods.flatness import curves

    words = {str(text): read_text(text)}
    made = None if matrices is None else load_matrices(matrices)[0]
    if made is not None and block >= len(made):
        raise FluteError(f"--block {block}: {matrices} holds {len(made)} blocks")
    loaded, tokenizer = folders.load(folders.find(model), dtype=torch.float32)
    windows = token_windows(tokenizer, words, samples=samples, length=window)
    found = curves(loaded, windows, block, None if made is None else made[block])
    draw(found, output, f"{model}, block {block}: channel norms, largest first")
    print(output)


def draw(found: Curves, path: Path, title: str) -> None:
    """One panel for each matrix, one line for each method.

    Raises:
        FluteError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FluteError("pictures need one more package; run: pip install 'flute-engine[plot]'") from None
    from ..checkpoint.atomic import whole_file

    figure = Figure(figsize=(3.2 * (len(found) // 2), 5), layout="constrained")
    panels: Any = figure.subplots(2, len(found) // 2, squeeze=False)
    for index, (name, lines) in enumerate(found.items()):
        axes = panels[index % 2][index // 2]
        for method, values in lines.items():
            axes.plot(range(len(values)), values, label=method, linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
