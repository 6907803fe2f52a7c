"""The lookup tables that have names.

A table is float32 of shape (2**bits,), ascending, or one of pairs (2**(2*bits), 2); every value is meant to be
rounded once to the activation dtype (fp16, bf16) before a kernel uses it.

* ``intB``  -2**(B-1) .. 2**(B-1)-1, the signed integers, exact in fp16 and bf16.
* ``fpB``   tiny floats, sign + exponent + mantissa, no infinities, ascending, both zeros kept (so a code is wasted):
            fp4 = e2m1 {0, .5, 1, 1.5, 2, 3, 4, 6}, fp3 = e2m0 {0, 1, 2, 4}, fp2 = e1m0 {0, 1}, each with both signs.
* ``nfB``   NormalFloat: quantiles of the standard normal at evenly spaced probabilities, scaled to [-1, 1], with an
            exact zero and one more positive than negative level (Dettmers et al. 2023, QLoRA, section 3; the nf4
            constants are the published ones, nf2 and nf3 follow the same rule and agree with it to float32).
* ``gaussB``  the 2**B values of least squared error for a standard normal variable (Lloyd-Max), and ``gausspairB``
            (2**(2*B), 2) the pairs: for weights that a rotation has made normal, scales their root mean square
            (Malinovskii et al. 2024, HIGGS). Made by ``training/gaussian_grids.py``, which tells how.

Any other table is the caller's tensor, passed beside a spec whose ``table`` is ``"custom"``.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import NormalDist

import torch

from .errors import SpecError
from .spec import CUSTOM_TABLE, PAIR_TABLES, QuantSpec

# The published constants differ from the rule in the last digits; checkpoints made with them must decode exactly.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FLOAT_MAGNITUDES = {2: (0.0, 1.0), 3: (0.0, 1.0, 2.0, 4.0), 4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}


def _normal_float(bits: int) -> list[float]:
    if bits == 4:
        return list(_NF4)
    half = 1 << (bits - 1)
    top = 1.0 - 0.5 * (1 / 32 + 1 / 30)  # largest probability whose quantile is used; the same for every width
    quantile = NormalDist().inv_cdf
    negative = [-quantile(top + (0.5 - top) * i / (half - 1)) for i in range(half)]  # -q(top) .. 0
    positive = [quantile(0.5 + (top - 0.5) * i / half) for i in range(1, half + 1)]  # q(0.5+) .. q(top)
    largest = max(abs(value) for value in negative + positive)
    return [value / largest + 0.0 for value in negative + positive]  # + 0.0 turns -0.0 into 0.0


def _small_float(bits: int) -> list[float]:
    magnitudes = _FLOAT_MAGNITUDES[bits]
    return [-value for value in reversed(magnitudes)] + list(magnitudes)


@cache
def _gaussian_grids() -> dict[str, list]:
    return json.loads(Path(__file__).with_name("data").joinpath("gaussian_grids.json").read_text(encoding="utf-8"))


def named_table(name: str) -> torch.Tensor:
    """The table called ``name`` as float32 (2**bits,), or (2**(2*bits), 2) for pairs, on the CPU.

    Raises:
        SpecError: no table has this name.
    """
    family, bits = name[:-1], name[-1:]
    if bits in ("2", "3", "4"):
        width = int(bits)
        if family == "int":
            return torch.arange(-(1 << (width - 1)), 1 << (width - 1), dtype=torch.float32)
        if family == "fp":
            return torch.tensor(_small_float(width), dtype=torch.float32)
        if family == "nf":
            return torch.tensor(_normal_float(width), dtype=torch.float32)
        if family == "gauss" or name in PAIR_TABLES:
            return torch.tensor(_gaussian_grids()[name], dtype=torch.float32)
    raise SpecError(
        f"table={name!r} is unknown; use int, fp, nf, gauss or gausspair followed by 2, 3 or 4, or pass your own tensor"
    )


def resolve_table(spec: QuantSpec, table: torch.Tensor | None = None) -> torch.Tensor:
    """The table of ``spec`` in float32: the named one, or ``table`` checked against the spec's shape.

    Args:
        spec: the spec; ``table`` must be given exactly when ``spec.table`` is ``"custom"``.
        table: (2**bits,) or, for vectors, (2**(2*bits), 2); any float dtype and device.

    Raises:
        SpecError: a custom table is missing, superfluous, of the wrong shape or not finite.
    """
    if spec.table != CUSTOM_TABLE:
        if table is not None:
            raise SpecError(f"table={spec.table!r} is a named table; use {CUSTOM_TABLE!r} to pass your own tensor")
        return named_table(spec.table)
    if table is None:
        raise SpecError(f"table={CUSTOM_TABLE!r} needs a tensor of shape {spec.table_shape}; pass table=...")
    if tuple(table.shape) != spec.table_shape:
        raise SpecError(
            f"custom table has shape {tuple(table.shape)}; bits={spec.bits} with vector_size={spec.vector_size} "
            f"needs {spec.table_shape}"
        )
    if not table.is_floating_point() or not bool(torch.isfinite(table).all()):
        raise SpecError(f"custom table ({table.dtype}) must hold finite floating-point values")
    if not bool((table != 0).any()):
        raise SpecError("custom table holds only zeros; a table needs at least one other value")
    return table.detach().to(torch.float32)
