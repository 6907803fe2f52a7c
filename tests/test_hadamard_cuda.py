"""The Hadamard kernel on a real GPU, against the explicit matrix and against plain torch in float64."""

import pytest
import torch
from test_hadamard import SIZES, rounded_product

from flute.hadamard import split, transform
from flute.kernels import cuda, walsh
from flute.kernels import hadamard as room
from flute.kernels.hadamard import hadamard

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BOUNDS = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, dtype: torch.dtype) -> None:
    """Integers: the explicit matrix, bit for bit, up to 4096; beyond, plain torch's exact sums. Then random numbers."""
    for m in (1, 7, 1000):
        x = torch.randint(-3, 4, (m, 2 * size if size < 4096 else size), device="cuda").to(dtype)
        exact = rounded_product(x, size) if size <= 4096 else transform(x, size)
        assert torch.equal(hadamard(x, size), exact), m
        x = torch.randn(x.shape, device="cuda").to(dtype)
        exact = transform(x.double(), size)
        assert (hadamard(x, size) - exact).norm() / exact.norm() < BOUNDS[dtype], m


@pytest.mark.parametrize("size", [1024, 4096, 5120, 14336, 24576, 28672, 32768])
def test_every_cut_gives_exact_integers(size: int) -> None:
    """Whatever `walsh.choose` may choose one day: shared by clusters or not, few threads or many."""
    x = torch.randint(-3, 4, (133, size), device="cuda").half()
    exact, shared = transform(x, size), cuda._shared_bytes(0)
    for parts in (1, 2, 4) if room._has_clusters(0) else (1,):
        for threads in (32, 64, 128, 160, 256, 512):
            cut = walsh.cut(size, parts=parts, threads=threads)
            assert cut is not None
            if cut.shared_bytes <= shared:
                assert torch.equal(room._launch(x, cut), exact), cut


def test_any_x() -> None:
    x = torch.randn(6, 2048, device="cuda").half()
    right = hadamard(x, 512)
    wide = torch.randn(6, 2 * 2048 + 1, device="cuda").half()
    for view in (wide[:, 1:2049], wide[:, ::2][:, :2048]):
        view.copy_(x)
        assert torch.equal(hadamard(view, 512), right)
    assert torch.equal(hadamard(x.view(2, 3, 2048), 512), right.view(2, 3, -1))
    assert torch.equal(hadamard(x.T.contiguous().T, 512), right)
    assert hadamard(x[:0], 512).shape == (0, 2048) and torch.equal(hadamard(x[0], 512), right[0])


@torch.no_grad()
def test_graphs() -> None:
    for size, m in ((512, 1), (4096, 16), (14336, 3), (28672, 200)):
        x = torch.randn(m, 28672 if size != 4096 else 8192, device="cuda").half()
        right = hadamard(x, size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hadamard(hadamard(hadamard(x, size), size) * 0 + x, size)  # launches that overlap wait for one another
        for _ in range(20):
            y.zero_()
            graph.replay()
            assert torch.equal(y, right)


def test_64_bit_offsets() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free GPU memory")
    x = torch.zeros((1 << 32) // 512 + 8, 512, dtype=torch.float16, device="cuda")
    x[-9:] = torch.randn(9, 512).half()
    y = hadamard(x, 512)
    assert torch.equal(y[-9:], hadamard(x[-9:], 512)) and not y[:-9].any()


def test_opcheck_gradient_and_compile() -> None:
    x = torch.randn(5, 5120, device="cuda").half().requires_grad_()
    torch.library.opcheck(torch.ops.flute.hadamard, (x, 5120))
    grad = torch.randn_like(x)
    hadamard(x, 5120).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, hadamard(grad, 5120))
    compiled = torch.compile(lambda x: hadamard(x, 5120), fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(compiled(x), hadamard(x, 5120))


def test_what_plain_torch_does() -> None:
    for size, dtype in ((12, torch.float16), (1, torch.bfloat16), (96, torch.float64)):
        assert split(size)[1] == 0 or dtype == torch.float64
        x = torch.randn(7, 2 * size, device="cuda").to(dtype)
        assert torch.equal(hadamard(x, size), transform(x, size))
