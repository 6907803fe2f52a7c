"""A small invertible matrix as it is learned: P = U diag(s) V^T, and P^-T = U diag(1/s) V^T without any inverse.

U and V are orthogonal, U = U0 C(A) with Cayley's map of a skew matrix A (zero at the start) around any orthogonal U0:

    C(A) = (I + A)^-1 (I - A)          the eigenvalues of I + A are 1 + i x: never singular, whatever A

and s = exp(t), so no value of the parameters makes P singular. With ``direct`` P itself is learned and its inverse is
taken in float64 (upstream's ``--direct_inv``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..errors import CalibrationError


class Pair(NamedTuple):
    """``forward``: P (n, n), x P is what runs. ``inverse``: P^-T, for the other side."""

    forward: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Pair:
        """The pair of a known P; the inverse is taken in float64.

        Raises:
            CalibrationError: P has no inverse.
        """
        inverse, failed = torch.linalg.inv_ex(matrix.double())
        if int(failed) or not bool(torch.isfinite(inverse).all()):
            raise CalibrationError(f"a transform of {len(matrix)} x {len(matrix)} is singular; calibrate again")
        return cls(matrix, inverse.mT.to(matrix.dtype))


class Parts(NamedTuple):
    """U (n, n), s (n,), V (n, n) of P = U diag(s) V^T."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """P."""
        return (self.left * self.values) @ self.right.mT


class Factor(nn.Module):
    """P (n, n), learnable, starting at ``parts``.

    Args:
        parts: U, s > 0, V, any float dtype.
        direct: learn the entries of P instead.
    """

    start: torch.Tensor

    def __init__(self, parts: Parts, *, direct: bool = False) -> None:
        super().__init__()
        self.direct = direct
        if direct:
            self.matrix = nn.Parameter(parts.matrix().float())
            return
        size = len(parts.values)
        self.register_buffer("start", torch.stack([parts.left, parts.right]).float())
        self.skew = nn.Parameter(torch.zeros(2, size, size, device=parts.values.device))
        self.log_values = nn.Parameter(parts.values.float().log())

    def pair(self, turns: torch.Tensor | None) -> Pair:
        """P and P^-T, given C(A) (2, n, n) of ``skew`` from `turned`."""
        if turns is None:
            inverse, _ = torch.linalg.inv_ex(
                self.matrix.double()
            )  # a singular P gives Inf, which training steps back from
            return Pair(self.matrix, inverse.mT.to(self.matrix.dtype))
        left, right = self.start @ turns
        values = self.log_values.exp()
        return Pair((left * values) @ right.mT, (left / values) @ right.mT)


def cayley(raw: torch.Tensor) -> torch.Tensor:
    """Orthogonal C (..., n, n) from any raw (..., n, n), of which the part below the diagonal counts."""
    lower = raw.tril(-1)
    skew = lower - lower.mT
    eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
    solution, _ = torch.linalg.solve_ex(eye + skew, eye - skew)  # NaN in, NaN out: never an exception
    return solution


def pairs(factors: dict[str, Factor]) -> dict[str, Pair]:
    """Pairs of all factors; Cayley's systems of one size are solved in one batch."""
    by_size: dict[int, list[str]] = {}
    for name, factor in factors.items():
        if not factor.direct:
            by_size.setdefault(factor.skew.shape[-1], []).append(name)
    turns: dict[str, torch.Tensor] = {}
    for names in by_size.values():
        turns |= zip(names, cayley(torch.stack([factors[name].skew for name in names])), strict=True)
    return {name: factor.pair(turns.get(name)) for name, factor in factors.items()}
