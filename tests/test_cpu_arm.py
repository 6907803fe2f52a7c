"""The NEON code without an ARM machine: cross-compiled and emulated, if the tools for that are here."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from test_cpu_kernel import FLOATS, FORMATS, SHAPES, Problem, tokens

from flute.kernels import cpu

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no compiler or no emulator for aarch64")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm") / "cpu_case"
    source, include = Path(__file__).with_name("cpu_case.c"), Path(cpu.__file__).parent
    command = [COMPILER, "-O3", "-static", "-pthread", f"-I{include}", "-o", path, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


def emulate(program: Path, problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) and W (N, K), from two threads."""
    (m, k), n, o = x.shape, problem.weight.shape[0], problem.options
    numbers = (m, n, k, o["group_size"], o["bits"], o["vector_size"], cpu._DTYPES[x.dtype])
    sent = struct.pack("<7q", *numbers)
    for tensor in (x, problem.weight, problem.scales, problem.table):
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        sent += struct.pack("<q", len(data)) + data
    sent += struct.pack("<q", 0)  # no bias
    done = subprocess.run([str(EMULATOR), str(program), "1", "2"], input=sent, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    out = torch.frombuffer(bytearray(done.stdout), dtype=x.dtype)
    return out[: m * n].view(m, n), out[m * n :].view(n, k)


@pytest.mark.parametrize(("bits", "vector"), FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_neon_is_exact_where_arithmetic_is(bits: int, vector: int, dtype: torch.dtype, program: Path) -> None:
    for n, k, group in SHAPES[1:8:2]:
        problem = Problem(n, k, group, bits, vector, dtype, exact=True)
        for m in (1, 9):
            x = tokens(m, k, dtype, integers=True)
            y, dense = emulate(program, problem, x)
            wanted = (x.long() @ (problem.dense * 8).long().T).double() / 8
            assert torch.equal(y, wanted.to(dtype))
            assert torch.equal(dense, problem.rounded)
