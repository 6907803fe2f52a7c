"""Hadamard transforms: the matrices, the operator on the CPU, and the kernel as far as a compiler can check it."""

import math

import pytest
import torch
from compiler import needs_nvrtc
from hypothesis import given
from hypothesis import strategies as st
from test_compile import ARCHITECTURES, complaints, report

from flute.errors import OperatorError
from flute.hadamard import FACTORS, MOST, conference, largest_block, matrix, split, transform
from flute.kernels import walsh
from flute.kernels.hadamard import hadamard

SIZES = sorted(factor << k for factor in (1, *FACTORS) for k in range(16) if factor << k <= MOST)


def test_sylvester_in_natural_order() -> None:
    """Entry (i, j) is -1 to the number of ones that i and j share: scipy's order, and that of other libraries."""
    expected = [[(-1) ** bin(i & j).count("1") for j in range(64)] for i in range(64)]
    assert torch.equal(matrix(64), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("factor", FACTORS)
def test_conference_matrices(factor: int) -> None:
    c = torch.tensor(conference(factor))
    assert torch.equal(c, c.T) and torch.equal(c.abs(), 1 - torch.eye(factor // 2, dtype=torch.int64))
    assert torch.equal(c @ c.T, (factor // 2 - 1) * torch.eye(factor // 2, dtype=torch.int64))


@pytest.mark.parametrize("size", [size for size in SIZES if size <= 1792])
def test_matrices(size: int) -> None:
    """Entries +-1, rows orthogonal, symmetric: so H / sqrt(n) is orthonormal and its own inverse."""
    h = matrix(size)
    assert torch.equal(h.abs(), torch.ones(size, size, dtype=torch.float64)) and torch.equal(h, h.T)
    assert torch.equal(h @ h, size * torch.eye(size, dtype=torch.float64))


def test_the_factor_stands_in_front() -> None:
    assert torch.equal(matrix(12 * 8), torch.kron(matrix(12), matrix(8)))


def rounded_product(x: torch.Tensor, size: int) -> torch.Tensor:
    """x . H by the explicit matrix: the exact integer sums times the float32 scale, rounded to x's dtype."""
    exact = (x.double().reshape(-1, size) @ matrix(size).to(x.device)).float()
    return (exact * (1 / math.sqrt(size))).to(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size <= 1792])
def test_exact_against_the_matrix(size: int, dtype: torch.dtype) -> None:
    x = torch.randint(-3, 4, (3, 2 * size)).to(dtype)
    assert torch.equal(hadamard(x, size), rounded_product(x, size))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_a_rotation(size: int) -> None:
    """One-hot rows give rows of the matrix, norms stay, and twice is nothing."""
    x = torch.randn(4, size, dtype=torch.float64)
    y = hadamard(x, size)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1)) and torch.allclose(hadamard(y, size), x)
    factor, log = split(size)
    for i in (0, size // 3, size - 1):
        one = torch.zeros(size, dtype=torch.float64)
        one[i] = math.sqrt(size)
        row = torch.kron(matrix(factor)[i >> log] if factor > 1 else torch.ones(1), matrix(1 << min(log, 7))[0])
        found = hadamard(one, size)
        assert torch.allclose(found.abs(), torch.ones(size, dtype=torch.float64))
        if factor > 1:  # the first of every run of 2^log neighbours has the factor's sign
            assert torch.allclose(found[:: 1 << log], row[:: 1 << min(log, 7)].double())


def test_one_rounding() -> None:
    """float16 differs from float64 by half a unit of the last place and what float32 sums lose, no more."""
    x = torch.randn(2, 14336).half()
    y, exact = hadamard(x, 14336), transform(x.double(), 14336)
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2**-14))) - 10)
    assert ((y - exact).abs() < 0.51 * unit + 1e-6).all()


@given(st.integers(1, MOST))
def test_sizes_are_told_apart(size: int) -> None:
    if size in SIZES:
        factor, log = split(size)
        assert factor << log == size
    else:
        with pytest.raises(OperatorError, match=rf"{size} can be cut into blocks of {largest_block(size)}$"):
            split(size)
    assert size % largest_block(size) == 0 and largest_block(size) in SIZES


def test_any_x() -> None:
    x = torch.randn(6, 192).half()
    right = hadamard(x, 96)
    assert torch.equal(hadamard(x.view(2, 3, 192), 96), right.view(2, 3, 192))
    assert torch.equal(hadamard(x.T.contiguous().T, 96), right) and hadamard(x.T.contiguous().T, 1).is_contiguous()
    assert torch.equal(hadamard(torch.stack((x, x), -1)[..., 1], 96), right)
    assert torch.equal(hadamard(x[:1].expand(4, 192), 96), right[:1].expand(4, 192))
    assert torch.equal(hadamard(x[0], 96), right[0]) and torch.equal(right[:, :96], hadamard(x[:, :96], 96))
    assert hadamard(x[:0], 96).shape == (0, 192) and hadamard(x.view(2, 3, 192)[:, :0], 96).shape == (2, 0, 192)


@pytest.mark.parametrize("size", [1, 8, 12, 40])
def test_gradients(size: int) -> None:
    x = torch.randn(2 * size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, size), (x,))
    if size == 12:
        assert torch.autograd.gradgradcheck(lambda x: hadamard(x, size), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for shape in ((2, 0, 96), (3, 192)):
        torch.library.opcheck(torch.ops.flute.hadamard, (torch.randn(shape, dtype=dtype, requires_grad=True), 96))


def test_compiled_without_graph_break() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return hadamard(hadamard(x, 12) + 1, 24)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="eager")
    for m in (1, 5, 30):
        x = torch.randn(m, 48)
        assert torch.equal(compiled(x), twice(x))


def test_refusals_are_one_readable_line() -> None:
    x = torch.randn(2, 96)
    for words, call in {
        "block_size=0;": lambda: hadamard(x, 0),
        "block_size=-2;": lambda: hadamard(x, -2),
        "block_size=36; a block is 2^k": lambda: hadamard(x, 36),
        "block_size=65536;": lambda: hadamard(x, 65536),
        "last dimension of 96; block_size=64 must divide it": lambda: hadamard(x, 64),
        "x is a scalar": lambda: hadamard(torch.tensor(1.0), 2),
        "x is torch.int32": lambda: hadamard(x.int(), 32),
    }.items():
        with pytest.raises(OperatorError) as refusal:
            call()
        assert words in str(refusal.value) and "\n" not in str(refusal.value)


# ---- the kernel ------------------------------------------------------------------------------------------------------


GPUS = {"A100": (108, 166912, False), "L40S": (142, 101376, False), "H100": (132, 232448, True),
        "RTX 5090": (170, 101376, True)}  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
def test_cuts_cover_every_size(gpu: str) -> None:
    """Whole runs and whole rows within the GPU's shared memory; only what has no pairs or no room is left out."""
    sms, limit, clusters = GPUS[gpu]
    for size in SIZES:
        for elements in (size, 30 * size, 100 * size, 4096 * size):
            cut = walsh.choose(size, elements, sms, limit, clusters)
            if cut is None:
                assert split(size)[1] == 0 or (4 * size > limit and not clusters), size
                continue
            assert cut.size == size and cut.chunk // cut.split % 32 == 0 and cut.shared_bytes <= limit
            assert cut.threads % 32 == 0 and 32 <= cut.threads <= 512
            assert cut.split == 1 or (clusters and cut.batch == 1)


VARIANTS = sorted(
    {
        walsh.choose(size, tokens * size, *GPUS["H100"])
        for size in (2, 8, 96, 512, 1024, 4096, 5120, 24576, 28672, 32768)
        for tokens in (1, 4096)
    },
    key=str,
)


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: str) -> None:
    for number, cut in enumerate(VARIANTS):
        if cut is not None and (cut.split == 1 or arch not in ("sm_80", "sm_86", "sm_89")):
            dtype = ("float16", "float32", "bfloat16")[number % 3] if arch != "sm_90" else "float32"
            assert not complaints(report("hadamard.cu", dict(cut.macros(dtype)), arch)), (cut, dtype)
