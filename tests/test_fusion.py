"""Layers with the same x in one launch: the same bits as apart, the same files, never an answer to another question."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import equal_states
from torch import nn

from flute import LutLinear, QuantSpec
from flute.integrations.fusion import fuse, separate
from flute.kernels import cpu, joined, ops

SPECS = [QuantSpec(), QuantSpec(3, 48, "nf3"), QuantSpec(2, -1, "int2"), QuantSpec(4, 32, "custom", 2)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Attention(nn.Module):
    """Three layers of one x, with an odd number of rows in the last."""

    def __init__(self, spec: QuantSpec = QuantSpec(), dtype: torch.dtype = torch.float32, bias: bool = True) -> None:  # noqa: B008
        super().__init__()
        torch.manual_seed(0)
        table = torch.randn(spec.table_shape) if spec.table == "custom" else None
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 24)):
            dense = nn.Linear(96, rows, bias=bias, dtype=dtype)
            setattr(self, name, LutLinear.from_linear(dense, spec, table=table))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def fused(module: nn.Module) -> Any:
    assert fuse(module, anywhere=True) > 0
    return module


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every launch."""
    if not cpu.available():
        pytest.skip(cpu.build_hint())
    found: list[int] = []
    real = ops._lut_linear_cpu

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(rest[4])
        return real(x, *rest)

    monkeypatch.setattr(ops, "_lut_linear_cpu", counted)
    yield found


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_same_bits_as_apart(spec: QuantSpec, dtype: torch.dtype, bias: bool, launches: list[int]) -> None:
    plain = Attention(spec, dtype, bias)
    together = fused(copy.deepcopy(plain))
    assert equal_states(plain, together) and not launches
    for shape in ((1, 96), (2, 3, 96), (96,), (0, 96)):
        x = torch.randn(shape).to(dtype)
        assert equal(together(x), plain(x))
        assert launches == [120, 64, 32, 24], "one launch for all, then one for each"
        launches.clear()
    assert torch.equal(together.k_proj.dequantize(), plain.k_proj.dequantize())
    assert not together.q_proj.together._kept, "nothing waits when all parts are taken"


@torch.no_grad()
def test_no_stale_answers(launches: list[int]) -> None:
    plain = Attention()
    module = fused(copy.deepcopy(plain))
    x, other = torch.randn(2, 96), torch.randn(2, 96)
    # every layer another x
    assert torch.equal(module.q_proj(x), plain.q_proj(x))
    assert torch.equal(module.k_proj(other), plain.k_proj(other))
    # x changed in place between two layers, directly and through a view
    for changed in (x, x[0]):
        module(other)
        assert torch.equal(module.q_proj(x), plain.q_proj(x))
        changed.mul_(2)
        assert torch.equal(module.k_proj(x), plain.k_proj(x))
    # the same values in another tensor, autocast between, the same layer twice
    module = fused(copy.deepcopy(plain))
    assert torch.equal(module.q_proj(x), plain.q_proj(x)) and torch.equal(module.q_proj(x), plain.q_proj(x))
    module = fused(copy.deepcopy(plain))
    module.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.k_proj(x), plain.k_proj(x)) and module.k_proj(x).dtype == torch.bfloat16
    # weights changed between two layers, in place, by hand and by a method
    for change in _changes(plain):
        module = fused(copy.deepcopy(plain))
        apart = copy.deepcopy(plain)
        module.q_proj(x)
        change(module)
        change(apart)
        assert torch.equal(module.k_proj(x), apart.k_proj(x)), change
        assert equal(module(x), apart(x)) and equal_states(module, apart)


def _changes(plain: Attention) -> list[Callable[[Any], Any]]:
    with torch.no_grad():
        other = LutLinear.from_linear(nn.Linear(96, 32), QuantSpec())
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    def by_hand(module: Any) -> None:
        module.k_proj.weight.data = other.weight.data.clone()

    def replaced(module: Any) -> None:
        module.k_proj.scales = nn.Parameter(other.scales.detach().clone(), requires_grad=False)

    def tables(module: Any) -> None:
        module.v_proj.table.mul_(2)
        module.k_proj.table.mul_(2)

    def table(module: Any) -> None:
        module.k_proj.table = module.k_proj.table * 2

    return [
        lambda module: module.k_proj.weight.copy_(other.weight),
        lambda module: module.k_proj.bias.add_(1),
        lambda module: module.k_proj.scales.mul_(2),
        lambda module: module.k_proj.load_state_dict(state),
        lambda module: module.k_proj.to(torch.float64).to(torch.float32),
        by_hand,
        replaced,
        tables,
        table,
    ]


@torch.no_grad()
def test_a_group_that_is_none_is_left_apart(launches: list[int]) -> None:
    """q of one x, k and v of another: cross attention."""
    plain = Attention()
    module = fused(copy.deepcopy(plain))
    memory = torch.randn(5, 96)
    for _ in range(6):
        x = torch.randn(2, 96)
        assert torch.equal(module.q_proj(x), plain.q_proj(x)) and torch.equal(
            module.k_proj(memory), plain.k_proj(memory)
        )
        assert torch.equal(module.v_proj(memory), plain.v_proj(memory))
    assert not module.q_proj.together._kept and not module.q_proj.together.joined
    launches.clear()
    module(x)
    assert launches == [64, 32, 24]
    separate(module)
    assert module.q_proj.together is None and equal(module(x), plain(x))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())


@torch.no_grad()
def test_threads_do_not_mix() -> None:
    plain = Attention()
    module = fused(copy.deepcopy(plain))
    shared = torch.randn(3, 96)
    wrong: list[int] = []

    def run(seed: int) -> None:
        with torch.no_grad():
            own = torch.randn(3, 96, generator=torch.Generator().manual_seed(seed))
            for x in (own, shared) * 40:
                wrong.extend(1 for y, right in zip(module(x), plain(x), strict=True) if not torch.equal(y, right))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not module.q_proj.together._kept and module.q_proj.together.joined


def test_where_layers_stay_apart(launches: list[int]) -> None:
    """Gradients, inference tensors, functorch: the same answers, one launch each."""
    plain = Attention()
    module = fused(copy.deepcopy(plain))
    gradients = []
    for one in (plain, module):
        x = torch.ones(2, 96, requires_grad=True)
        sum(y.square().sum() for y in one(x)).backward()
        gradients.append((x.grad, one.q_proj.bias.grad, one.v_proj.bias.grad))
    assert equal(*gradients)
    with torch.inference_mode():
        x = torch.randn(2, 96)
        assert equal(module(x), plain(x))
    x = torch.randn(4, 96)
    with torch.no_grad():
        y = torch.func.functional_call(module, {"k_proj.bias": torch.zeros(32)}, (x,))
        torch.testing.assert_close(y[1], plain.k_proj(x) - plain.k_proj.bias)
        assert equal(module(x), plain(x))


@torch.no_grad()
def test_copies_pickles_and_files(tmp_path: Path, launches: list[int]) -> None:
    from safetensors.torch import load_file, save_file

    plain = Attention()
    module = fused(copy.deepcopy(plain))
    x = torch.randn(2, 96)
    alone = copy.deepcopy(module.k_proj)
    assert not alone.to(torch.float32).together.joined and torch.equal(alone(x), plain.k_proj(x))
    assert alone.weight.untyped_storage().nbytes() == alone.weight.nbytes
    copied = copy.deepcopy(module)
    module.q_proj.bias.add_(1)
    for made in (copied, copy.deepcopy(copied), pickle.loads(pickle.dumps(copied)), fused(copied)):
        together = made.q_proj.together
        assert together.joined and together is made.v_proj.together is not module.q_proj.together
        launches.clear()
        assert equal(made(x), plain(x)) and launches[0] == 120, "one launch for all of the copy"
    save_file(copied.state_dict(), tmp_path / "file")
    again = fused(Attention(dtype=torch.float32))
    for assign in (False, True):
        again.load_state_dict(load_file(tmp_path / "file"), assign=assign)
        assert again.q_proj.together.joined and equal(again(x), plain(x)) and equal_states(again, plain)


@torch.no_grad()
def test_moving_and_casting_joins_again() -> None:
    module, plain = fused(Attention()), Attention()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module, plain = module.to(dtype), plain.to(dtype)
        x = torch.randn(2, 96).to(dtype)
        assert module.q_proj.together.joined and equal(module(x), plain(x)) and equal_states(module, plain)
    module.q_proj.to(torch.float16)
    assert not module.q_proj.together.joined
    module.to("meta")
    assert not module.q_proj.together.joined


@torch.no_grad()
def test_only_like_layers_are_grouped() -> None:
    module = Attention()
    module.k_proj = LutLinear.from_linear(nn.Linear(96, 32), QuantSpec(3, 64, "nf3"))
    assert fuse(module, anywhere=True) == 1 and module.k_proj.together is None
    assert module.q_proj.together is module.v_proj.together is not None
    module.v_proj = nn.Linear(96, 24)
    assert fuse(module, anywhere=True) == 0 and module.q_proj.together is None
    assert fuse(Attention()) == 1 and fuse(nn.ModuleDict({"encoder_attn": Attention()})) == 0
    module = Attention()
    fuse(module)
    assert not module.q_proj.together.joined, "on a CPU only when asked"
    custom = Attention(QuantSpec(4, 32, "custom"))
    custom.k_proj.table.add_(1)
    fuse(custom, anywhere=True)
    assert not custom.q_proj.together.joined, "one table for all"


# ---- torch.compile ---------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Three attentions, one of which writes to its x between q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            q = layer.q_proj(x)
            if number == 1:
                x.add_(0.5)
            k, v = layer.k_proj(x), layer.v_proj(x)
            x = x * k.mean() + q.sum(-1, keepdim=True) - v.mean()
        return x


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("inductor", torch.no_grad), ("aot_eager", torch.inference_mode), ("eager", torch.no_grad)],
)
def test_compiled_in_one_launch_each(backend: str, mode: Any, launches: list[int]) -> None:
    plain = Stack()
    module = fused(copy.deepcopy(plain))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with mode():
        for tokens in (3, 1, 5, 9):
            x = torch.randn(tokens, 96)
            right = plain(x.clone())
            launches.clear()
            torch.testing.assert_close(compiled(x.clone()), right, rtol=1e-4, atol=1e-4)
            if backend != "eager":
                assert launches == [120] * 4, "one launch a layer, and one more where x was written to"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one token is a case of its own to torch"
        module.layers[0].k_proj.weight.data = plain.layers[0].k_proj.weight.data.clone()  # no neighbour any more
        torch.testing.assert_close(compiled(x.clone()), right, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert len(joined._traced) <= 1, "traces are not kept"


@torch.no_grad()
def test_compiled_graphs_find_the_weights_lying_still() -> None:
    """What is not static is copied before every run of a CUDA graph: nothing but x may be."""
    moving: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        moving.append(sum("_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}) for node in inputs))
        return graph.forward

    for module in (fused(Attention()), Attention()):
        torch.compiler.reset()
        torch.compile(module, fullgraph=True, backend=backend)(torch.randn(2, 96))
    assert moving == [1, 1]


@torch.no_grad()
def test_replicas_are_apart() -> None:
    replica = fused(Attention()).q_proj._replicate_for_data_parallel()
    assert replica.together is None


def test_compiled_training_and_the_operator() -> None:
    module = fused(Attention())
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, other = (torch.ones(2, 96).requires_grad_() for _ in range(2))
    sum(y.square().sum() for y in compiled(x)).backward()
    sum(y.square().sum() for y in module(other)).backward()
    assert x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    layers = [module.q_proj, module.k_proj, module.v_proj]
    given = ([m.weight for m in layers], [m.scales for m in layers], layers[0].table, [m.bias for m in layers])
    torch.library.opcheck(torch.ops.flute.lut_linears, (x.detach().requires_grad_(), *given, [64, 32, 24], 4, 64))
    y = torch.ops.flute.lut_linears(x, *given, [64, 32, 24], 4, 64)
    x.grad = None
    sum(part.square().sum() for part in y.split([64, 32, 24], -1)).backward()
    torch.testing.assert_close(x.grad, other.grad)
    apart = ([m.weight.clone() for m in layers], *given[1:])
    assert torch.equal(torch.ops.flute.lut_linears(x, *apart, [64, 32, 24], 4, 64), y)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(3, 32, "nf3"), QuantSpec(2, 48, "nf2")], ids=str)
@torch.no_grad()
def test_cuda(spec: QuantSpec) -> None:
    """Near the layers apart (another N may have another plan, which adds in another order), and the same in a graph."""
    plain = Attention(spec, torch.float16).cuda()
    module = Attention(spec, torch.float16)
    fuse(module)
    module = module.cuda()
    together = module.q_proj.together
    assert together.joined == module.q_proj.in_kernel_order and equal_states(module, plain)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (1, 5, 40, 200):
        x = torch.randn(tokens, 96, device="cuda").half()
        right = module(x)
        for y, other in zip(right, plain(x), strict=True):
            assert (y.double() - other.double()).norm() < 1e-3 * other.double().norm()
        assert equal(compiled(x), right)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            captured = module(x)
        graph.replay()
        assert equal(captured, right) and not together._kept
    back = module.cpu()
    assert not together.joined and equal_states(back, plain.cpu())


@pytest.mark.gpu
@torch.no_grad()
def test_what_was_captured_is_not_handed_out() -> None:
    """q in a graph, k outside of it: k must not be the graph's memory, which nothing has written to yet."""
    plain, module = Attention(dtype=torch.float16).cuda(), Attention(dtype=torch.float16).cuda()
    fuse(module)
    x = torch.randn(3, 96, device="cuda").half()
    module(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            module.q_proj(x)
        y = module.k_proj(x)
    torch.cuda.synchronize()
    torch.testing.assert_close(y, plain.k_proj(x), rtol=1e-2, atol=1e-2)
