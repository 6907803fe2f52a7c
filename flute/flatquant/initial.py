"""Where transforms begin: in closed form from second moments, as Hadamard rotations, or as nothing at all.

Rounding x P to steps in proportion to its norm, and W P^-T likewise, makes an output error in proportion to
tr(P^T M P) tr(P^-1 G P^-T), with M = E x^T x and G = W^T W. Over all P the product is least where both sides have the
same covariance, that is for

    P P^T = A,   A M A = G,   A = M^-1/2 (M^1/2 G M^1/2)^1/2 M^-1/2      (the geometric mean of M^-1 and G)

That leaves a rotation free: P = A^1/2 E R, E the eigenvectors of the common covariance A^1/2 M A^1/2, and R a rotation
whose entries all have about the same size: then every channel has the same variance on both sides. For a Kronecker
product the left factor gets this solution for the moments of its own index, then the right one for those that are left.
(The idea of choosing transforms by the second moments of both sides is WUSH's, arXiv 2512.00956.)
"""

from __future__ import annotations

import math

import torch

from ..blocks import split
from ..errors import OperatorError
from ..hadamard import matrix
from .factors import Parts

_DAMPING = 1e-2  # of the mean variance, added to the moments


def identity(size: int) -> Parts:
    """P = I."""
    eye = torch.eye(size, dtype=torch.float64)
    return Parts(eye, torch.ones(size, dtype=torch.float64), eye)


def flat_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """Orthogonal (n, n) float64 with entries of about one size and random signs per row: Hadamard where there is one,
    else Hartley's matrix, whose entries cos + sin are at most sqrt(2 / n)."""
    try:
        split(size)
        base = matrix(size) / math.sqrt(size)
    except OperatorError:
        turns = torch.arange(size, dtype=torch.float64)
        angles = 2 * math.pi / size * (turns[:, None] * turns % size)
        base = (angles.cos() + angles.sin()) / math.sqrt(size)
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs * base


def hadamard(size: int) -> Parts:
    """P = a rotation that spreads outliers, whatever they are: the baseline without data."""
    return Parts(flat_rotation(size), torch.ones(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64))


def balanced(moment: torch.Tensor, gram: torch.Tensor) -> Parts:
    """P of least expected error for M and G, both (n, n), symmetric and not negative."""
    m, g = _regular(moment), _regular(gram)
    root, inverse = _power(m, 0.5), _power(m, -0.5)
    a = inverse @ _power(root @ g @ root, 0.5) @ inverse
    squares, left = torch.linalg.eigh((a + a.mT) / 2)
    values = squares.clamp_min(1e-12).sqrt()
    values = values / values.log().mean().exp()
    half = left * values @ left.mT
    common = torch.linalg.eigh(half @ m @ half).eigenvectors
    rotation = flat_rotation(len(m)).to(m.device)
    return Parts(left, values, (left.mT @ common @ rotation).mT)


def balanced_pair(x: torch.Tensor, w: torch.Tensor, rows: int) -> tuple[Parts, Parts]:
    """Factors (n1, n1) and (n2, n2), n1 = ``rows``, for activations (T, n1 n2) and weights (N, n1 n2); every row of
    either counts the same, since each has a scale of its own."""
    grids = [each.float() / each.float().norm(dim=-1, keepdim=True).clamp_min(1e-20) for each in (x, w)]
    grids = [each.view(len(each), rows, -1) for each in grids]
    left = balanced(*(_moment(grid) for grid in grids))
    turns = left.matrix(), left._replace(values=1 / left.values).matrix()  # P and P^-T
    turned = [grid.mT @ turn.float() for grid, turn in zip(grids, turns, strict=True)]
    return left, balanced(*(_moment(grid) for grid in turned))


def _moment(grid: torch.Tensor) -> torch.Tensor:
    """Mean of X X^T over X (T, n1, n2); float64 (n1, n1)."""
    return torch.einsum("tij,tkj->ik", grid, grid).double() / len(grid)


def _regular(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix.double()
    mean = wide.diagonal().mean().clamp_min(1e-30)
    return (wide + wide.mT) / (2 * mean) + _DAMPING * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(1e-12).pow(exponent) @ vectors.mT
