"""Which layers of a model get the same x: found by their names below one parent, for `together.Together`.

A group is made of layers below one module that are called as in `FAMILIES` and are alike: K, spec, dtype, all or none
with a bias. All but one must have a multiple of 16 rows (the tiles of kernel order); an odd one goes last. Layers
that PEFT has wrapped are found below their wrapper. Cross attention, whose q sees another x than k and v, is passed
by where its name tells; where it does not, the group notices by itself (see `flute.together`). Decoder blocks of
transformers that consist of such groups do more in their launches, see `lutblocks`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..kernels.layout import TILE_ROWS
from ..linear import LutLinear
from ..together import Together

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
_CROSS = ("cross", "encoder_attn", "encdec")


def fuse(model: nn.Module, *, anywhere: bool = False) -> int:
    """Let layers that get the same x share one launch, and known blocks their norms and sums with their products.

    To be called again after layers were replaced.

    Args:
        model: any module with `LutLinear` in it. Groups on a GPU are joined now, others when they come to one.
        anywhere: join them on the CPU too.

    Returns:
        How many groups were found.
    """
    separate(model)
    count = 0
    for name, parent in model.named_modules():
        for layers in _groups(name, parent):
            together = Together(
                [layer._parameters for layer in layers],
                [layer._buffers for layer in layers],
                [layer.out_features for layer in layers],
                layers[0].spec,
                anywhere=anywhere,
            )
            for place, layer in enumerate(layers):
                layer.together, layer.place = together, place
            together.join()
            count += 1
    blocks = _lutblocks()
    if count and blocks is not None:
        blocks.take_over(model)
    return count


def separate(model: nn.Module) -> None:
    """Undo `fuse`: every layer launches for itself again, from memory of its own; blocks are what they were."""
    blocks = _lutblocks()
    if blocks is not None:
        blocks.give_back(model)
    for module in model.modules():
        if isinstance(module, LutLinear) and module.together is not None:
            module.together.apart()
            module.together = None
            for parameter in module.parameters():
                if not parameter.is_meta and parameter.untyped_storage().nbytes() > parameter.nbytes:
                    parameter.data = parameter.data.clone()


def _lutblocks() -> Any:
    """The module `lutblocks`; None where no model of transformers can be, which it would take seconds to import."""
    if "transformers" not in sys.modules:
        return None
    from . import lutblocks

    return lutblocks


def _groups(name: str, parent: nn.Module) -> Iterator[list[LutLinear]]:
    called = f"{name.rpartition('.')[2]} {type(parent).__name__}".lower()
    if any(word in called for word in _CROSS) or getattr(parent, "is_kv_shared_layer", False):
        return
    for family in FAMILIES:
        found: dict[object, list[LutLinear]] = {}
        for child in family:
            layer = _unwrapped(getattr(parent, child, None))
            if layer is not None and layer.scales is not None:
                alike = (layer.in_features, layer.spec, layer.bias is None, layer.scales.dtype)
                found.setdefault(alike, []).append(layer)
        for layers in found.values():
            odd = [layer for layer in layers if layer.out_features % TILE_ROWS]
            layers = [layer for layer in layers if layer not in odd] + odd[:1]
            if len(layers) > 1:
                yield layers


def _unwrapped(module: object) -> LutLinear | None:
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, LutLinear) else None
