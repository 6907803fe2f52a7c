"""The mma kernel: its tilings are legal on every GPU and cover everything once; on a GPU its answers are right."""

import pytest
import torch
from gpus import GPUS
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.bench.correctness import BOUNDS, Case, Problem, relative, specs
from flute.kernels import cuda, mma, plan
from flute.kernels.layout import CHUNK_K, TILE_ROWS, chunk_bytes
from flute.spec import QuantSpec

GROUPS = (32, 64, 96, 128, 256, -1)


def legal(gpu: plan.Gpu, made: mma.Tiling, m: int, n: int, k: int, bits: int, group: int) -> None:
    slot = made.rows // TILE_ROWS * (chunk_bytes(bits) + 32 * CHUNK_K // made.group_block)
    rings = made.stages * (made.tokens * 128 + 16) + -(-made.stages // 2) * slot
    assert plan.table_bytes(bits, False) + rings == made.shared_bytes <= gpu.shared_bytes
    assert made.stages >= 2 and made.threads <= 1024
    assert made.split <= -(-k // CHUNK_K)  # no slice is empty
    assert 1 <= made.blocks <= gpu.sms
    shape = (made.row_tiles, made.token_tiles, made.row_warps, made.token_warps)
    assert (shape, made.stages) in mma.variants()
    if 0 < group < k:
        assert group % made.group_block == 0


@given(
    st.sampled_from(sorted(GPUS)),
    st.integers(33, 5000),
    st.integers(1, 40000),
    st.integers(1, 40000),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(GROUPS),
)
@settings(deadline=None, max_examples=200)
def test_tilings_are_legal(name: str, m: int, n: int, k: int, bits: int, group: int) -> None:
    gpu, group = GPUS[name], k if group == -1 else group
    found = list(mma.candidates(gpu, m, n, k, bits, plan.group_block(group, k)))
    assert found and all(made.cycles > 0 for made in found)
    for made in found:
        legal(gpu, made, m, n, k, bits, group)
    chosen = mma.make(gpu, m, n, k, bits, group)
    assert chosen is None or chosen.cycles == min(made.cycles for made in found)


@pytest.mark.parametrize("name", ["A100", "RTX 3090", "L40S", "RTX 5090"])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192)])
def test_the_dense_path_is_left_where_its_estimate_is_worse(name: str, n: int, k: int) -> None:
    for m in (64, 65, 128, 256):
        made = mma.make(GPUS[name], m, n, k, 4, 64)
        assert made is not None and made.cycles < mma.dense_cycles(GPUS[name], m, n, k, 4)


def test_a_library_with_faster_tensor_cores_is_preferred_for_many_tokens() -> None:
    """sm_100: cuBLAS has instructions four times as fast as mma.sync."""
    gpu = GPUS["B200"]
    assert mma.make(gpu, 128, 8192, 8192, 4, 64) is not None
    assert mma.make(gpu, 4096, 8192, 8192, 4, 64) is None


@pytest.mark.parametrize("m", [65, 300, 3000])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (333, 776), (1, 64)])
def test_the_kernels_index_arithmetic_covers_everything_once(m: int, n: int, k: int) -> None:
    """The same formulas as Item in mma.cu and locate_tile in common.cuh."""
    for made in mma.candidates(GPUS["A100"], m, n, k, 4, 64):
        units, token_tiles, chunks, band = -(-n // made.rows), -(-m // made.tokens), -(-k // CHUNK_K), 16
        area, seen = units * token_tiles, []
        for at in range(area * made.split):
            slice_, rest = divmod(at, area)
            first = rest // (band * units)
            inner, width = rest - first * band * units, min(band, token_tiles - first * band)
            begin, end = slice_ * chunks // made.split, (slice_ + 1) * chunks // made.split
            seen += [(inner // width, first * band + inner % width, chunk) for chunk in range(begin, end)]
        assert sorted(seen) == [(u, t, c) for u in range(units) for t in range(token_tiles) for c in range(chunks)]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_slot_of_codes_is_filled_while_it_is_read(stages: int) -> None:
    """The order that mma.cu relies on: before it copies in iteration i, iterations up to i - 1 are over for all warps.

    The slot of x for iteration i + stages - 1 is filled in iteration i, and with every odd one the next chunk's codes.
    Codes are read one iteration before their chunk begins, the first ones (-1) before a barrier of the whole block.
    """
    slots = -(-stages // 2)
    for chunk in range(slots, 50):
        filled_in, earlier = 2 * chunk - 1 - (stages - 1), chunk - slots
        assert filled_in >= 0, "the first fillings need a slot each"
        assert 2 * earlier - 1 <= filled_in - 1, "not read yet"
        assert filled_in < 2 * chunk - 1, "not there in time"


# ---- on a GPU: any from sm_80 on, Hopper too, where the plan must be forced ------------------------------------------


def some(m: int, n: int, k: int, bits: int, group: int) -> list[mma.Tiling]:
    """Every shape once, with another split each."""
    found = list(mma.candidates(cuda.gpu(0), m, n, k, bits, plan.group_block(group, k)))
    shapes: dict[tuple[int, int], list[mma.Tiling]] = {}
    for made in found:
        shapes.setdefault((made.row_tiles, made.token_tiles), []).append(made)
    return [made[(m + i) % len(made)] for i, made in enumerate(shapes.values())]


def run(problem: Problem, x: torch.Tensor, bias: torch.Tensor | None, forced: mma.Tiling | plan.Plan) -> torch.Tensor:
    case = problem.case
    y = cuda.lut_linear(
        x, *problem.given, problem.table, bias, case.n, case.spec.bits, case.spec.group_size, forced=forced
    )
    assert y is not None
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 64), (333, 777), (520, 1536), (1024, 4096)], ids=str)
def test_answers(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    """Weights back bit for bit from one-hot x; errors against float64, beside torch's own and the decode kernel's."""
    n, k = shape
    for spec in specs(bits, GROUPS, vectors=k % 2 == 0):
        problem = Problem(Case(n, k, spec, dtype))
        wide = problem.decoded(torch.float64)
        for m in (1, 65, 131, 700):
            x = torch.randn(m, k, device="cuda").to(dtype)
            picks = torch.arange(m, device="cuda") * 37 % k
            one_hot = torch.nn.functional.one_hot(picks, k).to(dtype)
            exact = x.double() @ wide.T
            size = exact.norm() if m * n >= 256 else (x.double().abs() @ wide.abs().T).norm()
            torch_error = (torch.nn.functional.linear(x, problem.dense).double() - exact).norm() / size
            for forced in some(m, n, k, bits, spec.group(k)):
                assert torch.equal(run(problem, one_hot, None, forced), problem.dense[:, picks].T), (spec, forced)
                error = (run(problem, x, None, forced).double() - exact).norm() / size
                assert error <= BOUNDS[dtype] and (m * n < 256 or error <= 1.1 * torch_error), (spec, m, forced)
        decode = plan.make(cuda.gpu(0), 8, n, k, bits, spec.group(k))
        assert decode is not None
        x = torch.randn(8, k, device="cuda").to(dtype)
        both = [run(problem, x, None, forced) for forced in (some(8, n, k, bits, spec.group(k))[0], decode)]
        assert n < 256 or relative(both[0], both[1].double()) <= 2 * BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_tiling_gives_exact_integers(bits: int, group: int) -> None:
    """Rows and tokens that fill no tile and K that fills no chunk among them, and rings of every length."""
    n, k = 261, 1612
    spec = QuantSpec(bits, group, "custom")
    block = plan.group_block(spec.group(k), k)
    for m in (1, 70, 300):
        problem = Problem(Case(n, k, spec, torch.float16), integers=True)
        x = torch.randint(-3, 4, (m, k), device="cuda").half()
        bias = torch.randint(-8, 9, (n,), device="cuda").half()
        exact = problem.exact(x, bias).float().half()
        gpu = cuda.gpu(0)
        for shared in (gpu.shared_bytes, 101376):  # what GPUs other than sm_80, sm_90 and sm_100 have
            smaller = plan.Gpu(gpu.sms, shared, gpu.arch, gpu.clusters)
            for forced in mma.candidates(smaller, m, n, k, bits, block):
                assert torch.equal(run(problem, x, bias, forced), exact), (m, forced)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    for m, n, k in ((65, 4096, 4096), (300, 1000, 2048), (2000, 4096, 1024)):
        problem = Problem(Case(n, k, QuantSpec(4, 64, "custom"), torch.bfloat16))
        x = torch.randn(m, k, device="cuda").bfloat16()
        for forced in some(m, n, k, 4, 64):
            first = run(problem, x, None, forced)
            assert all(torch.equal(run(problem, x, None, forced), first) for _ in range(30))
