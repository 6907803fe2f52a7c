"""Modules of transformers that keep their name, parameters and place, and get another forward: by their class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


@cache
def with_forward(kind: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    """``kind`` with another ``forward``, to be put into ``__class__`` of a module.

    A subclass, under the name of ``kind``: transformers finds modules by their class or its name. No file of Python's
    has it, so modules are copied and pickled by ``kind`` and ``forward``, which must be a function of some file.
    """

    def reduce(module: nn.Module) -> tuple[Any, ...]:
        return _empty, (kind, forward), module.__dict__

    return type(kind.__name__, (kind,), {"forward": forward, "__reduce__": reduce, "__module__": kind.__module__})


def _empty(kind: Any, forward: Callable[..., Any]) -> nn.Module:
    """Without a state, which is what copying and unpickling give it next."""
    made = with_forward(kind, forward)
    return made.__new__(made)
