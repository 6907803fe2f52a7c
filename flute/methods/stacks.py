"""Stacked experts under any method: rounded to nearest, before anything is calibrated.

A token reaches a few of many experts, so a Hessian for each would take many times the text. Their dense parameters are
overwritten with the values that the codes stand for, so that the layers around them are calibrated on what the finished
model computes; the modules are exchanged for `LutExperts` at the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..hadamard import transform
from ..integrations import mixtures
from ..packing import pack_codes
from ..quantize import dequantize, quantize
from ..spec import CUSTOM_TABLE, QuantSpec
from ..tables import resolve_table
from .codebook import learn_table


class RoundedStack(NamedTuple):
    """``codes`` uint8 (E, N, row_bytes), ``scales`` (E, N, G), ``table`` float32 or None for a named one; seconds."""

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor | None
    seconds: float


@torch.no_grad()
def round_stack(
    parameter: torch.nn.Parameter,
    spec: QuantSpec,
    *,
    table: torch.Tensor | None,
    scale: str,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> RoundedStack:
    """Round a stack (E, N, K), which then holds what its codes stand for.

    Args:
        spec: how. table: the custom table; None with a custom spec: one is learned for the stack.
        scale: as in `flute.quantize.quantize`. dtype: of scales. device: where to compute. name: for messages.

    Raises:
        QuantizeError: NaN or Inf weights.
    """
    started, flat = time.perf_counter(), parameter.detach().flatten(0, 1).to(device, torch.float32)
    if spec.table == CUSTOM_TABLE and table is None:
        seen = transform(flat, spec.hadamard_size) if spec.hadamard_size else flat
        table = learn_table(seen, spec, torch.ones(flat.shape[1], device=device), scale_dtype=dtype, name=name).table
    made = quantize(flat, spec, table=table, scale=scale, scale_dtype=dtype, name=name)
    rounded = dequantize(*made, spec, table=table, dtype=torch.float32)
    parameter.data.copy_(rounded.view(parameter.shape))
    codes, home = pack_codes(made.codes, spec.code_bits), parameter.device
    shape = (*parameter.shape[:2], -1)
    return RoundedStack(
        codes.view(shape).to(home), made.scales.view(shape).to(home), table, time.perf_counter() - started
    )


def place_stacks(model: Any, specs: Mapping[str, QuantSpec], rounded: Mapping[str, RoundedStack]) -> None:
    """Put `LutExperts` with the ``rounded`` codes in the place of the experts that ``specs`` names by projection."""
    mixtures.swap(model, specs, pre_quantized=False)
    for name, stack in rounded.items():
        owner, role = mixtures.owner(name)
        experts = model.get_submodule(owner)
        experts.put(role, stack.codes, stack.scales)
        table = resolve_table(specs[name], stack.table).to(stack.scales.device, stack.scales.dtype)
        experts.register_buffer(f"{role}_table", table, persistent=stack.table is not None)
    for owner in {mixtures.owner(name)[0] for name in rounded}:
        model.get_submodule(owner).arrange()
    if getattr(model, "_weight_conversions", None):  # what saving cuts apart, it cuts with the scales
        model._weight_conversions += mixtures.scale_converters(model._weight_conversions)
