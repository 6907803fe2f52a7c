"""Attention of few queries over keys and values in 16 bits: ``flute::decode_attention``, what a decode step does.

One token of one sequence keeps few blocks of threads busy where each takes a head. Here positions are cut among blocks,
as many as run at once, and their parts are added in order ("Flash-Decoding": Dao, Haziza, Massa, Sizov 2023;
``cuda/decode_attention.cu``). Any boolean mask is taken, and keys that nobody may see are never read, so a static cache
costs what is in it.
"""

from __future__ import annotations

import torch

from ..errors import OperatorError
from . import attention_cuda

_library = torch.library.Library("flute", "FRAGMENT")
_library.define("decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor")


def _refuse(what: str) -> None:
    raise OperatorError(f"flute.decode_attention: {what}")


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        _refuse(f"query {tuple(query.shape)}, key {tuple(key.shape)}; need (B, query heads, T, D) and (B, H, S, D)")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or not query.dtype == key.dtype == value.dtype:
        _refuse(
            f"key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)} {value.dtype}; "
            f"need (B, H, S, D of either) in query's {query.dtype}"
        )
    if query.shape[1] % key.shape[1]:
        _refuse(f"{query.shape[1]} query heads over {key.shape[1]} key heads; one must be a multiple of the other")
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    if mask is not None and (mask.dtype != torch.bool or not _fits(mask, shape)):
        _refuse(f"mask {tuple(mask.shape)} {mask.dtype}; needs bool {shape}, B and T may be 1")


def _fits(mask: torch.Tensor, shape: tuple[int, ...]) -> bool:
    pairs = zip(mask.shape, shape, strict=False)
    return mask.dim() == 4 and mask.shape[3] == shape[3] and all(has in (1, wants) for has, wants in pairs)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What `decode_attention` and `attention.kv_attention` compute: softmax in float32; who sees nothing answers 0.

    Args:
        query: (B, query heads, T, D). key, value: (B, H, S, D), float32.
        seen: bool, (B or 1, T or 1, S).

    Returns:
        (B, query heads, T, D of values) in query's dtype.
    """
    (batch, many, tokens, dim), (heads, positions) = query.shape, key.shape[1:3]
    rows = query.float().reshape(batch, heads, many // heads * tokens, dim)
    scores = (rows @ key.mT * scaling).view(batch, heads, -1, tokens, positions)
    seen = seen[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
    return (weights.flatten(2, 3) @ value).view(batch, many, tokens, -1).to(query.dtype)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    _check(query, key, value, mask)
    seen = query.new_ones(1, 1, key.shape[2], dtype=torch.bool) if mask is None else mask[:, 0]
    return attend(query, key.float(), value.float(), seen, scaling).transpose(1, 2).contiguous()


def _attention_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    if not attention_cuda.takes_decode(query.dtype, query.shape[-1], value.shape[-1]):
        return _attention(query, key, value, mask, scaling)
    _check(query, key, value, mask)
    return attention_cuda.decode_attention(query, key, value, mask, scaling)


def _attention_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    _check(query, key, value, mask)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


_library.impl("decode_attention", _attention, "CompositeExplicitAutograd")
_library.impl("decode_attention", _attention_cuda, "CUDA")
torch.library.register_fake("flute::decode_attention", _attention_fake, lib=_library)


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling * query . key^T) . value, GQA by broadcasting; no gradients.

    Args:
        query: (B, query heads, T, D), few T; head h reads key head h / (query heads / H). Any strides, as all here.
        key, value: (B, H, S, D of either), in query's dtype.
        mask: bool (B or 1, 1, T or 1, S), True for what a query sees; None: every query sees everything.
        scaling: of the scores.

    Returns:
        (B, T, query heads, D of values), contiguous, in query's dtype; zeros for a query that sees nothing.

    Raises:
        OperatorError: shapes or dtypes do not fit.
    """
    return torch.ops.flute.decode_attention(query, key, value, mask, scaling)
