"""Other libraries' rounding, for the table of `flute.bench.quality`: W (N, K) in, the weight that it stands for out.

Each is called through its own public door with its own defaults, in groups of 64 along K, and decodes its own weights;
those are put into the dense model, so all contestants are measured by the same layers on the same text. Bytes are what
the library holds:

    bitsandbytes  NF4, scales float32                                   github.com/bitsandbytes-foundation/bitsandbytes
    hqq           uniform, scales and zero points searched, float16; 3 bits lie ten to a word of 32
                                                                        github.com/dropbox/hqq
    hqq axis=0    the same with groups across rows, which it recommends for low bits and has no fast kernel for
    torchao       IntxWeightOnlyConfig: uniform, symmetric; its int8 containers are counted as the bits in them
                                                                        github.com/pytorch/ao
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from .peers import Library, total_bytes

GROUP = 64


class Rounded(NamedTuple):
    """The dense weight (N, K) that a library's codes stand for, and the bytes of what it holds."""

    weight: torch.Tensor
    nbytes: int


@dataclass(frozen=True)
class Peer(Library):
    """One way to round a weight.

    Attributes:
        bits: what it takes.
        rounded: (W (N, K) in 16 bits, bits) -> Rounded.
    """

    bits: tuple[int, ...]
    rounded: Callable[[torch.Tensor, int], Rounded]


def _bitsandbytes(weight: torch.Tensor, bits: int) -> Rounded:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return Rounded(dequantize_4bit(packed, state), total_bytes(packed, state.absmax))


def _hqq(weight: torch.Tensor, bits: int, *, axis: int) -> Rounded:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    layer = HQQLinear(dense, config, compute_dtype=weight.dtype, device=str(weight.device))
    held = total_bytes(layer.W_q, *[part for part in layer.meta.values() if isinstance(part, torch.Tensor)])
    return Rounded(layer.dequantize(), held)


def _torchao(weight: torch.Tensor, bits: int) -> Rounded:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    layer[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP)))
    made: Any = layer[0].weight
    return Rounded(made.dequantize(), weight.numel() * bits // 8 + total_bytes(made.scale))


PEERS = (
    Peer("bitsandbytes", "bitsandbytes", "bitsandbytes", (4,), _bitsandbytes),
    Peer("hqq", "hqq", "hqq.core.quantize", (4, 3, 2), partial(_hqq, axis=1)),
    Peer("hqq axis=0", "hqq", "hqq.core.quantize", (4, 3, 2), partial(_hqq, axis=0)),
    Peer("torchao", "torchao", "torchao.quantization", (4, 3, 2), _torchao),
)
