"""The kernels of FlatQuant's run time compile for every GPU generation, without a GPU, and spill no register."""

import pytest
from compiler import needs_nvrtc
from gpus import GPUS
from test_compile import complaints, report

from flute.kernels import attention_cuda, integer_cuda
from flute.kernels.tokens_cuda import Problem

pytestmark = needs_nvrtc

OLD_AND_NEW = ("sm_80", "sm_90")


@pytest.mark.parametrize("shape", [(16, 4), (32, 4), (128, 2), (256, 2), (128, 4)], ids=str)
def test_every_tiling(shape: tuple[int, int]) -> None:
    """wgmma that waits for another is a complaint, too."""
    bits = 4 if sum(shape) % 4 else 8
    made = next(
        one for one in integer_cuda.tilings(300, 4096, 4096, bits, GPUS["H100"]) if (one.columns, one.rows) == shape
    )
    assert not complaints(report("integer_matmul.cu", dict(made.macros(bits, bits == 8)), "sm_90a")), made


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_decode(arch: str) -> None:
    for m in (1, 16, 64):
        macros = integer_cuda.decode_macros(m, 4096, 4 if m < 64 else 8, m == 16, 132)
        assert not complaints(report("integer_decode.cu", dict(macros), arch)), macros


@pytest.mark.parametrize("arch", OLD_AND_NEW)
def test_transforms(arch: str) -> None:
    for n1, n2, norm in ((64, 64, True), (86, 128, False)):
        made = Problem(n1, n2, True, True, norm, arch == "sm_80")
        assert not complaints(report("kronecker.cu", dict(made.macros(4, norm)), arch)), made
    for left in (True, False):
        made = Problem(32, 128, left, not left, False, False)
        assert not complaints(report("kronecker.cu", dict(made.macros(8 * left, False)), arch)), made
    gated = Problem(112, 128, True, True, False, arch == "sm_80", gated=True)
    heads = Problem(8, 128, False, True, False, arch == "sm_80", turn=True)
    shared = gated.shared_among(1, GPUS["H100"]), Problem(64, 64, True, True, True, True).shared_among(4, GPUS["H100"])
    for made in (gated, heads, *(shared if arch == "sm_90" else ())):
        assert made.cluster > 1 or made not in shared
        for short in (False, True):
            macros = made.macros(0 if made.turn else 4, True, short=short)
            assert not complaints(report("kronecker.cu", dict(macros), arch)), made
    plain = {"RANGES": 1, "BF16": 0, "BITS_OUT": 4, "SYMMETRIC": 0}
    assert not complaints(report("quantize.cu", plain, arch))


@pytest.mark.parametrize("arch", OLD_AND_NEW)
def test_caches(arch: str) -> None:
    for dim in (96, 256) if arch == "sm_80" else (128, 256):
        symmetric = dim == 96
        macros = dict(attention_cuda.macros(dim == 96, dim, dim, symmetric, symmetric))
        assert not complaints(report("kv_attention.cu", macros, arch)), dim
        assert not complaints(report("kv_append.cu", macros, arch)), dim
        macros = {"BF16": int(dim == 96), "SYMMETRIC": int(symmetric)}
        assert not complaints(report("kv_dequantize.cu", macros, arch)), dim
