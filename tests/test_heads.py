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
    q, k = torch.randn(2, 5, 6, 64).to(dtype), torch.randn(2, 5, 2, 64).to(dtype)
    cos, sin = angles(1, 5, 64, dtype=dtype)  # the same positions in both sequences
    rotated = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    wanted = [each.transpose(1, 2) for each in rotated]
    eye = torch.eye(64, dtype=dtype)
    assert all(map(torch.equal, turn_heads(q, k, cos, sin, eye, eye), wanted))
    matrices = torch.randn(2, 64, 64).to(dtype)
    for given, x, matrix in zip(turn_heads(q, k, cos, sin, *matrices), wanted, matrices, strict=True):
        assert torch.allclose(given.double(), x.double() @ matrix.double(), rtol=1e-2, atol=0.1)
    torch.library.opcheck(torch.ops.flute.turn_heads, (q, k, cos, sin, *matrices))


def test_keys_and_queries_keep_their_products() -> None:
    """q P^-T (k P)^T = q k^T."""
    queries, keys = torch.randn(2, 7, 2, 16, dtype=torch.float64)
    cos, sin = angles(7, 16, dtype=torch.float64)
    matrix, eye = torch.randn(16, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    plain = turn_heads(queries, keys, cos, sin, eye, eye)
    moved = turn_heads(queries, keys, cos, sin, matrix.inverse().T.contiguous(), matrix)
    scores = [torch.einsum("qhd,khd->hqk", *both) for both in (plain, moved)]
    assert torch.allclose(*scores)


def test_gradients() -> None:
    """Of both, by differences."""
    q, k = (torch.randn(2, 3, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = angles(1, 3, 8, dtype=torch.float64)
    matrices = torch.randn(2, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: turn_heads(q, k, cos, sin, *matrices), (q, k))


def test_refusals() -> None:
    x, (cos, sin), matrix = torch.randn(4, 2, 8), angles(4, 8, dtype=torch.float32), torch.eye(8)
    for bad, message in (
        ((x, x, cos[:3], sin, matrix, matrix), "cos"),
        ((x, x, cos, sin.half(), matrix, matrix), "sin"),
        ((x, x, cos, sin, torch.eye(4), matrix), "query"),
        ((x, x, cos, sin, matrix, torch.eye(4)), "key"),
        ((x, x[:3], cos, sin, matrix, matrix), "k "),
        ((x[..., :7], x, cos, sin, matrix, matrix), "even head_dim"),
    ):
        with pytest.raises(OperatorError, match=message):
            turn_heads(*bad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_same_bits_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    """Parts of one row, as a joint projection leaves them. Exact sums: permutations with signs; then any matrices, to
    the rounding of sums in another order."""
    for batch, length, heads, kv_heads in ((1, 1, 32, 8), (3, 1, 6, 2), (2, 150, 9, 3)):
        row = torch.randn(batch, length, heads + 2 * kv_heads, dim).to(dtype)
        q, k, _ = row.split((heads, kv_heads, kv_heads), -2)
        cos, sin = angles(1 if batch == 3 else batch, length, dim, dtype=dtype)
        signs = torch.randint(0, 2, (2, 1, dim)) * 2 - 1
        matrices = (torch.stack([torch.eye(dim)[torch.randperm(dim)] for _ in range(2)]) * signs).to(dtype)
        on_gpu = row.cuda().split((heads, kv_heads, kv_heads), -2)[:2]
        there = turn_heads(*on_gpu, cos.cuda(), sin.cuda(), *matrices.cuda())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there, turn_heads(q, k, cos, sin, *matrices), strict=True))
        matrices = torch.linalg.qr(torch.randn(2, dim, dim))[0].to(dtype)
        there = turn_heads(*on_gpu, cos.cuda(), sin.cuda(), *matrices.cuda())
        for a, b in zip(there, turn_heads(q, k, cos, sin, *matrices), strict=True):
            assert torch.allclose(a.cpu().float(), b.float(), rtol=1e-2, atol=2e-2)
