"""What transformers' HIGGS asks of FLUTE when it quantizes: rotated codes, scales and a grid into a layer's tensors.

transformers rotates the weight (in blocks, by ``fast_hadamard_transform``), takes norms for scales and the nearest
points of its grid for codes; here they become a container (`flute.integrations.container`), ``tables`` and ``tables2``.
What it does with them afterwards is in `flute.integrations.gemm`; docs/transformers-higgs.md tells what a user does.
"""

from __future__ import annotations

import torch

from ..errors import QuantizeError
from . import container
from .container import TuneMetaData
from .gemm import pairs_of

Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, TuneMetaData]


def _tables(grid: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid (2**(v bits), v) -> ``table`` (2**bits,) and ``table2`` float32 (2**bits, 2**bits, 1).

    Pairs are float16 where that is exact, for the reason that `gemm.codebook` gives; ``table`` is ``table2[0, :, 1]``.
    """
    count = 1 << num_bits
    pairs = pairs_of(grid.squeeze(-1)) if grid.shape[1] == 1 else grid.reshape(count, count, 2)
    half = pairs.to(torch.float16)
    stored = half if torch.equal(half.to(grid.dtype), pairs) else pairs
    return pairs[0, :, 1].contiguous(), stored.contiguous().view(torch.float32)


def _check(
    codes: torch.Tensor, scales: torch.Tensor, grid: torch.Tensor, num_bits: int, group_size: int, vector_size: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise QuantizeError where the three tensors do not make a layer."""

    def refuse(what: str) -> None:
        raise QuantizeError(f"prepare_data: {what}")

    if num_bits not in (2, 3, 4) or vector_size not in (1, 2):
        refuse(f"num_bits={num_bits} with vector_size={vector_size}; use 2, 3 or 4 with 1 or 2")
    if dtype not in (torch.float16, torch.bfloat16) or not scales.dtype == grid.dtype == dtype:
        refuse(f"dtype={dtype}, scales {scales.dtype}, grid {grid.dtype}; all must be float16, or all bfloat16")
    if tuple(grid.shape) != (1 << num_bits * vector_size, vector_size):
        refuse(f"grid {tuple(grid.shape)}; {num_bits} bits need {(1 << num_bits * vector_size, vector_size)}")
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.numel() == 0:
        refuse(
            f"codes are {tuple(codes.shape)} {codes.dtype}; a uint8 matrix, a code for {vector_size} weights, is needed"
        )
    out_features, in_features = codes.shape[0], codes.shape[1] * vector_size
    if group_size < 1 or in_features % group_size or tuple(scales.shape) != (out_features, in_features // group_size):
        refuse(
            f"scales {tuple(scales.shape)}; {out_features} x {in_features} with group_size={group_size} needs one each"
        )


def prepare_data_transposed(
    weight_original: torch.Tensor,
    scales_original: torch.Tensor,
    grid: torch.Tensor,
    num_bits: int,
    group_size: int,
    vector_size: int,
    dtype: torch.dtype,
    device: torch.device,
    example_batch_size: int | None = None,
    check_correctness: bool = True,
) -> Prepared:
    """Codes, scales and grid of a quantized weight (N, K) -> what `qgemm_v2` takes.

    Args:
        weight_original: codes, uint8 (N, K / vector_size), below 2**(num_bits * vector_size).
        scales_original: (N, K / group_size) in ``dtype``, float16 or bfloat16.
        grid: (2**(num_bits * vector_size), vector_size) in ``dtype``.
        device: where the result is to lie.
        example_batch_size: noted in the metadata; nothing is tuned to it.
        check_correctness: accepted and not needed; no kernel is run that could be wrong.

    Returns:
        weight int16 (N * num_bits / 16, K); scales (N, K / group_size); table (2**num_bits,);
        table2 float32 (2**num_bits, 2**num_bits, 1); `TuneMetaData`.

    Raises:
        QuantizeError: shapes or dtypes do not fit together.
        OperatorError: a code does not fit, or N rows do not fill whole int16.
    """
    _check(weight_original, scales_original, grid, num_bits, group_size, vector_size, dtype)
    make = container.from_codes if vector_size == 1 else container.from_pairs
    weight = make(weight_original.to(device), num_bits)
    weight, order = container.arrange(weight, num_bits, group_size, container.CHECKPOINT_ORDER)
    table, table2 = _tables(grid.to(device), num_bits)
    metadata = TuneMetaData(
        example_batch_size or 1, weight_original.shape[0], weight.shape[1], num_bits, group_size, 0, dtype,
        weight.device, order,
    )  # fmt: skip
    return weight, scales_original.to(device).contiguous(), table, table2, metadata


def prepare_data(
    weight_original: torch.Tensor,
    scales_original: torch.Tensor,
    grid: torch.Tensor,
    num_bits: int,
    group_size: int,
    vector_size: int,
    dtype: torch.dtype,
    device: torch.device,
    example_batch_size: int | None = None,
    check_correctness: bool = True,
) -> Prepared:
    """`prepare_data_transposed` of codes (K / vector_size, N) and scales (K / group_size, N)."""
    return prepare_data_transposed(
        weight_original.T, scales_original.T, grid, num_bits, group_size, vector_size, dtype, device,
        example_batch_size, check_correctness,
    )  # fmt: skip
