"""`flute bench`: its options, and what it measures of kernels, writes and refuses. Times are made up here."""

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import flute

from flute.bench import kernel, peers, plot, results, shapes
from flute.bench.kernel import Row, Sweep
from flute.bench.model import ModelRow
from flute.commands.bench import numbers
from flute.errors import FluteError
from flute.linear import LutLinear
from flute.spec import QuantSpec

# ---- options ---------------------------------------------------------------------------------------------------------


def test_shapes_of_models_and_pairs() -> None:
    assert shapes.parse_shapes("8192x28672, 4096x4096,8192x28672") == [(8192, 28672), (4096, 4096)]
    assert shapes.MODELS["llama-3.1-8b"].linears() == {
        "qkv": (6144, 4096), "q": (4096, 4096), "k, v": (1024, 4096), "o": (4096, 4096),
        "gate_up": (28672, 4096), "gate, up": (14336, 4096), "down": (4096, 14336),
    }  # fmt: skip
    assert len(shapes.parse_shapes("Llama-3.1-8B")) == 6  # q and o are alike
    assert shapes.MODELS["qwen3-32b"].linears()["o"] == (5120, 8192)
    for wrong in ("llama", "4096", "0x64", "64x-64", "64x64x64", ""):
        with pytest.raises(FluteError, match="--shapes"):
            shapes.parse_shapes(wrong)


def test_numbers() -> None:
    assert numbers("-m", "16, 1,4,1") == [1, 4, 16]
    assert numbers("--group-sizes", "-1,64") == [-1, 64]
    for option, text in (("-m", "0"), ("-m", "-1"), ("-m", "1.5"), ("-m", ""), ("-m", "1,,2"), ("--group-sizes", "0")):
        with pytest.raises(FluteError, match=option):
            numbers(option, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--shapes", "wide"], "--shapes 'wide': give NxK"),
        (["kernel", "-m", "none"], "-m 'none': give whole numbers"),
        (["kernel", "--dtypes", "fp8"], "--dtypes 'fp8': use fp16, bf16"),
        (["kernel", "--peers", "cublas"], "--peers 'cublas': use all, none"),
        (["model", "--device", "cpu", "--methods", "nf5"], "--methods 'nf5': use dense, bitsandbytes, or a table"),
        (["model", "--device", "cpu", "--methods", "flatquant-w4a16"], "flatquant- give one of w4a4kv4"),
        (["model", "--device", "cpu", "--config", "no-such-model"], "--config no-such-model: give llama-3.1-8b"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute("bench", *arguments, capsys=capsys)
    assert (code, out) == (1, "") and err.count("\n") == 1 and message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is to be refused")
def test_the_kernel_is_measured_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = flute("bench", "kernel", "--peers", "none", capsys=capsys)
    assert code == 1 and "torch sees no GPU" in err


def test_no_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    plot.require()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FluteError, match=r"pip install 'flute-engine\[plot\]'"):
        plot.require()


# ---- peers -----------------------------------------------------------------------------------------------------------


def test_missing_peers_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.Method(
        "ghost", "ghost-kernels", "no_such_module_of_kernels", (4,), (torch.float16,), (), peers._dense
    )
    monkeypatch.setattr(kernel, "PEERS", (absent, peers.PEERS[-1]))
    here, reasons = kernel.find_peers("all")
    assert [peer.name for peer in here] == ["tinygemm"]
    assert reasons == {"ghost": "not installed (no module no_such_module_of_kernels); pip install ghost-kernels"}
    assert kernel.find_peers("none") == ([], {})
    with pytest.raises(FluteError, match="--peers 'flute'"):
        kernel.find_peers("tinygemm,flute")


def test_affine_codes_are_nearest() -> None:
    weight = torch.rand(8, 128) * 3 - 1
    codes, scale, low = peers.affine(weight, 3, 32)
    assert codes.dtype == torch.uint8 and (int(codes.min()), int(codes.max())) == (0, 7)
    back = codes.view(8, 4, 32) * scale.unsqueeze(-1) + low.unsqueeze(-1)
    assert bool(((back.flatten(1) - weight).abs() <= scale.repeat_interleave(32, 1) / 2 + 1e-6).all())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_bound_lets_rounding_pass_and_nothing_worse(bits: int) -> None:
    weight = torch.rand(256, 512) * 2 - 1
    x = torch.randn(16, 512)
    codes, scale, low = peers.affine(weight, bits, 64)
    rounded = (codes.view(256, 8, 64) * scale.unsqueeze(-1) + low.unsqueeze(-1)).flatten(1)
    error, reason = peers.check(x @ rounded.T, x @ weight.T, bits)
    assert reason == "" and 0 < error < peers.BOUNDS[bits]
    for wrong in (
        torch.zeros(16, 256),
        x @ rounded.T.roll(1, 1),
        x @ rounded.roll(1, 1).T,
        torch.full((16, 256), torch.nan),
    ):
        assert "wrong" in peers.check(wrong, x @ weight.T, bits)[1]
    assert "asked for" in peers.check(torch.zeros(16, 255), x @ weight.T, bits)[1]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_this_library_is_prepared_like_its_layers(bits: int) -> None:
    weight, x = torch.rand(48, 192) * 2 - 1, torch.randn(3, 192)
    made = peers.FLUTE.prepare(weight, bits, 64, [3])
    linear = torch.nn.Linear(192, 48, bias=False)
    linear.weight.data = weight
    assert torch.equal(made.call(x), LutLinear.from_linear(linear, QuantSpec(bits, 64, f"nf{bits}"))(x))
    assert made.nbytes == 48 * (192 * bits // 8 + 2 * 3)
    assert peers.check(made.call(x), x @ weight.T, bits)[1] == ""


def test_who_takes_part() -> None:
    sweep = Sweep([(64, 64)], [1], (4, 2), (64, 48), (torch.float16,), peers.PEERS)
    names = [(method.name, bits, group) for method, bits, group in kernel._formats(sweep, torch.float16)]
    assert names[:5] == [("dense", 16, 0), *[("flute", bits, group) for bits in (4, 2) for group in (64, 48)]]
    assert names[5:] == [
        ("bitsandbytes", 4, 64),
        ("gemlite", 4, 64),
        ("gemlite", 2, 64),
        ("humming", 4, 64),
        ("humming", 2, 64),
    ]
    assert ("tinygemm", 4, 64) in [(m.name, b, g) for m, b, g in kernel._formats(sweep, torch.bfloat16)]
    with pytest.raises(FluteError, match="tokens is empty"):
        Sweep([(64, 64)], [])


# ---- the sweep, with made-up times -----------------------------------------------------------------------------------


def broken(weight: torch.Tensor, bits: int, group_size: int, tokens: Any) -> peers.Prepared:
    return peers.Prepared(lambda x: torch.zeros(x.shape[0], weight.shape[0]), 1)


def refusing(weight: torch.Tensor, bits: int, group_size: int, tokens: Any) -> peers.Prepared:
    raise ValueError("no such shape\nwith a long story")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep without a GPU: dense takes 12 us a call, everybody else 4."""

    def compare(*contestants: Any, replays: int) -> list[float]:
        for calls in contestants:
            assert len(calls) == 2
            assert torch.equal(calls[0](), calls[1]())
        return [12.0] + [4.0] * (len(contestants) - 1)

    monkeypatch.setattr(kernel.timing, "compare", compare)
    monkeypatch.setattr(kernel.timing, "copies_beyond_l2", lambda nbytes: 2)
    monkeypatch.setattr(kernel, "_DEVICE", "cpu")


@pytest.fixture
def rows(on_cpu: None) -> list[Row]:
    bad = peers.Method("bad", "bad", "torch", (4,), (torch.float16,), (), broken)
    shy = peers.Method("shy", "shy", "torch", (4,), (torch.float16,), (), refusing)
    return kernel.measure(Sweep([(64, 128)], [1, 4], (4, 2), peers=[bad, shy], peer_tokens=[4]), ceiling=1e9)


def test_rows(rows: list[Row]) -> None:
    assert [(row.m, row.method, row.bits) for row in rows] == [
        (1, "dense", 16), (1, "flute", 4), (1, "flute", 2),
        (4, "dense", 16), (4, "flute", 4), (4, "flute", 2), (4, "bad", 4), (4, "shy", 4),
    ]  # fmt: skip
    ours = rows[1]
    assert (ours.us, ours.speedup, ours.note, ours.dtype) == (4.0, 3.0, "", "float16")
    nbytes = 64 * (64 + 2 * 2)
    assert ours.floor_us == pytest.approx(nbytes / 1e9 * 1e6) and ours.read_share == pytest.approx(nbytes / 1e3 / 4)
    assert rows[0].speedup == 1.0 and rows[0].error == 0
    assert all(row.us is None and row.speedup is None for row in rows[-2:])
    assert "wrong: error 1.00" in rows[-2].note
    assert rows[-1].note == "cannot store this weight: ValueError: no such shape"
    assert kernel.notes(rows) == [f"{row.method} 4 bit on 64x128 float16: {row.note}" for row in rows[-2:]]


def test_table(rows: list[Row]) -> None:
    header, lines = kernel.table(rows, [1, 4])
    assert header == ["weight", "method", "us M=1", "of read ceiling", "M=1", "M=4"]
    assert lines[1] == ["64x128 float16", "flute 4 bit g64", "4.0", "109%", "3.00", "3.00"]
    assert lines[-1] == ["64x128 float16", "shy 4 bit g64", "-", "-", "-", "-"]
    assert {len(line) for line in lines} == {len(header)}


def test_csv(rows: list[Row], tmp_path: Path) -> None:
    path = results.output_file(tmp_path / "new" / "folder", "kernel")
    assert path == tmp_path / "new" / "folder" / "kernel.csv"
    assert results.output_file(tmp_path / "own.csv", "kernel") == tmp_path / "own.csv"
    results.write_rows(path, "one machine", rows)
    first, *rest = path.read_text().splitlines()
    read = list(csv.DictReader(rest))
    assert first == "# one machine" and list(read[0]) == [field.name for field in fields(Row)]
    assert read[1] | {"error": ""} == {
        "n": "64", "k": "128", "dtype": "float16", "m": "1", "method": "flute", "bits": "4", "group_size": "64",
        "us": "4.0", "speedup": "3.0", "floor_us": "4.352", "read_share": "1.088", "error": "", "note": "",
    }  # fmt: skip
    assert read[-1]["us"] == "" and "no such shape" in read[-1]["note"]
    assert [path.name for path in path.parent.iterdir()] == ["kernel.csv"]
    origin, again = results.read_rows(path, ModelRow, Row)
    assert origin == "one machine" and [row.note for row in again] == [row.note for row in rows]
    assert again[1].floor_us == 4.352 and again[1].m == 1 and again[-1].us is None


def test_a_file_that_is_not_ours(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(FluteError, match="cannot be read"):
        results.read_rows(path, Row)
    results.write_rows(path, "one machine", rows)
    right = path.read_text()
    for text in ("", "# one\n", "# one\na,b\n1,2\n", right + "1,2\n", right.replace("64,", "x,", 1)):
        path.write_text(text)
        with pytest.raises(FluteError, match="not a file of flute bench"):
            results.read_rows(path, Row)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FluteError, match="choose another --output"):
        results.output_file(tmp_path / "file" / "below", "kernel")


def test_plot_of_kernels(rows: list[Row], tmp_path: Path) -> None:
    path = plot.kernels(rows, tmp_path / "kernel.png", "made up")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bench_plot_draws_what_was_written(rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_rows(tmp_path / "one.csv", "one machine", rows)
    code, out, _ = flute("bench", "plot", tmp_path / "one.csv", capsys=capsys)
    assert code == 0 and out == f"written: {tmp_path / 'one.csv'}, {tmp_path / 'one.png'}\n"
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_roofline() -> None:
    """A read floor of 2 us and arithmetic of 8 flop a microsecond: memory decides at M=1, arithmetic at M=64."""

    def row(m: int, method: str, us: float, floor: float) -> Row:
        return Row(1, 4, "float16", m, method, 4 if method == "flute" else 16, 64, us, None, floor, None, None, "")

    made = [
        row(1, "dense", 8.0, 7.0),
        row(1, "flute", 4.0, 2.0),
        row(64, "dense", 64.0, 7.0),
        row(64, "flute", 80.0, 2.0),
    ]
    assert plot.fastest_dense(made) == 2 * 64 * 4 / 64
    assert plot.roofline(made, 4, plot.fastest_dense(made)) == {1: 4.0, 64: 1.0}


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_kernel_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = flute(
        "bench", "kernel", "--shapes", "512x256", "-m", "1,96", "--dtypes", "fp16,bf16", "--peers", "tinygemm",
        "-o", tmp_path / "k.csv", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    origin, rows = results.read_rows(tmp_path / "k.csv", Row)
    assert "read ceiling" in origin and len(rows) == 2 * 2 * 4 + 2
    for row in rows:
        assert row.note == "" and row.us > 0 and row.error <= peers.BOUNDS[row.bits]
        assert row.read_share == pytest.approx(row.floor_us / row.us, rel=1e-2)
