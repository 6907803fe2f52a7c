"""The command line tells a mistake in one line that says what to do, before hours are spent."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import flute

from flute.checkpoint.atomic import Workplace
from flute.commands import flat_published
from flute.errors import CheckpointError
from flute.integrations import base, folders

QUALITY = {"perplexity": 12.3, "windows": 3, "seq_len": 128, "dtype": "float32"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("return self " * 100)
    return path


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_an_output_below_a_file(command: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = flute(command, "tiny", "-o", text / "out", capsys=capsys)
    assert code == 1 and f"{text} cannot be made" in error and "choose another -o" in error


def test_a_folder_that_is_not_there_is_told_before_measuring(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "load", None)  # not reached
    code, out, error = flute("eval", "tiny", "--text", text, "-o", tmp_path / "none" / "out.json", capsys=capsys)
    assert code == 1 and not out and "none is no folder" in error


def test_a_missing_gpu_is_not_an_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, error = flute("bench", "kernel", "--shapes", "64x64", capsys=capsys)
    assert code == 1 and "measures on a GPU" in error and "--device" not in error


def test_flatquant_names_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = flute("flatquant", "tiny", "-o", tmp_path / "out", capsys=capsys)
    assert code == 1 and "--calibration FILE" in error and "--matrices FILE" in error


def test_what_a_card_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flute("quantize", "tiny", "-o", tmp_path / "small", "--quiet", capsys=capsys)
    code, _, error = flute("card", tmp_path / "small", "--quality", tmp_path / "none.json", capsys=capsys)
    assert code == 1 and "none.json cannot be read" in error and "folder" not in error
    code, _, error = flute("card", tmp_path / "small", "--base", "not an id", capsys=capsys)
    assert code == 1 and "--base 'not an id' is no hub id" in error
    (tmp_path / "wiki.json").write_text(json.dumps(QUALITY))
    code, out, _ = flute(
        "card", tmp_path / "small", "--quality", tmp_path / "wiki.json", "--base", "one/dense", capsys=capsys
    )
    assert code == 0 and "| wiki | 12.3000 |" in Path(out.strip()).read_text()


def test_a_disk_that_fills_while_safetensors_writes(tmp_path: Path) -> None:
    """Its library has an error of its own for that, which is no OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(CheckpointError, match=r"cannot be written: .*make room"),
            Workplace(tmp_path / "out", {}) as work,
            work.filled(),
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            save_file({"weight": torch.zeros(10_000)}, work.folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "find", interrupted)
    code, out, error = flute("generate", "tiny", "--prompt", "x", capsys=capsys)
    assert (code, out, error) == (130, "", "flute: error: interrupted\n")


def test_interrupts_of_the_other_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "quantize_hf_model", interrupted)
    words = {"pretrained_model_name_or_path": "tiny", "save_directory": tmp_path, "num_bits": 4, "group_size": 64}
    with pytest.raises(SystemExit) as end:
        base.main([part for key, value in words.items() for part in (f"--{key}", str(value))])
    assert end.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"
    monkeypatch.setattr(flat_published, "_run", interrupted)
    assert flat_published.main(["--model", "tiny"]) == 130
    assert capsys.readouterr().err == "flute: error: interrupted\n"
