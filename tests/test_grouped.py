"""The grouped operator: exact first, then bounded; empty and uneven experts; offsets that only the GPU knows."""

import pytest
import torch
from compiler import needs_nvrtc
from gpus import GPUS
from test_compile import complaints, report

from flute.bench.correctness import BOUNDS, Case, Problem, relative
from flute.errors import OperatorError
from flute.kernels import cuda, grouped, plan, stacked, tiles
from flute.kernels.grouped import lut_grouped_linear
from flute.spec import QuantSpec

BOTH = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
EVEN, EMPTY, ALL, ONE = [3, 6, 9, 12], [0, 0, 7, 7], [12, 12, 12, 12], [0, 1, 1, 1]


class Stack:
    """As many random weights as there are experts, of one table; every answer by the reference, expert by expert."""

    def __init__(
        self, experts: int, n: int, k: int, spec: QuantSpec, dtype: torch.dtype, device: str, *, integers: bool = False
    ) -> None:
        self.parts = [Problem(Case(n, k, spec, dtype, device, seed), integers=integers) for seed in range(experts)]
        for part in self.parts:
            part.table = self.parts[0].table
        self.n, self.k, self.spec, self.dtype, self.device = n, k, spec, dtype, device
        self.table = self.parts[0].table
        self.given = tuple(torch.stack([part.given[i] for part in self.parts]) for i in (0, 1))
        self.dense = [part.decoded(dtype) for part in self.parts]
        self.wide = [part.decoded(torch.float64) for part in self.parts]

    def offsets(self, ends: list[int]) -> torch.Tensor:
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    def run(self, x: torch.Tensor, ends: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
        given = (*self.given, self.table, self.offsets(ends))
        return lut_grouped_linear(x, *given, bias, spec=self.spec, out_features=self.n)

    def exact(self, x: torch.Tensor, ends: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
        """In float64."""
        y = torch.zeros(x.shape[0], self.n, dtype=torch.float64, device=x.device)
        for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            y[begin:end] = x[begin:end].double() @ self.wide[expert].T
            if bias is not None:
                y[begin:end] += bias[expert].double()
        return y


def uneven(rows: int, experts: int, seed: int = 0) -> list[int]:
    """Ends of random groups, some of them empty."""
    cuts = torch.randint(0, rows + 1, (experts - 1,), generator=torch.Generator().manual_seed(seed))
    return [*sorted(cuts.tolist()), rows]


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_hot_rows_give_back_the_experts_own_weights(bits: int, device: str) -> None:
    for dtype, group, n, k in ((torch.float16, 64, 40, 264), (torch.bfloat16, 32, 33, 130), (torch.float16, -1, 7, 48)):
        stack = Stack(4, n, k, QuantSpec(bits, group, "custom"), dtype, device)
        for ends in (EVEN, EMPTY, ALL, ONE):
            rows = ends[-1]
            picks = torch.linspace(0, k - 1, rows, device=device).long()
            x = torch.zeros(rows, k, dtype=dtype, device=device)
            x[torch.arange(rows), picks] = 1
            y = stack.run(x, ends)
            for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                assert torch.equal(y[begin:end], stack.dense[expert][:, picks[begin:end]].T), (ends, expert)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_of_integers_are_exact_with_and_without_bias(bits: int, device: str) -> None:
    stack = Stack(5, 48, 520, QuantSpec(bits, 64, "custom"), torch.float16, device, integers=True)
    for rows in (1, 12, 90):
        x = torch.randint(-3, 4, (rows, 520), device=device).half()
        bias = torch.randint(-8, 9, (5, 48), device=device).half()
        ends = uneven(rows, 5, rows)
        for own in (None, bias):
            assert torch.equal(stack.run(x, ends, own), stack.exact(x, ends, own).float().half())


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_stay_below_the_bound(dtype: torch.dtype, device: str) -> None:
    vectors = QuantSpec(2, 32, "custom", 2)
    for spec in (QuantSpec(4, 64, "custom"), QuantSpec(3, 96, "custom"), vectors, QuantSpec(2, 48, "custom")):
        stack = Stack(9, 72, 384, spec, dtype, device)
        for rows in (1, 30, 200) if device == "cpu" else (1, 30, 200, 3000):
            x = torch.randn(rows, 384, device=device).to(dtype)
            ends = uneven(rows, 9, rows)
            assert relative(stack.run(x, ends), stack.exact(x, ends)) < BOUNDS[dtype]


@pytest.mark.parametrize("device", BOTH)
def test_gradients(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    stack = Stack(4, 40, 96, QuantSpec(4, 32, "custom"), dtype, device)
    x = torch.randn(10, 96, device=device).to(dtype).requires_grad_()
    bias = torch.randn(4, 40, device=device).to(dtype).requires_grad_()
    grad = torch.randn(10, 40, device=device).to(dtype)
    stack.run(x, [3, 3, 8, 10], bias).backward(grad)
    parts = {0: slice(0, 3), 2: slice(3, 8), 3: slice(8, 10)}
    exact = torch.cat([grad[rows].double() @ stack.dense[expert].double() for expert, rows in parts.items()])
    assert x.grad is not None and relative(x.grad, exact) < BOUNDS[dtype]
    sums = torch.stack([grad[parts.get(e, slice(0, 0))].double().sum(0) for e in range(4)])
    assert bias.grad is not None and relative(bias.grad, sums) < BOUNDS[dtype]


@pytest.mark.parametrize("device", BOTH)
def test_opcheck(device: str) -> None:
    stack = Stack(4, 24, 96, QuantSpec(4, 32, "custom"), torch.float16, device)
    for ends in (EVEN, EMPTY):
        x = torch.randn(ends[-1], 96, device=device).half().requires_grad_()
        for bias in (None, torch.randn(4, 24, device=device).half()):
            given = (x, *stack.given, stack.table, bias, stack.offsets(ends), 24, 4, 32)
            torch.library.opcheck(torch.ops.flute.lut_grouped_linear, given)
    assert stack.run(torch.empty(0, 96, device=device).half(), [0, 0, 0, 0]).shape == (0, 24)


def test_refusals_are_one_readable_line() -> None:
    stack = Stack(4, 24, 96, QuantSpec(4, 32, "custom"), torch.float16, "cpu")
    x, (weight, scales), spec = torch.randn(12, 96).half(), stack.given, stack.spec
    ends = stack.offsets(EVEN)
    wrong = {
        "x (2, 6, 96)": lambda: lut_grouped_linear(x.view(2, 6, 96), weight, scales, stack.table, ends, spec=spec),
        "stacks of E experts": lambda: lut_grouped_linear(x, weight, scales[:3], stack.table, ends, spec=spec),
        "offsets (3,)": lambda: lut_grouped_linear(x, weight, scales, stack.table, ends[:3], spec=spec),
        "torch.int64": lambda: lut_grouped_linear(x, weight, scales, stack.table, ends.long(), spec=spec),
        "offsets [9, 6, 9, 12]": lambda: stack.run(x, [9, 6, 9, 12]),
        "offsets [3, 6, 9, 13]": lambda: stack.run(x, [3, 6, 9, 13]),
        "bias (24,)": lambda: stack.run(x, EVEN, torch.zeros(24).half()),
        "x is torch.float32": lambda: stack.run(x.float(), EVEN),
    }
    for words, call in wrong.items():
        with pytest.raises(OperatorError) as refusal:
            call()
        assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_packing_a_stack_is_exact_both_ways() -> None:
    stack = Stack(3, 40, 200, QuantSpec(3, 32, "custom"), torch.float16, "cpu")
    packed = grouped.pack_stack(*stack.given, 3, 200)
    assert packed[0].shape == (3, 3, 2, 768) and packed[1].shape == (3, 3, 7, 16)
    again = grouped.unpack_stack(*packed, 3, 40, 200)
    assert all(torch.equal(one, other) for one, other in zip(again, stack.given, strict=True))


# ---- tilings ---------------------------------------------------------------------------------------------------------

SHAPES = [(8, 28672, 4096), (8, 4096, 14336), (128, 1536, 2048), (128, 2048, 768), (60, 2816, 2048), (256, 4096, 7168)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_problem_gets_a_tiling_that_fits(bits: int) -> None:
    gpu = GPUS["H100"]
    for experts, n, k in SHAPES:
        for tokens in (1, 8, 64, 300, 4096, 32768):
            made = tiles.make_grouped(gpu, tokens, experts, n, k, bits, 64)
            assert made is not None and made.split == 1 and made.experts == experts
            assert made.shared_bytes <= gpu.shared_of(made.per_sm) and made.blocks == gpu.sms and made.per_sm == 1
    assert tiles.make_grouped(GPUS["A100"], 8, 8, 1024, 1024, bits, 64) is None


def test_few_tokens_an_expert_get_small_tiles_and_many_get_large_ones() -> None:
    sizes = [tiles.make_grouped(GPUS["H100"], m, 128, 1536, 2048, 4, 64) for m in (8, 128, 2048, 32768)]
    assert [one.tokens for one in sizes if one] == sorted(one.tokens for one in sizes if one)
    assert sizes[0] is not None and sizes[0].tokens == 16 and sizes[-1] is not None and sizes[-1].tokens >= 96


@needs_nvrtc
@pytest.mark.parametrize(("bits", "bf16", "group"), [(4, False, 64), (3, True, 32), (2, False, 128)])
def test_grouped_kernels_spill_nothing(bits: int, bf16: bool, group: int) -> None:
    """A few of them for each width, and where registers are scarcest; the loop over chunks is that of the others."""
    found = [shape for shape in tiles.variants() if shape[3] == 1]
    kept = [one for number, one in enumerate(found) if number % 9 == bits or (bits == 4 and one[0] == 256)]
    for tokens, rows, ways, _ in kept:
        made = tiles.tiling(GPUS["H100"], tokens, 4096, 4096, bits, group, tokens, rows, ways, 1, 1, True, 8)
        if made is not None:
            assert not complaints(report("matmul.cu", dict(made.macros(bits, bf16)), "sm_90a")), made


# ---- on Hopper -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper() -> plan.Gpu:
    gpu = cuda.gpu(0)
    if not gpu.has_wgmma:
        pytest.skip("the matmul kernel is for Hopper")
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (2, -1)])
def test_every_grouped_tiling_gives_exact_integers(bits: int, group: int, hopper: plan.Gpu) -> None:
    """Rows and tokens that fill no tile, K that fills no chunk, more tiles than blocks, experts without tokens."""
    n, k, experts = 201, 1608, 11
    stack = Stack(experts, n, k, QuantSpec(bits, group, "custom"), torch.float16, "cuda", integers=True)
    block = plan.group_block(stack.spec.group(k), k)
    bias = torch.randint(-8, 9, (experts, n), device="cuda").half()
    count = 0
    for rows in (5, 700):
        x = torch.randint(-3, 4, (rows, k), device="cuda").half()
        ends = uneven(rows, experts)
        exact = stack.exact(x, ends, bias).float().half()
        for number, shape in enumerate(tiles.variants()):
            forced = tiles.tiling(hopper, rows, n, k, bits, block, *shape[:3], 1, shape[3], bool(number % 2), experts)
            if forced is None or number % 3 != bits - 2:
                continue
            given = (*stack.given, stack.table, bias, stack.offsets(ends), n, bits, group)
            y = stacked.lut_grouped_linear(x, *given, forced=forced)
            assert y is not None and torch.equal(y, exact), (rows, forced)
            count += 1
    assert count > 20


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_takes_other_offsets_at_every_replay(hopper: plan.Gpu) -> None:
    stack = Stack(8, 512, 1024, QuantSpec(4, 64, "custom"), torch.bfloat16, "cuda")
    for rows in (16, 300):
        x, ends = torch.randn(rows, 1024, device="cuda").bfloat16(), stack.offsets(uneven(rows, 8))
        given = (*stack.given, stack.table)
        lut_grouped_linear(x, *given, ends, spec=stack.spec, out_features=512)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lut_grouped_linear(x, *given, ends, spec=stack.spec, out_features=512)
        for seed in range(20):
            other = [*[0] * 7, rows] if seed == 7 else [rows] * 8 if seed == 8 else uneven(rows, 8, seed)
            ends.copy_(stack.offsets(other))
            y.zero_()
            graph.replay()
            assert relative(y, stack.exact(x, other)) < BOUNDS[torch.bfloat16], other
            assert torch.equal(y, stack.run(x, other))


@pytest.mark.gpu
def test_the_same_bits_every_time_and_no_row_reads_its_neighbours(hopper: plan.Gpu) -> None:
    stack = Stack(16, 768, 2048, QuantSpec(4, 64, "custom"), torch.float16, "cuda")
    for rows in (8, 100, 900):
        x, ends = torch.randn(rows, 2048, device="cuda").half(), uneven(rows, 16)
        first = stack.run(x, ends)
        assert all(torch.equal(stack.run(x, ends), first) for _ in range(100))
        kept = next(e for e in ends if e > 0)
        x[kept:] = torch.nan
        assert torch.equal(stack.run(x, ends)[:kept], first[:kept])


@pytest.mark.gpu
def test_offsets_that_make_no_sense_touch_no_other_memory(hopper: plan.Gpu) -> None:
    """Nothing checks them on the device; the answer is then meaningless and everything around it untouched."""
    stack = Stack(4, 64, 256, QuantSpec(4, 64, "custom"), torch.float16, "cuda")
    x = torch.randn(40, 256, device="cuda").half()
    for ends in ([50, 60, 70, 80], [-5, 20, 10, 40], [40, 0, 40, 0], [2**31 - 1, -(2**31), 5, 9]):
        stack.run(x, ends)
    torch.cuda.synchronize()
    assert torch.equal(stack.run(x, [10, 20, 30, 40]), stack.run(x, [10, 20, 30, 40]))
