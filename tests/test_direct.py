"""The way past torch's dispatcher: open for plain tensors, shut where that would do more than call the kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flute.kernels import cuda, direct, layout, plan, tuned
from flute.linear import LutLinear
from flute.spec import QuantSpec


class Calls(TorchDispatchMode):
    """Names of the operators that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_open_for_plain_tensors() -> None:
    x = torch.randn(3)
    assert direct._known, "this torch has the names that the way is found by"
    assert direct.possible(x, None, x.half(), nn.Parameter(x, requires_grad=False))
    with torch.no_grad():
        assert direct.possible(nn.Parameter(x), nn.Parameter(x))
    with torch.inference_mode():
        assert direct.possible(x) and direct.possible(x + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert direct.possible(x)


def test_shut_for_everything_else() -> None:
    x, seen = torch.randn(2, 3), []

    def look(v: torch.Tensor) -> torch.Tensor:
        seen.append(direct.possible(v) or direct.possible(x))
        return v.sum()

    assert not direct.possible(nn.Parameter(x)) and not direct.possible(x, nn.Parameter(x))
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.functionalize(look)(x)
    make_fx(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    torch.compile(look, backend="eager", fullgraph=False)(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        look(torch.empty(3))
    with Calls():
        look(x)
    with torch.device("cpu"):
        look(x)
    assert len(seen) >= 9 and not any(seen)
    strange = [torch.empty(3, device="meta"), torch.randn(3, dtype=torch.cfloat).conj().imag, x.to_sparse()]
    assert not any(direct.possible(one) for one in strange)


def test_modes_see_the_operator() -> None:
    layer = LutLinear(96, 40, QuantSpec(), dtype=torch.float32)
    with torch.no_grad(), Calls() as calls:
        layer(torch.randn(2, 96))
    assert "flute.lut_linear.default" in calls.names


def test_a_torch_without_the_names_takes_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_known", False)
    assert not direct.possible(torch.randn(3))


# ---- launches that are found again, with a driver that only takes notes ----------------------------------------------

H100 = plan.Gpu(132, 232448, "sm_90", ((1, 132), (2, 66), (4, 33), (8, 16)))
A100 = plan.Gpu(108, 166912, "sm_80", tuple((split, 108 // split) for split in plan.CLUSTER_SIZES))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of every launch."""
    made: list[tuple[Any, ...]] = []
    remember: Callable[..., Any] = lambda *arguments: arguments  # noqa: E731
    for name in ("_kernel", "_config", "tensor_map"):
        monkeypatch.setattr(cuda, name, remember)
    monkeypatch.setattr(cuda, "_launch", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(cuda, "_launches", {})
    monkeypatch.setattr(cuda, "machine", lambda device: None)
    monkeypatch.setattr(tuned, "lookup", lambda machine, problem: None)  # this machine's tuning, if any, is not asked
    cuda.choose.cache_clear()
    yield made
    cuda.choose.cache_clear()


@pytest.mark.parametrize("gpu", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_a_known_launch_is_the_same_launch(
    m: int, gpu: plan.Gpu, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda device: gpu)
    n, k = 1000, 2048
    weight = torch.zeros(layout.packed_shape(n, k, 4), dtype=torch.uint8)
    scales, table = torch.zeros(63, 32, 16).half(), torch.zeros(16).half()
    bias, x = torch.zeros(n).half(), torch.randn(m, k).half()
    rest = (weight, scales, table, bias, n, 4, 64)
    assert cuda.again(x, *rest) is None, "nothing is known yet"
    y = cuda.lut_linear(x, *rest)
    count = len(launched)
    again = cuda.again(x, *rest)
    assert y is not None and again is not None and again.shape == y.shape == (m, n)
    split = cuda.choose(-1, m, n, k, 4, 64, False).split
    assert len(launched) == 2 * count == (4 if gpu is A100 and split > 1 else 2)
    address = {y.data_ptr(): 0, again.data_ptr(): 0}
    for first, second in zip(launched[:count], launched[count:], strict=True):
        if count == 1:  # otherwise the workspace has another address, too
            known = [[address.get(one, one) for one in each[3:] if isinstance(one, int)] for each in (first, second)]
            assert known[0] == known[1]
        assert first[:3] == second[:3]
    # anything that a check would look at is another signature
    for changed in (x[:, :-1], x.bfloat16(), x.view(m, 1, k), x.float()):
        assert cuda.again(changed, *rest) is None
    for other in ((weight[:-1], *rest[1:]), (weight.view(torch.int8), *rest[1:]), (*rest[:3], None, n, 4, 64)):
        assert cuda.again(x, *other) is None
    strided = torch.randn(m, 2 * k).half()[:, ::2]
    assert cuda.again(strided, *rest) is not None
    last, before = (
        [one for one in launched[at][3:] if isinstance(one, int) and one < 1 << 20] for at in (-1, count - 1)
    )
    assert last == before, "all but addresses"
    forced = cuda.lut_linear(x, *rest, forced=plan.candidates(gpu, m, n, k, 4, 64)[-1])
    assert forced is not None and cuda._launches[cuda._signature(x, *rest)].chosen is cuda.choose(
        -1, m, n, k, 4, 64, False
    )
