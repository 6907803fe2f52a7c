"""Stand-in for ``fast_hadamard_transform`` 1.1 by Dao-AILab: its one function that transformers' HIGGS calls.

The original is compiled by nvcc when it is installed; this one is ``flute::hadamard``, which needs no compiler and also
runs on CPUs. The original's transforms of 12, 20, 28 and 40 times a power of two use other matrices and are not here.
"""

import math

import torch

from flute.kernels.hadamard import hadamard

__all__ = ["hadamard_transform"]


def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x (..., n) times Sylvester's matrix of order n in natural order (entries 1 and -1), times ``scale``.

    If n is no power of two, x is filled up with zeros to the next one and the result is cut to n.
    """
    width = x.shape[-1]
    order = 1 << (width - 1).bit_length()
    filled = torch.nn.functional.pad(x, (0, order - width))
    return (hadamard(filled, order) * (scale * math.sqrt(order)))[..., :width]
