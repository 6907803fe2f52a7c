"""HQQ checkpoints in safetensors: W = (q - z) * s, z a fraction, each step rounded to ``compute_dtype``.

``NAME.W_q`` holds the groups as the rows of a matrix (N K / g, g), cut into 2 (4 bits), 4 (2 bits) or 10 (3 bits)
equal parts that lie over one another in a byte, or in an int32, the first part highest. ``NAME.scale`` and
``NAME.zero`` have one value a group; what else there is (``nbits``, ``group_size``, ``axis``, ``shape``, ...) are
settings saved as tensors, text as the numbers of its characters.

Zero points are optimized and become fractions, as a rule another in each group: they are stored beside the scales.
Groups along the first axis (``axis`` 0) run across rows and have no scales by row at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from .exact import Format, Levels, Stored, with_zeros
from .uniform import by_row

_CORE = (".W_q", ".scale", ".zero", ".nbits", ".group_size", ".axis", ".shape", ".packing", ".compute_dtype")
_SETTINGS = (
    ".unpack_view_dtype", ".view_as_float", ".quant_scale", ".quant_zero", ".channel_wise", ".optimize", ".round_zero",
    ".offload_meta", ".encoded_state_dict", ".stores_quant_config",
)  # fmt: skip
_DTYPES = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
_PARTS_OVER_ONE_ANOTHER = {"4bit_u8": (4, 2), "2bit_u8": (2, 4), "3bit_32": (3, 10)}
_MOST_ZEROS = 256


def read_format(config: dict[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``."""
    return Format("HQQ", (*_CORE, *_SETTINGS), lambda name, found: stored(found))


def _text(tensor: torch.Tensor) -> str:
    return bytes(tensor.flatten().to(torch.uint8).tolist()).decode("ascii", "replace")


def stored(parts: Mapping[str, torch.Tensor]) -> Stored:
    """One layer.

    Raises:
        CheckpointError: shapes or dtypes do not fit together, or a packing or dtype that is not read.
    """
    packing, dtype = _text(parts[".packing"]), _DTYPES.get(_text(parts[".compute_dtype"]))
    if packing not in _PARTS_OVER_ONE_ANOTHER or dtype is None or bool(parts.get(".view_as_float", False)):
        raise CheckpointError(f"HQQ packing {packing!r} with {_text(parts['.compute_dtype'])} is not read")
    bits, count = _PARTS_OVER_ONE_ANOTHER[packing]
    (rows, width), group, axis = parts[".shape"].tolist(), int(parts[".group_size"]), int(parts[".axis"])
    packed, scale, zero = parts[".W_q"], parts[".scale"].to(dtype), parts[".zero"].to(dtype)
    q = torch.cat([(packed >> (bits * (count - 1 - part))) & ((1 << bits) - 1) for part in range(count)])
    along = (rows * width // group, group) if axis == 1 else (group, rows * width // group)
    if packed.dim() != 2 or q.shape[1] != along[1] or len(q) < along[0]:
        raise CheckpointError(f"W_q {tuple(packed.shape)} does not hold {along[0]} x {along[1]} weights of {bits} bits")
    q = q[: along[0]]
    weight = ((q.to(dtype) - zero) * scale).reshape(rows, width)
    if axis != 1:
        return Stored(weight, None, "its groups run across rows (axis 0)")
    by_rows = by_row(scale.flatten(), rows, width, group)
    if isinstance(by_rows, str):
        return Stored(weight, None, by_rows)
    zero_by_rows = by_row(zero.flatten(), rows, width, group)
    assert not isinstance(zero_by_rows, str), "as many as there are scales"
    apart = with_zeros(q.reshape(rows, width), zero_by_rows[0], *by_rows, bits)
    zeros, zero_of = zero.flatten().unique(return_inverse=True)
    if len(zeros) > _MOST_ZEROS:
        return Stored(weight, None, apart=apart)
    levels = (torch.arange(1 << bits).to(dtype) - zeros.unsqueeze(1)).float()
    table, index = levels.unique(return_inverse=True)
    codes = index.to(torch.int16)[zero_of.unsqueeze(1), q.int()].reshape(rows, width)
    return Stored(weight, Levels(codes, table, *by_rows, bits), apart=apart)
