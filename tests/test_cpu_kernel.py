"""The C kernel against references that share nothing with it: exact where arithmetic is exact, float64 otherwise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flute.errors import CompileError
from flute.kernels import cpu

SOURCE = Path(cpu.__file__).with_name("_cpu.c")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = [(bits, vector) for bits in (2, 3, 4) for vector in (1, 2)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

each_format = pytest.mark.parametrize(("bits", "vector"), FORMATS, ids=[f"{b}bit-v{v}" for b, v in FORMATS])
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=[str(d).removeprefix("torch.") for d in FLOATS])
# N, K, group: whole units; short last group; groups that cut units, pairs and bytes; one row, one column
SHAPES = [
    (16, 256, 64), (13, 1024, 1024), (7, 96, 32), (20, 160, 64), (777, 64, 32), (9, 333, 48), (5, 333, 333),
    (8, 600, 7), (1, 1, 1), (1, 2, 32), (3, 31, 32), (6, 33, 32), (12, 48, 48), (2, 520, 96),
    (25, 2048, 512), (1, 4096, 64),
]  # fmt: skip
each_shape = pytest.mark.parametrize(("n", "k", "group"), SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])


@pytest.fixture(scope="session", autouse=True)
def _kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Test the sources as they are, not a library that was built some time ago, wherever there is a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        if not cpu.available():
            pytest.skip(f"no C compiler, and {cpu.build_hint()}")
        return
    library = tmp_path_factory.mktemp("cpu") / "_cpu.so"
    command = [compiler, "-O3", "-shared", "-fPIC", "-pthread", "-o", library, SOURCE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cpu.load(library)


@pytest.fixture(params=[2, 1, 0], ids=["avx512", "avx2-neon", "plain"], autouse=True)
def _instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set this machine has."""
    if request.param > cpu.best():
        pytest.skip("this machine has no such instructions")
    monkeypatch.setattr(cpu, "instructions", request.param)


class Problem:
    """Random codes with every code present (the top one first), and the exact float64 weights W (N, K)."""

    def __init__(self, n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype, exact: bool = False):
        draw = torch.Generator().manual_seed(n * 1009 + k * 31 + group + bits)
        count, entries = -(-k // vector), 1 << (bits * vector)
        codes = torch.randint(entries, (n, count), generator=draw)
        codes.view(-1)[: min(entries, codes.numel())] = torch.arange(entries - 1, -1, -1)[: codes.numel()]
        shape, groups = (entries,) if vector == 1 else (entries, 2), -(-k // group)
        if exact:  # sums of these are integers times 2**-3, far below 2**24
            self.table = torch.randint(-8, 9, shape, generator=draw).to(dtype)
            self.scales = torch.exp2(torch.randint(-3, 2, (n, groups), generator=draw).float()).to(dtype)
        else:
            self.table = torch.randn(shape, generator=draw).to(dtype)
            self.scales = (torch.rand(n, groups, generator=draw) + 0.1).to(dtype)
        self.weight = pack(codes, bits * vector)
        spread = self.scales.double().repeat_interleave(group, dim=1)[:, :k]
        self.values = self.table.double()[codes].reshape(n, -1)[:, :k]
        self.dense = self.values * spread
        # the one rounding to float32 and the one to dtype that the contract allows
        self.rounded = (self.values.float() * spread.float()).to(dtype)
        self.k, self.options = k, {"bits": bits, "group_size": group, "vector_size": vector}

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return cpu.lut_linear(x, self.weight, self.scales, self.table, bias, **self.options)

    def dequantize(self) -> torch.Tensor:
        return cpu.dequantize(self.weight, self.scales, self.table, self.k, **self.options)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Bit by bit, as the layout is written down: bit i of a row is bit i % 8 of byte i // 8. Padding bits are ones."""
    bits = (codes.unsqueeze(-1) >> torch.arange(width) & 1).flatten(1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8), value=1)
    return (bits.view(codes.shape[0], -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def tokens(m: int, k: int, dtype: torch.dtype, integers: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(m + k)
    x = torch.randint(-4, 5, (m, k), generator=draw) if integers else torch.randn(m, k, generator=draw)
    return x.to(dtype)


# ---- exact -----------------------------------------------------------------------------------------------------------


@each_format
@each_dtype
@each_shape
def test_dequantize_rounds_once(n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype) -> None:
    problem = Problem(n, k, group, bits, vector, dtype)
    assert torch.equal(problem.dequantize(), problem.rounded)


@each_format
@each_dtype
@pytest.mark.parametrize(("n", "k", "group"), [(16, 256, 64), (11, 45, 7), (6, 64, 48), (13, 96, 96)])
def test_one_hot_reads_weights(n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype) -> None:
    problem = Problem(n, k, group, bits, vector, dtype)
    eye = torch.eye(k, dtype=dtype)
    assert torch.equal(problem.linear(eye).T, problem.rounded)
    one_by_one = [problem.linear(eye[i : i + 1]) for i in range(k)]
    assert torch.equal(torch.cat(one_by_one).T, problem.rounded)


@each_format
@each_dtype
@each_shape
def test_integers_are_exact(n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype) -> None:
    problem = Problem(n, k, group, bits, vector, dtype, exact=True)
    for m in (1, 2, 5):
        x = tokens(m, k, dtype, integers=True)
        wanted = (x.long() @ (problem.dense * 8).long().T).double() / 8
        assert torch.equal(problem.linear(x), wanted.to(dtype))


@each_dtype
def test_every_code_at_every_place_of_a_unit(dtype: torch.dtype) -> None:
    for bits, vector in FORMATS:
        entries = 1 << (bits * vector)
        codes = (torch.arange(64 // vector) + torch.arange(entries).unsqueeze(1)) % entries
        table = torch.arange(1, entries * vector + 1).to(dtype).view((entries,) if vector == 1 else (entries, 2))
        scales = torch.ones(entries, 1, dtype=dtype)
        options = {"bits": bits, "group_size": 64, "vector_size": vector}
        dense = cpu.dequantize(pack(codes, bits * vector), scales, table, 64, **options)
        assert torch.equal(dense, table[codes].reshape(entries, 64))


@each_dtype
def test_all_values_of_the_dtype_survive(dtype: torch.dtype) -> None:
    """Scales over the whole range, subnormals and infinities too, times a table of ones."""
    if dtype == torch.float32:
        scales = torch.tensor([0.0, 1e-45, 1e-38, 1.1754944e-38, 1.0, 3.4e38, float("inf"), -2.5]).view(-1, 1)
    else:
        scales = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    table, weight = torch.ones(16, dtype=dtype), torch.zeros(scales.shape[0], 1, dtype=torch.uint8)
    dense = cpu.dequantize(weight, scales, table, 1, bits=4, group_size=1, vector_size=1)
    assert torch.equal(dense.nan_to_num(12345.0), scales.nan_to_num(12345.0))
    assert torch.equal(dense.isnan(), scales.isnan())
    assert torch.equal(dense.isinf(), scales.isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_round_to_even(dtype: torch.dtype) -> None:
    scales = torch.linspace(-3, 3, 4097).exp().to(dtype).view(-1, 1)
    table = torch.cat([torch.linspace(-1.9, 1.9, 12), torch.tensor([6e-5, -3e-6, 3e4, -7e4])]).to(dtype)
    codes = torch.arange(16).expand(scales.shape[0], 16)
    dense = cpu.dequantize(pack(codes, 4), scales, table, 16, bits=4, group_size=16, vector_size=1)
    assert torch.equal(dense, (table.float() * scales.float()).to(dtype))


# ---- against float64 -------------------------------------------------------------------------------------------------


@each_format
@each_dtype
@each_shape
def test_close_to_float64(n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype) -> None:
    problem = Problem(n, k, group, bits, vector, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for m in (1, 2, 5, 17, 66):
        x = tokens(m, k, dtype)
        wanted = x.double() @ problem.dense.T + bias.double()
        size = x.double().abs() @ problem.dense.abs().T + bias.double().abs()  # what rounding errors are relative to
        got = problem.linear(x, bias)
        assert got.dtype == dtype
        assert got.shape == (m, n)
        assert ((got.double() - wanted).abs() <= TOLERANCE[dtype] * size).all()


@each_format
def test_no_tokens(bits: int, vector: int) -> None:
    problem = Problem(4, 64, 32, bits, vector, torch.float32)
    assert problem.linear(torch.empty(0, 64)).shape == (0, 4)


# ---- repeatable ------------------------------------------------------------------------------------------------------


@each_format
@each_dtype
@pytest.mark.parametrize(("n", "k", "group"), [(777, 1024, 64), (130, 1000, 32), (200, 2000, 7)])
def test_same_bits_for_any_threads_and_batch(
    n: int, k: int, group: int, bits: int, vector: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(n, k, group, bits, vector, dtype)
    x = tokens(66, k, dtype)
    few, many = problem.linear(x[:8]), problem.linear(x)  # up to 8 tokens sums are scaled, above that weights
    dense = problem.dequantize()
    torch.set_num_threads(3)
    for openmp in (cpu._openmp, lambda: None):  # PyTorch's pool, and threads of our own
        monkeypatch.setattr(cpu, "_openmp", openmp)
        assert torch.equal(problem.linear(x), many)
        assert torch.equal(problem.dequantize(), dense)
        for m in (1, 2, 3, 4, 8, 9, 65):
            assert torch.equal(problem.linear(x[:m]), (few if m <= 8 else many)[:m])


def test_strides_do_not_matter() -> None:
    """The caller promises a contiguous x; weights that are slices of something larger work too."""
    problem = Problem(12, 128, 32, 4, 1, torch.float32)
    wanted = problem.dequantize()
    problem.weight = torch.stack([problem.weight, problem.weight], dim=1)[:, 0]
    problem.scales = torch.stack([problem.scales, problem.scales], dim=-1)[..., 0]
    assert torch.equal(problem.dequantize(), wanted)


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(CompileError, match=r"cannot be loaded.*reinstall"):
        cpu.load(broken)
    assert cpu.available()  # the one loaded before stays
    assert cpu.build_hint() == ""


def test_without_a_library_there_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "_loaded", None)
    monkeypatch.setattr(cpu, "_reason", "")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    assert not cpu.available()
    assert "C compiler" in cpu.build_hint()
    with pytest.raises(CompileError, match="not built"):
        Problem(1, 8, 8, 4, 1, torch.float32).linear(torch.zeros(1, 8))
