"""The environment is read in one place, and the cache directory is private or refused."""

import os
from pathlib import Path

import pytest

from flute import settings
from flute.errors import FluteError


def test_cache_dir_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "a" / "b"))
    path = settings.cache_dir()
    assert path == tmp_path / "a" / "b"
    assert path.stat().st_mode & 0o777 == 0o700
    assert settings.cache_dir() == path


def test_cache_dir_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUTE_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.cache_dir() == tmp_path / "xdg" / "flute"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert settings.cache_dir() == tmp_path / ".cache" / "flute"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_cache_dir_that_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    tmp_path.chmod(mode)
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path))
    with pytest.raises(FluteError, match="chmod go-w"):
        settings.cache_dir()


def test_cache_dir_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(FluteError, match="belongs to user"):
        settings.cache_dir()


def test_link_is_judged_by_what_it_points_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "link").symlink_to(shared)
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "link"))
    with pytest.raises(FluteError, match="others may write"):
        settings.cache_dir()


def test_unusable_cache_dir_is_one_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("FLUTE_CACHE_DIR", str(bad))
        with pytest.raises(FluteError, match="set FLUTE_CACHE_DIR") as refusal:
            settings.cache_dir()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("", True), ("0", True), ("1", False), ("yes", False)])
def test_autoregister_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("FLUTE_NO_AUTOREGISTER", raising=False)
    if value is not None:
        monkeypatch.setenv("FLUTE_NO_AUTOREGISTER", value)
    assert settings.autoregister() is expected


def test_cuda_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert settings.cuda_home() is None
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda-13")
    assert settings.cuda_home() == Path("/opt/cuda-13")
