"""What a decoder block does around a product, in the product's launch: the same numbers as line by line."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flute.errors import OperatorError
from flute.kernels import cuda, fused, fused_cuda, layout, ops
from flute.packing import pack_codes
from flute.quantize import quantize
from flute.spec import QuantSpec
from flute.tables import resolve_table

SPECS = [QuantSpec(), QuantSpec(3, 32, "nf3"), QuantSpec(2, -1, "int2"), QuantSpec(3, 128, "custom", 2)]
AROUND = ["norm", "gated", "residual", "norm gated", "norm residual", "norm gated residual"]


def operands(spec: QuantSpec, n: int, k: int, dtype: torch.dtype, device: str, whole: bool) -> dict[str, Any]:
    """Of one product; ``whole``: of integers small enough that every sum of products is exact."""
    torch.manual_seed(1)
    if whole:
        table = torch.randint(-2, 3, spec.table_shape).to(dtype)
        codes = pack_codes(
            torch.randint(0, 1 << spec.code_bits, (n, k // spec.vector_size)).to(torch.uint8), spec.code_bits
        )
        scales = torch.full((n, spec.num_groups(k)), 0.125, dtype=dtype)  # gate times up stays below float16's largest
    else:
        own = torch.randn(spec.table_shape) if spec.table == "custom" else None
        made = quantize(torch.randn(n, k) / k**0.5, spec, table=own, scale_dtype=dtype)
        table, codes, scales = resolve_table(spec, own).to(dtype), pack_codes(made.codes, spec.code_bits), made.scales
    weight, scales = codes.to(device), scales.to(device)
    if device == "cuda":
        weight, scales = layout.pack_weight(weight, spec.bits, k), layout.pack_scales(scales)
    bias = (torch.randint(-3, 4, (n,)) / 4).to(dtype).to(device)
    return {
        "weight": weight, "scales": scales, "table": table.to(device), "bias": bias, "out_features": n,
        "bits": spec.bits, "group_size": spec.group_size,
    }  # fmt: skip


def around(kind: str, x: torch.Tensor, n: int) -> dict[str, Any]:
    given: dict[str, Any] = {"gated": "gated" in kind}
    if "norm" in kind:
        given |= {"gain": (torch.randint(2, 7, x.shape[-1:]) / 4).to(x), "eps": 1e-5}
    if "residual" in kind:
        given["residual"] = (torch.randint(-8, 9, (*x.shape[:-1], n // 2 if "gated" in kind else n)) / 2).to(x)
    return given


def line_by_line(x: torch.Tensor, given: dict[str, Any], more: dict[str, Any], product: Any = None) -> torch.Tensor:
    """The definition, with torch's own functions around the product."""
    if "gain" in more:
        wide = x.float()
        x = more["gain"] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + more["eps"])).to(x.dtype)
    y = (product or whole_product)(x, given)
    if more["gated"]:
        y = F.silu(y[..., : y.shape[-1] // 2]) * y[..., y.shape[-1] // 2 :]
    return more["residual"] + y if "residual" in more else y


def whole_product(x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    return ops.apply(x, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", AROUND)
def test_line_by_line_on_a_cpu(kind: str, dtype: torch.dtype) -> None:
    given = operands(QuantSpec(), 64, 96, dtype, "cpu", whole=False)
    x = torch.randn(2, 3, 96).to(dtype)
    more = around(kind, x, 64)
    assert torch.equal(fused.lut_fused(x, **given, **more), line_by_line(x, given, more))


def test_codes_that_lie_apart() -> None:
    given = operands(QuantSpec(), 64, 96, torch.float32, "cpu", whole=False)
    x, more = torch.randn(1, 96), around("norm gated residual", torch.zeros(1, 96), 64)
    apart = given | {"weight": given["weight"].repeat(1, 2)[:, : given["weight"].shape[1]]}
    assert torch.equal(fused.lut_fused(x, **apart, **more), line_by_line(x, given, more))


def test_the_operator_is_what_torch_expects() -> None:
    given = operands(QuantSpec(), 64, 96, torch.float32, "cpu", whole=False)
    x = torch.randn(2, 96)
    more = {"gain": None, "eps": 0.0, "residual": None} | around("norm gated residual", x, 64)
    order = ("gain", "eps", "gated", "residual")
    torch.library.opcheck(torch.ops.flute.lut_fused.default, (x, *given.values(), *(more[name] for name in order)))


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for every launch."""
    if not cuda.gpu(0).has_clusters:
        pytest.skip("only GPUs with clusters run it in one launch")
    found: list[str] = []
    real = cuda._launch

    def counted(device: int, config: Any, kernel: Any, *arguments: Any) -> None:
        found.append("launch")
        real(device, config, kernel, *arguments)

    monkeypatch.setattr(cuda, "_launch", counted)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", AROUND)
def test_one_launch_gives_the_same_bits_of_whole_numbers(
    kind: str, spec: QuantSpec, dtype: torch.dtype, launched: list[str]
) -> None:
    for n, k in ((96, 256), (8192, 512), (7168, 1024), (1024, 4096)):
        given = operands(spec, n, k, dtype, "cuda", whole=True)
        for shape in ((1,), (1, 1), (2,), (3, 1), (4,)):
            x = torch.randint(-2, 3, (*shape, k), device="cuda").to(dtype)
            more = around(kind, x, n)
            launched.clear()
            y = fused.lut_fused(x, **given, **more)
            assert len(launched) == 1 and y.shape == (*shape, n // (2 if more["gated"] else 1))
            if "norm" in kind:  # products of normed numbers are not exact: the next test's
                close(y, x, given, more)
            else:
                assert torch.equal(y, line_by_line(x, given, more)), (n, k, shape)


def close(y: torch.Tensor, x: torch.Tensor, given: dict[str, Any], more: dict[str, Any]) -> None:
    """Within a few roundings of the product's own error of the same in float64 behind the norm."""
    weight = torch.ops.flute.dequantize(
        given["weight"], given["scales"], given["table"], given["out_features"], x.shape[-1], given["bits"],
        given["group_size"],
    )  # fmt: skip

    def product(normed: torch.Tensor, _: Any) -> torch.Tensor:
        return (normed.double() @ weight.double().T + given["bias"].double()).to(x.dtype)

    truth = line_by_line(x, given, more, product)
    error = float((y.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
    assert error < (2e-3 if x.dtype == torch.float16 else 1.2e-2), error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", AROUND)
def test_real_numbers(kind: str, spec: QuantSpec, dtype: torch.dtype, launched: list[str]) -> None:
    for n, k in ((160, 384), (6144, 4096), (28672, 4096), (4096, 14336)):
        given = operands(spec, n, k, dtype, "cuda", whole=False)
        for m in (1, 2, 4):
            x = torch.randn(m, k, device="cuda").to(dtype)
            more = around(kind, x, n)
            y = fused.lut_fused(x, **given, **more)
            close(y, x, given, more)
            assert torch.equal(y, fused.lut_fused(x, **given, **more))
            first = {name: one[:1] if name == "residual" else one for name, one in more.items()}
            close(fused.lut_fused(x[:1], **given, **first), x[:1], given, first)


@pytest.mark.gpu
def test_every_plan(launched: list[str]) -> None:
    """Every legal plan of a problem, with all that goes around, on whole numbers where that is exact."""
    k = 1024
    given = operands(QuantSpec(), 1024, k, torch.float16, "cuda", whole=True)
    x = torch.randint(-2, 3, (3, k), device="cuda").half()
    problem = (0, 3, 1024, k, 4, 64, False)
    wanted = {kind: around(kind, x, 1024) for kind in ("gated residual", "residual", "norm gated")}
    truth = {kind: line_by_line(x, given, more) for kind, more in wanted.items()}
    seen = 0
    for chosen in fused_cuda.plan.candidates(cuda.gpu(0), 3, 1024, k, 4, 64):
        for kind, more in wanted.items():
            if "gated" in kind and chosen.row_tiles != 2:
                continue
            macros = (("NORM", int("norm" in kind)), ("GATED", int("gated" in kind)))
            launch = cuda._prepare_decode(problem, chosen, macros)
            held = (given[name] for name in ("weight", "scales", "table", "bias"))
            y = fused_cuda.run(launch, x, *held, more.get("gain"), more.get("eps", 0.0), more["gated"],
                               more.get("residual"))  # fmt: skip
            if "norm" in kind:
                close(y, x, given, more)
            else:
                assert torch.equal(y, truth[kind]), (chosen.label, kind)
            seen += 1
    assert seen > 100


@pytest.mark.gpu
def test_more_tokens_and_odd_sizes_line_by_line(launched: list[str]) -> None:
    for n, k, m in ((128, 256, fused.MOST_TOKENS + 1), (80, 250, 1), (80, 256, 2)):
        given = operands(QuantSpec(4, 32), n, k, torch.float16, "cuda", whole=False)
        x = torch.randn(m, k, device="cuda").half()
        more = around("norm gated residual", x, n)
        assert torch.equal(fused.lut_fused(x, **given, **more), line_by_line(x, given, more))


@pytest.mark.gpu
def test_behind_a_kernel_that_writes_x_and_in_a_graph(launched: list[str]) -> None:
    """The launch may begin before the one that makes x, gain's reader before x is there: x is waited for."""
    given = operands(QuantSpec(), 2048, 1024, torch.bfloat16, "cuda", whole=False)
    x = torch.randn(2, 1024, device="cuda").bfloat16()
    gain = torch.rand(1024, device="cuda").bfloat16()

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = fused.lut_fused(x, **given, gain=gain, eps=1e-6, gated=True, residual=x)
        return x

    truth = chain(x)
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = chain(static)
    for _ in range(200):
        graph.replay()
        assert torch.equal(y, truth)


@pytest.mark.gpu
def test_refusals(launched: list[str]) -> None:
    given = operands(QuantSpec(), 64, 256, torch.float16, "cuda", whole=False)
    x = torch.randn(1, 256, device="cuda").half()
    with pytest.raises(OperatorError, match=r"gain .* needs"):
        fused.lut_fused(x, **given, gain=torch.ones(255, device="cuda").half())
    with pytest.raises(OperatorError, match=r"residual .* needs"):
        fused.lut_fused(x, **given, residual=torch.ones(1, 64, device="cuda"))
