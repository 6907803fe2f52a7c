"""The CUDA backend on a real GPU: a short cut through benchmarks/kernel_matrix.py, and what that leaves out."""

import copy
import threading

import pytest
import torch

from flute.bench.correctness import Case, Problem, check_decoding, check_errors, check_integers, relative, specs
from flute.errors import OperatorError
from flute.kernels import cuda, layout, ops, plan, tiles
from flute.kernels.reference import decode
from flute.linear import LutLinear
from flute.spec import QuantSpec

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64), (333, 777), (576, 1536), (1024, 4096), (4096, 14336)]
TOKENS = [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256, 257, 700]
GROUPS = (32, 64, 96, 128, 256, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    n, k = shape
    for spec in specs(bits, GROUPS, vectors=k % 2 == 0):
        problem = Problem(Case(n, k, spec, dtype))
        for tokens in (1, 8, 64, 65):
            assert check_decoding(problem, tokens) == "", spec
        wrong = [(spec, answer) for answer in check_errors(problem, TOKENS) if answer.reason]
        assert not wrong
        for tokens in (1, 16, 40):
            assert check_integers(Case(n, k, spec, dtype), tokens) == "", spec


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_legal_plan_gives_exact_integers(bits: int) -> None:
    """Whatever the planner may choose one day: all its candidates are right."""
    n, k, spec = 200, 1600, QuantSpec(bits, 64, "custom")
    for m in (1, 13, 29):
        case = Case(n, k, spec, torch.float16)
        problem = Problem(case, integers=True)
        x = torch.randint(-3, 4, (m, k), device="cuda").half()
        exact = problem.exact(x).float().half()
        found = plan.candidates(cuda.gpu(0), m, n, k, bits, 64)
        assert len(found) > 20
        for forced in found:
            y = cuda.lut_linear(x, *problem.given, problem.table, None, n, bits, 64, forced=forced)
            assert y is not None and torch.equal(y, exact), forced


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_legal_tiling_gives_exact_integers(bits: int, group: int) -> None:
    """The same of the matmul kernel, rows and tokens that fill no tile and K that fills no chunk among them."""
    if not cuda.gpu(0).has_wgmma:
        pytest.skip("the matmul kernel is for Hopper")
    n, k = 201, 1608
    spec = QuantSpec(bits, group, "custom")
    for m in (1, 13, 70, 300):
        case = Case(n, k, spec, torch.float16)
        problem = Problem(case, integers=True)
        x = torch.randint(-3, 4, (m, k), device="cuda").half()
        bias = torch.randint(-8, 9, (n,), device="cuda").half()
        exact = problem.exact(x, bias).float().half()
        block = plan.group_block(spec.group(k), k)
        found = list(tiles.candidates(cuda.gpu(0), m, n, k, bits, block))
        assert len(found) > 10
        for forced in found if m == 70 else found[::5]:
            y = cuda.lut_linear(x, *problem.given, problem.table, bias, n, bits, group, forced=forced)
            assert y is not None and torch.equal(y, exact), (m, forced)


def cut_tilings(m: int, n: int, k: int, bits: int, group: int) -> list[tiles.Tiling]:
    """Every tiling that cuts tiles along K, its estimate aside."""
    gpu, block = cuda.gpu(0), plan.group_block(QuantSpec(bits, group, "custom").group(k), k)
    made = [
        tiles.tiling(gpu, m, n, k, bits, block, *shape[:3], 1, shape[3], wide, cut=True)
        for shape in tiles.variants()
        for wide in (True, False)
    ]
    return [one for one in made if one is not None]


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (2, -1)])
def test_cut_tiles_give_exact_integers(bits: int, group: int) -> None:
    """Fewer tiles than blocks, so that three meet in one, a wave and some, several waves and some."""
    if not cuda.gpu(0).has_wgmma:
        pytest.skip("the matmul kernel is for Hopper")
    k, seen = 1096, 0
    for n, m in ((9001, 130), (20000, 200), (9000, 1500)):
        problem = Problem(Case(n, k, QuantSpec(bits, group, "custom"), torch.float16), integers=True)
        x = torch.randint(-3, 4, (m, k), device="cuda").half()
        bias = torch.randint(-8, 9, (n,), device="cuda").half()
        exact = problem.exact(x, bias).float().half()
        found = cut_tilings(m, n, k, bits, group)
        cuda.compile_ahead(0, found, bits, False)
        for forced in found:
            for _ in range(5):
                y = cuda.lut_linear(x, *problem.given, problem.table, bias, n, bits, group, forced=forced)
                assert y is not None and torch.equal(y, exact), (m, forced)
            seen += 1
    assert seen > 8


@torch.no_grad()
def test_cut_tiles_on_streams_and_in_graphs() -> None:
    """Launches of several streams at once, each with parts of its own to wait for; the same bits every time."""
    if not cuda.gpu(0).has_wgmma:
        pytest.skip("the matmul kernel is for Hopper")
    n, k, m = 28672, 2048, 256
    linear, x = layer(n, k), torch.randn(m, k, device="cuda").half()
    operands = (linear.weight, linear.scales, linear.table, linear.bias, n, 4, 64)
    forced = next(one for one in cut_tilings(m, n, k, 4, 64) if one.tokens == 256)
    right = cuda.lut_linear(x, *operands, forced=forced)
    assert right is not None
    torch.cuda.synchronize()
    streams, wrong = [torch.cuda.Stream() for _ in range(4)], torch.zeros((), dtype=torch.int64, device="cuda")
    counts = [torch.zeros_like(wrong) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, count in zip(streams, counts, strict=True):
            with torch.cuda.stream(stream):
                y = cuda.lut_linear(x, *operands, forced=forced)
                assert y is not None
                count += (y != right).sum()
    torch.cuda.synchronize()
    assert not sum(counts, wrong)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.lut_linear(x, *operands, forced=forced)
        y = cuda.lut_linear(x + 0, *operands, forced=forced)
    assert y is not None
    for _ in range(200):
        y.zero_()
        graph.replay()
        wrong += (y != right).sum()
    assert not wrong


def layer(n: int = 1000, k: int = 2048, spec: QuantSpec | None = None, dtype: torch.dtype = torch.float16) -> LutLinear:
    torch.manual_seed(0)
    dense = torch.nn.Linear(k, n, bias=True, dtype=dtype, device="cuda")
    return LutLinear.from_linear(dense, spec or QuantSpec())


def test_any_x() -> None:
    """Strides, offsets and leading dimensions change nothing."""
    linear = layer()
    x = torch.randn(6, 2048, device="cuda").half()
    right = linear(x)
    wide = torch.randn(6, 2 * 2048 + 1, device="cuda").half()
    for view in (wide[:, 1:2049], wide[:, ::2][:, :2048]):
        view.copy_(x)
        assert torch.equal(linear(view), right)
    flat = torch.randn(6 * 2048 + 3, device="cuda").half()
    for shift in (1, 2, 3):
        misaligned = flat[shift : shift + 6 * 2048].view(6, 2048)
        misaligned.copy_(x)
        assert torch.equal(linear(misaligned), right)
    assert torch.equal(linear(x.view(2, 3, 2048)), right.view(2, 3, -1))
    assert torch.equal(linear(x.T.contiguous().T), right)
    assert linear(x[:0]).shape == (0, 1000)
    assert linear(x.view(2, 3, 2048)[:, :0]).shape == (2, 0, 1000)
    assert torch.equal(linear(x[0]), linear(x[:1])[0])


def test_the_same_bits_every_time() -> None:
    for m in (1, 5, 16, 33, 64, 130, 700):
        for spec in (QuantSpec(), QuantSpec(3, 32, "nf3"), QuantSpec(2, -1, "int2")):
            linear = layer(4096, 4096, spec)
            x = torch.randn(m, 4096, device="cuda").half()
            first = linear(x)
            assert all(torch.equal(linear(x), first) for _ in range(100))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    linear = layer()
    x = torch.randn(8, 2048, device="cuda").half()
    first = linear(x)
    x[1:] = float("nan")
    assert torch.equal(linear(x)[0], first[0])


@torch.no_grad()
def test_graphs_and_streams() -> None:
    linear = layer(4096, 4096)
    for m in (1, 3, 16, 32, 64, 128, 1000):
        x = torch.randn(m, 4096, device="cuda").half()
        right = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        for _ in range(50):
            y.zero_()
            graph.replay()
        assert torch.equal(y, right)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x + 0)  # an address that nothing has met before
        graph.replay()
        assert torch.equal(y, right)
    x = torch.randn(16, 4096, device="cuda").half()
    right = linear(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(linear(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, right) for y in results)


@pytest.mark.parametrize("m", [4, 80])
def test_threads(m: int) -> None:
    """Threads that have not used CUDA before among them, as autograd's are when a checkpointed layer runs again."""
    linear = layer()
    x = torch.randn(m, 2048, device="cuda").half()
    right, wrong = linear(x), []

    def run() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(linear(x), right))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_device_than_the_current_one() -> None:
    """A model spread over two GPUs: nobody sets the current device for each layer."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    linear = layer()
    other = copy.deepcopy(linear).to("cuda:1")
    for m in (4, 80):
        x = torch.randn(m, 2048, device="cuda").half()
        assert torch.equal(other(x.to("cuda:1")).to("cuda:0"), linear(x))
        assert torch.cuda.current_device() == 0  # and it stays what it was


def test_gradients() -> None:
    for m in (3, 100):
        linear = layer()
        x = torch.randn(m, 2048, device="cuda").half().requires_grad_()
        grad = torch.randn(m, 1000, device="cuda").half()
        linear(x).backward(grad)
        exact = grad.double() @ linear.dequantize().double()
        assert x.grad is not None and relative(x.grad, exact) < 1e-3
        assert linear.bias.grad is not None and relative(linear.bias.grad, grad.double().sum(0)) < 1e-3


@pytest.mark.parametrize("m", [4, 80])
def test_opcheck_and_compile(m: int) -> None:
    linear = layer()
    x = torch.randn(m, 2048, device="cuda").half()
    operands = (linear.weight, linear.scales, linear.table, linear.bias, 1000, 4, 64)
    torch.library.opcheck(torch.ops.flute.lut_linear, (x.clone().requires_grad_(), *operands))
    torch.library.opcheck(torch.ops.flute.dequantize, (*operands[:3], 1000, 2048, 4, 64))
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), linear(x))


def test_moving_a_layer_is_exact() -> None:
    for spec in (QuantSpec(), QuantSpec(3, 96, "nf3"), QuantSpec(2, 48, "nf2")):
        linear = layer(333, 777, spec)
        assert linear.in_kernel_order == layout.supports(spec.group_size, 777)
        before = {name: tensor.cpu() for name, tensor in linear.state_dict().items()}
        assert before["weight"].shape == (333, spec.row_bytes(777))
        back = linear.cpu()
        assert not back.in_kernel_order
        assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())
        again = back.cuda()
        again.load_state_dict(before)
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in again.state_dict().items())


def test_a_layer_cast_to_float32_still_decodes() -> None:
    linear = layer()
    codes, scales = linear.checkpoint_tensors()
    wide = linear.float()
    exact = decode(codes, scales.float(), wide.table, 2048, 4, 64)
    assert torch.equal(wide.dequantize(), exact)


def test_checkpoint_order_on_the_gpu_gives_the_same() -> None:
    linear = layer()
    weight, scales = linear.checkpoint_tensors()
    x = torch.randn(5, 2048, device="cuda").half()
    y = ops.lut_linear(x, weight, scales, linear.table, linear.bias, spec=linear.spec)
    assert torch.equal(y, linear(x))


def test_64_bit_offsets() -> None:
    """More than 2**31 weights, and more than 2**32 elements of y."""
    n, k = 300_000, 8192
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free GPU memory")
    weight = torch.randint(0, 256, layout.packed_shape(n, k, 4), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n // 16, 1, 16, device="cuda").half()
    table = torch.randn(16, device="cuda").half()
    x = torch.randn(2, k, device="cuda").half()
    spec = QuantSpec(4, -1, "custom")
    y = ops.lut_linear(x, weight, scales, table, spec=spec, out_features=n)
    last = ops.lut_linear(x, weight[-4:], scales[-4:], table, spec=spec, out_features=64)
    assert torch.equal(y[:, -64:], last)
    tokens, rows = 300_000, 8192
    small = torch.randn(tokens, 64, device="cuda").half()
    linear = layer(rows, 64)
    many = linear(small)
    assert torch.equal(many[-65:], linear(small[-65:]))


def test_refusals() -> None:
    linear = layer()
    with pytest.raises(OperatorError, match=r"x is torch.float32"):
        linear(torch.randn(2, 2048, device="cuda"))
    with pytest.raises(OperatorError, match="cpu"):
        linear(torch.randn(2, 2048).half())
    with pytest.raises(OperatorError, match="weight"):
        linear(torch.randn(2, 4096, device="cuda").half())
