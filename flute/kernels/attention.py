"""An int4 cache of keys and values: ``flute::kv_append`` quantizes into it, ``flute::kv_attention`` reads it.

A `Store` holds keys, or values, of one layer in P pages of S slots. Heads are those of the keys, never repeated for
queries. Without a page table sequence b lies in page b (a static cache); with one, its token i lies in slot
i % S of page table[b, i / S]. Lengths, which always count the step's own T tokens too, stay on the device, so that a
step needs no host and can be captured.
"""

from __future__ import annotations

import torch

from ..errors import OperatorError
from . import attention_cuda
from .decode_attention import attend
from .store import Store, dequantize, quantize_heads

_library = torch.library.Library("flute", "FRAGMENT")
_library.define(
    "kv_append(Tensor key, Tensor value, Tensor(a!) key_codes, Tensor(b!) key_scale, Tensor(c!)? key_zero, "
    "Tensor? key_clip, Tensor(d!) value_codes, Tensor(e!) value_scale, Tensor(f!)? value_zero, Tensor? value_clip, "
    "Tensor lengths, Tensor? table) -> ()"
)
_library.define(
    "kv_attention(Tensor query, Tensor key_codes, Tensor key_scale, Tensor? key_zero, Tensor value_codes, "
    "Tensor value_scale, Tensor? value_zero, Tensor lengths, Tensor? starts, Tensor? table, float scaling) -> Tensor"
)


# ---- checks --------------------------------------------------------------------------------------------------------


def _refuse(what: str) -> None:
    raise OperatorError(f"flute.kv: {what}")


def _check_store(
    name: str, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, head_dim: int
) -> tuple[int, int]:
    """Heads and slots of a page."""
    if not all(one is None or one.is_contiguous() for one in (codes, scale, zero)):
        _refuse(f"the store of {name}s is not contiguous; take it as `Store.empty` made it")
    if codes.dim() != 4 or codes.dtype != torch.uint8 or 2 * codes.shape[-1] != head_dim:
        _refuse(f"{name} codes {tuple(codes.shape)} {codes.dtype}; needs uint8 (P, H, S, {head_dim}/2)")
    if scale.shape != codes.shape[:3] or scale.dtype != torch.float16:
        _refuse(f"{name} scale {tuple(scale.shape)} {scale.dtype}; needs float16 {tuple(codes.shape[:3])}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.int16):
        _refuse(f"{name} zero {tuple(zero.shape)} {zero.dtype}; needs int16 {tuple(scale.shape)}")
    return codes.shape[1], codes.shape[2]


def _check_sequences(batch: int, pages: int, lengths: torch.Tensor, table: torch.Tensor | None) -> None:
    if tuple(lengths.shape) != (batch,) or lengths.dtype != torch.int32:
        _refuse(f"lengths {tuple(lengths.shape)} {lengths.dtype}; needs int32 ({batch},)")
    if table is None and pages != batch:
        _refuse(f"{pages} pages for {batch} sequences; without a page table each sequence has its own")
    if table is not None and (table.dim() != 2 or table.shape[0] != batch or table.dtype != torch.int32):
        _refuse(f"table {tuple(table.shape)} {table.dtype}; needs int32 ({batch}, pages of a sequence)")


# ---- the operators -------------------------------------------------------------------------------------------------


def _append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    key_clip: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    value_clip: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    _check_append(key, value, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, table)
    _write(key, Store(key_codes, key_scale, key_zero, key_clip), lengths, table)
    _write(value, Store(value_codes, value_scale, value_zero, value_clip), lengths, table)


def _append_cuda(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    key_clip: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    value_clip: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    given = (key_codes, key_scale, key_zero, key_clip, value_codes, value_scale, value_zero, value_clip, lengths, table)
    if not _kernel_takes(key, value.shape[-1], key_codes, table):
        return _append(key, value, *given)
    _check_append(key, value, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, table)
    attention_cuda.append(key, value, *given)


def _kernel_takes(x: torch.Tensor, value_dim: int, codes: torch.Tensor, table: torch.Tensor | None) -> bool:
    return attention_cuda.takes(x.dtype, x.shape[-1], value_dim, codes.shape[2], table is not None)


def _check_append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    if key.dim() != 4 or key.shape[:3] != value.shape[:3] or key.dtype != value.dtype:
        _refuse(f"key {tuple(key.shape)} {key.dtype} and value {tuple(value.shape)} {value.dtype}; need (B, H, T, D)")
    heads, slots = _check_store("key", key_codes, key_scale, key_zero, key.shape[-1])
    if (heads, slots) != _check_store("value", value_codes, value_scale, value_zero, value.shape[-1]):
        _refuse("the stores of keys and values differ in heads or slots")
    if heads != key.shape[1]:
        _refuse(f"key has {key.shape[1]} heads, its store {heads}")
    _check_sequences(key.shape[0], key_codes.shape[0], lengths, table)


def _write(x: torch.Tensor, store: Store, lengths: torch.Tensor, table: torch.Tensor | None) -> None:
    fresh = quantize_heads(x, store.zero is None, store.clip)
    batch, slots = x.shape[0], store.codes.shape[2]
    at = lengths[:, None].long() + torch.arange(-x.shape[2], 0, device=x.device)  # (B, T)
    pages = at // slots
    if table is None:
        inside = pages < 1
        pages = torch.arange(batch, device=x.device)[:, None].expand_as(at)
    else:
        inside = pages < table.shape[1]
        pages = table.long().gather(1, pages.clamp(max=table.shape[1] - 1))
    for kept, new in ((store.codes, fresh.codes), (store.scale, fresh.scale), (store.zero, fresh.zero)):
        if kept is not None and new is not None:
            kept[pages[inside], :, (at % slots)[inside]] = new.transpose(1, 2)[inside]


def _append_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    key_clip: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    value_clip: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    _check_append(key, value, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, table)


def _check_attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    if query.dim() != 4:
        _refuse(f"query {tuple(query.shape)}; needs (B, query heads, T, D)")
    heads, slots = _check_store("key", key_codes, key_scale, key_zero, query.shape[-1])
    if (heads, slots) != _check_store("value", value_codes, value_scale, value_zero, 2 * value_codes.shape[-1]):
        _refuse("the stores of keys and values differ in heads or slots")
    if query.shape[1] % heads:
        _refuse(f"{query.shape[1]} query heads over {heads} key heads; one must be a multiple of the other")
    _check_sequences(query.shape[0], key_codes.shape[0], lengths, table)


def _attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    table: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    _check_attention(query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, table)
    key = dequantize(key_codes, key_scale, key_zero, table)
    value = dequantize(value_codes, value_scale, value_zero, table)
    tokens = query.shape[2]
    at = torch.arange(key.shape[2], device=query.device)
    last = lengths[:, None].long() - tokens + torch.arange(tokens, device=query.device)  # (B, T)
    seen = at <= last[..., None]
    if starts is not None:
        seen = seen & (at >= starts[:, None, None])
    return attend(query, key, value, seen, scaling)


def _attention_cuda(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    table: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    stores = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths)
    if not _kernel_takes(query, 2 * value_codes.shape[-1], key_codes, table):
        return _attention(query, *stores, starts, table, scaling)
    _check_attention(query, *stores, table)
    return attention_cuda.attention(query, *stores, starts, table, scaling)


def _attention_fake(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor | None,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    table: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    _check_attention(query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, lengths, table)
    return query.new_empty((*query.shape[:3], 2 * value_codes.shape[-1]))


_library.impl("kv_append", _append, "CompositeExplicitAutograd")
_library.impl("kv_attention", _attention, "CompositeExplicitAutograd")
_library.impl("kv_append", _append_cuda, "CUDA")
_library.impl("kv_attention", _attention_cuda, "CUDA")
torch.library.register_fake("flute::kv_append", _append_fake, lib=_library)
torch.library.register_fake("flute::kv_attention", _attention_fake, lib=_library)


def kv_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: Store,
    values: Store,
    lengths: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Quantize T tokens into the last of ``lengths`` places; what finds no slot is dropped.

    Args:
        key: (B, H, T, D), rotated and transformed; any strides.
        value: (B, H, T, D of values), in key's dtype.
        lengths: int32 (B,), tokens in the cache, these T included.
        table: int32 (B, pages of a sequence), or None for a static cache.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    torch.ops.flute.kv_append(
        key, value, keys.codes, keys.scale, keys.zero, keys.clip,
        values.codes, values.scale, values.zero, values.clip, lengths, table,
    )  # fmt: skip


def kv_attention(
    query: torch.Tensor,
    keys: Store,
    values: Store,
    lengths: torch.Tensor,
    scaling: float,
    starts: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling * query . keys^T) . values for the last T tokens of each sequence, causal, GQA by broadcasting.

    Args:
        query: (B, query heads, T, D); query head h reads key head h / (query heads / H).
        lengths: int32 (B,), tokens in the cache, these T included.
        scaling: of the scores.
        starts: int32 (B,), the first token that counts (prompts padded on the left), or None for 0.
        table: as in `kv_append`.

    Returns:
        (B, query heads, T, D of values) in query's dtype; zeros for a query that may see no key.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.flute.kv_attention(
        query, keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero,
        lengths, starts, table, scaling,
    )  # fmt: skip
