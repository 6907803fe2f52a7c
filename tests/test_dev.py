"""dev.py is the first thing a newcomer runs: it explains itself, installs once, and sees a wheel that lacks a file."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dev() -> ModuleType:
    description = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert description and description.loader
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--help"]])
def test_it_explains_itself(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, ROOT / "dev.py", *arguments], capture_output=True, text=True)
    assert "python3 dev.py demo" in done.stdout + done.stderr
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_it_installs_once_and_again_when_pins_change(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev, "PYTHON", tmp_path / ".venv" / "python")
    monkeypatch.setattr(dev, "STAMP", tmp_path / ".venv" / "stamp")
    monkeypatch.setattr(dev, "pip", lambda *arguments: installed.append(arguments))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "python").touch()
    (tmp_path / "constraints.txt").write_text("torch==1\n")

    def extras(level: str) -> list[str]:
        installed.clear()
        dev.setup(level)
        return [word for arguments in installed for word in arguments if word.startswith(".[")]

    assert extras("test") == [".[test]"]
    assert extras("test") == []
    assert extras("demo") == []  # test holds all that demo needs
    assert extras("dev") == [".[dev]"]
    assert extras("test") == []
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    assert extras("demo") == [".[plot]"]


def test_a_failed_install_is_tried_again(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    (tmp_path / "constraints.txt").write_text("this is no constraint ==\n")
    with pytest.raises(SystemExit, match="pip failed"):
        dev.setup("test")
    assert not (tmp_path / "stamp").exists()


def test_a_wheel_that_lacks_a_file_is_refused(dev: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "flute_engine-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flute_engine-0.dist-info/entry_points.txt", "flute = flute.cli:main\n")
        archive.writestr("flute/kernels/_cpu.so", "")
        archive.writestr("tests/test_dev.py", "")
    with pytest.raises(SystemExit) as refusal:
        dev.verify(path)
    for words in ("missing: flute/__init__.py", "not ours: tests", "no entry point: flute._autoload", "compiled code"):
        assert words in str(refusal.value)
