"""Figures as pictures. matplotlib comes with the extra ``plot``; without it `require` refuses in one line.

`kernels` draws dense time over ours against the number of tokens M, one panel a weight. The dashed line is the
roofline: what a kernel would reach that reads codes and scales once at the read ceiling of the run, or multiplies as
fast as the fastest dense matmul of the run, whichever takes longer::

    roofline(M) = dense_us(M) / max(floor_us, 2 M N K / (fastest dense flop/us of the run))
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import whole_file
from ..errors import FluteError
from .kernel import Row
from .model import ModelRow
from .quality import QualityRow

_COLOURS = {4: "tab:blue", 3: "tab:green", 2: "tab:orange"}
_SHAPES = "os^vDPX*<>ph"
_HOPELESS = 8  # times the dense perplexity
_MARKS = {"flute": "o", "humming": "s", "bitsandbytes": "^", "tinygemm": "v", "gemlite": "D"}


def require() -> None:
    """Raise FluteError where there is no matplotlib: before hours of measuring, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FluteError("--plot: matplotlib is not installed; run: pip install 'flute-engine[plot]'")


def _figure(panels: int, title: str, origin: str, size: tuple[float, float] = (4, 3)) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    across = min(3, panels)
    down = -(-panels // across)
    width, height = size
    figure = Figure(figsize=(width * across, height * down + 1), dpi=90, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.set_visible(False)
    figure.suptitle("\n".join([title, *textwrap.wrap(origin, int(13 * width) * across)]), fontsize=8)
    return figure, axes[:panels]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return path


def _tokens_axis(axes: Any, tokens: Iterable[int]) -> None:
    from matplotlib.ticker import NullLocator

    ticks = sorted(set(tokens))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _plain_log_axis(axes: Any, base: int = 2, subs: Sequence[float] = (1,)) -> None:
    """Twice as much is as far everywhere, and ticks are plain numbers: powers of ``base`` times ``subs``."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_locator(LogLocator(base=base, subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(axis="y", labelsize=7)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row], bits: int, fastest: float) -> dict[int, float]:
    """M -> the speed-up of a perfect kernel at ``bits``, from the rows of one weight.

    Args:
        fastest: flop per microsecond of the fastest dense matmul, see `fastest_dense`.
    """
    dense = {row.m: row.us for row in rows if row.method == "dense" and row.us}
    floors = {row.m: row.floor_us for row in rows if row.method == "flute" and row.bits == bits and row.floor_us}
    best = {}
    for m, us in dense.items():
        if m in floors:
            row = next(row for row in rows if row.m == m)
            best[m] = us / max(floors[m], 2 * m * row.n * row.k / fastest)
    return best


def fastest_dense(rows: Sequence[Row]) -> float:
    """Flop per microsecond of the fastest dense matmul among ``rows``."""
    return max((2 * row.m * row.n * row.k / row.us for row in rows if row.method == "dense" and row.us), default=1.0)


def kernels(rows: Sequence[Row], path: Path, origin: str) -> Path:
    """Speed-up over dense against M, a panel for each weight, in the first dtype of ``rows``.

    Raises:
        CheckpointError: ``path`` cannot be written.
    """
    dtype = rows[0].dtype
    rows = [row for row in rows if row.dtype == dtype]
    weights = list(dict.fromkeys((row.n, row.k) for row in rows))
    figure, panels = _figure(len(weights), f"dense {dtype} time over quantized, by tokens M", origin)
    fastest = fastest_dense(rows)
    for axes, (n, k) in zip(panels, weights, strict=True):
        here = [row for row in rows if (row.n, row.k) == (n, k)]
        lines = list(dict.fromkeys((r.method, r.bits, r.group_size) for r in here if r.method != "dense" and r.us))
        for method, bits, group in lines:
            points = [(r.m, r.speedup) for r in here if (r.method, r.bits, r.group_size) == (method, bits, group)]
            points = [(m, ratio) for m, ratio in points if ratio]
            ours = method == "flute"
            axes.plot(
                *zip(*points, strict=True), marker=_MARKS.get(method, "x"), markersize=4 if ours else 3,
                color=_COLOURS[bits], linewidth=1.6 if ours else 0.7, alpha=1 if ours else 0.6,
                linestyle="-" if ours else ":", label=f"{method} {bits} bit g{group}",
            )  # fmt: skip
        for bits in sorted({bits for method, bits, _ in lines if method == "flute"}, reverse=True):
            best = roofline(here, bits, fastest)
            axes.plot(list(best), list(best.values()), "--", color=_COLOURS[bits], linewidth=0.8,
                      label=f"roofline {bits} bit")  # fmt: skip
        axes.axhline(1, color="0.4", linewidth=0.8)
        axes.set_title(f"{n} x {k}", fontsize=9)
        _tokens_axis(axes, [row.m for row in here])
        _plain_log_axis(axes)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=7)
    return _save(figure, path)


# ---- models ----------------------------------------------------------------------------------------------------------


def models(rows: Sequence[ModelRow], path: Path, origin: str) -> Path:
    """Decoded tokens per second against batch size, a panel for each prompt length.

    Raises:
        CheckpointError: ``path`` cannot be written.
    """
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    figure, panels = _figure(len(prompts), "decoded tokens per second by batch size", origin)
    for axes, prompt in zip(panels, prompts, strict=True):
        for method in dict.fromkeys(row.method for row in rows):
            here = [row for row in rows if (row.method, row.prompt) == (method, prompt) and row.decode_tokens_per_s]
            if here:
                axes.plot([r.batch for r in here], [r.decode_tokens_per_s for r in here], "o-", markersize=4,
                          label=method)  # fmt: skip
        _tokens_axis(axes, [row.batch for row in rows])
        _plain_log_axis(axes)
        axes.set_title(f"prompt of {prompt}", fontsize=9)
    panels[0].legend(fontsize=8)
    return _save(figure, path)


# ---- quality ---------------------------------------------------------------------------------------------------------


def quality(rows: Sequence[QualityRow], path: Path, origin: str) -> Path:
    """Perplexity (log) against real bits per weight, a marker for each family and a panel for each text.

    The dense model is a line. What is worse than `_HOPELESS` times dense would leave no room for the rest: it is named
    in the title instead.

    Raises:
        CheckpointError: ``path`` cannot be written.
    """
    names = [name for name in (rows[0].text, rows[0].second_text) if name]
    columns = ("perplexity", "second_perplexity")[: len(names)]
    families = list(dict.fromkeys(row.family for row in rows if row.family != "dense"))
    figure, panels = _figure(len(names), "perplexity by real bits per weight", origin, size=(6, 5))
    for axes, name, column in zip(panels, names, columns, strict=True):
        dense = next((getattr(row, column) for row in rows if row.family == "dense"), None)
        points = {row: getattr(row, column) for row in rows if row.family != "dense" and getattr(row, column)}
        worst = _HOPELESS * (dense or min(points.values(), default=1))
        for place, family in enumerate(families):
            here = [(row.bits_per_weight, y) for row, y in points.items() if row.family == family and y <= worst]
            axes.plot(*zip(*here, strict=True) if here else ([], []), _SHAPES[place % len(_SHAPES)], markersize=6,
                      color=f"C{place % 10}", alpha=0.8, linestyle=":", linewidth=0.6, label=family)  # fmt: skip
        if dense:
            axes.axhline(dense, color="0.5", linestyle="--", linewidth=1, label="dense")
        beyond = ", ".join(row.name for row, y in points.items() if y > worst)
        title = f"{name}; beyond {worst:.3g}: {beyond}" if beyond else name
        axes.set_title(textwrap.fill(title, 80), fontsize=7)
        axes.set_xlabel("bits per weight, scales and tables included", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        _plain_log_axis(axes, base=10, subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    return _save(figure, path)
