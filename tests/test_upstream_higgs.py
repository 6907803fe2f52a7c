"""The names that transformers' HIGGS takes from FLUTE: the container, the operator, the record; and transformers."""

import gc
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import pytest
import torch

import flute
from flute import nf_utils, tune, utils
from flute.errors import CheckpointError, FluteError, OperatorError, QuantizeError
from flute.hadamard import matrix
from flute.integrations import container, gemm
from flute.integrations.higgs import prepare_data, prepare_data_transposed
from flute.kernels import layout
from flute.quantize import quantize
from flute.spec import QuantSpec

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "standins" / "fast-hadamard-transform"
EVERY = [(bits, vector, dtype) for bits in (2, 3, 4) for vector in (1, 2) for dtype in (torch.float16, torch.bfloat16)]
each = pytest.mark.parametrize(("bits", "vector", "dtype"), EVERY)
device = pytest.param("cuda", marks=pytest.mark.gpu)
anywhere = pytest.mark.parametrize("device", ["cpu", device])


def layer(
    bits: int, vector: int, dtype: torch.dtype, rows: int = 48, width: int = 320, group: int = 64, device: str = "cpu"
) -> tuple[Any, ...]:
    """What prepare_data_transposed makes of random codes, and the weight (N, K) that they stand for."""
    torch.manual_seed(bits * 10 + vector)
    codes = torch.randint(0, 1 << bits * vector, (rows, width // vector), dtype=torch.uint8)
    scales = (0.1 + torch.rand(rows, width // group)).to(dtype)
    grid = torch.randn(1 << bits * vector, vector).to(dtype)
    weight = grid.float()[codes.long()].reshape(rows, width) * scales.float().repeat_interleave(group, 1)
    made = prepare_data_transposed(
        codes.to(device), scales.to(device), grid.to(device), num_bits=bits, group_size=group, vector_size=vector,
        dtype=dtype, device=torch.device(device), check_correctness=False,
    )  # fmt: skip
    return made, weight.to(dtype).to(device)


# ---- the container ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_come_back_from_the_container(bits: int) -> None:
    for rows, width in ((16, 8), (16, 64), (48, 72), (128, 128), (32, 1152), (112, 24)):
        codes = torch.randint(0, 1 << bits, (rows, width), dtype=torch.uint8)
        held = container.from_codes(codes, bits)
        assert held.dtype == torch.int16 and held.shape == (rows * bits // 16, width)
        assert torch.equal(container.to_codes(held, bits, container.CHECKPOINT_ORDER), codes)
    for rows in {2: (8, 24), 3: (16,), 4: (4, 12)}[bits]:
        codes = torch.randint(0, 1 << bits, (rows, 8), dtype=torch.uint8)
        assert torch.equal(container.to_codes(container.from_codes(codes, bits), bits, 10_000), codes)
        with pytest.raises(OperatorError, match=f"out_features={rows + 1} does not fill"):
            container.from_codes(codes[[0, *range(rows)]], bits)
        with pytest.raises(OperatorError, match=r"in_features=6 does not fill|an even K"):
            container.from_codes(codes[:, : 6 if bits < 4 else 5], bits)


def test_the_bits_are_those_of_the_docstring() -> None:
    codes = torch.tensor([[1, 6, 7, 0] * 2] * 16, dtype=torch.uint8)
    stream = (1 << 3 | 6) | (7 << 3) << 6 | (1 << 3 | 6) << 12 | (7 << 3) << 18  # of one row, first pair lowest
    row = [stream >> 8 * i & 0xFF for i in range(3)]
    assert container.from_codes(codes, 3).view(torch.uint8).flatten().tolist() == row * 16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_orders_hold_the_same_codes(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (48, 384), dtype=torch.uint8)
    stored = container.from_codes(codes, bits)
    rows = stored.flatten().view(torch.uint8).view(48, -1)
    kernel = layout.pack_weight(rows, bits, 384).flatten().view(torch.int16).view(stored.shape)
    assert torch.equal(container.to_codes(kernel, bits, container.KERNEL_ORDER), codes)
    again, order = container.arrange(kernel, bits, 64, container.KERNEL_ORDER)  # the order of a CPU
    assert order == container.CHECKPOINT_ORDER and torch.equal(again, stored)


@pytest.mark.parametrize(
    ("bits", "digest"), [(2, "417e01c6e2f43f1e"), (3, "5a77974fd0e149c8"), (4, "05e93c400126e564")]
)
def test_kernel_order_on_disk_is_what_it_was(bits: int, digest: str) -> None:
    """Files hold it. Who changes kernel order keeps a reader of this one, for the id 10004."""
    assert container.KERNEL_ORDER == 10_004
    codes = (torch.arange(32 * 256) * 2654435761 >> 7).view(32, 256) % (1 << bits)
    rows = container.from_codes(codes.to(torch.uint8), bits).flatten().view(torch.uint8).view(32, -1)
    assert hashlib.sha256(layout.pack_weight(rows, bits, 256).numpy().tobytes()).hexdigest()[:16] == digest


def test_orders_that_cannot_be_read_are_refused() -> None:
    (weight, scales, *_, record), _ = layer(4, 2, torch.float16)
    for order, message in ((57, "original FLUTE.*flute convert"), (10_777, "does not know"), (99_999, "original")):
        with pytest.raises(CheckpointError, match=message) as caught:
            tune.maybe_tune_and_repack(weight=weight, scales=scales, metadata=record._replace(template_id=order))
        assert "\n" not in str(caught.value)
    for wrong in (record._replace(N=64), record._replace(K=64), record._replace(num_bits=3)):
        with pytest.raises(CheckpointError, match="belongs to a weight int16"):
            tune.maybe_tune_and_repack(weight, scales, wrong)
    with pytest.raises(OperatorError, match="container of 4-bit codes"):
        container.to_codes(weight.int(), 4, container.CHECKPOINT_ORDER)


def test_the_record_goes_to_json_and_back() -> None:
    record = tune.TuneMetaData(1, 64, 128, 3, 64, 132, torch.bfloat16, torch.device("cuda:1"), 10_000)
    values = json.loads(json.dumps(record.to_dict()))
    assert values["dtype"] == "torch.bfloat16" and values["device"] == "cuda:1"
    assert tune.TuneMetaData.from_dict(values) == record and tune.TuneMetaData.from_dict(values) == record
    for wrong in ({"N": "64"}, {"dtype": "torch.int8"}, {"device": "no such"}, {"K": True}, {"more": 1}):
        with pytest.raises(CheckpointError, match="tune_metadata"):
            tune.TuneMetaData.from_dict({**values, **wrong})


# ---- the operator ----------------------------------------------------------------------------------------------------


@anywhere
@each
def test_one_hot_inputs_return_the_weights(bits: int, vector: int, dtype: torch.dtype, device: str) -> None:
    for rows, width in ((48, 320), (64, 256)):  # on a GPU: beside the container, and the container itself
        (weight, scales, table, table2, record), expected = layer(bits, vector, dtype, rows, width, device=device)
        y = tune.qgemm_v2(torch.eye(width, dtype=dtype, device=device), weight, scales, table, table2, None, record)
        assert torch.equal(y.T, expected)
        numbers = (record.num_bits, record.group_size, record.template_id, record.num_sms)
        assert torch.equal(utils.reconstruct(weight, scales, table, table2, None, *numbers), expected)
        whole = device == "cuda" and width % 128 == 0
        assert record.template_id == (container.KERNEL_ORDER if whole else container.CHECKPOINT_ORDER)
        if whole:
            assert gemm._kept[weight].codes.data_ptr() == weight.data_ptr()


@anywhere
@each
def test_rotated_inputs(bits: int, vector: int, dtype: torch.dtype, device: str) -> None:
    (weight, scales, table, table2, record), dense = layer(bits, vector, dtype, 64, 512, device=device)
    h = torch.block_diag(*[matrix(128) / math.sqrt(128)] * 4).to(device)
    for tokens in (1, 7, 40):
        x = torch.randn(2, tokens, 512, device=device).to(dtype)
        y = tune.qgemm_v2(x, weight, scales, table, table2, None, record, hadamard_size=128)
        exact = x.double() @ h @ dense.double().T
        assert y.shape == (2, tokens, 64) and y.dtype == dtype
        assert float((y.double() - exact).norm() / exact.norm()) < (2e-3 if dtype == torch.float16 else 1.1e-2)
        same = (weight, scales, table, table2, None, bits, 64, 128, record.template_id, 132)
        assert torch.equal(flute.qgemm_hadamard(x, *same), y)
    plain = flute.qgemm(x, weight, scales, table, table2, None, bits, 64, record.template_id, 132)
    assert torch.equal(plain, tune.qgemm_v2(x, weight, scales, table, table2, None, record))
    with pytest.raises(OperatorError, match="hadamard_size=96 is not a power of two"):
        tune.qgemm_v2(x, weight, scales, table, table2, None, record, hadamard_size=96)


@each
def test_tables_survive_what_transformers_does_to_them(bits: int, vector: int, dtype: torch.dtype) -> None:
    """They are saved as float16, and cast to the model's dtype when they are loaded."""
    (weight, scales, table, table2, record), expected = layer(bits, vector, dtype)
    eye = torch.eye(320, dtype=dtype)
    cast = table2.view(torch.float16).to(dtype)
    loaded = tune.qgemm_v2(eye, weight, scales, table, cast.view(torch.float32), None, record)
    assert torch.equal(loaded.T, expected)
    if dtype == torch.bfloat16:  # upstream's are of bfloat16, which float16 destroys
        own = cast.view(torch.float32)
        assert torch.equal(tune.qgemm_v2(eye, weight, scales, table, own, None, record).T, expected)
        destroyed = cast.view(torch.float16).to(dtype).view(torch.float32)
        with pytest.raises(OperatorError, match="a cast has destroyed them"):
            tune.qgemm_v2(eye, weight, scales, table, destroyed, None, record)
        tiny = torch.linspace(-1, 1, 1 << bits).to(dtype).mul(2.0**-30).unsqueeze(1)  # nothing that float16 could hold
        codes = torch.randint(0, 1 << bits, (16, 64), dtype=torch.uint8)
        made = prepare_data_transposed(
            codes, torch.ones(16, 1).to(dtype), tiny, bits, 64, 1, dtype, torch.device("cpu")
        )
        one_hot = tune.qgemm_v2(torch.eye(64, dtype=dtype), *made[:4], None, made[4])
        assert torch.equal(one_hot.T, tiny[codes.long()].squeeze(-1))
    if vector == 1:
        assert torch.equal(gemm.codebook(table, utils.make_qmap2_from_qmap(table), bits, dtype), cast.view(-1, 2))


@anywhere
def test_packing_happens_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, scales, table, table2, record), _ = layer(4, 2, torch.float16, device=device)
    made, real = [], container.operands
    monkeypatch.setattr(container, "operands", lambda *given: made.append(1) or real(*given))
    x = torch.randn(3, 320, device=device).half()
    before = len(gemm._kept)
    first = tune.qgemm_v2(x, weight, scales, table, table2, None, record)
    for _ in range(3):
        assert torch.equal(
            tune.qgemm_v2(x, weight, scales, table, table2.view(torch.float16).view(torch.float32), None, record), first
        )
    assert len(made) == 1 and len(gemm._kept) == before + 1
    scales *= 2
    assert torch.equal(tune.qgemm_v2(x, weight, scales, table, table2, None, record), 2 * first) and len(made) == 2
    weight.zero_()
    assert not torch.equal(tune.qgemm_v2(x, weight, scales, table, table2, None, record), 2 * first)
    del weight
    gc.collect()
    assert len(gemm._kept) == before  # nothing outlives its container


def test_compiled_is_one_node_and_the_same() -> None:
    (weight, scales, table, table2, record), _ = layer(3, 2, torch.bfloat16)
    held = torch.nn.Parameter(weight, requires_grad=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        return tune.qgemm_v2(x + 1, held, scales, table, table2, None, record, hadamard_size=64)

    graphs = []
    compiled = torch.compile(run, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    x = torch.randn(5, 320).bfloat16()
    assert torch.equal(compiled(x), run(x)) and "flute.qgemm" in graphs[0].code
    torch.library.opcheck(
        torch.ops.flute.qgemm, (x, held, scales, table, table2, 3, 64, record.template_id, 64),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# ---- making layers ---------------------------------------------------------------------------------------------------


def test_prepare_data_takes_the_transposed() -> None:
    codes, grid = torch.randint(0, 8, (32, 128), dtype=torch.uint8), torch.randn(8, 1).half()
    scales = torch.rand(32, 2).half()
    rest: Any = (grid, 3, 64, 1, torch.float16, torch.device("cpu"))
    one, other = prepare_data_transposed(codes, scales, *rest), prepare_data(codes.T, scales.T, *rest)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True)) and one[4] == other[4]


def test_layers_that_do_not_fit_are_refused() -> None:
    codes, grid, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.randn(16, 1).half(), torch.ones(16, 1).half()
    good: dict[str, Any] = {
        "weight_original": codes, "scales_original": scales, "grid": grid, "num_bits": 4, "group_size": 64,
        "vector_size": 1, "dtype": torch.float16, "device": torch.device("cpu"),
    }  # fmt: skip
    prepare_data_transposed(**good)
    for wrong in (
        {"num_bits": 5}, {"vector_size": 3}, {"dtype": torch.bfloat16}, {"grid": grid[:8]}, {"group_size": 32},
        {"weight_original": codes.int()}, {"scales_original": scales.float()}, {"weight_original": codes[:0]},
        {"dtype": torch.int16},
    ):  # fmt: skip
        with pytest.raises(QuantizeError, match="prepare_data"):
            prepare_data_transposed(**{**good, **wrong})
    with pytest.raises(FluteError, match="code 16 does not fit"):
        prepare_data_transposed(**{**good, "weight_original": codes + 16})


@anywhere
def test_upstreams_utils(device: str) -> None:
    codes = torch.randint(0, 8, (192, 48), device=device)  # (K, N)
    packed = utils.pack(codes, 3)
    scales, workspace = torch.rand(48, 3, device=device).half(), utils.make_workspace_streamk(device=codes.device)
    assert torch.equal(utils.unpack(packed, scales, workspace, 3, 64, 10_000), codes.T.half())
    same, record = tune.tune_and_pack(torch.randn(5, 192, device=device).half(), codes, 3, 64)
    assert torch.equal(same, packed) and record[:6] == (5, 48, 192, 3, 64, 0) and record.dtype == torch.float16
    with pytest.raises(OperatorError, match="template_ids"):
        utils.pack(codes, 3, [0, 1])
    for wrong, message in [(259, "code 259 does not fit in 3 bits"), (-1, "code -1"), (8, "code 8"), (2.5, "integer")]:
        other = codes.to(torch.float32 if isinstance(wrong, float) else codes.dtype).clone()
        other[0, 0] = wrong
        for packing in (lambda c: utils.pack(c, 3), lambda c: tune.tune_and_pack(torch.randn(5, 192).half(), c, 3, 64)):
            with pytest.raises(OperatorError, match=message):
                packing(other)
    with pytest.raises(OperatorError, match="qmap"):
        utils.make_qmap2_from_qmap(torch.zeros(4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_upstreams_nf_utils(bits: int) -> None:
    weight = torch.randn(24, 128)
    weight[3, :64] = 0
    expected = quantize(weight, QuantSpec(bits, 64, f"nf{bits}"), scale_dtype=torch.float32)
    rounded, codes, scales, table = nf_utils.nf_quantize(weight, bits, 64)
    assert torch.equal(codes, expected.codes.long()) and torch.equal(scales.view(24, 2), expected.scales)
    assert torch.equal(rounded, table[codes] * expected.scales.repeat_interleave(64, 1))
    half = nf_utils.nf_quantize_2(weight, bits, 64, torch.float16)
    assert torch.equal(half, table.half()[codes] * expected.scales.half().repeat_interleave(64, 1))
    values, pivots = (part.cpu() for part in nf_utils.get_values_pivots(bits, symmetric=True))
    assert torch.allclose(values, -values.flip(0)) and values[-1] == 1 and not (values == 0).any()
    assert torch.equal(pivots, (values[1:] + values[:-1]) / 2)
    custom = nf_utils.nf_quantize(weight, bits, 64, custom_scales=2 * scales.unsqueeze(1))
    assert torch.equal(custom[2], 2 * scales) and not torch.equal(custom[1], codes)


# ---- other people's names --------------------------------------------------------------------------------------------


def test_the_stand_in_multiplies_by_hadamards_matrix() -> None:
    spec = importlib.util.spec_from_file_location("standin", STANDIN / "fast_hadamard_transform.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for width, order in ((64, 64), (128, 128), (48, 64)):
        x = torch.randn(3, 2, width)
        expected = 0.5 * x.double() @ matrix(order)[:width, :width]
        assert torch.allclose(module.hadamard_transform(x, 0.5).double(), expected, atol=1e-5)


def test_flute_kernel_is_a_name_of_ours(tmp_path: Path) -> None:
    assert version("flute-kernel") >= "0.4.1"
    assert "flute-kernel" not in {found.metadata["Name"] for found in distributions()}
    with pytest.raises(PackageNotFoundError):
        version("flute-kernels")
    real = tmp_path / "flute_kernel-0.4.9.dist-info"
    real.mkdir()
    (real / "METADATA").write_text("Metadata-Version: 2.1\nName: flute-kernel\nVersion: 0.4.9\n")
    code = "import flute, importlib.metadata as m; print(m.version('flute-kernel'))"
    assert process(code, tmp_path).stdout == "0.4.9\n"  # one that is installed comes first
    off = process(code, FLUTE_NO_AUTOREGISTER="1")
    assert "PackageNotFoundError" in off.stderr


def process(code: str | Path, *paths: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new Python that finds ``paths`` before this checkout and runs a file or a line."""
    words = ["-c", code] if isinstance(code, str) else [str(code), "--cases", *CASES]
    found = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": found},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


CASES = ("4/2/bfloat16/Llama", "3/1/float16/Qwen2")
OTHER = os.environ.get("FLUTE_TEST_TRANSFORMERS", "")


@pytest.mark.parametrize(
    "transformers",
    [
        "",
        pytest.param(
            OTHER,
            marks=pytest.mark.skipif(
                not OTHER, reason="FLUTE_TEST_TRANSFORMERS names no folder with transformers 4.57 and what it needs"
            ),
        ),
    ],
    ids=["this", "another"],
)
def test_transformers_quantizes_saves_and_loads(transformers: str, tmp_path: Path) -> None:
    """Its own HIGGS, unmodified but for its refusal of CPUs: `higgs_scenario` has the checks."""
    record = tmp_path / "fast_hadamard_transform-1.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fast_hadamard_transform\nVersion: 1.1.0\n")
    first = [transformers] if transformers else []
    done = process(ROOT / "tests" / "higgs_scenario.py", *first, STANDIN, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert all(line.endswith("  -") for line in done.stdout.splitlines()[2:]) and done.stdout.count("\n") == 4
