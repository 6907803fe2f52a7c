"""Options of ``flute quantize`` that depend on the method: what is missing, what contradicts, what would be ignored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FluteError

BitsOption = Annotated[
    float | None,
    typer.Option(
        help="2, 3 or 4, or an average between, such as 3.25: each layer gets what it needs. "
        "Left out: what the table says, else 4.",
        show_default=False,
    ),
]
PerLayerOption = Annotated[
    bool,
    typer.Option(
        "--per-layer",
        help="Choose bits (and for higgs, where to rotate) layer by layer also for a whole number of --bits.",
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(help="int4, fp4, nf4, ... gauss4, or a JSON file of numbers or pairs. Left out: nf<bits>."),
]
MethodOption = Annotated[
    str,
    typer.Option(help="rtn, higgs: no text needed; gptq, awq, awq+gptq, best, nfl, and these with +nfl: calibrated."),
]
HadamardOption = Annotated[
    int | None, typer.Option(help="Rotate blocks of at most so many inputs; 0: none. higgs: 512, others: 0.")
]
ScaleOption = Annotated[
    str, typer.Option(help="For rtn and higgs: absmax, rms, mse: the least squared error; auto: as the table wants.")
]
CalibrationOption = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 text to calibrate with; may be repeated.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens in such a window.")]
ActOrderOption = Annotated[
    bool, typer.Option("--act-order/--no-act-order", help="For gptq, best: most important inputs first, or in order.")
]
LrOption = Annotated[
    float | None,
    typer.Option(
        help="For nfl: first step, in units of a layer's mean scale. Left out: 0.005, and behind another method, whose "
        "codes are kept, 0.0005 at 4 bits, 0.0015 at 3."
    ),
]
ObjectiveOption = Annotated[
    str, typer.Option(help="For nfl: kl (to the dense model), nll (of the text), or block after block.")
]

_LEARNING = ("epochs", "lr", "objective", "learn_table")
_CALIBRATING = ("samples", "window")


def check_method(method: str, calibration: list[Path], scale: str) -> None:
    """Refuse a method that does not exist, lacks its text, or does not go with other options.

    Raises:
        FluteError: naming the option.
    """
    from ..methods.recipes import RECIPES
    from ..quantize import SCALE_METHODS

    if method not in RECIPES:
        raise FluteError(f"--method {method} is unknown; use {', '.join(RECIPES)}")
    if scale not in SCALE_METHODS:
        raise FluteError(f"--scale {scale} is unknown; use {' or '.join(SCALE_METHODS)}")
    calibrated = RECIPES[method].calibrated
    if calibrated and not calibration:
        raise FluteError(f"--method {method} needs a text: --calibration FILE")
    if calibrated and scale != "auto":
        raise FluteError(f"--scale {scale} is for --method rtn; {method} searches its scales by itself")
    if calibration and not calibrated:
        raise FluteError(f"--calibration is not used by --method {method}; leave it out, or choose another method")


def check_used(method: str, average: float | None, context: typer.Context) -> None:
    """Refuse options that were given and that ``method`` would not look at.

    Raises:
        FluteError: naming the options.
    """
    from ..methods.recipes import RECIPES

    unused = {} if RECIPES[method].learns_scales else dict.fromkeys(_LEARNING, "--method nfl")
    unused |= {} if RECIPES[method].feedback else {"act_order": "gptq and best, also as a part of others"}
    if not RECIPES[method].calibrated:
        unused |= dict.fromkeys(_CALIBRATING, "methods that are calibrated")
        unused |= {} if average else {"seed": "methods that are calibrated, or an average of bits"}
    for name, owner in unused.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise FluteError(
                f"--{name.replace('_', '-')} is not used by --method {method}, only by {owner}; leave it out"
            )


def split_average(
    bits: float | None, per_layer: bool, table: str | None, override: list[str]
) -> tuple[int | None, float | None]:
    """``--bits`` as (a whole number for every layer, an average over layers); at most one of them is not None.

    Raises:
        FluteError: an average that is outside, or beside options that fix the bits.
    """
    if not per_layer and (bits is None or (math.isfinite(bits) and bits == int(bits))):
        return (None if bits is None else int(bits)), None
    bits = 4.0 if bits is None else bits
    if not 2 <= bits <= 4:
        raise FluteError(f"--bits {bits:g} is not supported; use 2, 3, 4, or an average between 2 and 4")
    if override:
        raise FluteError(f"--override does not go with --bits {bits:g}, which gives every layer bits of its own")
    if table is not None and table.endswith(".json"):
        raise FluteError(f"--table {table} has one number of bits; name a family for --bits {bits:g}, such as nf4")
    return None, bits
