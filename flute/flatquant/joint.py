"""Layers that get one activation (q, k, v; gate, up): one product for all of them.

Parameters keep their names and shapes; on a GPU they become neighbours in memory, which makes the product one launch
(`flute.kernels.integer_joined`). Layers that clip the activation differently, have zero points, or are no integer
layers, stay apart. `Joint` is the module that owns them: whatever gives them other memory, it lays them together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.integer_joined import int_linears, lay_together
from .modules import Activation, Codes, IntLinear


def join(layers: Sequence[nn.Module], *, anywhere: bool = False) -> None:
    """Lay the parameters of integer layers together, on a GPU or (to try it out) ``anywhere``.

    To be called again when they lie elsewhere; until then each layer launches for itself.
    """
    integer = [layer for layer in layers if isinstance(layer, IntLinear)]
    if len(integer) < len(layers) or not (integer[0].weight.is_cuda or anywhere):
        return
    rows = [layer.out_features for layer in integer]
    biases = [layer.bias for layer in integer if layer.bias is not None]
    for tensors in ([layer.weight for layer in integer], [layer.weight_scale for layer in integer], biases):
        if len(tensors) == len(integer):
            lay_together(tensors, rows)


def joint_product(layers: Sequence[nn.Module], inputs: Sequence[Activation]) -> torch.Tensor | None:
    """y (..., N1 + N2 + ...) of integer layers without zeros that share one activation without; None of others."""
    given = inputs[0]
    if len(inputs) > 1 or not isinstance(given, Codes) or given.zero is not None:
        return None
    integer = [layer for layer in layers if isinstance(layer, IntLinear)]
    biases = [layer.bias for layer in integer if layer.bias is not None]
    if len(integer) < len(layers) or len(biases) not in (0, len(layers)) or integer[0].weight_zero is not None:
        return None
    weights, scales = [layer.weight for layer in integer], [layer.weight_scale for layer in integer]
    y = int_linears(given.codes, given.scale, weights, scales, biases, given.like.dtype)
    return y.view(*given.like.shape[:-1], y.shape[-1])


def products(layers: Sequence[nn.Module], inputs: Sequence[Activation]) -> list[torch.Tensor]:
    """What each layer makes of the activation, one for all of them or one for each."""
    whole = joint_product(layers, inputs)
    if whole is None:
        return [layer(inputs[place % len(inputs)]) for place, layer in enumerate(layers)]
    return list(whole.split([layer.out_features for layer in layers if isinstance(layer, IntLinear)], -1))


class Joint(nn.Module):
    """A module that gives the layers ``joint`` one activation, and lays them together whenever they are moved or cast,
    their state is loaded, or the module is copied or unpickled.

    Attributes:
        joint: names of the layers. anywhere: on the CPU too (exact there as well; the gain is on GPUs).
    """

    joint: tuple[str, ...] = ()
    anywhere = False

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_join_again)  # ``assign=True`` gives layers other memory

    def join(self) -> None:
        """Lay the layers together; to be called when weights were put into them by hand."""
        join([self.get_submodule(name) for name in self.joint], anywhere=self.anywhere)

    def _apply(self, *arguments: Any, **keywords: Any) -> Joint:
        super()._apply(*arguments, **keywords)
        self.join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, too, whose parameters are clones
        super().__setstate__(state)
        self.join()


def _join_again(module: Joint, keys: Any) -> None:
    module.join()
