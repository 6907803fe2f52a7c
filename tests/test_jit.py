"""The cubin cache: damage, stale entries, missing disks and competing processes never give a wrong kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import needs_nvrtc

from flute.errors import CompileError, FluteError
from flute.kernels import jit

KERNEL = 'extern "C" __global__ void one(int* out) { out[threadIdx.x] = 1; }'

pytestmark = needs_nvrtc


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Architectures that were really compiled for, in order."""
    calls: list[str] = []
    original = jit.compile_cubin

    def counting(text: str, arch: str, **options: object) -> bytes:
        calls.append(arch)
        return original(text, arch, **options)

    monkeypatch.setattr(jit, "compile_cubin", counting)
    return calls


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.cubin")
    return path


def test_compiled_once_and_read_back(folder: Path, compiled: list[str]) -> None:
    first = jit.cubin(KERNEL, "sm_90")
    assert first[:4] == b"\x7fELF" and jit.cubin(KERNEL, "sm_90") == first
    assert compiled == ["sm_90"]
    assert entry(folder).stat().st_mode & 0o022 == 0


def test_damage_is_a_miss(folder: Path, compiled: list[str]) -> None:
    right = jit.cubin(KERNEL, "sm_90")
    path = entry(folder)
    stored = path.read_bytes()
    flipped = bytearray(stored)
    flipped[len(stored) // 2] ^= 1
    damaged = [b"", stored[:31], stored[:32], stored[:-1], bytes(flipped), stored + b"\0", b"\0" * len(stored)]
    for content in damaged:
        path.write_bytes(content)
        assert jit.cubin(KERNEL, "sm_90") == right
        assert path.read_bytes() == stored
    assert len(compiled) == 1 + len(damaged)


def test_whatever_changes_the_kernel_changes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {jit._key(KERNEL, "sm_90"), jit._key(KERNEL + " ", "sm_90"), jit._key(KERNEL, "sm_90a")}
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "99.9")
    names.add(jit._key(KERNEL, "sm_90"))
    monkeypatch.setattr(jit.layout, "LAYOUT_VERSION", -1)
    names.add(jit._key(KERNEL, "sm_90"))
    monkeypatch.setattr(jit, "_OPTIONS", ("std=c++20",))
    names.add(jit._key(KERNEL, "sm_90"))
    assert len(names) == 6


def test_the_text_of_a_kernel_holds_everything_it_is_made_of() -> None:
    text = jit.source("decode.cu", {"BITS": 3, "BF16": 1})
    assert "#define BITS 3" in text and "lookup_offset" in text and "lut_decode" in text and "fill_table" in text


def test_without_a_usable_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "file"))
    assert jit.cubin(KERNEL, "sm_90")[:4] == b"\x7fELF"
    monkeypatch.setenv("FLUTE_CACHE_DIR", str(tmp_path / "full"))

    def full(path: Path, cubin: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit, "_write", full)
    assert jit.cubin(KERNEL, "sm_90")[:4] == b"\x7fELF"
    assert not list((tmp_path / "full").rglob("*.cubin"))


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)

    def refuse(source: str, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(jit.os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        jit._write(folder / "x.cubin", b"cubin")
    assert list(folder.iterdir()) == []


FOUR = f"""
import os
from flute.kernels import jit
original = jit.compile_cubin
def loud(*a, **k):
    os.write(1, b"compiled ")
    return original(*a, **k)
jit.compile_cubin = loud
os.fork(), os.fork()  # one process becomes four
jit.cubin({KERNEL!r}, "sm_90")
failed = 0
try:
    while True:
        failed |= os.wait()[1]
except ChildProcessError:  # all of its own have ended
    os._exit(bool(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_many_processes_compile_once(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FOUR], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "compiled "), done.stderr


def test_no_nvrtc_is_one_readable_line() -> None:
    script = (
        "import sys\n"
        "sys.modules['cuda'] = None\n"
        "from flute.kernels import jit\n"
        "from flute.errors import CompileError\n"
        "try:\n    jit.nvrtc_version()\n"
        "except CompileError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1 and "pip install 'flute-engine[cuda]'" in said
    assert issubclass(CompileError, FluteError)
