"""Machine code of the main kernels on Hopper: what the budget in docs/kernel-log.md counts on is really there.

CI has no GPU. These counts change when the compiler unrolls less, makes asynchronous steps wait, or uses local memory.
"""

import re
import shutil
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from compiler import needs_nvrtc
from gpus import GPUS

from flute.kernels import jit, mma, plan, tiles, walsh


def disassembler() -> str | None:
    """NVIDIA's own, from the PATH or from the wheel nvidia-cuda-nvdisasm."""
    try:
        listed = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        listed = []
    found = [Path(str(file.locate())) for file in listed if file.name == "nvdisasm"]
    return str(found[0]) if found else shutil.which("nvdisasm")


TOOL = disassembler()
pytestmark = [needs_nvrtc, pytest.mark.skipif(TOOL is None, reason="no nvdisasm; pip install nvidia-cuda-nvdisasm")]


def listing(tmp_path: Path, file: str, macros: dict[str, int], arch: str, kernel: str) -> list[str]:
    """The instructions of ``kernel`` in order, with their modifiers; without the dead ``LDS RZ``.

    ptxas puts some of those in front of every LDGSTS; they load nothing.
    """
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(jit.compile_cubin(jit.source(file, macros), arch))
    text = subprocess.run([str(TOOL), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"(?m)^.*\bLDS RZ,.*$", "", text)
    section = text.split(f".text.{kernel}:")[1].split(".section")[0]
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", section, re.MULTILINE)


def instructions(tmp_path: Path, file: str, macros: dict[str, int], arch: str, kernel: str) -> Counter[str]:
    """How often each of `listing` stands there."""
    return Counter(listing(tmp_path, file, macros, arch, kernel))


def count(found: Counter[str], pattern: str) -> int:
    return sum(times for name, times in found.items() if re.match(pattern, name))


SHAPES = [(16, 4, False), (64, 4, False), (128, 2, False), (256, 2, False), (128, 3, True), (192, 2, True),
          (256, 2, True)]  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "tokens", "rows", "cut"),
    [
        pytest.param(bits, *shape, marks=[pytest.mark.sweep] * (bits < 4 and number % 2 == 1))
        for bits in (4, 3, 2)
        for number, shape in enumerate(SHAPES)
    ],
)
def test_matmul(tmp_path: Path, bits: int, tokens: int, rows: int, cut: bool) -> None:
    """All shapes at 4 bits, every other one at 3 and 2: what a width changes is the decoding, which shapes share."""
    made = tiles.tiling(GPUS["H100"], tokens, 28672, 4096, bits, 64, tokens, rows, 1, 1, 1, True, cut=cut)
    assert made is not None
    names = listing(tmp_path, "matmul.cu", dict(made.macros(bits, False)), "sm_90a", "lut_matmul")
    found, steps = Counter(names), [at for at, name in enumerate(names) if name.startswith("HGMMA")]
    # slots of the ring are known to be uniform: none is moved to a uniform register between tensor-core steps
    assert "R2UR" not in names[steps[0] : steps[-1]]
    assert count(found, "HGMMA") == 8  # the steps of a chunk, once: unrolled, and no second copy for the end
    assert count(found, "WARPGROUP.DEPBAR") == 5  # one wait per two steps and one at the end: none behind every step
    # lookups: one a pair of weights, or two pairs at 2 bits; a word of scales per group; at 3 bits some codes
    assert count(found, r"LDS(\.64)?$") == {4: 32 + 2, 3: 32 + 2 + 1, 2: 16 + 2}[bits]
    assert count(found, "HMUL2") == 32
    assert count(found, "LDGSTS") > 0 and count(found, "UTMALDG") == 1
    assert (count(found, "UBLKCP") > 0) == cut  # parts of tiles, by the copy engine
    assert count(found, "LDL|STL") == 0


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_decode(tmp_path: Path, bits: int) -> None:
    macros = dict(plan.decode_macros(bits, False, 64, 1, 1, 4, 1, True))
    found = instructions(tmp_path, "decode.cu", macros, "sm_90", "lut_decode")
    assert count(found, "HMMA.16816.F32") == 8
    assert count(found, "LDSM") == 4  # x: 32 k of eight tokens each
    assert count(found, "LDL|STL") == 0
    assert count(found, r"LDGSTS\.E\.BYPASS\.LTC256B\.128") > 0


def test_hadamard(tmp_path: Path) -> None:
    """4096 elements, 128 threads of 32: two exchanges of pairs, no shuffle, one addition for each bit and element."""
    cut = walsh.cut(4096)
    assert cut is not None and cut.threads == 128
    found = instructions(tmp_path, "hadamard.cu", dict(cut.macros("float16")), "sm_90", "hadamard")
    assert count(found, "LDG") == count(found, "STG") == 16
    assert count(found, "LDS.64") == count(found, "STS.64") == 32
    assert count(found, "FADD") == 12 * 32 and count(found, "SHFL|LDL|STL") == 0
    assert sum(found.values()) <= 26 * 32


def test_hadamard_in_a_warp(tmp_path: Path) -> None:
    """512 elements, 16 a lane: five of nine additions an element go through shuffles, nothing through shared memory."""
    cut = walsh.cut(512)
    assert cut is not None and cut.vectors == 2
    found = instructions(tmp_path, "hadamard.cu", dict(cut.macros("float16")), "sm_90", "hadamard")
    assert count(found, r"LDG\.E\.128") == count(found, r"STG\.E\.128") == 2
    assert count(found, "SHFL") == count(found, "FFMA") == 5 * 16 and count(found, "FADD") == 4 * 16
    assert count(found, "LDS|STS|BAR|LDL|STL") == 0


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [("A100", (2, 16, 8, 1), 4), ("A100", (2, 8, 8, 1), 3), ("RTX 3090", (2, 8, 8, 1), 2), ("B200", (1, 8, 8, 1), 4)],
)
def test_mma(tmp_path: Path, name: str, shape: tuple[int, int, int, int], bits: int) -> None:
    made = mma.tiling(GPUS[name], 4096, 4096, 4096, bits, 64, shape, 1)
    assert made is not None
    found = instructions(tmp_path, "mma.cu", dict(made.macros(bits, False)), GPUS[name].arch, "lut_mma")
    rows, tokens = shape[:2]
    assert count(found, "HMMA.16816.F32") == 8 * rows * tokens  # one chunk, unrolled, and no second copy of it
    assert count(found, "LDSM") == 8 * tokens // 2  # a fragment of x is loaded once for all row tiles
    # lookups, one a pair of weights or two pairs at 2 bits: a chunk's, and those of the very first step
    lookups = rows * 4 * (8 + 1) // (2 if bits == 2 else 1)
    found_lookups = count(found, r"LDS\.64$" if bits == 2 else r"LDS(\.U)?$")
    assert lookups <= found_lookups <= lookups + 4 * rows * 2  # and scales, codes
    assert count(found, "HMUL2") == rows * 4 * (8 + 1)
    assert count(found, "LDL|STL") == 0
