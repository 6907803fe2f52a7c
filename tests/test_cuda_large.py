"""What takes many launches or much memory on a real GPU: thousands at once, huge M, more than 2^31 weights."""

from functools import partial

import pytest
import torch

from flute.bench.timing import rotating_weights
from flute.kernels import cuda
from flute.spec import QuantSpec

pytestmark = pytest.mark.gpu

SPEC = QuantSpec(4, 64, "custom")
# one token or few: decode kernel with and without clusters; more: matmul kernel with K cut and with persistent blocks
PROBLEMS = [(1, 4096, 4096), (8, 1024, 4096), (33, 4096, 4096), (200, 1536, 2048), (300, 8192, 1024)]


def layer(m: int, n: int, k: int):
    """A call without arguments that multiplies a fixed random x by a fixed random weight."""
    ((weight, scales),), table = rotating_weights(n, k, SPEC, torch.float16, most=1)
    return partial(cuda.lut_linear, torch.randn(m, k, device="cuda").half(), weight, scales, table, None, n, 4, 64)


def test_four_streams_of_a_thousand_launches() -> None:
    """All at once, they give the bits that each gives alone."""
    calls = [layer(*problem) for problem in PROBLEMS]
    alone = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for launch in range(1000):
        for number, (stream, count) in enumerate(zip(streams, wrong, strict=True)):
            which = (launch + number) % len(calls)
            with torch.cuda.stream(stream):
                count += (calls[which]() != alone[which]).sum()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0, 0]


def test_a_graph_a_thousand_times() -> None:
    calls = [layer(*problem) for problem in PROBLEMS]
    alone = [call() for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, expected in zip(calls, alone, strict=True):
            wrong += (call() != expected).sum()
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert int(wrong) == 0


def test_300_000_tokens() -> None:
    """Rows repeat every 1,000, so must the answers, but for rounding in tiles cut along K; the first ones are right."""
    m, n, k = 300_000, 1008, 1024
    ((weight, scales),), table = rotating_weights(n, k, SPEC, torch.float16, most=1)
    some = torch.randn(1000, k, device="cuda").half()
    y = cuda.lut_linear(some.repeat(m // 1000, 1), weight, scales, table, None, n, 4, 64)
    assert y is not None
    exact = some.double() @ cuda.dequantize(weight, scales, table, n, k, 4, 64).double().T
    assert (y[:1000].double() - exact).norm() < 1e-3 * exact.norm()
    torch.testing.assert_close(y.view(-1, 1000, n), y[:1000].expand(m // 1000, 1000, n), rtol=2**-9, atol=2e-3)
    assert torch.equal(cuda.lut_linear(some.repeat(m // 1000, 1), weight, scales, table, None, n, 4, 64), y)


@pytest.mark.parametrize("m", [1, 100])
def test_more_than_2_to_the_31_weights(m: int) -> None:
    """Rows far into the weight, where 32-bit offsets would have wrapped, are those of the slice alone."""
    n, k = (1 << 18) + 64, 8192
    ((weight, scales),), table = rotating_weights(n, k, SPEC, torch.float16, most=1)
    x = torch.randn(m, k, device="cuda").half()
    y = cuda.lut_linear(x, weight, scales, table, None, n, 4, 64)
    assert y is not None
    for tile in (0, n // 32, n // 16 - 8):
        part = slice(tile, tile + 8)
        dense = cuda.dequantize(weight[part], scales[part], table, 128, k, 4, 64).double()
        exact = x.double() @ dense.T
        assert (y[:, 16 * tile : 16 * tile + 128].double() - exact).norm() < 1e-3 * exact.norm()
