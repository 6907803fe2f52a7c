"""The command line: ``flute quantize | convert | flatquant | flatness | eval | generate | inspect | card | ...``.

Each command is a file in `flute.commands`. Nothing here or at the top of those files imports torch, so that ``--help``
is quick. Figures and text go to stdout, everything else to stderr; a refusal is one line there and exit code 1.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

from flute import __version__
from flute.commands import (
    bench,
    card,
    convert,
    demo,
    doctor,
    evaluate,
    flatness,
    flatquant,
    generate,
    inspect,
    quantize,
    tune,
)
from flute.errors import FluteError

# click's base class of "you typed it wrong": typer brings click along under a private name, but shows this child of it
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130

app = typer.Typer(
    name="flute",
    help="Quantize an LLM's linear layers to 2-4 bits with any lookup table, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("flatquant")(flatquant.flatquant)
app.command("flatness")(flatness.flatness)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("card")(card.card)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flute {__version__}")
        raise typer.Exit(0)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Only what comes before a command."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 refused, 2 typed wrong, 130 interrupted."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except FluteError as error:
        _complain(str(error), 1)
    except _USAGE_ERROR as error:
        format_message = getattr(error, "format_message", None)
        text = format_message() if callable(format_message) else str(error)
        _complain(f"{text} (flute --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)  # the reader of our output went away
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    if code == _INTERRUPTED:  # typer's own word for Ctrl-C, in silence
        _complain("interrupted", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str, code: int) -> NoReturn:
    print(f"flute: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)
