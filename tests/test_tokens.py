"""Transform and quantize: the definition against the dense matrix, codes by hand, transformers' norm; then the GPU."""

import math

import pytest
import torch
from gpus import GPUS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flute.errors import OperatorError
from flute.kernels import tokens_cuda
from flute.kernels.tokens import kronecker, kronecker_quantize, quantize_rows, quantize_tokens, transform

SIZES = (576, 1536, 3584, 5120, 11008, 14336)
DTYPES = [torch.float16, torch.bfloat16]


def factors(n: int) -> tuple[int, int]:
    n1 = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return n1, n // n1


def sparse(rows: int, columns: int, dtype: torch.dtype, share: float = 0.3) -> torch.Tensor:
    """-1, 0, 1: sums of products of these are integers that every dtype here holds exactly."""
    return (torch.randint(-1, 2, (rows, columns)) * (torch.rand(rows, columns) < share)).to(dtype)


def moved(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if one is None else one.cuda() for one in tensors]


@pytest.mark.parametrize(("n1", "n2"), [(1, 1), (3, 5), (8, 12), (24, 24)])
def test_the_transform_is_the_kronecker_product(n1: int, n2: int) -> None:
    x = torch.randn(2, 3, n1 * n2, dtype=torch.float64)
    left, right = torch.randn(n1, n1, dtype=torch.float64), torch.randn(n2, n2, dtype=torch.float64)
    eye1, eye2 = torch.eye(n1, dtype=torch.float64), torch.eye(n2, dtype=torch.float64)
    for a, b in ((left, right), (left, None), (None, right)):
        dense = torch.kron(eye1 if a is None else a, eye2 if b is None else b)
        assert torch.allclose(kronecker(x, a, b), x @ dense, atol=1e-12)


def test_the_middle_product_is_rounded_and_the_last_is_not() -> None:
    x = torch.tensor([[1.0, 2.0**-11]]).half()  # their sum is no float16
    ones = torch.ones(2, 2).half()
    left = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).half()
    both = torch.cat((x, torch.zeros_like(x)), 1)
    assert transform(both, left, ones, None, 0.0)[0, 0] == 1.0
    assert transform(both, None, ones, None, 0.0)[0, 0] == 1.0 + 2.0**-11
    last = transform(both.view(1, 2, 2).transpose(1, 2).reshape(1, 4), ones, None, None, 0.0)
    assert last[0, 0] == 1.0 + 2.0**-11


@pytest.mark.parametrize("norm", [True, False])
def test_gradients(norm: bool) -> None:
    """Of x and the norm's weight, by differences."""
    x, left, right = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 12), (3, 3), (4, 4)))
    weight = torch.rand(12, dtype=torch.float64, requires_grad=True) if norm else None
    for a, b in ((left, right), (left, None), (None, right)):
        assert torch.autograd.gradcheck(
            lambda x, w: kronecker(x, a, b, w, 1e-5),  # noqa: B023
            (x.requires_grad_(), weight),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0)
    x = (torch.randn(7, 96) * 30).to(dtype)
    assert torch.equal(kronecker(x, None, None, norm.weight.data, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_the_gate_is_silu_times_up(dtype: torch.dtype) -> None:
    x, left, right = torch.randn(3, 4, 60).to(dtype), torch.randn(5, 5).to(dtype), torch.randn(6, 6).to(dtype)
    inner = torch.nn.functional.silu(x[..., :30]) * x[..., 30:]
    weight = torch.rand(30).to(dtype)
    for norm in (None, weight):
        made = kronecker_quantize(x, left, right, norm_weight=norm, gated=True)
        wanted = kronecker_quantize(inner, left, right, norm_weight=norm)
        assert torch.equal(made[0], wanted[0]) and torch.equal(made[1], wanted[1])
    torch.library.opcheck(torch.ops.flute.kronecker_quantize, (x, left, right, None, 4, True, None, 1e-6, True))
    with pytest.raises(OperatorError, match="gated"):
        kronecker_quantize(x[..., :59], None, None, gated=True)


def test_codes_by_hand() -> None:
    x = torch.tensor([[7.0, -3.5, 1.5, 0.5, -7.0], [0.0] * 5, [0.0, 15.0, 7.0, 7.5, 1.0]])
    codes, scale, zero = quantize_tokens(x.half())
    assert zero is None and scale.tolist() == [1.0, 1.0, float(torch.tensor(15.0) / 7)]
    assert codes[0].tolist() == [7, -4, 2, 0, -7]  # halves to even
    assert codes[1].tolist() == [0] * 5 and codes[2].tolist() == [0, 7, 3, 4, 0]
    codes, scale, zero = quantize_tokens(x.half(), symmetric=False)
    assert zero is not None and (scale[2], zero[2]) == (1.0, -8)
    assert codes[2].tolist() == [-8, 7, -1, 0, -7] and codes.dtype == torch.int8
    assert (scale[1], zero[1]) == (1.0, -8) and codes[1].tolist() == [-8] * 5  # 0, exactly
    codes, scale, _ = quantize_tokens(x.half(), clip=torch.tensor([0.5, 0.25]))
    assert scale[0] == 0.5 and codes[0].tolist() == [7, -7, 3, 1, -8]  # 7 / 0.5 and -7 / 0.5 are clipped


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_within_half_a_step(bits: int, symmetric: bool) -> None:
    x = torch.randn(50, 64) + 1
    codes, scale, zero = quantize_rows(x, bits, symmetric)
    assert codes.min() >= -(1 << bits - 1) and codes.max() <= (1 << bits - 1) - 1
    back = scale[:, None] * (codes.float() - (0 if zero is None else zero[:, None]))
    assert ((back - x).abs() <= scale[:, None] * (0.5001 if symmetric else 1.0001)).all()


def test_opcheck_and_empty() -> None:
    x, left, right = torch.randn(3, 6).half(), torch.randn(2, 2).half(), torch.randn(3, 3).half()
    for symmetric in (True, False):
        torch.library.opcheck(torch.ops.flute.kronecker_quantize, (x, left, right, None, 4, symmetric, None, 1e-6))
    torch.library.opcheck(torch.ops.flute.kronecker, (x, left, right, None, 1e-6))
    assert kronecker(x[:0], left, right).shape == (0, 6)


def test_refusals() -> None:
    x, good = torch.randn(3, 6).half(), torch.randn(2, 2).half()
    for left, right, message in (
        (torch.randn(4, 4).half(), None, "divides n=6"),
        (good, torch.randn(2, 2).half(), "is not n=6"),
        (good.float(), None, "make them alike"),
        (torch.randn(2, 3).half(), None, "no square matrix"),
    ):
        with pytest.raises(OperatorError, match=message):
            kronecker_quantize(x, left, right)
    with pytest.raises(OperatorError, match="bits=9"):
        kronecker_quantize(x, good, None, bits=9)
    with pytest.raises(OperatorError, match="clip"):
        kronecker_quantize(x, good, None, torch.ones(3))
    with pytest.raises(OperatorError, match="norm_weight"):
        kronecker(x, good, None, torch.ones(5))


def test_usual_sizes_have_a_kernel() -> None:
    for n in (*SIZES, 4096, 8192, 18944, 28672):
        found = tokens_cuda.Problem(*factors(n), True, True, False, False)
        assert found.room(232448) is not None, n
    assert tokens_cuda.Problem(1, 4096, True, True, False, False).room(232448) is None  # plain torch does that


def test_few_tokens_are_shared_among_blocks() -> None:
    """As many blocks a token as run at once and have whole tiles of columns."""
    problem = tokens_cuda.Problem(112, 128, True, True, False, False)
    shared = {m: problem.shared_among(m, GPUS["H100"]).cluster for m in (1, 15, 16, 30, 64, 66, 67, 2048)}
    assert shared == {1: 8, 15: 8, 16: 4, 30: 4, 64: 2, 66: 2, 67: 1, 2048: 1}
    assert problem.shared_among(1, GPUS["A100"]).cluster == 1  # no clusters there
    assert tokens_cuda.Problem(64, 64, True, True, True, False).shared_among(1, GPUS["H100"]).cluster == 4
    assert tokens_cuda.Problem(86, 88, True, True, True, False).shared_among(1, GPUS["H100"]).cluster == 1


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def same(
    x: torch.Tensor, *rest: torch.Tensor | None, bits: int = 4, symmetric: bool = True, gated: bool = False
) -> bool:
    """Codes, scales and zeros of the GPU are those of the reference, bit for bit."""
    mine = kronecker_quantize(x, *rest, bits=bits, symmetric=symmetric, gated=gated)
    there = kronecker_quantize(*moved(x, *rest), bits=bits, symmetric=symmetric, gated=gated)  # type: ignore[arg-type]
    return all(a is b is None or torch.equal(a, b.cpu()) for a, b in zip(mine, there, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SIZES, 35, 64, 13824, 28672])
def test_exact_codes(n: int, dtype: torch.dtype) -> None:
    n1, n2 = factors(n)
    clip = torch.tensor([0.9, 0.8])
    for m in (1, 12, 40, 300):  # on an H100 all numbers of blocks a token
        x, left, right = sparse(m, n, dtype, 1.0), sparse(n1, n1, dtype), sparse(n2, n2, dtype)
        assert same(x, left, right) and same(x, left, right, clip, symmetric=False), m
        assert torch.equal(kronecker(x, left, right), kronecker(*moved(x, left, right)).cpu())  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SIZES, 35, 13824])
def test_exact_codes_of_a_gate(n: int, dtype: torch.dtype) -> None:
    """Gates of 0 and 64, whose silu is the same number, times -1/64, 0, 1/64; then any, beside torch on the GPU."""
    n1, n2 = factors(n)
    for m in (1, 12, 40, 300):
        left, right = sparse(n1, n1, dtype), sparse(n2, n2, dtype)
        x = torch.cat((64 * sparse(m, n, dtype, 1.0).abs(), sparse(m, n, dtype, 1.0) / 64), -1)
        assert same(x, left, right, gated=True), m
        x, left, right = torch.randn(m, 2 * n).to(dtype).cuda(), left.cuda(), right.cuda()
        inner = torch.nn.functional.silu(x[:, :n]) * x[:, n:]
        made, wanted = kronecker_quantize(x, left, right, gated=True), kronecker_quantize(inner, left, right)
        assert (made[0] != wanted[0]).float().mean() < 1e-3 and torch.allclose(made[1], wanted[1], rtol=1e-2), m


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 40])
def test_the_same_bits_of_any_number_of_blocks(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that share a token add the same numbers in the same order as one block does."""
    cases = [(64, 64, True, True), (112, 128, True, False), (32, 128, False, False)]
    for n1, n2, with_right, with_norm in cases:
        x = torch.randn(m, n1 * n2, device="cuda").half()
        left, right = torch.randn(n1, n1, device="cuda").half() / 8, torch.randn(n2, n2, device="cuda").half() / 8
        weight = torch.rand(n1 * n2, device="cuda").half() if with_norm else None
        given = (x, left, right if with_right else None, None, 4, False, weight)
        shared = kronecker_quantize(*given)
        with monkeypatch.context() as patch:
            patch.setattr(tokens_cuda.Problem, "shared_among", lambda self, tokens, gpu: self)
            alone = kronecker_quantize(*given)
        if weight is None:  # else the squares are added in another order
            assert all(map(torch.equal, shared, alone))
        assert (shared[0] != alone[0]).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_codes_with_fewer_factors(bits: int, symmetric: bool) -> None:
    """Heads mixed (o_proj), every head turned (keys and queries), neither."""
    for n1, n2 in ((32, 128), (28, 128), (9, 64), (7, 9)):
        x = torch.randn(33, n1 * n2).half()
        ints = sparse(33, n1 * n2, torch.float16, 1.0)
        assert same(ints, sparse(n1, n1, torch.float16), None, bits=bits, symmetric=symmetric)
        assert same(ints, None, sparse(n2, n2, torch.float16), bits=bits, symmetric=symmetric)
        assert same(x, None, None, torch.tensor([0.7, 0.9]), bits=bits, symmetric=symmetric)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1536, 4096, 14336])
def test_random_codes_differ_only_at_boundaries(n: int) -> None:
    """float32 sums in another order: scales within an ulp or two of 16 bits, codes apart by 1, one in a thousand."""
    n1, n2 = factors(n)
    x, weight = torch.randn(64, n).half(), torch.rand(n).half() + 0.5
    left, right = (torch.linalg.qr(torch.randn(size, size))[0].half() for size in (n1, n2))
    mine = kronecker_quantize(x, left, right, norm_weight=weight)
    there = kronecker_quantize(*moved(x, left, right), norm_weight=weight.cuda())  # type: ignore[arg-type]
    difference = (mine[0].int() - there[0].cpu().int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3
    assert torch.allclose(mine[1], there[1].cpu(), rtol=5e-4)


@pytest.mark.gpu
def test_a_captured_step_gives_the_same_bits() -> None:
    x, weight = torch.randn(5, 4096).half().cuda(), torch.rand(4096).half().cuda()
    left, right = torch.randn(2, 64, 64).half().cuda()
    first = kronecker_quantize(x, left, right, norm_weight=weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scale, _ = kronecker_quantize(x, left, right, norm_weight=weight)
    for _ in range(20):
        codes.zero_()
        graph.replay()
        assert torch.equal(codes, first[0]) and torch.equal(scale, first[1])
