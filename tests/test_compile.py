"""Kernels compile for every GPU generation, without a GPU, and spill no register.

Of the decode kernel are compiled always, in all widths:

* sm_90: all kinds and groups; both tables with the usual dtype and group, the wide one with the others.
* sm_80: the usual dtype and group; kinds that come near the limit of registers (`TIGHT`) in all of them.
* sm_86 and sm_89, which are given sm_80's registers: a sample.
* sm_120: likewise, the compact table with the others.

From Hopper on the dtype changes no register: there dtypes take turns.

With ``--sweep`` (by hand, before a release): every variant everywhere, and that the above still is so.
"""

import re
from typing import Any

import pytest
from compiler import needs_nvrtc
from gpus import GPUS

from flute.errors import CompileError
from flute.kernels import jit, mma, plan, tiles

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
    """Spills, stack frames, warnings, and wgmma that the compiler makes wait for each other, in its report."""
    spilled = [line for line in re.findall(r"\d+ bytes stack frame.*", text) if set(re.findall(r"\d+", line)) != {"0"}]
    return spilled + re.findall(r".*(?:warning|Potential Performance Loss).*", text)


def decode_variants(arch: str, bits: int) -> list[dict[str, int]]:
    """Those that can be planned there: two blocks to an SM on Hopper only."""
    found = [dict(variant) for variant in plan.variants()]
    found = [one for one in found if one["BITS"] == bits and (one["BLOCKS"] == 1 or arch == "sm_90")]
    if arch != "sm_120":
        return found
    return [one for one in found if (*kind_of(one), one["GROUP_BLOCK"]) not in plan._SPILLING_LATER]


def kind_of(macros: dict[str, int]) -> tuple[int, int, int]:
    return macros["TOKEN_TILES"], macros["ROW_TILES"], macros["BLOCKS"]


TIGHT = {(1, 2, 1), (2, 1, 1), (2, 2, 1)}  # kinds within eight registers of their limit before Hopper


def is_chosen(macros: dict[str, int], arch: str) -> bool:
    """Whether a variant is always compiled; where the group is not the usual one, with the table that must do there."""
    usual, wide = macros["BF16"] == 0 and macros["GROUP_BLOCK"] == 64, macros["WIDE_TABLE"] == 1
    if arch in ("sm_90", "sm_120"):
        return usual or (wide == (arch == "sm_90") and macros["BF16"] == (macros["GROUP_BLOCK"] != 64))
    if arch == "sm_80":
        return usual or (not wide and kind_of(macros) in TIGHT)
    return usual and not wide and kind_of(macros) in TIGHT


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_variant(arch: str, bits: int) -> None:
    chosen = [macros for macros in decode_variants(arch, bits) if is_chosen(macros, arch)]
    kinds = {kind_of(macros) for macros in decode_variants(arch, bits)}
    assert {kind_of(macros) for macros in chosen} == (TIGHT if arch in ("sm_86", "sm_89") else kinds)
    for macros in chosen:
        assert not complaints(report("decode.cu", macros, arch)), macros
    for bf16 in (0, 1):
        assert not complaints(report("dequantize.cu", {"BITS": bits, "BF16": bf16, "WIDE_TABLE": 0}, arch))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_what_is_fused(arch: str, bits: int) -> None:
    """Every kind that `fused_cuda` may ask for: norms with any, all else with two row tiles; groups that need most."""
    groups = (32, 64) if arch == "sm_90" else (64,)
    for macros in decode_variants(arch, bits):
        if macros["TOKEN_TILES"] > 1 or macros["GROUP_BLOCK"] not in groups or not is_chosen(macros, arch):
            continue
        for norm, gated in ((1, 0), (1, 1), (0, 0)):
            if macros["ROW_TILES"] == 2 or (norm and not gated):
                assert not complaints(report("decode.cu", macros | {"NORM": norm, "GATED": gated}, arch)), macros


def registers(text: str) -> int:
    return max(map(int, re.findall(r"Used (\d+) registers", text)))


@pytest.mark.sweep
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_left_out_adds_nothing(bits: int, group: int) -> None:
    """Every variant on every architecture; the registers on which `is_chosen` relies."""
    used: dict[str, dict[tuple[Any, ...], int]] = {}
    for arch in ARCHITECTURES:
        for macros in decode_variants(arch, bits):
            if macros["GROUP_BLOCK"] == group:
                text = report("decode.cu", macros, arch)
                assert not complaints(text), (arch, macros)
                used.setdefault(arch, {})[kind_of(macros), macros["WIDE_TABLE"], macros["BF16"]] = registers(text)
    assert used["sm_86"] == used["sm_89"]
    for key, count in used["sm_80"].items():
        limit = min(65536 // (32 * plan._MAX_WARPS[key[0]]), 255)
        assert abs(count - used["sm_86"][key]) <= 1 and (key[0] in TIGHT or count <= limit - 32), key
    for arch in ("sm_90", "sm_120"):
        assert all(count == used[arch][kind, wide, 1 - bf16] for (kind, wide, bf16), count in used[arch].items())


H100 = GPUS["H100"]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    ("bits", "bf16", "group"), [(4, False, 64), (3, True, 32), (2, False, 128)], ids=["4bit", "3bit", "2bit"]
)
def test_every_tiling(bits: int, bf16: bool, group: int, half: int) -> None:
    """All shapes of a tile at 4 bits; at the others those with the fewest registers to spare, and one in five."""
    found = tiles.variants()
    if bits != 4:
        found = [one for number, one in enumerate(found) if number % 5 == 0 or one[0] in (96, 256)]
    for tokens, rows, ways, per_sm in found[half::2]:
        made = tiles.tiling(H100, tokens, 4096, 4096, bits, group, tokens, rows, ways, 1, per_sm, True)
        if made is not None:
            assert not complaints(report("matmul.cu", dict(made.macros(bits, bf16)), "sm_90a")), made


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_tiling_that_is_cut(bits: int) -> None:
    for number, (tokens, rows) in enumerate(sorted(tiles._CUT)):
        bf16, group = (number + bits) % 2 == 1, (32, 64, 128)[(number + bits) % 3]
        made = tiles.tiling(H100, tokens, 28672, 4096, bits, group, tokens, rows, 1, 1, 1, True, cut=True)
        assert made is not None
        assert not complaints(report("matmul.cu", dict(made.macros(bits, bf16)), "sm_90a")), made


MMA_GPUS = ("A100", "RTX 3090", "L40S", "B200", "RTX 5090")  # the L40S has the RTX 3090's tilings and registers
CASES = [(2, True, 64), (3, True, 32), (2, False, 128), (3, False, 64), (4, True, 32), (4, False, 64), (4, False, 128)]


@pytest.mark.parametrize(
    "number", [pytest.param(at, marks=[pytest.mark.sweep] * (name == "L40S")) for at, name in enumerate(MMA_GPUS)]
)
def test_every_mma_tiling(number: int) -> None:
    """Every shape, those with registers to spare on every second architecture; widths, groups and dtypes take turns."""
    gpu = GPUS[MMA_GPUS[number]]
    for turn, shape in enumerate(mma._SHAPES):
        if shape[0] * shape[1] < 24 and (turn + number) % 2:
            continue
        bits, bf16, block = CASES[(turn + 3 * number) % len(CASES)]
        made = mma.tiling(gpu, 300, 4096, 4096, bits, block, shape, 1)
        assert made is not None
        assert not complaints(report("mma.cu", dict(made.macros(bits, bf16)), gpu.arch)), made


def test_serialized_tensor_cores_would_be_seen() -> None:
    """The check above can fail: 48 registers are too few for 16 tokens, and the compiler says what that costs."""
    made = tiles.tiling(H100, 16, 4096, 4096, 4, 64, 16, 4, 1, 1, 1, True)
    assert made is not None
    assert complaints(report("matmul.cu", dict(made.macros(4, False)) | {"BLOCKS": 2}, "sm_90a"))


@pytest.mark.parametrize("stages", [3, 6, 8])
def test_ring_sizes(stages: int, request: pytest.FixtureRequest) -> None:
    """The ring's length is only a constant of the kernel: one architecture stands for all.

    Four token tiles, with forty registers to spare, only with ``--sweep``.
    """
    most = 4 if request.config.getoption("--sweep") else 2
    for macros in (dict(variant) for variant in plan.variants()):
        if (
            macros["BF16"] == 0
            and macros["GROUP_BLOCK"] == 64
            and macros["WIDE_TABLE"]
            and macros["TOKEN_TILES"] <= most
            and (macros["BITS"], macros["TOKEN_TILES"], macros["ROW_TILES"], macros["BLOCKS"], stages)
            not in plan._SPILLING_RINGS
            and stages <= plan._MOST_STAGES[macros["BLOCKS"]]
        ):
            assert not complaints(report("decode.cu", macros | {"STAGES": stages}, "sm_90")), macros


def test_a_spill_would_be_seen() -> None:
    """The check above can fail: a variant squeezed into too few registers complains."""
    macros = dict(plan.variants()[-1]) | {"MAX_THREADS": 1024}
    assert complaints(report("decode.cu", macros, "sm_90"))


def test_compile_errors_are_one_line() -> None:
    with pytest.raises(CompileError, match="does not compile for sm_90") as refusal:
        jit.compile_cubin('extern "C" __global__ void broken() { nonsense; }', "sm_90")
    assert "\n" not in str(refusal.value) and "nonsense" in str(refusal.value)
