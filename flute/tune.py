"""Tuning from Python: measure which launch is the fastest on this GPU, once; every process finds it from then on.

Nothing has to be tuned: without it the analytic choice runs (`flute.kernels.choice`). What is found is kept in the
cache directory, per GPU, driver and version of the kernels, and never in a checkpoint. ``flute tune`` does the same.

Upstream FLUTE's `TuneTask`, `tune_tasks_legacy` and `tune_and_pack` work by name, and so does what transformers' HIGGS
takes from here: `TuneMetaData`, `qgemm_v2`, `maybe_tune_and_repack`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .bench import tuning
from .bench.tuning import CANDIDATES, Result
from .integrations import container
from .integrations.container import TuneMetaData
from .integrations.gemm import maybe_tune_and_repack, qgemm_v2
from .kernels import layout
from .linear import LutLinear
from .spec import CUSTOM_TABLE, QuantSpec

TOKENS = (1, 2, 4, 8, 16, 32, 64)

__all__ = [
    "CANDIDATES", "TOKENS", "Result", "TuneMetaData", "TuneTask", "maybe_tune_and_repack", "qgemm_v2", "tune",
    "tune_and_pack", "tune_model", "tune_tasks_legacy",
]  # fmt: skip


def tune(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int] = TOKENS,
    *,
    spec: QuantSpec | None = None,
    dtype: torch.dtype = torch.float16,
    device: int = 0,
    candidates: int = CANDIDATES,
    again: bool = False,
) -> list[Result]:
    """Tune for every shape and number of tokens.

    Args:
        shapes: (N, K) = (out_features, in_features) of weights.
        tokens: numbers of tokens M; each stands for its bucket (`flute.kernels.choice.bucket`).
        spec: bits and group size count, the table does not.
        dtype: float16 or bfloat16.
        device: index of the GPU.
        candidates: launches to try, of each kernel.
        again: measure also what is known already.

    Raises:
        TuneError: there is no GPU, the kernels take no such weights, or what was found cannot be kept on disk.
    """
    wanted = tuning.problems(shapes, list(tokens), spec or QuantSpec(), dtype)
    return list(tuning.tune(wanted, device=device, candidates=candidates, again=again))


def tune_model(
    model: nn.Module, tokens: Iterable[int] = TOKENS, *, candidates: int = CANDIDATES, again: bool = False
) -> list[Result]:
    """Tune for every distinct `LutLinear` of a model, on the GPU where each lies (the first one, if it lies on none).

    Layers whose groups no CUDA kernel takes are left out.

    Raises:
        TuneError: there is no GPU, a layer is float32, or what was found cannot be kept on disk.
    """
    tuning.check_gpu()
    tokens = list(tokens)
    wanted: dict[tuple[int, tuple[int, int], QuantSpec, torch.dtype], None] = {}
    for layer in model.modules():
        if isinstance(layer, LutLinear) and layout.supports(layer.spec.group_size, layer.in_features):
            shape = (layer.out_features, layer.in_features)
            wanted[layer.weight.device.index or 0, shape, layer.spec, layer.scales.dtype] = None
    results = []
    for device, shape, spec, dtype in wanted:
        results += tune([shape], tokens, spec=spec, dtype=dtype, device=device, candidates=candidates, again=again)
    return results


class TuneTask(NamedTuple):
    """Upstream's record of a problem: M, N and K as everywhere, the spec's two numbers, and where it is to run."""

    M: int
    N: int
    K: int
    num_bits: int
    group_size: int
    num_sms: int
    dtype: torch.dtype
    device: torch.device


def tune_tasks_legacy(tasks: Sequence[TuneTask], num_seeds: int = 3) -> None:
    """Upstream's way in: tune for each task and keep the result, here in the cache directory.

    Args:
        tasks: their ``num_sms`` is not needed, the GPU of ``device`` is asked; a device without index is the first.
        num_seeds: accepted and not needed; a timing is a median over many replays and weights.

    Raises:
        TuneError: there is no GPU, the kernels take no such weights, or what was found cannot be kept on disk.
    """
    tuning.check_gpu()
    for task in tasks:
        spec = QuantSpec(task.num_bits, task.group_size, CUSTOM_TABLE)
        tune([(task.N, task.K)], [task.M], spec=spec, dtype=task.dtype, device=torch.device(task.device).index or 0)


def tune_and_pack(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    num_bits: int,
    group_size: int,
    num_seeds: int = 3,
    check_correctness: bool = True,
    check_num_seeds: int = 3,
) -> tuple[torch.Tensor, TuneMetaData]:
    """Upstream's packing: tune for so many tokens on the GPU of ``inputs`` (on a CPU nothing is), and pack the codes.

    Args:
        inputs: (M, K), float16 or bfloat16; its values do not count.
        weight: codes (K, N), any integers below 2**num_bits.
        num_seeds, check_correctness, check_num_seeds: accepted and not needed; tuning checks every answer.

    Returns:
        Container int16 (N * num_bits / 16, K) on the device of ``inputs``, and its metadata.

    Raises:
        TuneError: the kernels take no such weights, or what was found cannot be kept on disk.
        OperatorError: a code does not fit, or N columns do not fill whole int16.
    """
    tokens, (width, rows) = inputs.numel() // inputs.shape[-1], weight.shape
    packed = container.from_codes(weight.to(inputs.device).T, num_bits)
    if inputs.is_cuda:
        spec = QuantSpec(num_bits, group_size, CUSTOM_TABLE)
        tune([(rows, width)], [tokens], spec=spec, dtype=inputs.dtype, device=inputs.get_device())
    packed, order = container.arrange(packed, num_bits, group_size, container.CHECKPOINT_ORDER)
    sizes = (tokens, rows, width, num_bits, group_size, 0)
    return packed, TuneMetaData(*sizes, inputs.dtype, packed.device, order)
