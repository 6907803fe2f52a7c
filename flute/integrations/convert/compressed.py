"""compressed-tensors checkpoints (llm-compressor, vLLM), format "pack-quantized": W = (q - z) * s.

::

    NAME.weight_packed      int32 (N, ceil(K b / 32))    q + 2^(b-1), dense along K
    NAME.weight_scale       (N, G), or (N, 1)            NAME.weight_shape   int64 (2,): N and K
    NAME.weight_zero_point  int32 (ceil(N b / 32), G)    z + 2^(b-1), dense along N; left out: z = 0
    NAME.weight_g_idx       int32 (K,)                   group of every input, with act-order; left out, or -1

Bits and group size follow from the shapes, so the targets and patterns of its config need not be interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from .exact import Format, Stored
from .uniform import uniform, words

_WIDTHS = (2, 3, 4, 8)
_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


def read_format(config: dict[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("compressed-tensors config has no config_groups")
    for name, group in groups.items():
        form = group.get("format") or config.get("format")
        if form != "pack-quantized":
            raise CheckpointError(f"compressed-tensors format={form!r} of {name!r} is not read; 'pack-quantized' is")
        if group.get("input_activations"):
            raise CheckpointError(f"compressed-tensors quantizes activations in {name!r}; only weights are converted")
    return Format("compressed-tensors", _PARTS, lambda name, found: stored(found))


def stored(parts: Mapping[str, torch.Tensor]) -> Stored:
    """One layer.

    Raises:
        CheckpointError: shapes or dtypes do not fit together.
    """
    packed, scales, shape = parts[".weight_packed"], parts[".weight_scale"], parts[".weight_shape"].tolist()
    if len(shape) != 2 or packed.dim() != 2 or scales.dim() != 2 or packed.shape[0] != shape[0] or shape[1] < 1:
        raise CheckpointError(f"weight_packed {tuple(packed.shape)} and weight_scale do not fit weight_shape {shape}")
    rows, width = shape
    bits = next((b for b in _WIDTHS if -(-width * b // 32) == packed.shape[1]), None)
    if bits is None:
        raise CheckpointError(f"{packed.shape[1]} words for {width} weights are none of {_WIDTHS} bits, densely packed")
    middle, groups = 1 << (bits - 1), scales.shape[1]
    if ".weight_zero_point" in parts:
        zeros = words(parts[".weight_zero_point"].t(), bits, rows).t()
    else:
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    g_idx = parts.get(".weight_g_idx")
    if g_idx is not None and bool((g_idx == -1).all()):
        g_idx = None
    return uniform(words(packed, bits, width), zeros, scales, -(-width // groups), bits, g_idx)
