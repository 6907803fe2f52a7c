"""Heads of keys and queries turned by their position and transformed, ``flute::turn_heads``: one launch.

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
_library.define("turn_heads(Tensor x, Tensor cos, Tensor sin, Tensor matrix) -> Tensor")


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] % 2 or not x.is_floating_point():
        raise OperatorError(f"flute.turn_heads: x {tuple(x.shape)} {x.dtype}; needs (..., heads, an even head_dim)")
    shape, dim = (*x.shape[:-2], x.shape[-1]), x.shape[-1]
    for name, one, wanted in (("cos", cos, shape), ("sin", sin, shape), ("matrix", matrix, (dim, dim))):
        if tuple(one.shape) != wanted or one.dtype != x.dtype or one.device != x.device:
            raise OperatorError(
                f"flute.turn_heads: {name} {tuple(one.shape)} {one.dtype} on {one.device}; needs {wanted} {x.dtype} "
                f"on {x.device}"
            )


def _turn_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    _check(x, cos, sin, matrix)
    low, high = x.chunk(2, -1)
    turned = x * cos[..., None, :] + torch.cat((-high, low), -1) * sin[..., None, :]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (turned.to(wide) @ matrix.to(wide)).to(x.dtype)


def _turn_heads_cuda(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    _check(x, cos, sin, matrix)
    found = tokens_cuda.problem(x, x.shape[-2], x.shape[-1], None, matrix, None, turn=True)
    return _turn_heads(x, cos, sin, matrix) if found is None else tokens_cuda.turn_heads(found, x, cos, sin, matrix)


def _turn_heads_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    _check(x, cos, sin, matrix)
    return x.new_empty(x.shape)


_library.impl("turn_heads", _turn_heads, "CompositeExplicitAutograd")
_library.impl("turn_heads", _turn_heads_cuda, "CUDA")
torch.library.register_fake("flute::turn_heads", _turn_heads_fake, lib=_library)


def turn_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rotary embedding and a transform of every head, as above.

    Args:
        x: (..., H, D), tokens before heads, as a projection leaves them; float16 or bfloat16 (others in plain torch).
        cos: (..., D) in x's dtype, of each token, as transformers' rotary embeddings give it.
        sin: the same.
        matrix: (D, D) in x's dtype.

    Returns:
        (..., H, D) in x's dtype, contiguous; the same bits on every run.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.flute.turn_heads(x, cos, sin, matrix)
