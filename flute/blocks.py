"""Sizes of Hadamard blocks: n = m 2^k with m in {1, 12, 20, 28}. Integers only: a spec asks without torch."""

from __future__ import annotations

from .errors import OperatorError

FACTORS = (12, 20, 28)
MOST = 32768  # the largest block


def split(size: int) -> tuple[int, int]:
    """(m, k) with size = m 2^k, m = 1 or one of `FACTORS`.

    Raises:
        OperatorError: there is no such pair, or the size is beyond `MOST`.
    """
    for factor in (1, *FACTORS):
        power, rest = divmod(size, factor)
        if 0 < size <= MOST and rest == 0 and power & (power - 1) == 0:
            return factor, power.bit_length() - 1
    raise OperatorError(
        f"flute.hadamard: block_size={size}; a block is 2^k, 12 * 2^k, 20 * 2^k or 28 * 2^k, from 1 to {MOST}"
        + (f"; {size} can be cut into blocks of {largest_block(size)}" if size > 0 else "")
    )


def largest_block(features: int, most: int = MOST) -> int:
    """The largest block size up to ``most`` that divides ``features`` (both positive)."""
    sizes = (factor << k for factor in (1, *FACTORS) for k in range(MOST.bit_length()))
    return max(size for size in sizes if size <= min(most, MOST) and features % size == 0)
