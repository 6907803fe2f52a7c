"""The operator ``flute::lut_linears``: several layers that take the same x, in one launch.

    y (..., N1 + N2 + ...) = x (..., K) . [W1; W2; ...]^T + [bias1; bias2; ...]

Rows of W lie one after the other in both layouts (in kernel order in tiles of 16), so where the codes, scales and
biases of the layers are neighbours in memory, one kernel runs over all of them as over one layer. The operator looks
at the addresses each time: layers that are no neighbours any more are multiplied one by one, with the same meaning.

Every layer of a group calls this operator and takes its part of y. While torch.compile traces, calls with the same
operands are made one (`_once`): the graph then holds one call. This happens behind functionalization, where a tensor
that was written to is another tensor, so the same operands mean the same values. (Inductor itself merges equal calls of
an operator only when it trains.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import ops

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "lut_linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor table, Tensor[] biases, int[] out_features, "
    "int bits, int group_size) -> Tensor"
)


def neighbours(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over all of ``tensors``, which lie one after the other along dimension 0; None if they do not."""
    first, rows = tensors[0], 0
    home, place, rest = first.untyped_storage().data_ptr(), first.data_ptr(), first.shape[1:]
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.shape[1:] != rest or tensor.dtype != first.dtype:
            return None
        if tensor.data_ptr() != place or tensor.untyped_storage().data_ptr() != home:
            return None
        place += tensor.nbytes
        rows += tensor.shape[0]
    return first.as_strided((rows, *rest), first.stride())


def _lut_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    table: torch.Tensor,
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    bits: int,
    group_size: int,
) -> torch.Tensor:
    codes, scaled = neighbours(weights), neighbours(scales)
    bias = neighbours(biases) if biases else None
    if codes is not None and scaled is not None and (bias is not None or not biases):
        return ops.backend(x)(x, codes, scaled, table, bias, sum(out_features), bits, group_size)
    each = zip(weights, scales, biases or (None,) * len(weights), out_features, strict=True)
    return torch.cat([ops.backend(x)(x, w, s, table, b, n, bits, group_size) for w, s, b, n in each], -1)


def _fake(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    table: torch.Tensor,
    biases: Sequence[torch.Tensor],
    out_features: Sequence[int],
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(out_features))


def _once(mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    """Tracing: the second call with the same operands is the first one."""
    seen = _traced.setdefault(mode.tracer, {})
    tensors = (args[0], *args[1], *args[2], args[3], *args[4])
    # a traced tensor keeps its identity while ``seen`` holds it; its version tells of writes not made functional
    states = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    key = (states, tuple(args[5]), *args[6:])
    if key not in seen:
        seen[key] = (mode.__torch_dispatch__(func, types, args, kwargs), tensors)
    return seen[key][0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weights, scales, table, biases, ctx.sizes, bits, group_size = inputs
    ctx.save_for_backward(*weights, *scales, table)
    ctx.rest, ctx.biases = (x.shape[-1], bits, group_size), len(biases)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *saved, table = ctx.saved_tensors
    count, grad_x = len(ctx.sizes), None
    grads = grad.split(ctx.sizes, -1)
    if ctx.needs_input_grad[0]:
        for part, weight, scales, n in zip(grads, saved[:count], saved[count:], ctx.sizes, strict=True):
            product = part @ torch.ops.flute.dequantize(weight, scales, table, n, *ctx.rest)
            grad_x = product if grad_x is None else grad_x + product
    biases = [part.reshape(-1, part.shape[-1]).sum(0) for part in grads] if ctx.biases else []
    return grad_x, [None] * count, [None] * count, None, biases, None, None, None


_traced: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

_library.impl("lut_linears", _lut_linears, "CPU")
_library.impl("lut_linears", _lut_linears, "CUDA")
torch.library.register_fake("flute::lut_linears", _fake, lib=_library)
torch.library.register_torch_dispatch("flute::lut_linears", ProxyTorchDispatchMode, _once, lib=_library)
torch.library.register_autograd("flute::lut_linears", _backward, setup_context=_setup_context, lib=_library)
