"""``flute bench quality``: one table of all methods on one model, and its plot."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FluteError
from .common import (
    DeviceOption,
    ModelArgument,
    OutputOption,
    PlotOption,
    QuietOption,
    ThreadsOption,
    check_device,
    close,
    note,
    print_table,
    quiet_libraries,
    read_text,
)
from .method_options import SamplesOption, WindowOption

if TYPE_CHECKING:
    from ..bench.quality import QualityRow


def quality(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text to evaluate on.", show_default=False)],
    second_text: Annotated[Path | None, typer.Option(help="Another: do gains hold on it?")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="For calibrated methods; never what is evaluated.")
    ] = None,
    samples: SamplesOption = 64,
    window: WindowOption = 512,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window of evaluation.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows of each text.")] = None,
    only: Annotated[str, typer.Option(help="Names or globs of rows, with commas: make these, anew.")] = "",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    output: OutputOption = Path("bench-output"),
    draw: PlotOption = False,
    quiet: QuietOption = False,
) -> None:
    """Perplexity, KL divergence and size of every method and of other libraries, on the same text and windows.

    Each row is written when it is there. Rows that the file has already are kept, so a run that was cut off goes on
    where it was; --only makes some of them again. What cannot be made here is named, and left out.
    """
    from ..bench import plot as pictures
    from ..bench import quality as bench
    from ..bench.candidates import CANDIDATES, chosen
    from ..bench.results import output_file, read_rows, write_rows
    from ..integrations import folders

    texts = {path.name: read_text(path) for path in (text, second_text) if path is not None}
    if second_text is not None and len(texts) < 2:
        raise FluteError(f"--second-text {second_text} has the name of --text; figures are told apart by it")
    for path in calibration or []:
        read_text(path)  # refused now, not after an hour
        if path.name in texts:
            raise FluteError(f"--calibration {path} is what the table evaluates; give another text")
    if draw:
        pictures.require()
    check_device(device)
    quiet_libraries(threads)
    file = output_file(output, "quality")
    rows: dict[str, QualityRow] = {}
    if file.exists():
        rows = {row.name: row for row in read_rows(file, bench.QualityRow)[1]}
    wanted = chosen([part.strip() for part in only.split(",") if part.strip()], rows)
    order = {one.name: place for place, one in enumerate(CANDIDATES)}
    with (
        tempfile.TemporaryDirectory() as work,
        folders.dense_folder(folders.find(model), Path(work)) as source,
    ):
        conditions = bench.Conditions(
            source, Path(model).name, texts, calibration or [], samples, window, seq_len, windows, device, threads
        )
        bank = bench.Bench(conditions, lambda line: note(line, quiet=quiet))
        bank.check(list(rows.values()), file)
        for candidate in wanted:
            try:
                rows[candidate.name] = bank.row(candidate)
            except FluteError as error:
                note(f"{candidate.name} is left out: {error}")
                continue
            rows = dict(sorted(rows.items(), key=lambda item: order.get(item[0], len(order))))
            write_rows(file, _origin(rows), list(rows.values()), digits=6)
    if not rows:
        raise FluteError("nothing was measured; the lines above say why")
    made = list(rows.values())
    print_table(*bench.table(made))
    close(file, pictures.quality if draw else None, made, _origin(rows))


def _origin(rows: dict[str, QualityRow]) -> str:
    """What the file is about; machine, versions and date stand in every row, which may be of different runs."""
    from ..evaluate.perplexity import PROTOCOL

    one = next(iter(rows.values()))
    texts = " and ".join(
        f"{name} ({tokens} tokens)"
        for name, tokens in ((one.text, one.tokens), (one.second_text, one.second_tokens)) if name
    )  # fmt: skip
    return f"{one.model}, {one.device}; perplexity on {texts}, windows of {one.seq_len}; {PROTOCOL}"
