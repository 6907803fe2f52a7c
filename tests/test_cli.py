"""The command line: what it prints, where, and with which exit code."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flute import __version__
from flute.cli import main
from flute.commands import demo
from flute.commands.quantize import layer_spec, parse_override, read_table
from flute.errors import FluteError, SpecError
from flute.integrations import folders

WORDS = tuple(
    "the city of a river is large and its people are many so that it has some old bridges".split()  # noqa: SIM905
)


def flute(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with BOS 1 and EOS 2."""
    vocabulary = {word: 3 + index for index, word in enumerate(WORDS)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "dense"
    build("Llama", torch.float16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(dense: Path) -> Path:
    out = dense.parent / "quantized"
    with pytest.raises(SystemExit) as end:
        main(["quantize", str(dense), "-o", str(out), "--quiet", "--threads", "2"])
    assert not end.value.code
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 10), encoding="utf-8")
    return path


def test_help_and_version_are_light() -> None:
    code = (
        "import sys\nfrom flute.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (
        ["--version"],
        ["--help"],
        ["quantize", "--help"],
        ["demo", "--help"],
        ["bench", "model", "--help"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"
        assert done.stdout.startswith(f"flute {__version__}") or "Usage:" in done.stdout


def test_python_m_flute() -> None:
    done = subprocess.run([sys.executable, "-m", "flute", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"flute {__version__}\n" and done.stderr == ""


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect", "tune", "doctor", "demo"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute(command, "--help", capsys=capsys)
    assert code == 0 and "Usage:" in out and "--json" in out and err == ""


def test_quantize_json(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--bits",
        "3",
        "--group-size",
        "24",
        "--skip",
        "*.o_proj",
        "--override",
        "*.down_proj=bits:4,group_size:60",
    ]
    code, out, err = flute("quantize", dense, "-o", tmp_path / "out", *options, "--json", capsys=capsys)
    figures = json.loads(out)
    assert code == 0 and err == ""
    report = folders.validate(tmp_path / "out")
    assert figures["layers"] == len(report.layers) == 12
    assert figures["bytes"] == report.nbytes and figures["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    specs = {str(layer.spec) for layer in report.layers}
    assert specs == {"nf3 3bit g24", "nf4 4bit g60"}


def test_quantize_says_what_it_did(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute("quantize", dense, "-o", tmp_path / "out", "--scale", "mse", capsys=capsys)
    assert code == 0 and "14 layers" in out and len(out.splitlines()) == 1
    assert err == ""  # no bar where stderr is no terminal


@pytest.mark.parametrize(
    ("method", "table"), [("awq+gptq", "nf3"), ("best", "customx2"), ("nfl", "nf3"), ("best+nfl", "customx2")]
)
def test_a_calibrated_method(
    method: str, table: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", method, "--bits", "3", "--calibration", text, "--samples", "4", "--window", "16", "--json"]
    codes, bytes_written = [], []
    for name in ("one", "two"):
        code, out, err = flute("quantize", dense, "-o", tmp_path / name, *options, capsys=capsys)
        codes.append((code, err))
        bytes_written.append((tmp_path / name / "model.safetensors").read_bytes())
    figures = json.loads(out)
    assert codes == [(0, "")] * 2 and bytes_written[0] == bytes_written[1]
    assert [layer["spec"] for layer in figures["method_layers"]] == [f"{table} 3bit g64"] * 14
    if method.endswith("nfl"):
        assert figures["learned"]["after"] <= figures["learned"]["before"] and figures["learned"]["steps"] > 0
    else:
        assert all(0 < layer["error"] < 1 for layer in figures["method_layers"])
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert folders.validate(tmp_path / "one").bits_per_weight > 3
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "--calibration FILE"),
        (["--method", "gptq", "--calibration", "TEXT", "--window", "500"], "has 190 tokens, a window 500"),
        (["--method", "gptq", "--calibration", "EMPTY"], "empty"),
        (["--method", "rtn", "--calibration", "TEXT"], "not used by --method rtn"),
        (["--method", "gptq", "--calibration", "TEXT", "--scale", "mse"], "--scale mse is for --method rtn"),
        (["--method", "nice"], "use rtn, gptq"),
        (["--method", "nfl", "--calibration", "TEXT", "--lr", "0"], "lr=0.0"),
    ],
)
def test_calibration_that_cannot_serve_is_one_line(
    options: list[str], message: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    files = {"TEXT": str(text), "EMPTY": str(tmp_path / "empty.txt")}
    given = [files.get(option, option) for option in options]
    code, out, err = flute("quantize", dense, "-o", tmp_path / "out", *given, capsys=capsys)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_inspect_a_hub_id(quantized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *_: object, **__: object) -> Path:
        asked.append(name)
        return quantized

    monkeypatch.setattr(folders, "_download", download)
    code, out, err = flute("inspect", "someone/quantized", capsys=capsys)
    assert (code, err, asked) == (0, "", ["someone/quantized"]) and "quantized layers" in out


def test_inspect(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flute("inspect", quantized, capsys=capsys)
    assert code == 0
    assert "model.layers.0.mlp.down_proj" in out and "72 x 120" in out and "nf4 4bit g64" in out
    assert "14 quantized layers" in out
    code, out, _ = flute("inspect", quantized, "--json", capsys=capsys)
    figures = json.loads(out)
    assert len(figures["layers"]) == 14 and figures["quantization_config"]["table"] == "nf4"
    assert figures["bytes"] == figures["dense_bytes"] + sum(layer["bytes"] for layer in figures["layers"])


@pytest.mark.parametrize("which", ["dense", "quantized"])
def test_eval(which: str, text: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    code, out, err = flute("eval", model, "--text", text, "--seq-len", 32, "--json", "--quiet", capsys=capsys)
    figures = json.loads(out)
    assert code == 0 and err == ""
    assert figures["tokens"] == 31 * (len(WORDS) * 10 // 32) and figures["seconds"] > 0
    assert math.isfinite(figures["perplexity"]) and figures["perplexity"] > 1
    assert figures["bos"] == "none" and figures["dtype"] == "float32"


def test_eval_says_that_windows_are_shorter(quantized: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = flute("eval", quantized, "--text", text, capsys=capsys)
    assert code == 0 and "windows of 64" in err and "windows of 64" in out and "no BOS" in out


def test_generate(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", quantized, "--prompt", "the city", "--max-new-tokens", 5)
    code, out, err = flute(*arguments, capsys=capsys)
    assert code == 0 and out.startswith("the city") and "tokens/s" in err
    code, out, err = flute(*arguments, "--json", capsys=capsys)
    figures = json.loads(out)
    assert err == "" and 1 <= figures["tokens"] <= 5 and figures["tokens_per_second"] > 0


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flute("doctor", "--json", capsys=capsys)
    facts = json.loads(out)
    assert code == 0 and facts["flute"] == __version__ and facts["self-test cpu"].startswith("exact")
    assert {"gpu", "driver", "nvrtc", "kernel cache", "C kernel", "torch"} <= facts.keys()
    code, out, _ = flute("doctor", capsys=capsys)
    assert code == 0 and "self-test cpu" in out


def test_demo(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense / "heldout.txt").write_text(text.read_text())
    monkeypatch.setattr(folders, "embedded", lambda: dense)
    monkeypatch.setattr(demo, "_WINDOW", 32)
    monkeypatch.setattr(demo, "_NEW_TOKENS", 8)
    for tables in (("nf4",), ("nf4", "nf3", "int4")):  # a second time over the first one's results
        monkeypatch.setattr(demo, "TABLES", tables)
        code, out, _ = flute("demo", "--output", tmp_path / "demo", "--quiet", capsys=capsys)
        assert code == 0
    assert all(name in out for name in ("fp16", "nf4", "nf3", "int4", "perplexity", "tokens/s"))
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [row["model"] for row in rows] == ["fp16", "nf4", "nf3", "int4"]
    with open(tmp_path / "demo" / "results.csv", newline="") as file:
        assert [float(row["perplexity"]) for row in csv.DictReader(file)] == [row["perplexity"] for row in rows]
    assert (tmp_path / "demo" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert rows[1]["bits_per_weight"] < 16 and rows[1]["megabytes"] < rows[0]["megabytes"]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "table", "expected"),
    [
        (None, None, "nf4 4bit g64"),
        (3, None, "nf3 3bit g64"),
        (None, "int2", "int2 2bit g64"),
        (4, "fp4", "fp4 4bit g64"),
    ],
)
def test_bits_follow_the_table(bits: int | None, table: str | None, expected: str) -> None:
    assert str(layer_spec(bits, 64, table, "rtn")[1]) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([0.5 * i for i in range(8)], "custom 3bit g64"), ([[i, -i] for i in range(16)], "customx2 2bit g64")],
)
def test_table_from_a_file(numbers: list[Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(numbers))
    table, spec = layer_spec(None, 64, str(path), "rtn")
    assert str(spec) == expected and table is not None and table.tolist() == numbers


@pytest.mark.parametrize("text", ["{}", "[]", "[1, [2, 3]]", "[[1,2,3]]", '["a"]', "[true]", "[1,", "[[]]", "[" * 9999])
def test_bad_table_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(SpecError, match=r"table\.json"):
        read_table(tmp_path / "table.json")


def test_override_syntax() -> None:
    assert parse_override("re:a=b=bits:3,table:int3") == ("re:a=b", {"bits": 3, "table": "int3"})
    for text in ("bits:3", "*.a=bits", "=bits:3", "*.a="):
        with pytest.raises(SpecError, match="PATTERN=field:value"):
            parse_override(text)


# ---- where a model comes from ----------------------------------------------------------------------------------------


def test_find(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.find(str(dense)) == (dense, None)
    assert folders.find("tiny").folder.name == "tiny"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert folders.find(str(tmp_path)) == folders.find(str(tmp_path / "a.gguf")) == (tmp_path, "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(dense)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folders.find("somebody/model").folder == dense
    assert asked["name"] == "somebody/model" and not any("bin" in p or ".py" in p for p in asked["allow_patterns"])


@pytest.mark.parametrize("model", ["no_such_folder", "/no/such/folder", "a/b/c", "../no_such_folder", "a b/c"])
def test_find_refuses(model: str) -> None:
    with pytest.raises(FluteError, match="does not exist"):
        folders.find(model)


def test_hub_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise RuntimeError("no\nroute\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    code, _, err = flute("quantize", "some/model", "-o", "/nowhere/x", capsys=capsys)
    assert code == 1 and len(err.splitlines()) == 1 and "no route to host" in err


def test_typed_wrong(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    for arguments in (["quantize", "x"], ["nonsense"], ["eval", "x", "--text", text, "--seq-len", "one"], ["--bad"]):
        code, out, err = flute(*arguments, capsys=capsys)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("flute: error: ")
