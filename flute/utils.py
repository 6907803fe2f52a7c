"""Upstream FLUTE's ``flute.utils`` by name: packing codes, reading them back, tables of pairs, the workspace.

Orders of bytes are those of `flute.integrations.container`; a template id is the ``template_id`` of a `TuneMetaData`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import OperatorError
from .integrations import container, gemm


def make_workspace_streamk(device: torch.device | str) -> torch.Tensor:
    """A tensor on ``device`` to be passed where a workspace is asked for. Nothing uses it: kernels need none."""
    return torch.zeros(1, dtype=torch.uint8, device=device)


def make_qmap2_from_qmap(qmap: torch.Tensor) -> torch.Tensor:
    """A table (2**bits,), float16 or bfloat16 -> float32 (2**bits, 2**bits, 1), whose 32 bits at [i, j] are the pair
    (qmap[i], qmap[j]).

    Raises:
        OperatorError: it is no such table.
    """
    if qmap.dim() != 1 or qmap.dtype not in (torch.float16, torch.bfloat16):
        raise OperatorError(f"qmap is {tuple(qmap.shape)} {qmap.dtype}; a vector of float16 or bfloat16 is needed")
    return gemm.pairs_of(qmap).view(torch.float32)


def pack(
    W: torch.Tensor, num_bits: int, template_ids: Sequence[int] = (container.CHECKPOINT_ORDER,), num_sms: int = 0
) -> torch.Tensor:
    """Codes (K, N), any integers below 2**num_bits -> container int16 (N * num_bits / 16, K).

    Args:
        template_ids: the order, `CHECKPOINT_ORDER`, which every device reads; no other is made here.
        num_sms: accepted and not needed; no order depends on a GPU.

    Raises:
        OperatorError: another order is asked for, a code does not fit, or N columns do not fill whole int16.
    """
    if set(template_ids) != {container.CHECKPOINT_ORDER}:
        raise OperatorError(
            f"template_ids={list(template_ids)}; codes are packed in order {container.CHECKPOINT_ORDER}"
        )
    return container.from_codes(W.T, num_bits)


def unpack(
    weight: torch.Tensor,
    scales: torch.Tensor,
    workspace: torch.Tensor | None,
    num_bits: int,
    group_size: int,
    template_id_packed: int,
    num_sms_packed: int = 0,
) -> torch.Tensor:
    """Container -> codes (N, K) as numbers in the dtype of ``scales``; nothing else than these and the order counts.

    Raises:
        CheckpointError, OperatorError: the container cannot be read.
    """
    return container.to_codes(weight, num_bits, template_id_packed).to(scales.dtype)


def reconstruct(
    weight: torch.Tensor,
    scales: torch.Tensor,
    tables: torch.Tensor,
    tables2: torch.Tensor,
    workspace: torch.Tensor | None,
    num_bits: int,
    group_size: int,
    template_id: int,
    num_sms: int = 0,
) -> torch.Tensor:
    """The weight (N, K) that a container, scales (N, G) and tables stand for, in the dtype of the scales.

    Raises:
        CheckpointError, OperatorError: the container cannot be read, or the tables do not fit.
    """
    return gemm.reconstruct(weight, scales, tables, tables2, num_bits, group_size, template_id)
