"""Rotary embedding and transform of heads: transformers' rotary embedding, then a matrix; the GPU bit for bit."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flute.errors import OperatorError
from flute.kernels.heads import turn_heads


def angles(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(*shape[:-1], shape[-1] // 2) * 7
    whole = torch.cat((half, half), -1)
    return whole.cos().to(dtype), whole.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_embedding_of_transformers(dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 64).to(dtype), angles(2, 5, 64, dtype=dtype)
    turned, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    turned = turned.transpose(1, 2)
    assert torch.equal(turn_heads(x, cos, sin, torch.eye(64, dtype=dtype)), turned)
    matrix = torch.randn(64, 64).to(dtype)
    wanted = turned.double() @ matrix.double()
    assert torch.allclose(turn_heads(x, cos, sin, matrix).double(), wanted, rtol=1e-2, atol=0.1)
    torch.library.opcheck(torch.ops.flute.turn_heads, (x, cos, sin, matrix))


def test_keys_and_queries_keep_their_products() -> None:
    """q P^-T (k P)^T = q k^T."""
    keys, queries = torch.randn(2, 7, 2, 16, dtype=torch.float64)
    cos, sin = angles(7, 16, dtype=torch.float64)
    matrix, eye = torch.randn(16, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    plain = [turn_heads(x, cos, sin, eye) for x in (queries, keys)]
    moved = [turn_heads(queries, cos, sin, matrix.inverse().T.contiguous()), turn_heads(keys, cos, sin, matrix)]
    scores = [torch.einsum("qhd,khd->hqk", *both) for both in (plain, moved)]
    assert torch.allclose(*scores)


def test_refusals() -> None:
    x, (cos, sin), matrix = torch.randn(4, 2, 8), angles(4, 8, dtype=torch.float32), torch.eye(8)
    for bad, message in (
        ((x, cos[:3], sin, matrix), "cos"),
        ((x, cos, sin.half(), matrix), "sin"),
        ((x, cos, sin, torch.eye(4)), "matrix"),
        ((x[..., :7], cos, sin, matrix), "even head_dim"),
    ):
        with pytest.raises(OperatorError, match=message):
            turn_heads(*bad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_same_bits_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    """Exact sums: a permutation with signs; then any matrix, to the rounding of sums in another order."""
    for tokens, heads in ((1, 8), (300, 3)):
        x, (cos, sin) = torch.randn(tokens, heads, dim).to(dtype), angles(tokens, dim, dtype=dtype)
        signs = torch.randint(0, 2, (dim,)) * 2 - 1
        matrix = (torch.eye(dim)[torch.randperm(dim)] * signs).to(dtype)
        there = turn_heads(x.cuda(), cos.cuda(), sin.cuda(), matrix.cuda())
        assert torch.equal(there.cpu(), turn_heads(x, cos, sin, matrix))
        matrix = torch.linalg.qr(torch.randn(dim, dim))[0].to(dtype)
        there = turn_heads(x.cuda(), cos.cuda(), sin.cuda(), matrix.cuda()).cpu().float()
        assert torch.allclose(there, turn_heads(x, cos, sin, matrix).float(), rtol=1e-2, atol=2e-2)
