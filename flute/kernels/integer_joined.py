"""Products of one activation with several layers' integer weights in one launch, ``flute::int_linears``.

    y (M, N1 + N2 + ...) = codes (M, K) . [W1; W2; ...]^T * scale * weight_scales + biases

One kernel runs where weights, scales and biases are neighbours in memory, as `lay_together` puts them; the operator
looks at addresses each time, and weights that are no neighbours any more are multiplied one by one, with the same
meaning. Integer sums are exact, so both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .integer import int_linear
from .joined import neighbours
from .pieces import TILE_ROWS

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "int_linears(Tensor codes, Tensor scale, Tensor[] weights, Tensor[] weight_scales, Tensor[] biases, "
    "ScalarType dtype) -> Tensor"
)


def lay_together(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
    """Make neighbours of parameters of layers with so many ``rows``, in place, if tiles of 16 rows allow it and they
    are of one dtype on one device."""
    plain = [tensor.detach() for tensor in tensors]
    unlike = len({(tensor.device, tensor.dtype) for tensor in plain}) > 1
    if unlike or any(n % TILE_ROWS for n in rows[:-1]) or neighbours(plain) is not None:
        return
    whole = torch.cat(plain)
    for tensor, part in zip(tensors, whole.split([len(one) for one in plain]), strict=True):
        tensor.data = part


def _int_linears(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    weight, rows = neighbours(weights), neighbours(weight_scales)
    bias = neighbours(biases) if biases else None
    if weight is not None and rows is not None and (bias is not None or not biases):
        return int_linear(codes, scale, weight, rows, bias, dtype)
    each = zip(weights, weight_scales, biases or (None,) * len(weights), strict=True)
    return torch.cat([int_linear(codes, scale, weight, rows, bias, dtype) for weight, rows, bias in each], -1)


def _fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], sum(rows.shape[0] for rows in weight_scales)), dtype=dtype)


_library.impl("int_linears", _int_linears, "CPU")
_library.impl("int_linears", _int_linears, "CUDA")
torch.library.register_fake("flute::int_linears", _fake, lib=_library)


def int_linears(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """y (M, N1 + N2 + ...), as above; operands as in `int_linear`, ``biases`` empty or one a layer.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.flute.int_linears(codes, scale, weights, weight_scales, biases, dtype)
