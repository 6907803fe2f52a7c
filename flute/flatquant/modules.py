"""What runs: transforms in front of layers, keys and values, and layers of integer weights.

The same modules serve calibration and the finished model. With ``real`` they give codes to `IntLinear`; without, they
give the numbers that those codes stand for to an ordinary nn.Linear, with gradients. Code for code it is the same
arithmetic (`flute.kernels.tokens` is the definition), so what was calibrated is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.heads import turn_heads, turned
from ..kernels.integer import int_linear, pack_nibbles, unpack_nibbles
from ..kernels.pieces import arrange, restore
from ..kernels.tokens import kronecker, kronecker_quantize, transform
from .fake import fake
from .rounding import Grid


class Codes(NamedTuple):
    """A quantized activation: int8 ``codes`` (M, n), float32 ``scale`` (M,), int32 ``zero`` (M,) or None; ``like``:
    the tensor (..., n) it was made from, for shape and dtype."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    like: torch.Tensor


Activation = torch.Tensor | Codes
FLOAT32 = ("weight_scale", "clip", "q_clip", "k_clip", "v_clip")  # parameters that stay so in a model of any dtype


def fixed(*shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter that is not trained by the model's owner."""
    return nn.Parameter(torch.ones(*shape, device=device, dtype=dtype), requires_grad=False)


def _identity(size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter | None:
    """A factor (size, size) that does nothing yet; size 0: none."""
    return nn.Parameter(torch.eye(size, device=device, dtype=dtype), requires_grad=False) if size else None


class _KeepsFloat32(nn.Module):
    """A cast of the whole model, such as ``model.half()``, leaves scales and clips float32, as kernels want them."""

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        exact = {name: part.data for name, part in self._parameters.items() if name in FLOAT32 and part is not None}
        super()._apply(*arguments, **keywords)
        for name, values in exact.items():
            part = self.get_parameter(name)
            if part.dtype != values.dtype:
                part.data = values.to(part.device)
        return self


class DeferredNorm(nn.Module):
    """The place of an RMSNorm whose arithmetic the site behind it does, in the same launch: x -> x.

    Attributes:
        weight: (n,), under the name it always had. eps: the norm's.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x


class Site(_KeepsFloat32):
    """x -> x (left (x) right), rounded token by token: what one or more layers get.

    Args:
        rows, columns: n1 and n2 of the factors; 0: that factor is the identity.
        bits, symmetric: of the grid; 16: not rounded.
        clips: 1, or one for each consumer.
        real: give codes.

    Attributes:
        left, right: (n1, n1), (n2, n2), in the activations' dtype. clip: (clips, 2) float32, ratios of max and min.
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    clip: nn.Parameter

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        *,
        symmetric: bool = True,
        clips: int = 1,
        real: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.real = bits, symmetric, real
        self._norm: tuple[DeferredNorm, ...] = ()  # a tuple: it is a child of the block, not of this module
        for name, size in (("left", rows), ("right", columns)):
            self.register_parameter(name, _identity(size, device, dtype))
        self.register_parameter("clip", fixed(clips, 2, device=device, dtype=torch.float32) if bits < 16 else None)

    def after(self, norm: DeferredNorm) -> None:
        """Take over the arithmetic of the norm before a ``real`` site."""
        self._norm = (norm,)

    @property
    def gives_codes(self) -> bool:
        """Rather than numbers."""
        return self.real and self.bits < 16

    def forward(self, x: torch.Tensor, *, gated: bool = False) -> tuple[Activation, ...]:
        """One activation per clip; of silu(first half of x) * second half if ``gated``, where it gives codes."""
        if self.gives_codes:
            factors, kind = (self.left, self.right), (self.bits, self.symmetric)
            return tuple(
                Codes(*kronecker_quantize(x, *factors, clip, *kind, *self._norming(), gated=gated), x)
                for clip in self.clip
            )
        if self.bits >= 16:
            return (self._transformed(x),)
        z = self._transformed(x)
        return tuple(fake(z, self.bits, symmetric=self.symmetric, clip=clip) for clip in self.clip)

    def _transformed(self, x: torch.Tensor) -> torch.Tensor:
        if self.real:
            return kronecker(x, self.left, self.right, *self._norming())
        left, right = (None if each is None else each.to(x.dtype) for each in (self.left, self.right))
        return transform(x, left, right, None, 0.0).to(x.dtype).view(x.shape)

    def _norming(self) -> tuple[torch.Tensor | None, float]:
        """Weight and eps of the norm to apply."""
        return (self._norm[0].weight, self._norm[0].eps) if self._norm else (None, 0.0)

    def extra_repr(self) -> str:
        sizes = " x ".join(str(len(each)) for each in (self.left, self.right) if each is not None)
        return f"{sizes}, bits={self.bits}, real={self.real}"


class Heads(_KeepsFloat32):
    """Keys and values as the cache holds them: k P_h, v (transformed before), a grid per token and head; and q P_h^-T.

    q k^T = (q P_h^-T) (k P_h)^T, exactly. Scales are float16, as the cache stores them; those of queries float32.

    Args:
        size: of the factor; 0: the identity. heads: of keys and values. head_dim: d.
        bits, symmetric: of keys and of values.
        offset: keys have a mean to subtract.
        q_bits, q_symmetric: of queries.
        values: values are transformed here, by P_v.
        real: turn and transform in one launch, without gradients.

    Attributes:
        key, query, value: (d, d), P_h, P_h^-T and P_v, or None. offset: (heads, d) or None. q_clip, k_clip, v_clip:
        (2,) float32.
    """

    key: nn.Parameter | None
    query: nn.Parameter
    value: nn.Parameter | None
    offset: nn.Parameter | None
    q_clip: nn.Parameter | None
    k_clip: nn.Parameter | None
    v_clip: nn.Parameter | None

    def __init__(
        self,
        size: int,
        heads: int,
        bits: tuple[int, int],
        symmetric: tuple[bool, bool],
        *,
        head_dim: int,
        offset: bool = False,
        q_bits: int = 16,
        q_symmetric: bool = True,
        values: bool = False,
        real: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.real = bits, symmetric, real
        self.q_bits, self.q_symmetric = q_bits, q_symmetric
        for name, factor in (("key", size), ("query", size), ("value", head_dim if values else 0)):
            self.register_parameter(name, _identity(factor, device, dtype))
        for name, width in (("q_clip", q_bits), ("k_clip", bits[0]), ("v_clip", bits[1])):
            made = fixed(2, device=device, dtype=torch.float32) if width < 16 else None
            self.register_parameter(name, made)
        self.register_parameter("offset", fixed(heads, head_dim, device=device, dtype=dtype) if offset else None)
        if self.offset is not None and not self.offset.is_meta:
            nn.init.zeros_(self.offset)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (B, L, H, d), k (B, L, heads, d), turned by cos, sin (B or 1, L, d) and transformed: heads first;
        q rounded, k not."""
        if self.key is None:
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        elif self.real:
            q, k = turn_heads(q, k, cos, sin, self.query.to(q.dtype), self.key.to(k.dtype))
        else:
            q, k = turned(q, cos, sin) @ self.query.to(q.dtype), turned(k, cos, sin) @ self.key.to(k.dtype)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q = fake(q, self.q_bits, symmetric=self.q_symmetric, clip=self.q_clip)
        return q, k if self.offset is None else k - self.offset.to(k.dtype).unsqueeze(-2)

    def turned_values(self, v: torch.Tensor) -> torch.Tensor:
        """v (B, heads, L, d) of v_proj, transformed; not rounded."""
        return v if self.value is None else v @ self.value.to(v.dtype)

    def rounded(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformed keys and values (B, heads, L, d) as their codes stand for them."""
        k = fake(k, self.bits[0], symmetric=self.symmetric[0], clip=self.k_clip, dtype=torch.float16)
        return k, fake(v, self.bits[1], symmetric=self.symmetric[1], clip=self.v_clip, dtype=torch.float16)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, q_bits={self.q_bits}"


class IntLinear(_KeepsFloat32):
    """y = x W^T + bias of codes and integer weights; W ~ (codes - weight_zero) * weight_scale.

    Of the activation's and the weight's codes c and q, with one kind of zeros at most,

        sum (c - zero) q = sum c q - zero sum q,      sum c (q - zero) = sum c q - zero sum c

    and ``flute::int_linear`` subtracts either product exactly. Sums of the weight's rows are made when it is loaded.

    On a GPU the weight lies in the kernels' order, elsewhere in the checkpoint's; moving the module converts it, and a
    state dict always shows the checkpoint's.

    Args:
        in_features, out_features: K (even below 5 bits), N.
        bits: of the weights; up to 4 they share bytes.
        w_asym, a_asym: weights, or activations, have zero points; not both.

    Attributes:
        weight: uint8 (N, K / 2) of `pack_nibbles`, or int8 (N, K), or `pieces.arrange`d. weight_scale: float32 (N,).
        weight_zero: int32 (N,) or None; as codes, 2^(bits-1) lower than in `rounding`. bias: (N,) or None.
    """

    bias: nn.Parameter | None
    weight_zero: nn.Parameter | None
    row_sum: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        bias: bool = False,
        w_asym: bool = False,
        a_asym: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        shape, kind = ((in_features // 2,), torch.uint8) if bits <= 4 else ((in_features,), torch.int8)
        zeros = torch.zeros(out_features, *shape, dtype=kind, device=device)
        self.weight = nn.Parameter(zeros, requires_grad=False)
        self.weight_scale = fixed(out_features, device=device, dtype=torch.float32)
        whole = torch.zeros(out_features, dtype=torch.int32, device=device)
        self.register_parameter("weight_zero", nn.Parameter(whole, requires_grad=False) if w_asym else None)
        self.register_buffer("row_sum", whole.clone() if a_asym else None, persistent=False)
        self.register_parameter("bias", fixed(out_features, device=device, dtype=dtype) if bias else None)

    def forward(self, x: Codes, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., N) in the activation's dtype, added to ``residual`` if there is one."""
        return self.product(x, self.bias, residual)

    def product(self, x: Codes, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The same with another bias (N,), or None."""
        zero, sums = x.zero, self.row_sum
        if self.weight_zero is not None:
            zero, sums = x.codes.sum(-1, dtype=torch.int32), self.weight_zero
        if residual is not None:
            residual = residual.reshape(-1, self.out_features)
        y = int_linear(x.codes, x.scale, self.weight, self.weight_scale, bias, x.like.dtype, zero, sums, residual)
        return y.view(*x.like.shape[:-1], self.out_features)

    def store(self, units: torch.Tensor, made: Grid) -> None:
        """Take codes (N, K) of `rounding.codes` and their grid, a scale (and zero) per row."""
        shift = 0 if made.zero is None else 1 << (self.bits - 1)
        whole = (units - shift).to(torch.int8)
        self.weight.data = pack_nibbles(whole) if self.bits <= 4 else whole
        self.weight_scale.data = made.scale.flatten().float()
        if self.weight_zero is not None and made.zero is not None:
            self.weight_zero.data = (made.zero.flatten() - shift).to(torch.int32)
        self.arrange()

    def codes(self) -> torch.Tensor:
        """int8 (N, K)."""
        stored = self.stored()
        return unpack_nibbles(stored) if self.bits <= 4 else stored

    def stored(self) -> torch.Tensor:
        """The weight in the checkpoint's order."""
        weight = self.weight.data
        return restore(weight, self.out_features, self.in_features) if weight.dim() == 3 else weight

    def arrange(self) -> None:
        """Take the order that is right where the weight lies, and sum its rows if activations have zeros."""
        if self.row_sum is not None:
            self.row_sum = self.codes().sum(-1, dtype=torch.int32)
        if self.weight.is_cuda and self.weight.dim() == 2:
            self.weight.data = arrange(self.weight.data)

    def _apply(self, *arguments: Any, **keywords: Any) -> IntLinear:
        self.weight.data = self.stored()
        super()._apply(*arguments, **keywords)
        self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.stored()

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        parameter, held = self.weight, self.weight.data
        self.weight.data = self.stored()
        super()._load_from_state_dict(*arguments, **keywords)
        self.arrange()
        if self.weight is parameter and held.dim() == 3:  # in place, as of any tensor: neighbours and graphs find it
            self.weight.data = held.copy_(self.weight.data)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def freeze(model: nn.Module) -> None:
    """Nothing that was calibrated is trained by the model's owner: no integer, scale, transform or clip, nor the biases
    of integer layers. Whoever loads a model makes new parameters, which would be."""
    for part in model.modules():
        if isinstance(part, _KeepsFloat32):
            part.requires_grad_(False)


def project(layer: nn.Module, x: Activation, residual: torch.Tensor | None) -> torch.Tensor:
    """What the layer makes of x, added to ``residual`` if there is one: of an integer layer in the same launch."""
    if residual is None:
        return layer(x)
    return layer(x, residual) if isinstance(layer, IntLinear) else residual + layer(x)


@contextmanager
def unrounded_cache(model: nn.Module) -> Iterator[None]:
    """Inside, keys and values are transformed and not rounded: to tell what rounding them costs."""
    parts = [part for part in model.modules() if isinstance(part, Heads)]
    kept = [part.bits for part in parts]
    try:
        for part in parts:
            part.bits = (16, 16)
        yield
    finally:
        for part, bits in zip(parts, kept, strict=True):
            part.bits = bits
