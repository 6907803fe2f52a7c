"""Upstream FLUTE's operator under its names: y = x . W^T with W from a container (`flute.integrations.container`).

    W[n, 2 j + i] = table2[first, second, i] * scales[n, 2 j // g]      (first, second) the codes of n at 2 j, 2 j + 1

What runs is ``flute::lut_linear``. It wants codes and scales in the order of the device and ``table2`` as a codebook;
these are made at the first call and kept as long as the container lives, until one of the tensors changes (`_version`).
A change through ``weight.data`` in place is the one that nobody can see.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import CheckpointError, OperatorError
from ..kernels import ops
from ..kernels.hadamard import hadamard
from ..quantize import dequantize
from ..spec import CUSTOM_TABLE, QuantSpec
from . import container
from .container import TuneMetaData


def pairs_of(table: torch.Tensor) -> torch.Tensor:
    """A table (2**bits,) of 16-bit floats -> ``table2`` (2**bits, 2**bits, 2): [i, j] is (table[i], table[j])."""
    count = len(table)
    return torch.stack((table.unsqueeze(1).expand(count, count), table.unsqueeze(0).expand(count, count)), -1)


def codebook(table: torch.Tensor, table2: torch.Tensor, num_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """``table2`` -> (2**(2 bits), 2) in ``dtype``, the table of pairs that ``flute::lut_linear`` takes.

    ``table2`` is 32 bits a pair, viewed as whatever it may be. Pairs are of ``dtype``, or of float16 for any ``dtype``
    as `flute.integrations.higgs` makes them: transformers takes them for float16, and casts them to the model's dtype
    when it loads them, after which they are of that one. ``table`` tells which it is: it equals ``table2[0, :, 1]``.

    Raises:
        OperatorError: ``table2`` has another size, or is neither.
    """
    count = 1 << num_bits
    if table2.numel() * table2.element_size() != 4 * count * count or dtype not in (torch.float16, torch.bfloat16):
        raise OperatorError(
            f"table2 is {tuple(table2.shape)} {table2.dtype} for an input of {dtype}; {num_bits} bits need 32 bits for "
            f"each of {count} x {count} pairs, and an input of float16 or bfloat16"
        )
    bits = table2.contiguous().flatten()
    if dtype == torch.float16:
        return bits.view(torch.float16).view(count * count, 2)
    for stored in (dtype, torch.float16):
        pairs = bits.view(stored).view(count * count, 2).to(dtype)
        if torch.equal(pairs[:count, 1], table):
            return pairs
    raise OperatorError(
        f"table2 holds no pairs of {dtype} or float16 that belong to table; a cast has destroyed them, quantize again"
    )


class _Operands(NamedTuple):
    made_of: tuple[Any, ...]
    sources: tuple[torch.Tensor, ...]  # held, so that their addresses in ``made_of`` are nobody else's
    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor


_kept = WeakTensorKeyDictionary()


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _operands(
    weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, table2: torch.Tensor, dtype: torch.dtype,
    num_bits: int, group_size: int, template_id: int,
) -> _Operands:  # fmt: skip
    """What ``flute::lut_linear`` takes, made once for these tensors."""
    tensors = (weight, scales, table, table2)
    made_of = (*map(_identity, tensors), dtype, num_bits, group_size, template_id)
    held: _Operands | None = _kept.get(weight)
    if held is None or held.made_of != made_of:
        # .data: what is kept may share memory with the weight, but as a view of it would keep it alive
        weight_, scales_, table_, table2_ = sources = tuple(tensor.data for tensor in tensors)
        codes, ordered = container.operands(weight_, scales_, num_bits, group_size, template_id)
        held = _Operands(made_of, sources, codes, ordered, codebook(table_, table2_, num_bits, dtype))
        _kept[weight] = held
    return held


def _qgemm(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, table2: torch.Tensor,
    num_bits: int, group_size: int, template_id: int, hadamard_size: int,
) -> torch.Tensor:  # fmt: skip
    held = _operands(weight, scales, table, table2, x.dtype, num_bits, group_size, template_id)
    if hadamard_size:
        x = hadamard(x, hadamard_size)
    return ops.apply(x, held.codes, held.scales, held.table, None, scales.shape[0], num_bits, group_size)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, table2: torch.Tensor,
    num_bits: int, group_size: int, template_id: int, hadamard_size: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], scales.shape[0])


# one opaque call for torch.compile, which must not look at addresses; everything else calls `_qgemm`
_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "qgemm(Tensor x, Tensor weight, Tensor scales, Tensor table, Tensor table2, int num_bits, int group_size, "
    "int template_id, int hadamard_size) -> Tensor"
)
_library.impl("qgemm", _qgemm, "CPU")
_library.impl("qgemm", _qgemm, "CUDA")
torch.library.register_fake("flute::qgemm", _fake, lib=_library)


def qgemm(
    input: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    workspace: torch.Tensor | None,
    num_bits: int,
    group_size: int,
    template_id: int,
    num_sms: int,
) -> torch.Tensor:
    """y (..., N) = x (..., K) . W^T, not rotated; see `qgemm_hadamard`."""
    return qgemm_hadamard(
        input, weight, scales, table, table2, workspace, num_bits, group_size, 0, template_id, num_sms
    )  # fmt: skip


def qgemm_hadamard(
    input: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    workspace: torch.Tensor | None,
    num_bits: int,
    group_size: int,
    hadamard_size: int,
    template_id: int,
    num_sms: int,
) -> torch.Tensor:
    """y (..., N) = (x H) (..., K) . W^T, products summed in float32 and rounded once.

    Args:
        input: x (..., K), float16 or bfloat16.
        weight: container int16 (N * num_bits / 16, K).
        scales: (N, K / group_size) in x's dtype.
        table: (2**num_bits,) in x's dtype; ``table2``: pairs, float32 (2**num_bits, 2**num_bits, 1) (see `codebook`).
        hadamard_size: neighbours along K that are rotated together, a power of two; 0: none.
        template_id: the order of the container.
        workspace, num_sms: accepted and not needed.

    Raises:
        CheckpointError: the container is in an order that cannot be read.
        OperatorError: shapes, dtypes or devices do not fit, or ``hadamard_size`` is no power of two.
    """
    if hadamard_size & (hadamard_size - 1):
        raise OperatorError(
            f"hadamard_size={hadamard_size} is not a power of two; for other sizes the weights were not rotated "
            "orthonormally, quantize again with one"
        )
    call = torch.ops.flute.qgemm if torch.compiler.is_compiling() else _qgemm
    return call(input, weight, scales, table, table2, num_bits, group_size, template_id, hadamard_size)


def qgemm_v2(
    input: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    workspace: torch.Tensor | None,
    metadata: TuneMetaData,
    hadamard_size: int | None = None,
) -> torch.Tensor:
    """`qgemm_hadamard` with the numbers of ``metadata``."""
    return qgemm_hadamard(
        input, weight, scales, table, table2, workspace,
        metadata.num_bits, metadata.group_size, hadamard_size or 0, metadata.template_id, metadata.num_sms,
    )  # fmt: skip


def reconstruct(
    weight: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    num_bits: int,
    group_size: int,
    template_id: int,
    hadamard_size: int = 0,
) -> torch.Tensor:
    """The weight (N, K) that these tensors stand for, rotated back, in the dtype of the scales; see `qgemm_hadamard`.

    Raises:
        CheckpointError, OperatorError: the container cannot be read, or the tables do not fit.
    """
    pairs = container.to_pairs(weight, num_bits, template_id)
    spec = QuantSpec(num_bits, group_size, CUSTOM_TABLE, vector_size=2, hadamard_size=hadamard_size)
    return dequantize(pairs, scales, spec, table=codebook(table, table2, num_bits, scales.dtype))


def maybe_tune_and_repack(
    weight: torch.Tensor, scales: torch.Tensor, metadata: TuneMetaData, example_batch_size: int | None = None
) -> tuple[torch.Tensor, TuneMetaData]:
    """A loaded container in the order that suits its device. Exact; nothing is tuned, nothing has to be.

    Raises:
        CheckpointError: it is in an order that cannot be read, or another matrix than its metadata says.
    """
    container.check_order(metadata.template_id)
    wanted = (metadata.N * metadata.num_bits // 16, metadata.K)
    if tuple(weight.shape) != wanted or weight.dtype != torch.int16:
        raise CheckpointError(
            f"tune_metadata of {metadata.N} x {metadata.K} at {metadata.num_bits} bits belongs to a weight int16 "
            f"{wanted}, and this one is {tuple(weight.shape)} {weight.dtype}"
        )
    weight, order = container.arrange(weight, metadata.num_bits, metadata.group_size, metadata.template_id)
    tokens = metadata.M if example_batch_size is None else example_batch_size
    return weight, metadata._replace(M=tokens, dtype=scales.dtype, device=weight.device, template_id=order)
