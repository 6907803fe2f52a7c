"""The scripts in examples/ run as they stand, made small."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_models import load

from flute.integrations.folders import embedded

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *words: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:merging quantizes")
def test_qlora(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    words = ("--model", shallow, "--steps", 10, "--window", 48, "--text", embedded() / "README.md")
    words += ("--out", tmp_path / "merged")
    out = run("qlora.py", *words, monkeypatch=monkeypatch, capsys=capsys)
    first, last = map(float, re.findall(r"steps (\d+\.\d+)", out.replace("of the last", "steps")))
    assert last < first
    assert load(tmp_path / "merged").is_quantized


def test_learned_scales(shallow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", shallow, "--samples", 2, "--window", 32, "--windows", 1)
    out = run("learned_scales.py", *words, monkeypatch=monkeypatch, capsys=capsys)
    dense, rounded, learned = map(float, re.findall(r"perplexity (\d+\.\d+)", out))
    assert dense < min(rounded, learned)  # two steps teach nothing: what is tested is that the script runs
