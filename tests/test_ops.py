"""The operator on the CPU: exact first, then bounded; every refusal readable; torch's own checks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.bench.correctness import Case, Problem, check_decoding, check_errors, check_integers, relative, specs
from flute.errors import OperatorError
from flute.kernels import cpu
from flute.kernels.ops import lut_linear
from flute.spec import QuantSpec

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(params=["C kernel", "plain torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on both backends of the CPU."""
    if request.param == "plain torch":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip(cpu.build_hint())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 64), (33, 77), (17, 1), (24, 260)], ids=str)
def test_answers(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    n, k = shape
    for spec in specs(bits, (32, 48, -1), vectors=k % 2 == 0):
        case = Case(n, k, spec, dtype, device="cpu")
        problem = Problem(case)
        for tokens in (1, 3, 20):
            assert check_decoding(problem, tokens) == "", spec
            assert check_integers(case, tokens) == "", spec
        assert [answer for answer in check_errors(problem, [1, 2, 5, 16, 17, 40]) if answer.reason] == []


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100), st.sampled_from([2, 3, 4]), st.integers(0, 1000))
@settings(max_examples=60)
def test_any_shape_and_group(n: int, k: int, group: int, bits: int, seed: int) -> None:
    case = Case(n, k, QuantSpec(bits, group, "custom"), torch.float16, device="cpu", seed=seed)
    assert check_decoding(Problem(case), 3) == ""
    assert check_errors(Problem(case), [2])[0].reason == ""


def problem(dtype: torch.dtype = torch.float16, n: int = 24, k: int = 96) -> Problem:
    return Problem(Case(n, k, QuantSpec(4, 32, "custom"), dtype, device="cpu"))


def test_any_x() -> None:
    p = problem()
    x = torch.randn(6, 96).half()
    right = p.run(x)
    assert torch.equal(p.run(x.view(2, 3, 96)), right.view(2, 3, 24))
    assert torch.equal(p.run(x.T.contiguous().T), right)
    assert torch.equal(p.run(torch.stack((x, x), -1)[..., 1]), right)
    assert torch.equal(p.run(x[:1].expand(4, 96)), right[:1].expand(4, 24))
    assert torch.equal(p.run(x[0]), p.run(x[:1])[0])
    assert p.run(x[:0]).shape == (0, 24)
    assert p.run(x.view(2, 3, 96)[:, :0]).shape == (2, 0, 24)


def test_gradients_flow_to_x_and_bias_only() -> None:
    p = problem(torch.float32)
    x = torch.randn(2, 3, 96, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(2, 3, 24)
    p.run(x, bias).backward(grad)
    exact = grad.double() @ p.decoded(torch.float64)
    assert x.grad is not None and relative(x.grad, exact) < 1e-6
    assert bias.grad is not None and torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)
    one = torch.randn(96, requires_grad=True)
    p.run(one, bias).sum().backward()
    assert one.grad is not None and one.grad.shape == (96,)


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96), (2, 40, 96)], ids=str)
def test_the_result_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As that of nn.Linear: some adapters add to it, some models scale it."""
    p, x = problem(torch.float32), torch.randn(shape, requires_grad=True)
    y = p.run(x)
    y.mul_(2).add_(1)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    (2 * p.run(other)).sum().backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    p = problem(dtype)
    bias = torch.randn(24, dtype=dtype)
    for m in (0, 1, 40):
        x = torch.randn(2, m, 96, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.flute.lut_linear, (x, *p.given, p.table, bias, 24, 4, 32))
        torch.library.opcheck(torch.ops.flute.lut_linear, (x, *p.given, p.table, None, 24, 4, 32))
    torch.library.opcheck(torch.ops.flute.dequantize, (*p.given, p.table, 24, 96, 4, 32))


def test_compiled_without_graph_break() -> None:
    p = problem()

    def twice(x: torch.Tensor) -> torch.Tensor:
        return p.run(x) + p.run(2 * x)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="eager")
    for m in (1, 5, 30):
        x = torch.randn(m, 96).half()
        assert torch.equal(compiled(x), twice(x))


def test_refusals_are_one_readable_line() -> None:
    p = problem()
    weight, scales = p.given
    x = torch.randn(2, 96).half()
    spec = p.spec
    wrong = {
        "x is torch.float32": lambda: lut_linear(x.float(), weight, scales, p.table, spec=spec),
        "x is torch.int32": lambda: lut_linear(x.int(), weight, scales, p.table, spec=spec),
        "needs uint8 (24, 49)": lambda: lut_linear(torch.randn(2, 98).half(), weight, scales, p.table, spec=spec),
        "weight (24, 48) torch.int8": lambda: lut_linear(x, weight.view(torch.int8), scales, p.table, spec=spec),
        "scales (24, 2)": lambda: lut_linear(x, weight, scales[:, :2], p.table, spec=spec),
        "table (15,)": lambda: lut_linear(x, weight, scales, p.table[:15], spec=spec),
        "table is torch.float32": lambda: lut_linear(x, weight, scales, p.table.float(), spec=spec),
        "bias (23,)": lambda: lut_linear(x, weight, scales, p.table, torch.zeros(23).half(), spec=spec),
        "x is a scalar": lambda: lut_linear(torch.tensor(1.0).half(), weight, scales, p.table, spec=spec),
        "bits=5": lambda: torch.ops.flute.lut_linear(x, weight, scales, p.table, None, 24, 5, 32),
        "group_size=0": lambda: torch.ops.flute.lut_linear(x, weight, scales, p.table, None, 24, 4, 0),
        "group_size=48 in kernel order": lambda: torch.ops.flute.dequantize(
            torch.zeros(2, 1, 1024, dtype=torch.uint8), scales, p.table, 24, 96, 4, 48
        ),
        "two devices": lambda: lut_linear(x, weight, scales, p.table.to("meta"), spec=spec),
    }
    for words, call in wrong.items():
        with pytest.raises((OperatorError, NotImplementedError)) as refusal:
            call()
        if refusal.type is OperatorError:
            assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_large_m_takes_the_dense_path_with_the_same_weights() -> None:
    p = problem(torch.float32, 64, 512)
    x = torch.randn(65, 512)  # more than the C kernel takes
    assert relative(p.run(x), p.exact(x)) < 1e-5
