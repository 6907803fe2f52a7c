"""bitsandbytes NF4 and FP4 weights, from a checkpoint's tensors or a layer in memory; the library is not needed.

::

    W.flat[i] = dtype(quant_map[code i] * absmax[i // blocksize])       product in float32, rounded once

    NAME.weight           uint8, two codes a byte, the first in the high bits, along the flattened (N, K)
    NAME.weight.absmax    float32, one a block; or uint8 with double quantization:
                          absmax = nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset
    NAME.weight.quant_state.bitsandbytes__nf4 (or __fp4)    JSON as bytes: shape, dtype, blocksize, nested_...

Scales are float32 and stay so in a checkpoint, which is what makes it exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, IntegrationError
from ...linear import LutLinear
from ...quantize import Quantized
from .exact import Exact, Format, Levels, Stored, represent
from .uniform import by_row

_STATE = ".weight.quant_state.bitsandbytes__"
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
_PARTS = (".weight.absmax", ".weight", ".weight.quant_map", *_NESTED, f"{_STATE}nf4", f"{_STATE}fp4")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BITS = 4


def read_format(config: dict[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``."""
    if config.get("load_in_8bit") or not config.get("load_in_4bit", config.get("_load_in_4bit")):
        raise CheckpointError("bitsandbytes in 8 bits is not read; load_in_4bit (nf4, fp4) is")
    return Format("bitsandbytes", _PARTS, lambda name, found: _from_parts(found))


def _from_parts(parts: Mapping[str, torch.Tensor]) -> Stored:
    state = _state(parts)
    absmax = parts[".weight.absmax"]
    if absmax.dtype == torch.uint8:
        inner, inner_map = (parts[name] for name in _NESTED)
        absmax = unnested(absmax, inner, inner_map, state["nested_blocksize"], state["nested_offset"])
    return stored(parts[".weight"], absmax, parts[".weight.quant_map"], state)


def _state(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shape, dtype and block sizes, checked."""
    found = [tensor for name, tensor in parts.items() if name.startswith(_STATE)]
    try:
        state = json.loads(bytes(found[0].tolist()))
        (rows, width), dtype = state["shape"], _DTYPES[state["dtype"]]
        blocks = [int(state["blocksize"]), int(state.get("nested_blocksize", 1))]
        offset = float(state.get("nested_offset", 0.0))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its quant_state is damaged: {type(error).__name__} {error}") from None
    if min(rows, width, *blocks) < 1 or rows * width > parts[".weight"].nbytes * 2:
        raise CheckpointError(f"its quant_state has shape ({rows}, {width}), blocks {blocks}; its weight is smaller")
    return {
        "shape": (rows, width), "dtype": dtype, "blocksize": blocks[0], "nested_blocksize": blocks[1],
        "nested_offset": offset,
    }  # fmt: skip


def unnested(
    absmax: torch.Tensor, nested_absmax: torch.Tensor, nested_map: torch.Tensor, blocksize: int, offset: float
) -> torch.Tensor:
    """Double-quantized absmax uint8 (B,) -> float32 (B,)."""
    if nested_map.shape != (256,) or len(nested_absmax) != -(-len(absmax) // blocksize):
        raise CheckpointError(
            f"nested_quant_map {tuple(nested_map.shape)} and nested_absmax {tuple(nested_absmax.shape)} do not fit "
            f"{len(absmax)} blocks"
        )
    spread = nested_absmax.float().repeat_interleave(blocksize)[: len(absmax)]
    return nested_map.float()[absmax.int()] * spread + torch.tensor(offset, dtype=torch.float32)


def stored(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, state: Mapping[str, Any]) -> Stored:
    """One layer: packed bytes (N K / 2, 1), float32 absmax (B,), table (16,), and shape, dtype, blocksize in ``state``.

    Raises:
        CheckpointError: shapes do not fit together.
    """
    rows, width = state["shape"]
    block = state["blocksize"]
    if table.shape != (1 << _BITS,):
        raise CheckpointError(f"its table (quant_map) has shape {tuple(table.shape)}; 4 bits need {(1 << _BITS,)}")
    packed = packed.contiguous().view(torch.uint8)  # bnb_4bit_quant_storage may be another type of the same bytes
    if packed.numel() != -(-rows * width // 2):
        raise CheckpointError(f"its weight has {packed.numel()} bytes, not {rows} x {width} codes")
    flat = packed.flatten()
    codes = torch.stack((flat >> _BITS, flat & 15), 1).flatten()[: rows * width]
    spread = absmax.float().repeat_interleave(block)[: len(codes)]
    if len(spread) != len(codes):
        raise CheckpointError(f"{len(absmax)} absmax are not those of {rows} x {width} weights in blocks of {block}")
    table = table.float()
    weight = (table[codes.int()] * spread).to(state["dtype"]).view(rows, width)
    by_rows = by_row(absmax.float(), rows, width, block)
    if isinstance(by_rows, str):
        return Stored(weight, None, by_rows)
    return Stored(weight, Levels(codes.view(rows, width), table, *by_rows, _BITS))


def read_module(name: str, module: Any) -> Exact:
    """A bitsandbytes ``Linear4bit`` in memory, in our format.

    Raises:
        IntegrationError: no 4-bit layer, one that has not been quantized yet, or one that cannot be represented.
    """
    state = getattr(module.weight, "quant_state", None)
    if type(module).__name__ != "Linear4bit" or state is None:
        raise IntegrationError(
            f"layer {name!r} is a bitsandbytes {type(module).__name__}, which cannot be converted; a quantized "
            "Linear4bit can (nf4, fp4), or pass prepare_bnb_layers=False to leave such layers alone"
        )
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = unnested(absmax, inner.absmax, inner.code, inner.blocksize, float(state.offset))
    values = {"shape": tuple(state.shape), "dtype": state.dtype, "blocksize": state.blocksize}
    try:
        made = represent(stored(module.weight.data, absmax, state.code, values))
    except CheckpointError as error:
        raise IntegrationError(f"layer {name!r}: {error}") from None
    if isinstance(made, str):
        raise IntegrationError(f"layer {name!r}: {made}")
    return made


def converted(name: str, module: Any, dtype: torch.dtype | None) -> LutLinear:
    """A bitsandbytes ``Linear4bit`` as a `LutLinear` on its device, with its bias.

    Args:
        dtype: of layers that were quantized from float32; None: float16. Others keep theirs. Scales and table, float32
            at bitsandbytes, are rounded to it.

    Raises:
        IntegrationError: see `read_module`.
    """
    made = read_module(name, module)
    found = module.weight.quant_state.dtype
    dtype = (dtype or torch.float16) if found == torch.float32 else found
    rows, width = made.codes.shape
    layer = LutLinear(width, rows, made.spec, device=made.codes.device, dtype=dtype)
    if made.table is not None:
        layer.table.copy_(made.table)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=module.bias.requires_grad)
    return layer.store(Quantized(made.codes, made.scales.to(dtype)))
