"""Every kernel variant compiles for every GPU generation, without a GPU, and spills no register."""

import re

import pytest
from compiler import needs_nvrtc

from flute.errors import CompileError
from flute.kernels import jit, plan

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")

pytestmark = needs_nvrtc


class Log:
    """Collects the compiler's report."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, part: str | bytes) -> None:
        self.text += part.decode() if isinstance(part, bytes) else part


def report(file: str, macros: dict[str, int], arch: str) -> str:
    log = Log()
    cubin = jit.compile_cubin(jit.source(file, macros), arch, log=log)
    assert cubin[:4] == b"\x7fELF"
    assert "Used" in log.text and "registers" in log.text, "the compiler said nothing: this test would prove nothing"
    return log.text


def complaints(text: str) -> list[str]:
    """Spills, stack frames and warnings in the compiler's report."""
    spilled = [line for line in re.findall(r"\d+ bytes stack frame.*", text) if set(re.findall(r"\d+", line)) != {"0"}]
    return spilled + re.findall(r".*warning.*", text)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_variant(arch: str, bits: int) -> None:
    found = [dict(variant) for variant in plan.variants() if dict(variant)["BITS"] == bits]
    assert len(found) == 28
    for macros in found:
        assert not complaints(report("decode.cu", macros, arch)), macros
    for bf16 in (0, 1):
        assert not complaints(report("dequantize.cu", {"BITS": bits, "BF16": bf16}, arch))


@pytest.mark.parametrize("stages", [3, 6, 8])
def test_ring_sizes(stages: int) -> None:
    """The ring's length is only a constant of the kernel: one architecture stands for all."""
    for macros in (dict(variant) for variant in plan.variants()):
        if macros["BF16"] == 0 and macros["GROUP_BLOCK"] == 64:
            assert not complaints(report("decode.cu", macros | {"STAGES": stages}, "sm_90")), macros


def test_a_spill_would_be_seen() -> None:
    """The check above can fail: a variant squeezed into too few registers complains."""
    macros = dict(plan.variants()[-1]) | {"MAX_THREADS": 1024}
    assert complaints(report("decode.cu", macros, "sm_90"))


def test_compile_errors_are_one_line() -> None:
    with pytest.raises(CompileError, match="does not compile for sm_90") as refusal:
        jit.compile_cubin('extern "C" __global__ void broken() { nonsense; }', "sm_90")
    assert "\n" not in str(refusal.value) and "nonsense" in str(refusal.value)
