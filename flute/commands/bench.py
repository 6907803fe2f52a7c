"""``flute bench kernel | model | quality | plot``: how fast and how good, beside what else is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FluteError
from .common import (
    OutputOption,
    PlotOption,
    QuietOption,
    check_device,
    close,
    note,
    parse_dtype,
    print_table,
    quiet_libraries,
)
from .quality import quality

if TYPE_CHECKING:
    import torch

app = typer.Typer(help="Measure speed, of the kernel or of a whole model, and quality.", no_args_is_help=True)
app.command("quality")(quality)

_SHAPES = "4096x4096,6144x4096,4096x14336,8192x8192,28672x4096,28672x8192"
_TOKENS = "1,2,4,8,16,32,64,128,256,1024,4096"


def numbers(option: str, text: str) -> list[int]:
    """``"1,2,4"`` -> [1, 2, 4], in rising order, each once.

    Raises:
        FluteError: not a list of positive numbers; -1 is a whole row and allowed for group sizes.
    """
    least = -1 if option == "--group-sizes" else 1
    words = [word.strip() for word in text.split(",")]
    if not all(word.lstrip("-").isdecimal() and int(word) >= least and int(word) for word in words):
        raise FluteError(f"{option} {text!r}: give whole numbers from 1 on with commas between them, such as 1,2,4")
    return sorted({int(word) for word in words})


def _dtypes(text: str) -> list[torch.dtype]:
    short = {"fp16": "float16", "bf16": "bfloat16"}
    names = [short.get(word.strip(), word.strip()) for word in text.split(",")]
    for name in names:
        if name not in short.values():
            raise FluteError(f"--dtypes {name!r}: use fp16, bf16, or both with a comma")
    found = [parse_dtype(name) for name in dict.fromkeys(names)]
    return [dtype for dtype in found if dtype is not None]


@app.command("kernel")
def kernel(
    shapes: Annotated[str, typer.Option(help="NxK and names of models such as llama-3.1-8b, with commas.")] = _SHAPES,
    tokens: Annotated[str, typer.Option("-m", "--tokens", help="Numbers of tokens M.")] = _TOKENS,
    bits: Annotated[str, typer.Option(help="Bits per weight.")] = "4,3,2",
    group_sizes: Annotated[str, typer.Option(help="Weights that share a scale; -1 for the whole row.")] = "64",
    dtypes: Annotated[str, typer.Option(help="fp16, bf16 or both.")] = "fp16",
    peers: Annotated[str, typer.Option(help="Other libraries: all (that are installed), none, or names.")] = "all",
    peer_tokens: Annotated[str, typer.Option(help="Measure peers only at these M; default: all of -m.")] = "",
    output: OutputOption = Path("bench-output"),
    draw: PlotOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time of one linear layer beside torch's dense matmul and other libraries. Needs a GPU.

    Everything is measured in one run: weights rotate beyond the L2 cache, CUDA graphs are replayed in turns, medians
    are taken, answers are checked first. The speed at which the GPU reads is measured too.
    """
    from ..bench import shapes as named

    chosen = named.parse_shapes(shapes)
    ms = numbers("-m", tokens)
    for_peers = numbers("--peer-tokens", peer_tokens) if peer_tokens else ms
    formats = numbers("--bits", bits), numbers("--group-sizes", group_sizes)
    import torch

    from ..bench import kernel as bench
    from ..bench import plot as pictures
    from ..bench.machine import describe
    from ..bench.results import output_file, write_rows

    here, absent = bench.find_peers(peers)
    sweep = bench.Sweep(
        chosen, ms, sorted(formats[0], reverse=True), formats[1], _dtypes(dtypes), here,
        [m for m in ms if m in for_peers],
    )  # fmt: skip
    if draw:
        pictures.require()
    if not torch.cuda.is_available():
        raise FluteError("flute bench kernel measures on a GPU, and torch sees no GPU; flute doctor tells why")
    path = output_file(output, "kernel")
    from ..bench.timing import read_ceiling

    ceiling = read_ceiling()
    versions = ", ".join(f"{peer.name} {peer.version()}" for peer in here) or "none"
    origin = f"{describe()}; read ceiling {ceiling / 1e12:.2f} TB/s; peers: {versions}"
    note(origin, quiet=quiet)
    for name, why in absent.items():
        note(f"{name} is left out: {why}", quiet=quiet)
    rows: list[Any] = []

    def done(made: list[bench.Row]) -> None:
        rows.extend(made)
        write_rows(path, origin, rows)  # each time: a peer that takes the process down leaves what was measured
        print_table(*bench.table(made, ms))

    bench.measure(sweep, ceiling, done)
    for line in bench.notes(rows):
        note(f"not timed: {line}", quiet=quiet)
    close(path, pictures.kernels if draw else None, rows, origin)


@app.command("model")
def model(
    config: Annotated[
        str, typer.Option(help="llama-3.1-8b or another model by name, tiny, or a folder with config.json.")
    ] = "llama-3.1-8b",
    methods: Annotated[
        str,
        typer.Option(
            help="dense, bitsandbytes (NF4), tables of ours; nf4+head: the output head too; flatquant; any of them "
            "with +attention last: flute's attention of a decode step."
        ),
    ] = "dense,nf4,nf4+attention,nf4+head+attention,nf3+attention,nf2+attention,bitsandbytes",
    batch: Annotated[str, typer.Option(help="Numbers of sequences.")] = "1,4,16,64",
    prompts: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "1,128,2048",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1 for the whole row.")] = 64,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16; float32 on the CPU.")] = "bf16",
    device: Annotated[str, typer.Option(help="cuda; cpu is for trying the command out.")] = "cuda",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile decoder layers by torch.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed together.")] = 32,
    prefill_tokens: Annotated[int, typer.Option(help="Leave out prefills of more tokens (batch x prompt).")] = 8192,
    output: OutputOption = Path("bench-output"),
    draw: PlotOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decoded and prefilled tokens per second of a model with random weights in transformers.

    Static cache, one CUDA graph a step, the same code around the linear layers (and attention) for every method. Memory
    stands beside.
    """
    batches, lengths = numbers("--batch", batch), numbers("--prompts", prompts)
    names = [name.strip() for name in methods.split(",")]
    check_device(device)
    quiet_libraries()
    from ..bench import model as bench
    from ..bench import plot as pictures
    from ..bench.machine import describe
    from ..bench.results import output_file, write_rows

    for name in names:
        bench.check_method(name)
    chosen = parse_dtype(dtype) if dtype == "float32" and device == "cpu" else _dtypes(dtype)[0]
    assert chosen is not None
    plan = bench.Plan(config, names, batches, lengths, group_size, chosen, device, compiled, steps, prefill_tokens)
    bench.load_config(config)
    if draw:
        pictures.require()
    path = output_file(output, "model")
    layers = f"decoder layers {'compiled' if compiled else 'not compiled'}"
    origin = f"{describe()}; {config}, {str(chosen).removeprefix('torch.')}, {layers}"
    note(origin, quiet=quiet)
    rows: list[Any] = []

    def done(made: list[bench.ModelRow]) -> None:
        rows.extend(made)
        write_rows(path, origin, rows)
        measured = [row for row in made if row.batch]
        if measured:
            print_table(*bench.table(measured))

    bench.measure(plan, done)
    for line in dict.fromkeys(f"{row.method}: {row.note}" for row in rows if row.note):
        note(line, quiet=quiet)
    close(path, pictures.models if draw else None, rows, origin)


@app.command("plot")
def plot(
    files: Annotated[list[Path], typer.Argument(metavar="CSV...", help="What the other commands wrote.")],
) -> None:
    """Draw the figures of CSV files, each as a .png beside it; for machines with a GPU and no matplotlib."""
    from ..bench import plot as pictures
    from ..bench.kernel import Row
    from ..bench.model import ModelRow
    from ..bench.quality import QualityRow
    from ..bench.results import read_rows

    pictures.require()
    drawers: dict[Any, Any] = {Row: pictures.kernels, ModelRow: pictures.models, QualityRow: pictures.quality}
    for path in files:
        origin, rows = read_rows(path, *drawers)
        draw = drawers[type(rows[0])]
        close(path, draw, rows, origin)
