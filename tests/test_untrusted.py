"""Files of a model folder are untrusted: nothing in them runs, and no name in them leads out of the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import digests, make
from test_faults import SINGLE, copied, nothing_left, refused

from flute.checkpoint.files import MAX_JSON_BYTES, inside, read_json
from flute.checkpoint.shards import INDEX
from flute.errors import CheckpointError


def test_pickles_are_not_read(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(dense, tmp_path)
    (source / SINGLE).unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    line = refused("quantize", source, "-o", tmp_path / "out", capsys=capsys)
    assert "pytorch_model.bin" in line and "safetensors" in line
    assert not (tmp_path / "ran").exists() and nothing_left(tmp_path)


def test_remote_code_never_runs(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(dense, tmp_path)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (source / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    made = json.loads((make(source, tmp_path / "made") / "config.json").read_text())
    assert "auto_map" not in made and "trust_remote_code" not in made
    (source / "config.json").write_text(json.dumps({**config, "model_type": "evil", "trust_remote_code": True}))
    assert "config.json" in refused("quantize", source, "-o", tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "not valid JSON"), ("[]", "a JSON object"), ('{"a": 1, "a": 2}', "twice"), ('{"a": NaN}', "NaN"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested"), ("[" * 100_000, "nested"), ('{"a": "\xff"}', "not valid JSON"),
    ],
)  # fmt: skip
def test_bad_json(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rule) as refusal:
        read_json(tmp_path / "config.json")
    assert "config.json" in str(refusal.value)


def test_large_json_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "", "x\0y", "n" * 300, 7, None]
)
def test_path_tricks_in_the_index(name: Any, sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only bare names inside the folder"):
        inside(tmp_path, name)
    source = copied(sharded, tmp_path)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only bare names inside the folder"):
        make(source, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_links_out_of_the_folder(dense: Path, tmp_path: Path) -> None:
    source = copied(dense, tmp_path)
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to(dense / SINGLE)
    with pytest.raises(CheckpointError, match="outside the folder"):
        make(source, tmp_path / "out")


def test_links_of_the_hub_cache_are_followed(dense: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(dense, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert digests(make(snapshot, tmp_path / "out")) == digests(make(dense, tmp_path / "again"))
