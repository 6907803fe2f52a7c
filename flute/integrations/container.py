"""Upstream FLUTE's container, int16 (N bits / 16, K), with codes of ours in it, and the record that tells so.

transformers' HIGGS layers hold exactly this tensor and save this record (``tune_metadata`` in config.json) beside it. A
container knows nothing of the table: its codes come in pairs of neighbours along K, each an index into ``table2``
(2**bits, 2**bits, 2), which holds a grid of pairs (HIGGS with p = 2) or every pair of a scalar table (p = 1) alike::

    pair[n, j] = code[n, 2 j] << bits | code[n, 2 j + 1]

The bytes have one of two orders, both the same for every GPU. ``template_id`` says which; upstream's ids begin at 0::

    10000                     the checkpoint's: rows of a dense bit stream (`flute.packing`), cut into int16 anew
    10000 + LAYOUT_VERSION    kernel order (`flute.kernels.layout`), for N a multiple of 16 and K of 128, where it has
                              as many bytes: a GPU then runs the container itself, not a second copy of the codes

transformers saves what lies in memory, so this is the one place where kernel order reaches files.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, OperatorError
from ..kernels import layout
from ..packing import pack_codes, unpack_codes

RESERVED = range(10_000, 20_000)  # template ids that are ours
CHECKPOINT_ORDER = RESERVED.start
KERNEL_ORDER = RESERVED.start + layout.LAYOUT_VERSION

_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


class TuneMetaData(NamedTuple):
    """Upstream's record of a container: the problem, and in ``template_id`` the order of its bytes.

    ``M``, ``num_sms`` and ``device`` say for what upstream tuned; here they are kept and nothing depends on them.
    """

    M: int
    N: int
    K: int
    num_bits: int
    group_size: int
    num_sms: int
    dtype: torch.dtype
    device: torch.device
    template_id: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._asdict(), "dtype": str(self.dtype), "device": str(self.device)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuneMetaData:
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a key is missing or unknown, or a value is none of its kind.
        """
        if not isinstance(values, dict) or set(values) != set(cls._fields):
            raise CheckpointError(f"tune_metadata {values!r} must have exactly the keys {', '.join(cls._fields)}")
        texts = ("dtype", "device")
        wrong = [key for key, value in values.items() if type(value) is not (str if key in texts else int)]
        if wrong or values["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"tune_metadata {values!r}: {wrong[0] if wrong else 'dtype'} is not what it should be"
            )
        try:
            device = torch.device(values["device"])
        except RuntimeError:
            raise CheckpointError(f"tune_metadata: device {values['device']!r} is not a device") from None
        return cls(**{**values, "dtype": _DTYPES[values["dtype"]], "device": device})


def check_order(template_id: int) -> None:
    """Refuse an order that cannot be read.

    Raises:
        CheckpointError: the bytes are in an order of upstream's, or in one that this version does not know.
    """
    if template_id not in RESERVED:
        raise CheckpointError(
            f"template_id={template_id}: the weight was packed by the original FLUTE, in the order of that kernel; "
            "convert the checkpoint with `flute convert`, or quantize the model again"
        )
    if template_id not in (CHECKPOINT_ORDER, KERNEL_ORDER):
        raise CheckpointError(
            f"template_id={template_id}: the weight is in an order that this version of flute does not know; "
            "use the version that wrote it"
        )


def sizes(weight: torch.Tensor, num_bits: int) -> tuple[int, int]:
    """(N, K) of a container.

    Raises:
        OperatorError: it is not int16 (N bits / 16, K) of whole rows.
    """
    if num_bits not in (2, 3, 4):
        raise OperatorError(f"num_bits={num_bits} is not supported; use 2, 3 or 4")
    rows = weight.shape[0] * 16
    if weight.dim() != 2 or weight.dtype != torch.int16 or rows % num_bits or weight.shape[1] * num_bits % 8:
        raise OperatorError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; a container of {num_bits}-bit codes is int16 "
            f"(N * {num_bits} / 16, K)"
        )
    return rows // num_bits, weight.shape[1]


def from_pairs(pairs: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pairs uint8 (N, K / 2), each below 2**(2 bits) -> container in the checkpoint's order.

    Raises:
        OperatorError: N rows do not fill whole int16 or K columns whole bytes, or a pair does not fit.
    """
    rows, width = pairs.shape[0], 2 * pairs.shape[1]
    for name, size, whole in (("out", rows, 16 // gcd(16, num_bits)), ("in", width, 8 // gcd(8, num_bits))):
        if size % whole:
            raise OperatorError(
                f"{name}_features={size} does not fill a container at {num_bits} bits, which takes multiples of "
                f"{whole}; leave this layer dense"
            )
    return pack_codes(pairs, 2 * num_bits).flatten().view(torch.int16).view(rows * num_bits // 16, width)


def to_pairs(weight: torch.Tensor, num_bits: int, template_id: int) -> torch.Tensor:
    """The inverse of `from_pairs`, of either order."""
    return unpack_codes(_stream(weight, num_bits, template_id), 2 * num_bits, weight.shape[1] // 2)


def from_codes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes (N, K) of any integer dtype, each in 0 .. 2**bits - 1 -> container in the checkpoint's order.

    Raises:
        OperatorError: N rows do not fill whole int16 or K columns whole bytes, a code does not fit, or is no integer.
    """
    if codes.dim() != 2 or codes.shape[1] % 2 or codes.is_floating_point():
        raise OperatorError(
            f"codes are {tuple(codes.shape)} {codes.dtype}; an integer matrix (N, K) with an even K is needed"
        )
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >> num_bits:
        raise OperatorError(f"code {low if low < 0 else high} does not fit in {num_bits} bits")
    codes = codes.to(torch.uint8)
    return from_pairs(codes[:, 0::2] << num_bits | codes[:, 1::2], num_bits)


def to_codes(weight: torch.Tensor, num_bits: int, template_id: int) -> torch.Tensor:
    """The inverse of `from_codes`, of either order."""
    pairs = to_pairs(weight, num_bits, template_id)
    return torch.stack((pairs >> num_bits, pairs & (1 << num_bits) - 1), -1).flatten(1)


def _stream(weight: torch.Tensor, num_bits: int, template_id: int) -> torch.Tensor:
    """Container -> the checkpoint's bytes (N, K bits / 8); a view where that is its order."""
    check_order(template_id)
    out_features, in_features = sizes(weight, num_bits)
    stream = weight.contiguous().flatten().view(torch.uint8)
    if template_id == CHECKPOINT_ORDER:
        return stream.view(out_features, -1)
    packed = stream.view(layout.packed_shape(out_features, in_features, num_bits))
    return layout.unpack_weight(packed, num_bits, out_features, in_features)


def operands(
    weight: torch.Tensor, scales: torch.Tensor, num_bits: int, group_size: int, template_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Container and scales (N, G) -> codes and scales as ``flute::lut_linear`` takes them on their device.

    On a GPU that is kernel order; codes of a container that is in it are a view, not a copy.
    """
    out_features, in_features = sizes(weight, num_bits)
    if not (weight.is_cuda and layout.supports(group_size, in_features)):
        return _stream(weight, num_bits, template_id), scales
    if template_id == KERNEL_ORDER:
        codes = weight.flatten().view(torch.uint8).view(layout.packed_shape(out_features, in_features, num_bits))
    else:
        codes = layout.pack_weight(_stream(weight, num_bits, template_id), num_bits, in_features)
    return codes, layout.pack_scales(scales)


def arrange(weight: torch.Tensor, num_bits: int, group_size: int, template_id: int) -> tuple[torch.Tensor, int]:
    """A container in the order that suits its device, and that order; the same tensor where it has it already.

    Raises:
        CheckpointError, OperatorError: it cannot be read.
    """
    check_order(template_id)
    out_features, in_features = sizes(weight, num_bits)
    whole = not out_features % layout.TILE_ROWS and not in_features % layout.CHUNK_K
    wanted = CHECKPOINT_ORDER
    if weight.is_cuda and whole and layout.supports(group_size, in_features):
        wanted = KERNEL_ORDER
    if wanted == template_id:
        return weight, wanted
    stream = _stream(weight, num_bits, template_id)
    if wanted == KERNEL_ORDER:
        stream = layout.pack_weight(stream, num_bits, in_features)
    return stream.flatten().view(torch.int16).view(weight.shape), wanted
