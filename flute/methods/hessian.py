"""What calibration knows about a layer's input: H = sum of x^T x, and how to invert it without ever failing.

The error that rounding W (N, K) to W^ makes in the layer's output, summed over the calibration tokens, is

    |X W^T - X W^^T|^2 = trace((W - W^) H (W - W^)^T),    H = X^T X  (K, K)

so H is all that the methods here need of the data. H is summed in float64: a few hundred thousand float32 products of
like sign lose half their digits.

H may be singular (fewer tokens than K, dead inputs, inputs that are linear in each other). `damped` adds a share of the
mean diagonal, one percent at first and ten times more until the Cholesky factor exists; at a share of 1 it does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import QuantizeError

DAMPING = 0.01
_MOST = 1e4


class Damped(NamedTuple):
    """``matrix``: H plus ``share`` of its mean diagonal, float32 (K, K); ``factor``: its lower Cholesky factor,
    float64; ``dead``: number of inputs that were always zero."""

    matrix: torch.Tensor
    factor: torch.Tensor
    share: float
    dead: int


def damped(hessian: torch.Tensor, *, share: float = DAMPING, name: str = "weight") -> Damped:
    """H made positive definite.

    Args:
        hessian: (K, K), symmetric, any float dtype.
        share: of the mean diagonal to add; raised by factors of ten where it does not suffice.
        name: the layer's, for messages.

    Raises:
        QuantizeError: H is not a square matrix of finite numbers, or has a negative diagonal.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise QuantizeError(f"layer {name!r}: Hessian is {tuple(hessian.shape)}; a square matrix (K, K) is needed")
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    if not bool(torch.isfinite(matrix).all()) or bool((diagonal < 0).any()):
        raise QuantizeError(
            f"layer {name!r}: the Hessian of its inputs is not finite and positive; the calibration text drives the "
            "model to NaN or Inf, or the weights before this layer are damaged"
        )
    mean = float(diagonal.mean())
    mean = mean if mean > 0 else 1.0  # all inputs dead: any metric will do, the identity is one
    matrix = (matrix + matrix.T) / 2
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        trial = matrix + share * mean * eye
        factor, failed = torch.linalg.cholesky_ex(trial)
        if not int(failed) and bool(torch.isfinite(factor).all()):
            return Damped(trial.float(), factor, share, int((diagonal == 0).sum()))
        if share > _MOST:
            raise QuantizeError(f"layer {name!r}: its Hessian stays singular at a damping of {share:g}; it is no X^T X")
        share = max(share * 10, DAMPING)


def inverse_factor(factor: torch.Tensor) -> torch.Tensor:
    """Upper U (K, K) float32 with H^-1 = U^T U, from the lower Cholesky factor of H."""
    inverse = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True).float()


def dense_target(weight: torch.Tensor, made: Damped, shift: torch.Tensor | None, strength: float = 1.0) -> torch.Tensor:
    """The dense weight that, on the inputs of the quantized model, does best what W does on those of the dense one.

    With X the dense model's inputs, X^ the quantized model's, and H = X^^T X^ the least squares solution of
    X W*^T ~ X^ W^T is W* = W + W (X^T X^ - H) H^-1 (Li et al. 2025, GPTAQ, section 4, in another form).

    Args:
        weight: W (N, K) float32.
        made: H, damped.
        shift: W (X^T X^ - H), float64 (N, K), what the two streams differ by; None: W is the target.
        strength: how much of the change to take; 1 is least squares.
    """
    if shift is None or strength == 0:
        return weight
    change = torch.cholesky_solve(shift.double().T, made.factor).T
    return weight + strength * change.float()


def loss(error: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(N,): the squared output error of each row, e H e^T, of ``error`` W - W^ (N, K)."""
    return ((error @ matrix) * error).sum(-1)
