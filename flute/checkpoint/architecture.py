"""`Architecture`: which tensors a model consists of, known before any of them is read.

It is made from config.json alone, by whoever knows models (`flute.integrations`); the rest of this package works from
this record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..spec import QuantSpec


class TensorNames(NamedTuple):
    """The tensors of a quantized layer."""

    codes: str
    scales: str
    table: str
    zeros: str


def tensor_names(layer: str, shape: tuple[int, ...]) -> TensorNames:
    """A linear layer (N, K) has tensors of its own; a stack (E, N, K) is itself one, with the others beside it."""
    if len(shape) == 2:
        return TensorNames(f"{layer}.weight", f"{layer}.scales", f"{layer}.table", f"{layer}.zeros")
    stem = layer.removesuffix("_proj")
    return TensorNames(layer, f"{stem}_scales", f"{stem}_table", f"{stem}_zeros")


@dataclass(frozen=True)
class Architecture:
    """A model's layers and tensors, by the names they have in the model.

    Args:
        linears: (N, K) of every linear layer that is to be quantized, (E, N, K) of every stack of experts' weights.
        specs: the spec of each of them.
        dense_linears: names of the linear layers that stay dense.
        tensors: shape of every tensor of the dense model's state dict, weights of ``linears`` included.
        tied: tensor -> the tensor it shares its memory with; it need not be on disk.
        rename: name of a tensor on disk -> (its name in the model, whether it is only a part of that tensor).
        ignored: tells whether a tensor on disk that the model does not have is no mistake.
        left: stacks of weights that have to stay dense, and why.
    """

    linears: dict[str, tuple[int, ...]]
    specs: dict[str, QuantSpec]
    dense_linears: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    rename: Callable[[str], tuple[str, bool]]
    ignored: Callable[[str], bool]
    left: dict[str, str] = field(default_factory=dict)

    def names(self, layer: str) -> TensorNames:
        """The tensors of one of ``linears``."""
        return tensor_names(layer, self.linears[layer])
