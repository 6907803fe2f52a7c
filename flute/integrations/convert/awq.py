"""AWQ checkpoints in "gemm" order (AutoAWQ, transformers): W = (q - z) * s at 4 bits, inputs first.

::

    NAME.qweight  int32 (K, N / 8)        NAME.qzeros  int32 (G, N / 8)        NAME.scales  float16 (G, N)

Both are packed along N, eight outputs a word; nibble i of a word, from the lowest, is output 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from .exact import Format, Stored
from .uniform import uniform, whole_number, words

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def read_format(config: dict[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``."""
    names = ("bits", "group_size") if "bits" in config else ("w_bit", "q_group_size")
    bits, group = (whole_number(config, name) for name in names)
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm" or bits != 4:
        raise CheckpointError(f"AWQ version={version!r} with {bits} bits is not read; version 'gemm' with 4 bits is")
    parts = (".qweight", ".qzeros", ".scales")
    return Format("AWQ 4 bit", parts, lambda name, found: stored(found, group))


def _outputs(packed: torch.Tensor, count: int) -> torch.Tensor:
    """int32 (R, N / 8) -> uint8 (R, N), outputs in order."""
    nibbles = words(packed, 4, count)
    return nibbles.view(-1, count // 8, 8)[:, :, list(_NIBBLE_OF_OUTPUT)].flatten(1)


def stored(parts: Mapping[str, torch.Tensor], group_size: int) -> Stored:
    """One layer.

    Raises:
        CheckpointError: shapes or dtypes do not fit together.
    """
    scales = parts[".scales"]
    rows = scales.shape[1]
    if rows % 8:
        raise CheckpointError(f"AWQ packs eight outputs a word; {rows} outputs are no multiple of 8")
    q, zeros = _outputs(parts[".qweight"], rows), _outputs(parts[".qzeros"], rows)
    group = q.shape[0] if group_size == -1 else group_size
    return uniform(q.t().contiguous(), zeros.t(), scales.t().contiguous(), group, 4)
