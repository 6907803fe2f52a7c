"""Orthonormal Hadamard transforms: H of n = m 2^k with m in {1, 12, 20, 28}, and x . H block by block in plain torch.

A Hadamard matrix has entries +-1 and rows that are orthogonal to one another; divided by sqrt(n) it is a rotation that
spreads an outlier evenly over all n positions. One convention, the only one in this house:

    H_n = H_m (x) S_k / sqrt(n)      S_0 = (1),  S_k = ((1, 1), (1, -1)) (x) S_{k-1}      (x): Kronecker's product

S_k is Sylvester's matrix in natural order, what ``scipy.linalg.hadamard(2**k)`` and ``fast_hadamard_transform`` use.
The factor m stands in front: position i 2^k + j of a block is row i of H_m and row j of S_k, so H_m acts on the m runs
of 2^k neighbours, S_k within each run.

H_m is Paley's second construction (R. Paley, "On orthogonal matrices", J. Math. Phys. 12, 1933): m = 2 (q + 1), q = 5,
9, 13 a prime power of the form 4 t + 1, chi the quadratic character of the field of q elements (1 for squares, -1 for
others, 0 for zero), and

    C = ( 0   1  )     Q_ab = chi(a - b)        H_m = ( C + I   C - I )
        ( 1   Q  )                                    ( C - I  -C - I )

The second construction, since it is symmetric (the first is not). So every H_n here is its own transpose and its own
inverse: one function rotates, rotates back, and is its own gradient. It also makes the factor cheap: with halves (a, b)
and s = a + b, d = a - b, the product is (C s + d, C d - s). Other libraries' matrices of order 12, 20 and 28 are
others, equally good: weights rotated with one of them need activations rotated with the same one.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from .blocks import FACTORS, MOST, largest_block, split
from .errors import OperatorError

__all__ = ["FACTORS", "MOST", "conference", "largest_block", "matrix", "split", "transform"]


def _field(q: int) -> list[list[int]]:
    """Differences a - b of the field of q elements, by number, for q prime or 9."""
    if q != 9:  # integers modulo q
        return [[(a - b) % q for b in range(q)] for a in range(q)]
    return [[(a // 3 - b // 3) % 3 * 3 + (a - b) % 3 for b in range(q)] for a in range(q)]  # u + 3 v is u + v i


def _squares(q: int) -> set[int]:
    """The squares of the field but zero; with q = 9, i^2 = -1: (u + v i)^2 = u^2 - v^2 + 2 u v i."""
    if q != 9:
        return {a * a % q for a in range(1, q)}
    return {(u * u - v * v) % 3 + 3 * (2 * u * v % 3) for u in range(3) for v in range(3)} - {0}


@cache
def conference(factor: int) -> tuple[tuple[int, ...], ...]:
    """C of order factor / 2: symmetric, zero diagonal, +-1 elsewhere, C C^T = (factor / 2 - 1) I."""
    q = factor // 2 - 1
    squares = _squares(q)
    core = [[(0 if d == 0 else 1 if d in squares else -1) for d in row] for row in _field(q)]
    return ((0, *[1] * q), *((1, *row) for row in core))


def matrix(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """H without its 1 / sqrt(size): entries +-1, (size, size), symmetric, on the CPU.

    Raises:
        OperatorError: there is no such size (see `split`).
    """
    factor, log = split(size)
    h = torch.ones(1, 1, dtype=dtype)
    if factor > 1:
        c, one = torch.tensor(conference(factor), dtype=dtype), torch.eye(factor // 2, dtype=dtype)
        h = torch.cat((torch.cat((c + one, c - one), 1), torch.cat((c - one, -c - one), 1)))
    two = torch.tensor([[1, 1], [1, -1]], dtype=dtype)
    for _ in range(log):
        h = torch.kron(h, two)
    return h


def transform(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x (..., n) -> (..., n): each block of ``block_size`` neighbours along the last dimension times H, rounded once.

    Sums are float32 (float64 for float64): butterflies for the power of two, then a product with H_m for the factor.

    Raises:
        OperatorError: there is no such block size, or it does not divide n.
    """
    factor, log = split(block_size)
    if x.dim() == 0 or x.shape[-1] % block_size:
        last = "is a scalar" if x.dim() == 0 else f"has a last dimension of {x.shape[-1]}"
        raise OperatorError(f"flute.hadamard: x {last}; block_size={block_size} must divide it")
    wide = x.contiguous().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for bit in range(log):
        pairs = wide.reshape(-1, 2, 1 << bit)
        wide = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
    if factor > 1:
        sums = matrix(factor).to(x.device) @ wide.reshape(-1, factor, 1 << log).double()  # float32 might mean TF32
        wide = sums.to(wide.dtype)
    return (wide * (1 / math.sqrt(block_size))).to(x.dtype).reshape(x.shape)
