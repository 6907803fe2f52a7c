"""A checkpoint's README.md: true to the checkpoint, readable by the hub's own library, and it runs as it says."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import load, saved

from flute import FluteConfig
from flute.cli import main
from flute.errors import CheckpointError
from flute.integrations import card, described, folders
from flute.integrations.folders import embedded

QUALITY = {"text": "wiki", "perplexity": 12.34567, "windows": 3, "seq_len": 128, "dtype": "float32"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = FluteConfig(bits=4, group_size=24, overrides={"*.down_proj": {"bits": 3}})
    load(saved(tmp_path / "dense"), quantization_config=config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_card_says_what_the_checkpoint_holds(checkpoint: Path) -> None:
    path = card.write(described.of_folder(checkpoint), base="someone/dense", quality=[QUALITY])
    found = ModelCard.load(path)
    assert found.data.base_model == "someone/dense"
    assert found.data.tags == ["flute", "4-bit", "quantized"]
    assert found.data.pipeline_tag == "text-generation"
    report = folders.validate(checkpoint)
    assert f"{report.bits_per_weight:.3f} bits per quantized weight" in found.text
    assert "| 12 | 4 | 24 | nf4 | 1 | none |" in found.text and "| 2 | 3 | 24 | nf3 | 1 | none |" in found.text
    assert "| wiki | 12.3457 | 3 x 128 | float32 |" in found.text
    path.write_text(path.read_text().replace("tags:", "license: mit\ntags:"))  # metadata are not the text
    card.write(described.of_folder(checkpoint))  # its own card is replaced
    again = ModelCard.load(path)
    assert "## Quality" not in again.text
    assert (again.data.base_model, again.data.license) == ("someone/dense", "mit")  # stays known


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    readme = checkpoint / "README.md"
    for mine in ("mine", readme.read_text() + "\nand a word of mine\n"):
        readme.write_text(mine)
        with pytest.raises(CheckpointError, match="not written by flute, or edited since"):
            card.write(described.of_folder(checkpoint))
        assert readme.read_text() == mine
    readme.write_text("mine")
    with pytest.raises(CheckpointError, match="not what flute eval --json prints"):
        card.write(described.of_folder(checkpoint), quality=[{"perplexity": "good"}], force=True)
    assert (checkpoint / "README.md").read_text() == "mine"
    card.write(described.of_folder(checkpoint), force=True, base=str(tmp_path / "dense"))  # a path is nobody's business
    assert str(tmp_path) not in (checkpoint / "README.md").read_text()


def test_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From quantize and eval to a card, whose Python is then run as it stands."""

    def flute(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([*words])
        out, error = capsys.readouterr()
        assert not end.value.code, error
        return out

    monkeypatch.chdir(tmp_path)
    flute("quantize", "tiny", "-o", "small", "--quiet")
    assert (tmp_path / "small" / "README.md").exists()
    heldout = str(embedded() / "heldout.txt")
    measured = flute("eval", "small", "--text", heldout, "--windows", "1", "--seq-len", "64", "--json", "--quiet")
    (tmp_path / "heldout.json").write_text(measured)
    flute("card", "small", "--quality", "heldout.json", "--base", "someone/tiny")
    text = (tmp_path / "small" / "README.md").read_text()
    assert f"| heldout | {json.loads(measured)['perplexity']:.4f} | 1 x 64 |" in text
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert script
    exec(script[1], {})
    assert capsys.readouterr().out.startswith("The lookup table")
