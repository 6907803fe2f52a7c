"""The contestants of `flute.bench.kernel`: torch's dense matmul, this library, and other libraries where installed.

Each is a `Method`: what it can store, and ``prepare``, which takes a weight W (N, K) in float16 or bfloat16 on the GPU
and returns a function x (M, K) -> y (M, N) and the bytes of weight data that it reads. Peers are called through their
own public doors, with their own quantization and their own choice of kernel:

    bitsandbytes   NF4, blocks along K, scales not quantized again      github.com/bitsandbytes-foundation/bitsandbytes
    gemlite        uniform 4 and 2 bits with zero points (Triton)       github.com/dropbox/gemlite
    humming        symmetric uniform 4, 3 and 2 bits                    github.com/vllm-project/humming
    tinygemm       uniform 4 bits with zero points, in torch itself     aten::_weight_int4pack_mm

A peer is somebody else's code: it may be absent, refuse a shape or be wrong. `check` asks whether y is near x . W^T, as
near as rounding to so many bits allows, and whoever is not is reported and not timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels import layout, ops
from ..packing import pack_codes
from ..quantize import quantize
from ..spec import QuantSpec
from ..tables import named_table

Call = Callable[[torch.Tensor], torch.Tensor]
_HALVES = (torch.float16, torch.bfloat16)
# relative Frobenius error of y for uniformly distributed weights: 0.09, 0.15 .. 0.2 and 0.3 .. 0.4 were seen; a kernel
# that reads the wrong codes or scales has 1 and more
BOUNDS = {16: 0.02, 4: 0.15, 3: 0.3, 2: 0.6}


class Prepared(NamedTuple):
    """A weight ready to be multiplied with: x (M, K) -> y (M, N), and the bytes it has on the GPU."""

    call: Call
    nbytes: int


@dataclass(frozen=True)
class Library:
    """Where a contestant comes from.

    Attributes:
        name: as it stands in tables. package: the distribution that has it, whose version is reported.
        module: what to import to see whether it is there.
    """

    name: str
    package: str
    module: str

    def version(self) -> str:
        """Of its package; "unknown" if that was not installed as one."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def missing(self) -> str:
        """Why it cannot be used here; nothing if it can."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"not installed (no module {error.name}); pip install {self.package}"
        except Exception as error:  # noqa: BLE001, a peer's import may fail in any way
            return f"import fails: {first_line(error)}"
        return ""


@dataclass(frozen=True)
class Method(Library):
    """One way to multiply by a weight.

    Attributes:
        bits, dtypes, group_sizes: what it takes; empty ``group_sizes``: any.
        prepare: (W (N, K), bits, group_size, numbers of tokens that will be asked for) -> Prepared.
    """

    bits: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    group_sizes: tuple[int, ...]
    prepare: Callable[[torch.Tensor, int, int, Sequence[int]], Prepared]

    def takes(self, bits: int, group_size: int, dtype: torch.dtype) -> bool:
        """Whether it has such a format at all."""
        return bits in self.bits and dtype in self.dtypes and (not self.group_sizes or group_size in self.group_sizes)


def first_line(error: Exception) -> str:
    """An exception in one short line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:200]


def check(y: torch.Tensor, dense: torch.Tensor, bits: int) -> tuple[float, str]:
    """Relative Frobenius error of y (M, N) against ``dense``, and what is wrong with it or nothing.

    Meant for weights distributed evenly in an interval, where the error of rounding is known.
    """
    if y.shape != dense.shape:
        return float("nan"), f"y is {tuple(y.shape)} where {tuple(dense.shape)} was asked for"
    error = float((y.float() - dense.float()).norm() / dense.float().norm())
    return error, "" if error <= BOUNDS[bits] else f"wrong: error {error:.2f} where {bits} bits allow {BOUNDS[bits]}"


def total_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- torch and this library ------------------------------------------------------------------------------------------


def _dense(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    copy = weight.clone()
    return Prepared(lambda x: F.linear(x, copy), total_bytes(copy))


def _flute(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    n, k = weight.shape
    spec = QuantSpec(bits, group_size, f"nf{bits}")
    made = quantize(weight, spec, scale_dtype=weight.dtype)
    codes, scales = pack_codes(made.codes, bits), made.scales
    if weight.is_cuda and layout.supports(group_size, k):
        codes, scales = layout.pack_weight(codes, bits, k), layout.pack_scales(scales)
        _compile_ahead(weight.get_device(), n, k, spec, weight.dtype == torch.bfloat16, tuple(tokens))
    table = named_table(spec.table).to(weight)
    # what the format holds, not how it is padded: (codes + scales) / time is then comparable between kernels
    held = n * (spec.row_bytes(k) + 2 * spec.num_groups(k))
    return Prepared(lambda x: ops.lut_linear(x, codes, scales, table, spec=spec, out_features=n), held)


@cache
def _compile_ahead(device: int, n: int, k: int, spec: QuantSpec, bf16: bool, tokens: tuple[int, ...]) -> None:
    """The kernels for all numbers of tokens at once, which is quicker than one by one; once for all copies."""
    from ..kernels import cuda

    chosen = [cuda.choose(device, m, n, k, spec.bits, spec.group(k), bf16) for m in tokens]
    cuda.compile_ahead(device, [one for one in chosen if one is not None], spec.bits, bf16)


# ---- peers -----------------------------------------------------------------------------------------------------------


def affine(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (N, K) as low + scale * code: codes uint8 (N, K) in 0 .. 2**bits - 1, scale and low float32 (N, K / g)."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-8)
    codes = ((grouped - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1), scale, low


def _bitsandbytes(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    held = total_bytes(packed, state.absmax)
    return Prepared(lambda x: bitsandbytes.matmul_4bit(x, packed, quant_state=state), held)


def _gemlite(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    from gemlite.helper import A16Wn

    codes, scale, low = affine(weight, bits, group_size)
    dtype = weight.dtype
    layer = A16Wn(device=weight.device, dtype=dtype).from_weights(
        codes, scale.to(dtype), (-low / scale).to(dtype), bits, group_size
    )
    return Prepared(layer, total_bytes(layer.W_q, layer.scales, layer.zeros))


def _humming(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    n, k = weight.shape
    config = {"dtype": f"int{bits}", "group_size": group_size}
    layer: Any = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=weight.dtype).cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    # its own choice for every M, but asked for one by one: by default it compiles a kernel for each range up to 8192
    ends = sorted(tokens)
    chosen = [
        [begin, end, get_heuristics_config(layer.humming_config, shape_m=end)]
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    return Prepared(lambda x: layer(x, tuning_config=chosen), total_bytes(layer.weight, layer.weight_scale))


def _tinygemm(weight: torch.Tensor, bits: int, group_size: int, tokens: Sequence[int]) -> Prepared:
    codes, scale, low = affine(weight, bits, group_size)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    both = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)  # (G, N, 2)
    held = total_bytes(packed, both)
    return Prepared(lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group_size, both), held)


DENSE = Method("dense", "torch", "torch", (16,), _HALVES, (), _dense)
FLUTE = Method("flute", "flute-engine", "flute", (4, 3, 2), _HALVES, (), _flute)
PEERS = (
    Method("bitsandbytes", "bitsandbytes", "bitsandbytes", (4,), _HALVES, (32, 64, 128, 256, 512, 1024), _bitsandbytes),
    Method("gemlite", "gemlite", "gemlite", (4, 2), _HALVES, (32, 64, 128, 256), _gemlite),
    Method("humming", "humming-kernels", "humming.layer", (4, 3, 2), _HALVES, (32, 64, 128, 256), _humming),
    Method("tinygemm", "torch", "torch", (4,), (torch.bfloat16,), (32, 64, 128, 256), _tinygemm),
)
