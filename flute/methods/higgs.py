"""HIGGS: rotate blocks of weights, round them to a grid that is optimal for normal variables. No data is needed.

A random-looking rotation makes any weights nearly normal, so one grid per number of bits serves every layer of every
model, and its squared error relative to the weights' is known beforehand: the D of `training/gaussian_grids.py`, by
bits per weight

    one weight per code     2: 0.1175   3: 0.0345   4: 0.0095
    two                     2: 0.1076   3: 0.0295   4: 0.0078          (with scales that are exact and one to a row)

Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", section 4.
Their rotation has random signs too; here it is the plain Hadamard matrix, which the input then needs just once.
"""

from __future__ import annotations

from ..spec import QuantSpec

HADAMARD_SIZE = 512


def higgs_spec(
    bits: int = 4, group_size: int = 64, *, vector_size: int = 2, hadamard_size: int = HADAMARD_SIZE
) -> QuantSpec:
    """The spec of HIGGS; quantize with it by method ``"rtn"`` (the same as ``"higgs"``), or a calibrated one.

    Args:
        bits: 2, 3 or 4. group_size: weights that share a scale, their root mean square.
        vector_size: weights per code, 1 or 2.
        hadamard_size: the largest block to rotate; a layer whose K it does not divide gets a smaller one.

    Raises:
        SpecError: a value is outside of its limits.
    """
    family = "gauss" if vector_size == 1 else "gausspair"
    return QuantSpec(bits, group_size, f"{family}{bits}", vector_size, hadamard_size)
