"""Integer products: nibbles, kernel order and sums, exactly; then every launch on the GPU, exactly too."""

import pytest
import torch
from gpus import GPUS
from hypothesis import given
from hypothesis import strategies as st

from flute.errors import OperatorError
from flute.kernels import cuda, integer_cuda, pieces
from flute.kernels.integer import int_linear, pack_nibbles, reference, unpack_nibbles

SHAPES = [(576, 576), (100, 1000), (33, 130), (1, 16), (1024, 4096)]


def weights(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and what is stored."""
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    return codes, pack_nibbles(codes) if bits == 4 else codes


def test_every_pair_of_nibbles_round_trips() -> None:
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_nibbles(pairs)
    assert packed.unique().numel() == 256 and torch.equal(unpack_nibbles(packed), pairs)
    assert packed[pairs.tolist().index([-8, 7])].item() == 0x78  # the even column is the low nibble
    with pytest.raises(OperatorError, match="3 columns"):
        pack_nibbles(torch.zeros(2, 3, dtype=torch.int8))


@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([4, 8]))
def test_kernel_order_round_trips(n: int, half: int, bits: int) -> None:
    _, stored = weights(n, 2 * half, bits)
    arranged = pieces.arrange(stored)
    assert arranged.shape == pieces.shape(n, 2 * half, bits)
    assert torch.equal(pieces.restore(arranged, n, 2 * half), stored)


@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_order_is_what_it_says(bits: int) -> None:
    """The formula of pieces.py and integers.cuh, weight by weight."""
    n, k = 32, 256
    codes, stored = weights(n, k, bits)
    arranged, steps = pieces.arrange(stored), 2 if bits == 4 else 1
    for index in torch.randint(0, arranged.numel(), (200,)).tolist():
        rest, byte = divmod(index, 512)
        tile, piece = divmod(rest, arranged.shape[1])
        (lane, r), i = divmod(byte // 4, 4), byte % 4
        for step in range(steps):
            row = 16 * tile + 2 * (lane // 4) + r % 2
            column = 32 * (piece * steps + step) + 16 * (r // 2) + 4 * (lane % 4) + i
            value = arranged.view(-1)[index].item() >> 4 * step & (15 if bits == 4 else 255)
            assert value == codes[row, column].item() & (15 if bits == 4 else 255)


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_exact(bits: int) -> None:
    codes, stored = weights(20, 62, bits)
    x = torch.randint(-128, 128, (5, 62), dtype=torch.int8)
    zero, row_sum = torch.randint(-30, 30, (5,), dtype=torch.int32), codes.sum(1, dtype=torch.int32)
    one = torch.ones(20)
    sums = [[sum(a * b for a, b in zip(row, w, strict=True)) for w in codes.tolist()] for row in x.tolist()]
    y = int_linear(x, torch.ones(5), stored, one, dtype=torch.float32)
    assert y.tolist() == sums
    shifted = int_linear(x, torch.ones(5), stored, one, dtype=torch.float32, zero=zero, row_sum=row_sum)
    wanted = int_linear((x.int() - zero[:, None]).clamp(-128, 127).to(torch.int8), torch.ones(5), stored, one)
    inside = ((x.int() - zero[:, None]).abs() < 127).all(1)
    assert torch.equal(shifted[inside].half(), wanted[inside])
    assert shifted[0, 0] == sums[0][0] - zero[0] * row_sum[0]
    scale, weight_scale, bias = torch.rand(5), torch.rand(20), torch.randn(20).half()
    y = int_linear(x, scale, stored, weight_scale, bias)
    wanted = (torch.tensor(sums).float() * (scale[:, None] * weight_scale) + bias.float()).half()
    assert torch.equal(y, wanted)
    residual = torch.randn(5, 20).half()
    assert torch.equal(int_linear(x, scale, stored, weight_scale, bias, residual=residual), residual + wanted)


def test_the_largest_sum_is_exact() -> None:
    """128 * 128 * K in int32, and with the kernel's 16 q as well."""
    k = 131071
    x = torch.full((1, k), -128, dtype=torch.int8)
    assert int_linear(x, torch.ones(1), x, torch.ones(1), dtype=torch.float32).item() == float(2**14 * k)
    assert 2**14 * k < 2**31
    with pytest.raises(OperatorError, match="K=131072"):
        int_linear(torch.zeros(1, k + 1, dtype=torch.int8), torch.ones(1), x, torch.ones(1))


def test_opcheck_and_refusals() -> None:
    _, stored = weights(8, 32, 4)
    x, scale, weight_scale = torch.zeros(3, 32, dtype=torch.int8), torch.ones(3), torch.ones(8)
    good = (x, scale, stored, weight_scale, None, None, None, torch.bfloat16, torch.ones(3, 8).bfloat16())
    torch.library.opcheck(torch.ops.flute.int_linear, good)
    for at, bad, message in (
        (0, x.int(), "needs int8"),
        (1, torch.ones(4), "scale"),
        (2, stored[:, :3], "weight"),
        (3, weight_scale.half(), "float32"),
        (4, torch.ones(8), "bias"),
        (5, torch.zeros(3, dtype=torch.int32), "row_sum"),
        (7, torch.int32, "dtype"),
        (8, torch.ones(3, 8), "residual"),
    ):
        with pytest.raises(OperatorError, match=message):
            torch.ops.flute.int_linear(*(bad if i == at else one for i, one in enumerate(good)))


@given(st.integers(1, 5000), st.integers(1, 40000), st.integers(1, 40000), st.sampled_from([4, 8]))
def test_tilings_are_legal(m: int, n: int, k: int, bits: int) -> None:
    found = list(integer_cuda.tilings(m, n, k, bits, GPUS["H100"]))
    assert found and integer_cuda.choose(m, n, k, bits, GPUS["H100"]).cycles == min(one.cycles for one in found)
    for made in found:
        assert 232448 < 2 * made.shared_bytes(bits) <= 2 * 232448 and made.threads <= 672 and made.stages >= 3
        tiles = [-(-n // (16 * pitch)) * -(-m // made.columns) for pitch in (4 * made.rows, made.pitch)]
        at_once = dict(GPUS["H100"].clusters)[made.split]
        assert made.pitch <= 4 * made.rows and -(-tiles[0] // at_once) == -(-tiles[1] // at_once)
        assert made.split == 1 or tiles[1] <= at_once
        assert made.split <= -(-k // 128) and 256 * made.rows * made.columns <= made.stages * made.slot_bytes(bits)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def case(m: int, n: int, k: int, bits: int, dtype: torch.dtype, extras: bool) -> tuple[tuple, torch.Tensor]:
    """Arguments with the weight in kernel order, and y."""
    codes, stored = (one.cuda() for one in weights(n, k, bits))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    scale, weight_scale = torch.rand(m, device="cuda") / 64, torch.rand(n, device="cuda") / 64
    bias = torch.randn(n, device="cuda").to(dtype) if extras else None
    zero = torch.randint(-20, 20, (m,), dtype=torch.int32, device="cuda") if extras else None
    row_sum = codes.sum(1, dtype=torch.int32) if extras else None
    residual = torch.randn(m, n, device="cuda").to(dtype) if extras else None
    y = reference(x, scale, stored, weight_scale, bias, zero, row_sum, dtype, residual)
    return (x, scale, pieces.arrange(stored), weight_scale, bias, zero, row_sum, dtype, residual), y


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_are_exact(shape: tuple[int, int], bits: int) -> None:
    for m in (1, 3, 8, 9, 40, 65, 300):
        for dtype in (torch.float16, torch.bfloat16):
            given, y = case(m, *shape, bits, dtype, m in (3, 65))
            assert torch.equal(torch.ops.flute.int_linear(*given), y), (m, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_every_tiling_is_exact(bits: int) -> None:
    if cuda.gpu(0).arch != "sm_90":
        pytest.skip("the matmul kernel is Hopper's")
    for m, n, k in ((40, 333, 1000), (700, 1024, 2048)):
        given, y = case(m, n, k, bits, torch.float16, True)
        for forced in integer_cuda.tilings(m, n, k, bits, cuda.gpu(0)):
            assert torch.equal(integer_cuda.int_linear(*given, forced=forced), y), forced


@pytest.mark.gpu
def test_checkpoint_order_float32_and_captured() -> None:
    _, stored = weights(100, 64, 4)
    x, scale = torch.randint(-8, 8, (5, 64), dtype=torch.int8), torch.rand(5)
    for dtype in (torch.float16, torch.float32):
        y = int_linear(x, scale, stored, torch.ones(100), dtype=dtype)
        assert torch.equal(
            int_linear(x.cuda(), scale.cuda(), stored.cuda(), torch.ones(100).cuda(), dtype=dtype).cpu(), y
        )
    for m in (1, 64, 300):
        given, y = case(m, 1024, 4096, 4, torch.float16, False)
        graph = torch.cuda.CUDAGraph()
        torch.ops.flute.int_linear(*given)
        with torch.cuda.graph(graph):
            out = torch.ops.flute.int_linear(*given)
        for _ in range(20):
            out.zero_()
            graph.replay()
            assert torch.equal(out, y), m
