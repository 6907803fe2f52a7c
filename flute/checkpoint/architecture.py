"""`Architecture`: which tensors a model consists of, known before any of them is read.

It is made from config.json alone, by whoever knows models (`flute.integrations`); the rest of this package works from
this record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..spec import QuantSpec


@dataclass(frozen=True)
class Architecture:
    """A model's layers and tensors, by the names they have in the model.

    Args:
        linears: (N, K) of every linear layer that is to be quantized.
        specs: the spec of each of them.
        dense_linears: names of the linear layers that stay dense.
        tensors: shape of every tensor of the dense model's state dict, weights of ``linears`` included.
        tied: tensor -> the tensor it shares its memory with; it need not be on disk.
        rename: name of a tensor on disk -> (its name in the model, whether it is only a part of that tensor).
        ignored: tells whether a tensor on disk that the model does not have is no mistake.
    """

    linears: dict[str, tuple[int, int]]
    specs: dict[str, QuantSpec]
    dense_linears: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    rename: Callable[[str], tuple[str, bool]]
    ignored: Callable[[str], bool]
