"""Full disks, limits, killed runs and outputs that are in the way: one line of error, and nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import digests, interrupted, make
from test_faults import LAYER, SINGLE, copied, edit, refused

from flute.checkpoint import atomic
from flute.cli import main
from flute.errors import CheckpointError, QuantizeError

ROOT = Path(__file__).resolve().parent.parent


class FullDisk:
    """A file on which only so many bytes find room, over all files together."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        self.left[0] -= len(data)
        if self.left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *reason: object) -> None:
        self.file.close()


def test_disk_full_at_any_time(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(sharded, tmp_path / "whole")
    total = sum(path.stat().st_size for path in whole.iterdir())
    plain = open
    for part in range(12):
        left = [total * part // 12]
        monkeypatch.setattr(atomic, "open", lambda *a, left=left: FullDisk(plain(*a), left), raising=False)
        with pytest.raises(CheckpointError, match="cannot be written: No space left") as refusal:
            make(sharded, tmp_path / "out")
        assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        if part < 11:
            shutil.rmtree(tmp_path / "out.partial")
    monkeypatch.undo()
    make(sharded, tmp_path / "out")  # goes on where the disk was full
    assert digests(tmp_path / "out") == digests(whole)


def test_too_little_room_is_noticed_before(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="GB free"):
        make(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_file_size_limit(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = refused("quantize", dense, "-o", tmp_path / "out", capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert SINGLE in line and "File too large" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_kill_in_the_middle(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = (
        "import time\nfrom flute.checkpoint import streaming\nplain = streaming._write_layer\n"
        "def late(*a): time.sleep(0.15); plain(*a)\nstreaming._write_layer = late\n"
        "import sys\nfrom flute.cli import main\nmain(sys.argv[1:])"
    )
    arguments = ["quantize", str(sharded), "-o", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    work = tmp_path / "out.partial" / "folder"
    until = time.monotonic() + 120
    while len(list(work.glob("*.safetensors"))) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert len(list(work.glob("*.safetensors"))) >= 3
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert not end.value.code and figures["resumed"]
    whole = tmp_path / "whole"
    with pytest.raises(SystemExit):
        main(["quantize", str(sharded), "-o", str(whole)])
    (tmp_path / "out" / "README.md").unlink(), (whole / "README.md").unlink()  # they name their folders
    assert digests(tmp_path / "out") == digests(whole) and not (tmp_path / "out.partial").exists()


def test_failure_leaves_the_old_checkpoint(dense: Path, tmp_path: Path) -> None:
    out = make(dense, tmp_path / "out")
    before = digests(out)
    bad = copied(dense, tmp_path)
    edit(bad, lambda tensors: tensors[f"{LAYER}.weight"].fill_(float("nan")))
    with pytest.raises(QuantizeError):
        make(bad, out, force=True)
    assert digests(out) == before


def test_leftovers_do_not_hide_an_error(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(dense, tmp_path / "out", 2)
    line = refused("quantize", dense, "-o", tmp_path / "out", "--bits", 3, capsys=capsys)
    assert "out.partial" in line and "--force" in line


def test_output_below_a_file(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "file" in refused("quantize", dense, "-o", tmp_path / "file" / "out", capsys=capsys)


def test_output_exists(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(make(dense, tmp_path / "out"))
    assert "exists" in refused("quantize", dense, "-o", tmp_path / "out", capsys=capsys)
    assert digests(tmp_path / "out") == before
