"""Integers with zero points: W = s * (q - z), which GPTQ, AWQ and compressed-tensors have in common.

They differ in how the integers lie in words of 32 bits and whether K or N is the first dimension. Words hold dense
little-endian bit streams (value i has bits [i b, (i+1) b), also across words), the order of `flute.packing`, so that is
what unpacks them.
"""

from __future__ import annotations

import math

import torch

from ...errors import CheckpointError
from ...packing import unpack_codes
from .exact import Levels, Stored, with_zeros

_SMALLEST_GROUP = 32  # smaller ones cost more than they save, and the kernels want multiples of it


def words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 (R, ceil(count * bits / 32)) -> uint8 (R, count): the values in each row of words.

    Raises:
        CheckpointError: not int32, or another number of words.
    """
    needed = -(-count * bits // 32)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != needed:
        raise CheckpointError(
            f"packed integers are {packed.dtype} {tuple(packed.shape)}; {count} values of {bits} bits need {needed} "
            "words of int32 a row"
        )
    return unpack_codes(packed.contiguous().view(torch.uint8)[:, : -(-count * bits // 8)].contiguous(), bits, count)


def uniform(
    q: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    bits: int,
    g_idx: torch.Tensor | None = None,
) -> Stored:
    """What integers mean whose owner computes ``(q - z) * s`` with the difference exact and the product rounded once.

    With act-order inputs were quantized by importance, and ``g_idx`` scatters the groups. Where every run of g inputs
    has one group all the same, its scales are put in the order of the runs, which is exact; else a scale would be
    needed per input, and there is no such layer here.

    Args:
        q: integers (N, K). zeros: integers (N, G). scales: (N, G), the dtype of the weight.
        group_size: inputs that share one of each; the last group may be short.
        g_idx: (K,) group of every input, if it is not input // group_size.

    Raises:
        CheckpointError: scales, zero points or groups that do not fit.
    """
    rows, width = q.shape
    groups = -(-width // group_size)
    if scales.shape != (rows, groups) or zeros.shape != (rows, groups):
        raise CheckpointError(
            f"scales {tuple(scales.shape)} and zero points {tuple(zeros.shape)} do not fit; {rows} x {width} weights "
            f"in groups of {group_size} need {(rows, groups)}"
        )
    plain = torch.arange(width) // group_size
    group_of = plain if g_idx is None else g_idx.long()
    if group_of.shape != plain.shape or int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise CheckpointError(f"g_idx {tuple(group_of.shape)} does not give {width} inputs one of {groups} groups each")
    zeros = zeros.to(torch.int16)
    levels = q.to(torch.int16) - zeros[:, group_of]
    weight = levels.to(scales.dtype) * scales[:, group_of]
    runs = group_of[::group_size]
    if not torch.equal(runs[plain], group_of):
        return Stored(weight, None, "act-order (desc_act) scatters its groups over the inputs")
    low, high = -int(zeros.max()), (1 << bits) - 1 - int(zeros.min())
    table = torch.arange(low, high + 1, dtype=torch.float32)
    scales, zeros = scales[:, runs].contiguous(), zeros[:, runs]
    apart = with_zeros(q, zeros, scales, group_size, bits) if bits <= 4 else ()
    return Stored(weight, Levels(levels - low, table, scales, group_size, bits), apart=apart)


def by_row(flat: torch.Tensor, rows: int, width: int, block: int) -> tuple[torch.Tensor, int] | str:
    """Scales (B,) of blocks along the flattened weight (N, K) -> (N, K / g) and g, or in one line why not.

    Where K is no multiple of the block, blocks run over the ends of rows; a group is then what both have in common, and
    neighbours have equal scales.

    Raises:
        CheckpointError: another number of scales.
    """
    if flat.shape != (-(-rows * width // block),):
        raise CheckpointError(f"{len(flat)} scales are not those of {rows} x {width} weights in blocks of {block}")
    group = math.gcd(width, block)
    if group < min(block, _SMALLEST_GROUP):
        return f"its blocks of {block} weights run over the ends of rows of {width}, at every {group} weights"
    starts = torch.arange(0, rows * width, group, device=flat.device).view(rows, -1)
    return flat[starts // block], group


def whole_number(config: dict, key: str, default: int | None = None) -> int:
    """A positive integer, or -1, from an owner's config.

    Raises:
        CheckpointError: it is none.
    """
    value = config.get(key, default)
    if type(value) is not int or not (value == -1 or 1 <= value <= 1 << 20):
        raise CheckpointError(f"quantization_config has {key}={value!r}; a positive whole number is needed")
    return value
