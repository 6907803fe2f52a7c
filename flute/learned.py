"""`LearnedLinear`: a linear layer that computes with its quantized weight while the scales of that weight are learned.

With W (N, K) frozen, s (N, G) the scales, T (E,) or (E, 2) the table, both rounded to the dtype in which they will be
stored, and r the distance of a weight (or pair) to an entry::

    c[n, j]  = argmin_i | W[n, k] / s[n, k // g] - T[i] |                 chosen anew in every forward pass
    W^[n, k] = T[c[n, k]] * s[n, k // g]

The codes c and the rounding of s and T are steps, whose derivative is zero or does not exist. The straight-through
gradient takes both as constants (Bengio et al. 2013; the learned scales of Guo et al. 2024, FLUTE)::

    dL/ds[n, m] = sum over k in group m         of  dL/dW^[n, k] * T[c[n, k]]
    dL/dT[i]    = sum over n, k with c[n, k] = i of  dL/dW^[n, k] * s[n, k // g]

What is trained is what will be stored: the loss of a forward pass is the loss of the checkpoint, in the arithmetic of
the model. The scales that the optimizer moves are float32: half a unit in the last place of a bfloat16 scale of 0.05 is
1.2e-4, and smaller steps would be lost one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import SpecError
from .linear import LutLinear
from .quantize import Quantized, nearest, quantize, spread, sum_by_code, values_of
from .spec import CUSTOM_TABLE, QuantSpec
from .tables import resolve_table

_ROWS_AT_ONCE_ELEMENTS = 1 << 23  # indices of 8 bytes: slices of 64 MB


def choose_codes(weight: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, group: int) -> torch.Tensor:
    """Codes uint8 (N, K / v) of the entries nearest to W / s; a value halfway between two takes the lower one.

    Args:
        weight: (N, K), any float dtype. scales: (N, G). A scale of zero divides by one.
        table: float32 (E,) or (E, 2). group: weights to a scale.
    """
    width = weight.shape[1]
    rows = max(1, _ROWS_AT_ONCE_ELEMENTS // width)
    parts = []
    for part, part_scales in zip(weight.split(rows), scales.split(rows), strict=True):
        wide = spread(torch.where(part_scales == 0, torch.ones_like(part_scales), part_scales), group, width)
        parts.append(nearest(part.float() / wide, table).to(torch.uint8))
    return torch.cat(parts)


def gradients(
    upstream: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    group: int,
    *,
    of_table: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The straight-through gradients (N, G) and, if asked for, of the table's shape; formulas above.

    Args:
        upstream: dL/dW^ (N, K) float32 or float64. values: T[c] (N, K). codes: uint8 (N, K / v).
        scales, table: those of the forward pass.
    """
    rows, width = upstream.shape
    short = -width % group
    products = nn.functional.pad(upstream * values, (0, short))
    to_scales = products.view(rows, -1, group).sum(-1)
    if not of_table:
        return to_scales, None
    masses = (upstream * spread(scales, group, width)).view(-1, table[0].numel())
    return to_scales, sum_by_code(masses, codes.flatten().long(), len(table)).view_as(table).to(upstream.dtype)


class _Product(torch.autograd.Function):
    """x (..., K), W (N, K), s (N, G), T, codes or None -> x . W^^T (..., N); W^ is made again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        table: torch.Tensor,
        codes: torch.Tensor | None,
        group: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Rounds s and T to ``dtype`` (here, since a cast outside would round their gradients); saves codes, not W^."""
        scales, table = scales.to(dtype).float(), table.to(dtype).float()
        codes = choose_codes(weight, scales, table, group) if codes is None else codes
        ctx.save_for_backward(x, scales, table, codes)
        ctx.group = group
        return x @ (values_of(codes, table) * spread(scales, group, x.shape[-1])).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, s and T."""
        x, scales, table, codes = ctx.saved_tensors
        to_x = to_scales = to_table = None
        values = values_of(codes, table)
        if ctx.needs_input_grad[0]:
            to_x = upstream @ (values * spread(scales, ctx.group, x.shape[-1])).to(x.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            to_weight = (upstream.flatten(0, -2).T @ x.flatten(0, -2)).float()
            to_scales, to_table = gradients(
                to_weight, values, codes, scales, table, ctx.group, of_table=ctx.needs_input_grad[3]
            )
        return to_x, None, to_scales, to_table, None, None, None


def check_unrotated(spec: QuantSpec, name: str) -> None:
    """Refuse a rotated weight: codes would be chosen of another weight than the scales.

    Raises:
        SpecError: naming the layer.
    """
    if spec.hadamard_size:
        raise SpecError(
            f"layer {name!r}: hadamard_size={spec.hadamard_size}; scales are learned of weights that are not "
            "rotated, use --hadamard-size 0 or another method"
        )


class LearnedLinear(nn.Linear):
    """y = x . W^^T + bias; see the top of this file.

    Args:
        linear: the dense layer; its weight and bias are taken as they are, not copied.
        spec: bits, group size, table, vector size.
        table: the custom table, when ``spec.table`` is ``"custom"``.
        scale: where the scales begin, ``"absmax"`` or ``"mse"``.
        dtype: in which scales and table will be stored (float16, bfloat16, float32).
        learn_table: learn a table of this layer's own, from ``table`` on; `stored_spec` then says ``"custom"``.
        fixed_codes: keep the codes that are nearest at the start.
        start: codes and scales to begin with, from another method, whose codes are kept; None: rounding to nearest.
        name: for messages.

    Attributes:
        scales: Parameter float32 (N, G). table: float32, a Parameter or a buffer. weight: frozen.
        plain: compute with W instead, as before; `dense_weights` sets it for a while.

    Raises:
        QuantizeError, SpecError: as `flute.quantize.quantize`; SpecError also where the spec rotates the weight.
    """

    table: torch.Tensor
    fixed: torch.Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        spec: QuantSpec,
        *,
        table: torch.Tensor | None = None,
        scale: str = "absmax",
        dtype: torch.dtype = torch.float16,
        learn_table: bool = False,
        fixed_codes: bool = False,
        start: Quantized | None = None,
        name: str = "linear",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate another weight
        check_unrotated(spec, name)
        weight = linear.weight.detach()
        made = start or quantize(weight, spec, table=table, scale=scale, scale_dtype=dtype, name=name)
        self.in_features, self.out_features, self.spec, self.dtype = (
            linear.in_features,
            linear.out_features,
            spec,
            dtype,
        )
        self.weight, self.bias, self.plain = linear.weight, linear.bias, False
        self.scales = nn.Parameter(made.scales.float())
        values = resolve_table(spec, table).to(weight.device, dtype).float()
        if learn_table:
            self.table = nn.Parameter(values)
        else:
            self.register_buffer("table", values, persistent=False)
        self.register_buffer("fixed", made.codes if fixed_codes or start else None, persistent=False)
        self.train(linear.training)

    def learnable(self) -> list[nn.Parameter]:
        """What an optimizer is to move: the scales, and the table if it is learned."""
        return [self.scales, self.table] if isinstance(self.table, nn.Parameter) else [self.scales]

    @property
    def stored_spec(self) -> QuantSpec:
        """The spec of the finished layer."""
        learned = isinstance(self.table, nn.Parameter)
        return (
            QuantSpec(self.spec.bits, self.spec.group_size, CUSTOM_TABLE, self.spec.vector_size)
            if learned
            else self.spec
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        if self.plain:
            return super().forward(x)
        group = self.spec.group(self.in_features)
        y: torch.Tensor = _Product.apply(x, self.weight, self.scales, self.table, self.fixed, group, self.dtype)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def quantized(self, dtype: torch.dtype | None = None) -> Quantized:
        """Codes uint8 (N, K / v) and scales (N, G) as they are now, in ``dtype`` (default: the one trained for)."""
        scales = self.scales.to(dtype or self.dtype)
        table = self.table.to(scales.dtype).float()
        group = self.spec.group(self.in_features)
        codes = choose_codes(self.weight, scales.float(), table, group) if self.fixed is None else self.fixed
        return Quantized(codes, scales)

    @torch.no_grad()
    def finished(self, dtype: torch.dtype | None = None) -> LutLinear:
        """The layer for use: codes, scales and, if it was learned, the table."""
        made = self.quantized(dtype)
        kind, device = made.scales.dtype, self.weight.device
        layer = LutLinear(self.in_features, self.out_features, self.stored_spec, device=device, dtype=kind)
        layer.table.copy_(self.table)
        layer.bias = self.bias
        return layer.store(made).train(self.training)


def learned_layers(model: nn.Module) -> dict[str, LearnedLinear]:
    """The layers being learned, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedLinear)}


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """The model as it was before quantization, while the context lasts."""
    layers = list(learned_layers(model).values())
    try:
        for layer in layers:
            layer.plain = True
        yield
    finally:
        for layer in layers:
            layer.plain = False


@contextmanager
def held_codes(layers: Iterable[LearnedLinear]) -> Iterator[None]:
    """Codes are chosen once for all forward passes of the context, in which scales and tables must not change."""
    free = [layer for layer in layers if layer.fixed is None]
    try:
        for layer in free:
            layer.fixed = layer.quantized().codes
        yield
    finally:
        for layer in free:
            layer.fixed = None
