"""Codes to bytes on disk, and back: exact inverses.

A row of codes is a dense little-endian bit stream along K: code j occupies bits [j*B, (j+1)*B) of its row, where bit i
is bit ``i % 8`` of byte ``i // 8`` and B is the width of a code. Eight codes therefore fill exactly B bytes, so a row
can be cut at any multiple of 8 codes without unpacking; the last byte of a row is padded with zero bits.

This layout belongs to no GPU: every kernel makes its own order from it at load time (`flute.kernels.layout`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import OperatorError

_SLICE_CODES = 1 << 23  # rows are taken in slices: 16 bytes of scratch a code would be gigabytes for a large layer


def _by_rows(tensor: torch.Tensor, codes_per_row: int, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    parts = tensor.split(max(1, _SLICE_CODES // max(1, codes_per_row)))
    return convert(parts[0]) if len(parts) == 1 else torch.cat([convert(part) for part in parts])


def pack_codes(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Pack codes uint8 (N, J), each below 2**code_bits, into uint8 (N, ceil(J * code_bits / 8)).

    Raises:
        OperatorError: a code does not fit, or the tensor is not uint8 of two dimensions.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise OperatorError(f"codes are {tuple(codes.shape)} {codes.dtype}; a uint8 matrix (N, J) is needed")
    if not 1 <= code_bits <= 8:
        raise OperatorError(f"code_bits={code_bits} is outside 1..8")
    if code_bits < 8 and codes.numel() and int(codes.max()) >> code_bits:
        raise OperatorError(f"code {int(codes.max())} does not fit in {code_bits} bits")
    return _by_rows(codes, codes.shape[1], lambda part: _pack(part, code_bits))


def _pack(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    rows, count = codes.shape
    eights = -(-count // 8)
    block = torch.nn.functional.pad(codes, (0, eights * 8 - count)).view(rows, eights, 8).to(torch.int64)
    shifts = torch.arange(8, device=codes.device) * code_bits
    word = (block << shifts).sum(-1)  # 8 codes of at most 8 bits: one 64-bit word, whose sign bit may be used
    byte_shifts = torch.arange(code_bits, device=codes.device) * 8
    packed = ((word.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8).view(rows, eights * code_bits)
    return packed[:, : -(-count * code_bits // 8)].contiguous()


def unpack_codes(packed: torch.Tensor, code_bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 (N, ceil(count * code_bits / 8)) -> uint8 (N, count).

    Raises:
        OperatorError: the number of bytes per row is not that of ``count`` codes.
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != -(-count * code_bits // 8):
        raise OperatorError(
            f"packed is {tuple(packed.shape)} {packed.dtype}; {count} codes of {code_bits} bits need uint8 "
            f"(N, {-(-count * code_bits // 8)})"
        )
    return _by_rows(packed, count, lambda part: _unpack(part, code_bits, count))


def _unpack(packed: torch.Tensor, code_bits: int, count: int) -> torch.Tensor:
    rows = packed.shape[0]
    eights = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, eights * code_bits - packed.shape[1]))
    byte_shifts = torch.arange(code_bits, device=packed.device) * 8
    word = (padded.view(rows, eights, code_bits).to(torch.int64) << byte_shifts).sum(-1)
    shifts = torch.arange(8, device=packed.device) * code_bits
    codes = (word.unsqueeze(-1) >> shifts) & ((1 << code_bits) - 1)
    return codes.to(torch.uint8).view(rows, eights * 8)[:, :count].contiguous()
