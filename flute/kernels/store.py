"""Keys, or values, of one layer as int4 codes: a `Store`; and back to numbers, ``flute::kv_dequantize``.

Per token and head D codes of 4 bits, a float16 scale, and unless it is symmetric an int16 zero; value ~ scale
(code - zero), rules as in `tokens.quantize_rows`. Bytes a number, D = 128: (64 + 2 or 4) / 128, which is 0.258 or 0.266
of 16-bit floats.

    codes uint8 (P, H, S, D / 2)   scale float16 (P, H, S)   zero int16 (P, H, S)     P pages of S slots
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import OperatorError
from . import attention_cuda
from .integer import pack_nibbles, unpack_nibbles
from .tokens import quantize_rows

_library = torch.library.Library("flute", "FRAGMENT")
_library.define("kv_dequantize(Tensor codes, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor")


@dataclass
class Store:
    """Quantized keys, or values, of one layer, as above; ``clip``: (2,) ratios of (largest, smallest), or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    clip: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        pages: int,
        heads: int,
        slots: int,
        head_dim: int,
        symmetric: bool,
        device: torch.device | str | None = None,
        clip: torch.Tensor | None = None,
    ) -> Store:
        """Room for pages * slots tokens of ``heads`` heads, zeros."""
        if head_dim % 2:
            raise OperatorError(f"flute.Store: head_dim={head_dim}; two codes share a byte, so it must be even")
        shape = (pages, heads, slots)
        zero = None if symmetric else torch.zeros(shape, dtype=torch.int16, device=device)
        codes = torch.zeros((*shape, head_dim // 2), dtype=torch.uint8, device=device)
        return cls(codes, torch.ones(shape, dtype=torch.float16, device=device), zero, clip)

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zeros."""
        return sum(one.nbytes for one in (self.codes, self.scale, self.zero) if one is not None)

    def dequantize(self, dtype: torch.dtype, table: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, L, D): every slot of every sequence, also those nothing was written to; on CUDA one launch."""
        if table is not None:
            return dequantize(self.codes, self.scale, self.zero, table).to(dtype)
        return torch.ops.flute.kv_dequantize(self.codes, self.scale, self.zero, dtype)


def quantize_heads(x: torch.Tensor, symmetric: bool, clip: torch.Tensor | None = None) -> Store:
    """Codes, scales and zeros of keys or values x (B, H, T, D) as a cache would hold them: a `Store` of B pages."""
    codes, scale, zero = quantize_rows(x, 4, symmetric, clip, torch.float16)
    return Store(pack_nibbles(codes), scale, None if zero is None else zero.clamp(-32768, 32767).to(torch.int16), clip)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, table: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 (B, H, L, D), pages in the order of the page table (B, pages of a sequence). Plain torch."""
    values = unpack_nibbles(codes).float()
    if zero is not None:
        values -= zero.float()[..., None]
    values *= scale.float()[..., None]
    if table is None:
        return values
    return values[table.long()].transpose(1, 2).flatten(2, 3)  # (B, pages, H, S, D)


def _kv_dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return dequantize(codes, scale, zero).to(dtype)


def _kv_dequantize_cuda(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    dim, given = 2 * codes.shape[-1], (codes, scale, zero)
    contiguous = all(one is None or one.is_contiguous() for one in given)
    if not contiguous or not attention_cuda.takes(dtype, dim, dim, codes.shape[2], False):
        return _kv_dequantize(*given, dtype)
    return attention_cuda.dequantize(*given, dtype)


def _fake(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype)


_library.impl("kv_dequantize", _kv_dequantize, "CompositeExplicitAutograd")
_library.impl("kv_dequantize", _kv_dequantize_cuda, "CUDA")
torch.library.register_fake("flute::kv_dequantize", _fake, lib=_library)
