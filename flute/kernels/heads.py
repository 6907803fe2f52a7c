"""Heads of queries and keys turned by their position and transformed, ``flute::turn_heads``: one launch for both.

    y (..., H, D) = rotary(x) . matrix (D, D)        rotary(x) = x cos + (-x[D/2:], x[:D/2]) sin

FlatQuant transforms keys by P and queries by P^-T behind the rotary embedding, with which a general P does not commute
(arXiv 2410.09426, section 3.2). Both products of the rotary embedding and their sum are rounded to x's dtype, as
transformers does; the matrix product adds in float32 and is rounded once.
"""

from __future__ import annotations

import torch

from ..errors import OperatorError
from . import tokens_cuda

_library = torch.library.Library("flute", "FRAGMENT")
_library.define("turn_heads(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor query, Tensor key) -> (Tensor, Tensor)")


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x (..., H, D) in halves (Su et al. 2021, RoPE), cos and sin (..., D). Plain torch."""
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat((-high, low), -1) * sin.unsqueeze(-2)


def _check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> None:
    if q.dim() < 2 or q.shape[-1] % 2 or not q.is_floating_point():
        raise OperatorError(f"flute.turn_heads: q {tuple(q.shape)} {q.dtype}; needs (..., heads, an even head_dim)")
    places, dim = q.shape[:-2], q.shape[-1]
    angles = (1, *places[1:], dim) if places and cos.shape[:1] == (1,) else (*places, dim)
    wanted = {
        "k": (k, (*places, *k.shape[-2:-1], dim)), "cos": (cos, angles), "sin": (sin, angles),
        "query": (query, (dim, dim)), "key": (key, (dim, dim)),
    }  # fmt: skip
    for name, (one, shape) in wanted.items():
        if tuple(one.shape) != shape or one.dtype != q.dtype or one.device != q.device:
            raise OperatorError(
                f"flute.turn_heads: {name} {tuple(one.shape)} {one.dtype} on {one.device}; needs {shape} {q.dtype} "
                f"on {q.device}"
            )


def _turn_heads(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, cos, sin, query, key)
    wide = torch.promote_types(q.dtype, torch.float32)
    first, second = (
        (turned(x, cos, sin).to(wide) @ matrix.to(wide)).to(x.dtype) for x, matrix in ((q, query), (k, key))
    )
    return first, second


def _turn_heads_cuda(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, cos, sin, query, key)
    found = tokens_cuda.heads_problem(q, k)
    if found is None:
        return _turn_heads(q, k, cos, sin, query, key)
    return tokens_cuda.turn_heads(found, q, k, cos, sin, query, key)


def _turn_heads_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, cos, sin, query, key)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    _q, _k, *kept = inputs
    ctx.save_for_backward(*kept)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_q: torch.Tensor, grad_k: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Of q and k; what is turned back swaps the halves the other way round."""
    cos, sin, *matrices = ctx.saved_tensors  # type: ignore[attr-defined]
    wide, made = torch.promote_types(cos.dtype, torch.float32), []
    for grad, matrix in zip((grad_q, grad_k), matrices, strict=True):
        back = grad.to(wide) @ matrix.to(wide).mT
        low, high = (back * sin.to(wide).unsqueeze(-2)).chunk(2, -1)
        made.append((back * cos.to(wide).unsqueeze(-2) + torch.cat((high, -low), -1)).to(grad.dtype))
    return *made, None, None, None, None


_library.impl("turn_heads", _turn_heads, "CompositeExplicitAutograd")
_library.impl("turn_heads", _turn_heads_cuda, "CUDA")
torch.library.register_fake("flute::turn_heads", _turn_heads_fake, lib=_library)
torch.library.register_autograd("flute::turn_heads", _backward, setup_context=_save, lib=_library)


def turn_heads(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding and a transform of every head, as above.

    Args:
        q: (..., H, D), tokens before heads, as a projection leaves them; float16 or bfloat16 (others in plain torch).
        k: (..., heads of keys, D) in q's dtype; both may be parts of one wider row.
        cos: (..., D) in q's dtype, of each token, as transformers' rotary embeddings give it; the first dimension may
            be 1 where positions of all sequences are the same.
        sin: the same.
        query, key: (D, D) in q's dtype, the matrices of q and of k.

    Returns:
        Both, in their shapes, contiguous; the same bits on every run. Gradients are those of q and k.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.flute.turn_heads(q, k, cos, sin, query, key)
