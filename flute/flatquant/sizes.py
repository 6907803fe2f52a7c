"""Sizes of the two factors of a Kronecker transform: n = n1 n2 with n1 <= n2 and the least n1 + n2.

The cost of the transform is n (n1 + n2) products per token, so the best pair is the one nearest to the square root
(FlatQuant, section 3.2). Scanning down from there finds it for every n, also for n = 2 mod 4, which is no difference of
squares.
"""

from __future__ import annotations

import math

from ..errors import SpecError


def factor_sizes(features: int) -> tuple[int, int]:
    """(n1, n2) of ``features``: 14336 -> (112, 128).

    Raises:
        SpecError: ``features`` is not positive.
    """
    if features < 1:
        raise SpecError(f"features={features} cannot be cut into two factors; give a positive number")
    first = next(n for n in range(math.isqrt(features), 0, -1) if features % n == 0)
    return first, features // first
