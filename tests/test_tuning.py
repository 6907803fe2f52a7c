"""Measuring plans: the loop, what it keeps, what the command line says, and on a GPU the whole of it.

Who wins is tested in test_verdicts.py.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiler import needs_nvrtc
from gpus import GPUS
from test_verdicts import FOUND, PROBLEM
from tiny_models import build
from torch import nn

import flute.tune
from flute import LutLinear, QuantSpec
from flute.bench import tuning
from flute.cli import main
from flute.errors import TuneError
from flute.kernels import choice, cuda, jit, ops, plan, reference, tiles, tuned
from flute.tune import TuneTask, tune_model, tune_tasks_legacy

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known before, and nothing stays behind for other tests of this process."""
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "cache"))
    tuned.clear()
    cuda.choose.cache_clear()
    yield
    tuned.clear()
    cuda.choose.cache_clear()


# ---- the loop, with a GPU that is not there ------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuned.Problem]:
    """The loop believes in an H100 on which the third candidate is the fastest; collects what is measured."""
    seen: list[tuned.Problem] = []

    def measured(problem: tuned.Problem, launches: list[choice.Launch], device: int) -> tuning.Result:
        seen.append(problem)
        verdict = tuned.Verdict(launches[2].label, 8.0, 9.0)
        return tuning.Result(problem, launches[0].label, verdict, (), len(launches))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(cuda, "gpu", lambda device: GPUS["H100"])
    monkeypatch.setattr(cuda, "machine", lambda device: tuned.Machine("H100", "580", "0"))
    monkeypatch.setattr(tuning, "_measured", measured)
    return seen


def test_a_tuned_problem_is_not_measured_again(pretended: list[tuned.Problem]) -> None:
    before = cuda.choose(0, *PROBLEM[:-1])
    first = flute.tune.tune([(4096, 4096)], [16, 16, 12], candidates=4)
    assert pretended == [PROBLEM] and first[0].measured == 8 and first[0].gain == 9.0 / 8.0
    after = cuda.choose(0, *PROBLEM[:-1])
    assert after is not None and after != before and after.label == first[0].verdict.plan  # type: ignore[union-attr]
    second = flute.tune.tune([(4096, 4096)], [16])
    assert pretended == [PROBLEM] and second[0].measured == 0 and second[0].verdict == first[0].verdict
    flute.tune.tune([(4096, 4096)], [16], again=True)
    assert pretended == [PROBLEM] * 2


def test_what_no_kernel_takes_is_not_measured(pretended: list[tuned.Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda device: GPUS["B200"])
    (result,) = flute.tune.tune([(8192, 8192)], [4096])  # there dense is estimated to be faster
    assert result.verdict is None and result.analytic is None and result.gain == 1.0 and not pretended


def test_a_full_disk_is_told_at_the_end(
    pretended: list[tuned.Problem], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned.os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        main(["tune", "--shapes", "4096x4096", "-m", "1,16"])
    out, error = capsys.readouterr()
    assert end.value.code == 1 and len(pretended) == 2 and "4096x4096" in out
    assert "No space left" in error and error.count("\n") == 1
    assert cuda.choose(0, *PROBLEM[:-1]) != FOUND[0]  # this process goes on with what it knows


def test_models_and_tasks(pretended: list[tuned.Problem]) -> None:
    model = nn.Sequential(
        LutLinear(128, 64, QuantSpec(), dtype=torch.float16),
        LutLinear(128, 64, QuantSpec(table="int4"), dtype=torch.float16),  # the same problem
        LutLinear(64, 64, QuantSpec(3, 32, "nf3"), dtype=torch.bfloat16),
        LutLinear(96, 64, QuantSpec(3, 24, "nf3"), dtype=torch.bfloat16),  # no kernel takes it
        nn.Linear(128, 64),
    )
    tune_model(model, [1])
    assert pretended == [tuned.Problem(1, 64, 128, 4, 64, "float16"), tuned.Problem(1, 64, 64, 3, 32, "bfloat16")]
    task = TuneTask(5, 256, 512, 2, 128, 132, torch.float16, torch.device("cuda"))
    tune_tasks_legacy([task, task._replace(N=128)], num_seeds=1)
    assert pretended[2:] == [tuned.Problem(8, n, 512, 2, 128, "float16") for n in (256, 128)]


@needs_nvrtc
def test_kernels_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_arch", lambda device: "sm_90")
    pair = [next(one for one in FOUND if isinstance(one, kind)) for kind in (plan.Plan, tiles.Tiling)]
    cuda.compile_ahead(0, [*pair, *pair], 4, False)
    assert len(list((tmp_path / "cache" / "cubins").glob("*.cubin"))) == 2

    def compiled(text: str, arch: str) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "compile_cubin", compiled)
    for one, file, arch in zip(pair, ("decode.cu", "matmul.cu"), ("sm_90", "sm_90a"), strict=True):
        assert jit.cubin(jit.source(file, dict(one.macros(4, False))), arch)


# ---- the command ---------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["tune", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@NO_GPU
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tiny"], ["--shapes", "64x64"]):
        code, out, err = said(capsys, *arguments)
        assert (code, out) == (1, "") and "torch sees none" in err and err.count("\n") == 1
    for call in (
        lambda: tune_model(nn.Linear(2, 2)),
        lambda: tune_tasks_legacy([]),
        lambda: flute.tune.tune([(9, 64)]),
    ):
        with pytest.raises(TuneError, match="torch sees none"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what is to be tuned"),
        (["tiny", "--shapes", "64x64"], "what is to be tuned"),
        (["--shapes", "64,64"], "no list of NxK"),
        (["--shapes", "64x"], "no list of NxK"),
        (["--shapes", "64x64", "-m", "1,x"], "--tokens '1,x'"),
        (["--shapes", "64x64", "-m", "0"], "0 tokens"),
        (["--shapes", "64x64", "--bits", "5"], "bits=5"),
        (["--shapes", "64x64", "--dtype", "float32"], "float32"),
        (["--shapes", "64x64", "--group-size", "24"], "group_size=24"),
        (["tiny", "--group-size", "24"], "no layer has groups"),
        (["no-such-model"], "does not exist"),
        (["--show", "--clear"], "stand alone"),
        (["tiny", "--show"], "stand alone"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *arguments, "--dry-run")
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1


def test_dry_run_names_the_problems(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = said(capsys, "--shapes", "64x128,32x64", "--bits", "4,3", "-m", "1,2", "--dry-run", "--json")
    problems = [tuned.Problem(**row) for row in json.loads(out)]
    assert (code, err) == (0, "") and len(problems) == 8 and problems[0] == tuned.Problem(1, 64, 128, 4, 64, "float16")
    build("Llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    _, out, _ = said(capsys, tmp_path / "dense", "--group-size", 32, "-m", "3", "--dry-run", "--json")
    shapes = {(row["n"], row["k"]) for row in json.loads(out)}
    assert {(row["m"], row["dtype"], row["bits"], row["group"]) for row in json.loads(out)} == {(4, "bfloat16", 4, 32)}
    with pytest.raises(SystemExit):
        main(
            ["quantize", str(tmp_path / "dense"), "-o", str(tmp_path / "q"), "--bits", "3", "--group-size", "32", "-q"]
        )
    _, out, _ = said(capsys, tmp_path / "q", "-m", "3", "--dry-run", "--json")
    assert {(row["n"], row["k"]) for row in json.loads(out)} == shapes
    assert {(row["m"], row["dtype"], row["bits"], row["group"]) for row in json.loads(out)} == {(4, "bfloat16", 3, 32)}
    _, out, _ = said(capsys, tmp_path / "q", "-m", "3", "--dry-run")
    assert "3bit g32 bfloat16 M<=4" in out


def test_table_show_and_clear(pretended: list[tuned.Problem], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "--shapes", "4096x4096", "-m", "16")
    assert code == 0 and "1 faster" in err
    assert "4096x4096 4bit g64 float16 M<=16" in out and "9.00" in out and "8.00" in out and "1.125" in out
    _, out, _ = said(capsys, "--shapes", "4096x4096", "-m", "16", "--json")
    (row,) = json.loads(out)
    assert row["gain"] == 1.125 and row["measured"] == 0 and row["plan"].startswith(("decode ", "matmul "))
    _, out, _ = said(capsys, "--show")
    assert "H100, driver 580: 1 problems; of other kernels" in out and "M<=16" in out and "1.125" in out
    _, out, _ = said(capsys, "--show", "--json")
    (file,) = json.loads(out)
    assert file["current"] is False and file["entries"][0]["us"] == 8.0
    assert said(capsys, "--clear")[1] == "1 files removed\n"
    assert said(capsys, "--show")[1] == "nothing is kept\n"
    assert json.loads(said(capsys, "--clear", "--json")[1]) == {"removed": 0}


def test_autotune_is_the_same_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", "--shapes", "64x64", "-m", "3", "--dry-run", "--json"])
    with pytest.raises(SystemExit):
        runpy.run_module("flute.autotune", run_name="__main__")
    problems = [tuned.Problem(**row) for row in json.loads(capsys.readouterr().out)]
    assert problems == [tuned.Problem(4, 64, 64, 4, 64, "float16")]


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_real_tuning(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    n, k, spec = 1000, 2048, QuantSpec(3, 64, "nf3")
    before = [cuda.choose(0, m, n, k, 3, 64, dtype == torch.bfloat16) for m in (1, 16)]
    results = flute.tune.tune([(n, k)], [1, 16], spec=spec, dtype=dtype, candidates=5)
    assert [result.problem.m for result in results] == [1, 16] and not any(result.wrong for result in results)
    torch.manual_seed(0)
    layer = LutLinear.from_linear(nn.Linear(k, n, bias=False, dtype=dtype, device="cuda"), spec)
    for result, was in zip(results, before, strict=True):
        assert result.verdict is not None and was is not None and result.analytic == was.label
        assert 0 < result.verdict.us <= result.verdict.analytic_us and result.measured >= 5
        now = cuda.choose(0, result.problem.m, n, k, 3, 64, dtype == torch.bfloat16)
        assert now is not None and now.label == (result.verdict.plan or was.label)
        x = torch.randn(result.problem.m, k, device="cuda").to(dtype)
        y = ops.lut_linear(x, layer.weight, layer.scales, layer.table, spec=spec, out_features=n)
        exact = reference.lut_linear(x, *layer.checkpoint_tensors(), layer.table, None, 3, 64)
        assert (y.double() - exact).norm() / exact.norm() < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    script = (
        "import sys, torch, flute.tune\nfrom flute import QuantSpec\n"
        f"found = flute.tune.tune([({n}, {k})], [1, 16], spec=QuantSpec(3, 64, 'nf3'), dtype={dtype})\n"
        "print([(r.measured, r.verdict.plan) for r in found])"
    )
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert second.stdout.strip() == str([(0, result.verdict.plan) for result in results if result.verdict])
    assert said(capsys, "--show")[1].count("not used") == 0


@pytest.mark.gpu
def test_a_graph_keeps_the_plan_it_was_captured_with() -> None:
    layer = LutLinear.from_linear(nn.Linear(2048, 1000, bias=False, device="cuda").half(), QuantSpec())
    x = torch.randn(1, 2048, device="cuda").half()
    right = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    found = choice.contestants(cuda.gpu(0), 1, 1000, 2048, 4, 64)
    other = next(one for one in reversed(found) if one.label != found[0].label)
    tuned.keep(cuda.machine(0), {tuned.Problem(1, 1000, 2048, 4, 64, "float16"): tuned.Verdict(other.label, 1.0, 2.0)})
    cuda.choose.cache_clear()
    assert cuda.choose(0, 1, 1000, 2048, 4, 64) == other
    graph.replay()
    assert torch.equal(y, right)
