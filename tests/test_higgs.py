"""Gaussian grids and rotated weights: distortions that theory knows, layers that compute what their weights say."""

import ast
import copy
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import equal_states, load, prompt, saved
from torch import nn
from typer.testing import CliRunner

from flute import FluteConfig, LutLinear, QuantSpec
from flute.cli import app
from flute.config import ModelSpec, changed
from flute.errors import CheckpointError, FluteError, QuantizeError, SpecError
from flute.experts import ROLES, LutExperts
from flute.hadamard import matrix, transform
from flute.integrations import folders
from flute.integrations.fusion import fuse
from flute.methods import higgs_spec, quantize_model
from flute.methods.capture import Moments
from flute.methods.recipes import RECIPES, solve
from flute.quantize import dequantize, quantize
from flute.spec import PAIR_TABLES
from flute.tables import named_table

TINY = Path(__file__).resolve().parent.parent / "flute" / "data" / "tiny"
SPECS = [higgs_spec(bits, 24, vector_size=vector, hadamard_size=96) for bits, vector in ((2, 1), (3, 2), (4, 2))]
SPECS += [QuantSpec(4, 32, "nf4", 1, 12), QuantSpec(3, -1, "custom", 2, 40)]


# ---- grids -----------------------------------------------------------------------------------------------------------


def integral(grid: torch.Tensor) -> tuple[float, float]:
    """D of a grid (n,) or (n, 2) by the midpoint rule, and how far its points are from the means of their cells."""
    step = 0.0005 if grid.dim() == 1 else 0.02
    line = torch.arange(-5.5 + step / 2, 5.5, step, dtype=torch.float64)
    points = line[:, None] if grid.dim() == 1 else torch.cartesian_prod(line, line)
    grid = grid.double().view(len(grid), -1)
    mass = torch.exp(-points.square().sum(1) / 2)
    mass /= mass.sum()
    nearest = torch.cat([torch.cdist(part, grid).argmin(1) for part in points.split(1 << 14)])
    held = torch.zeros(len(grid), dtype=torch.float64).index_add_(0, nearest, mass)
    means = torch.zeros_like(grid).index_add_(0, nearest, mass[:, None] * points) / held[:, None]
    distortion = (mass * (points - grid[nearest]).square().sum(1)).sum() / grid.shape[1]
    return float(distortion), float((means - grid).abs().max())


@pytest.mark.parametrize(("bits", "published"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_grids_of_one_dimension_are_those_of_lloyd_and_max(bits: int, published: float) -> None:
    """Max 1960, table I."""
    table = named_table(f"gauss{bits}")
    distortion, off = integral(table)
    assert distortion == pytest.approx(published, rel=0.001) and off < 1e-3
    assert torch.equal(table, -table.flip(0))


def other_grid(count: int) -> torch.Tensor:
    """The grid of pairs that transformers has for HIGGS, read from its source: to import it would import flute."""
    home = find_spec("transformers.integrations")
    assert home is not None and home.origin is not None
    tree = ast.parse((Path(home.origin).parent / "higgs.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_higgs_grid"]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(wanted, []), "higgs", "exec"), space)
    return space["get_higgs_grid"](2, count)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grids_of_pairs_are_as_good_as_the_best_known(bits: int) -> None:
    """Within a percent of the quantizers of Pages and Printems, which other libraries have; Zador says about where."""
    table, count = named_table(f"gausspair{bits}"), 1 << (2 * bits)
    distortion, off = integral(table)
    assert distortion < 1.01 * integral(other_grid(count))[0] and off < 0.02
    zador = 5 / (36 * math.sqrt(3)) * 8 * math.pi / count
    assert distortion == pytest.approx(zador, rel={2: 0.16, 3: 0.07, 4: 0.02}[bits])
    assert distortion < 0.95 * integral(named_table(f"gauss{bits}"))[0]


@pytest.mark.parametrize("vector", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_of_any_kind_are_rounded_with_the_grids_distortion(bits: int, vector: int) -> None:
    """Outliers and all: the rotation makes them normal, and the error is known beforehand."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator) ** 3
    spec = higgs_spec(bits, -1, vector_size=vector, hadamard_size=1024)
    made = quantize(weight, spec, scale_dtype=torch.float32)
    error = float((weight - dequantize(*made, spec)).square().sum() / weight.square().sum())
    expected = integral(named_table(spec.table))[0]
    assert error == pytest.approx(expected, rel=0.05)
    unrotated = spec.unrotated
    plain = dequantize(*quantize(weight, unrotated, scale_dtype=torch.float32), unrotated)
    assert float((weight - plain).square().sum() / weight.square().sum()) > 1.5 * error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pairs_beat_singles_and_normal_float_on_the_embedded_model(bits: int) -> None:
    weights = {name: w.float() for name, w in load_file(TINY / "model.safetensors").items() if "_proj" in name}
    specs = [higgs_spec(bits), higgs_spec(bits, vector_size=1), QuantSpec(bits, 64, f"nf{bits}")]
    totals = []
    for spec in specs:
        fitted = [(w, spec.fitted(w.shape[1])) for w in weights.values()]
        error = sum(float((w - dequantize(*quantize(w, s), s).float()).square().sum()) for w, s in fitted)
        totals.append(error)
    assert totals[0] < 0.95 * totals[1] and totals[0] < 0.95 * totals[2]
    assert (
        bits == 4 or totals[1] < 0.9 * totals[2]
    )  # at 4 bits the largest of 64 weights tells more than their variance


# ---- specs -----------------------------------------------------------------------------------------------------------


def test_specs_with_and_without_rotation_in_json() -> None:
    spec = higgs_spec(3, 128)
    assert spec == QuantSpec(3, 128, "gausspair3", 2, 512) and str(spec) == "gausspair3 3bit g128 h512"
    assert QuantSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["hadamard_size"] == 512
    assert "hadamard_size" not in QuantSpec().to_dict()  # what older versions can read they still can
    record = ModelSpec(spec, {"*.a": {"hadamard_size": 0}, "*.b": {"bits": 2}, "*.c": {"vector_size": 1}})
    assert ModelSpec.from_dict(record.to_dict()) == record
    found = {name: record.spec_for(f"x.{name}") for name in "abcd"}
    assert found["a"] == spec.unrotated and found["b"] == higgs_spec(2, 128) and found["d"] == spec
    assert found["c"] == higgs_spec(3, 128, vector_size=1)
    exact = record.resolved({"x.a": spec.unrotated, "x.e": spec.fitted(576)}, [])
    assert exact.overrides == {"x.a": {"hadamard_size": 0}, "x.e": {"hadamard_size": 192}}
    plain = ModelSpec(QuantSpec()).resolved({"x.e": spec.fitted(576)}, [])
    assert ModelSpec.from_dict(plain.to_dict()).spec_for("x.e") == spec.fitted(576)
    assert changed(QuantSpec(), {"vector_size": 2}).table == "custom"


@pytest.mark.parametrize(("features", "block"), [(512, 512), (576, 192), (1536, 512), (90, 2), (7, 1), (160, 160)])
def test_the_largest_block_that_divides_any_hidden_size(features: int, block: int) -> None:
    spec = higgs_spec(4, vector_size=1).fitted(features)
    assert spec.hadamard_size == block and spec.fitted(features) == spec
    spec.check_layer("here", 8, features)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hadamard_size": -1}, "hadamard_size=-1"),
        ({"hadamard_size": 65536}, "hadamard_size=65536"),
        ({"hadamard_size": 64.0}, "not an integer"),
        ({"hadamard_size": True}, "not an integer"),
        ({"table": "gausspair4"}, "holds pairs"),
        ({"table": "gauss4", "vector_size": 2}, "gausspair4"),
        ({"table": "gauss3"}, "use table=gauss4"),
        ({"table": "gausspair3", "vector_size": 2}, "use table=gausspair4"),
    ],
)
def test_specs_that_break_a_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantSpec.from_dict({"bits": 4, "table": "nf4", **values})


@pytest.mark.parametrize("block", [512, 36, 5])
def test_a_layer_takes_only_blocks_that_divide_it(block: int) -> None:
    with pytest.raises(SpecError, match=r"layer 'here': hadamard_size=\d+ is no block.*in_features=144"):
        quantize(torch.ones(2, 144), QuantSpec(hadamard_size=block), name="here")


def test_importance_is_refused_for_rotated_channels() -> None:
    with pytest.raises(QuantizeError, match="importance"):
        quantize(torch.ones(2, 64), higgs_spec(hadamard_size=64), importance=torch.ones(64))


# ---- layers ----------------------------------------------------------------------------------------------------------


def layer(spec: QuantSpec, dtype: torch.dtype = torch.float32, rows: int = 40, width: int = 240) -> LutLinear:
    torch.manual_seed(0)
    table = torch.randn(spec.table_shape) if spec.table == "custom" else None
    return LutLinear.from_linear(nn.Linear(width, rows, dtype=dtype), spec.fitted(width), table=table)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layer_computes_what_its_weight_says(spec: QuantSpec) -> None:
    made, x = layer(spec), torch.randn(3, 5, 240, requires_grad=True)
    weight = made.dequantize()
    expected = nn.functional.linear(x, weight, made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(made(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    block = made.spec.hadamard_size
    inner = LutLinear(240, 40, made.spec.unrotated)
    inner.weight, inner.scales, inner.table = made.weight, made.scales, made.table
    turned = inner.dequantize().view(40, -1, block).double() @ (matrix(block) / math.sqrt(block))
    torch.testing.assert_close(weight, turned.view(40, 240).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_16_bits_and_under_autocast(dtype: torch.dtype) -> None:
    made, x = layer(SPECS[1], dtype), torch.randn(4, 240, dtype=dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.dequantize(), made.bias), **tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x.float()), made(x), **tolerance)


class Three(nn.Module):
    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (layer(spec, rows=rows) for rows in (64, 32, 24))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def test_layers_of_one_input_rotate_it_together() -> None:
    apart = Three(SPECS[1]).requires_grad_(False)
    module = copy.deepcopy(apart)
    assert fuse(module, anywhere=True) == 1
    x = torch.randn(3, 240)
    with torch.no_grad():
        for one, other in zip(module(x), apart(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for one, other in zip(compiled(x), apart(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_stacks_of_experts_rotate_too() -> None:
    torch.manual_seed(0)
    specs = {"gate_up": higgs_spec(3, 24, hadamard_size=64).fitted(72), "down": higgs_spec(4, hadamard_size=20)}
    made = LutExperts(4, 72, 40, specs)
    weights = []
    for role in ROLES:
        dense = 0.2 * torch.randn(4, *made.shapes[role])
        made.fill(role, dense)
        weights.append(made.dequantize(role))
        assert float((dense - weights[-1]).square().mean() / dense.square().mean()) < 0.05
    x, index = torch.randn(9, 72), torch.randint(4, (9, 1))
    shares = torch.rand(9, 1)
    expected = [
        share * (weights[1][e] @ made.gate(weights[0][e] @ token))
        for token, e, share in zip(x, index.flatten(), shares.flatten(), strict=True)
    ]
    torch.testing.assert_close(made(x, index, shares), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_merged_adapters_neither_shrink_nor_move_the_weight(spec: QuantSpec) -> None:
    """Root mean squares of rounded weights are smaller than those of the weights: merging must not use them."""
    peft = pytest.importorskip("peft")
    from flute.integrations.peft import merge_and_unload

    module = Three(spec)
    before = module.q_proj.dequantize()
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj"]))  # of nothing yet
    with pytest.warns(UserWarning, match="merging"):
        after = merge_and_unload(adapted).q_proj.dequantize()
    assert float((after - before).norm() / before.norm()) < 0.1
    assert float(after.norm() / before.norm()) == pytest.approx(1, abs=0.01)


def test_error_feedback_in_rotated_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 96, generator=generator), torch.randn(300, 96, generator=generator)
    x = (x @ torch.randn(96, 96, generator=generator) * 0.5 ** torch.arange(96).div(48)).double()
    known, spec = Moments(x.T @ x, None), higgs_spec(2, 32, hadamard_size=96)
    found = {}
    for method in ("higgs", "gptq"):
        made = solve(weight, known, spec, RECIPES[method], scale_dtype=torch.float32)
        torch.testing.assert_close(made.weight, dequantize(*made.quantized, spec), rtol=1e-4, atol=1e-5)
        lost = (x @ (weight - made.weight).double().T).square().sum() / (x @ weight.double().T).square().sum()
        assert made.error == pytest.approx(float(lost), rel=0.1)  # but for damping
        found[method] = made.error
    assert found["gptq"] < 0.8 * found["higgs"]
    turned = known.rotated(96).hessian
    torch.testing.assert_close(turned, transform(x, 96).T @ transform(x, 96))


# ---- models and files ------------------------------------------------------------------------------------------------


def test_three_ways_to_the_same_model(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense", dtype=torch.float16)
    arguments = ["--method", "higgs", "--bits", "3", "--group-size", "24", "--hadamard-size", "64", "--json"]
    done = CliRunner().invoke(app, ["quantize", dense, "-o", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 0 and json.loads(done.stdout)["method"] == "higgs"
    model = load(tmp_path / "out", dtype=torch.float16)
    asked = higgs_spec(3, 24, hadamard_size=64)
    blocks = {layer.name: layer.spec for layer in folders.validate(tmp_path / "out").layers}
    down = model.model.layers[0].mlp.down_proj
    assert down.spec == blocks["model.layers.0.mlp.down_proj"] == asked.fitted(down.in_features)
    assert equal_states(model, load(dense, dtype=torch.float16, quantization_config=FluteConfig(asked)))
    other = load(dense, dtype=torch.float16)
    quantize_model(other, asked, method="higgs")
    assert equal_states(model, other)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1 and config["table"] == "gausspair3" and config["hadamard_size"] == 64

    again = load(tmp_path / "out", dtype=torch.float32)
    logits = again(prompt()).logits
    plain = again.dequantize()
    assert type(plain.model.layers[0].mlp.down_proj) is nn.Linear
    torch.testing.assert_close(plain(prompt()).logits, logits, rtol=1e-3, atol=1e-3)


def test_a_rotation_that_does_not_fit_the_files_is_refused(tmp_path: Path) -> None:
    config = FluteConfig(higgs_spec(4, 24, hadamard_size=64))
    load(saved(tmp_path / "dense"), quantization_config=config).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["hadamard_size"] = "64"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="hadamard_size='64' is not an integer"):
        folders.validate(tmp_path / "out")
    values["quantization_config"] |= {"hadamard_size": 64, "overrides": {}}  # blocks of 64 in rows of 72
    path.write_text(json.dumps(values))
    for read in (folders.validate, load):
        with pytest.raises(FluteError, match=r"q_proj': hadamard_size=64 is no block that divides in_features=72"):
            read(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "higgs", "--table", "nf4"], "--table nf4 does not go with --method higgs"),
        (["--method", "higgs", "--vector-size", "3"], "vector_size=3"),
        (["--hadamard-size", "-4"], "hadamard_size=-4"),
        (["--method", "higgs", "--calibration", __file__], "not used by --method higgs"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, tmp_path: Path) -> None:
    from flute.commands.quantize import check_method, layer_spec

    given = dict(zip(options[::2], options[1::2], strict=True))
    whole = {key: None if given.get(key) is None else int(given[key]) for key in ("--vector-size", "--hadamard-size")}
    method, files = given.get("--method", "rtn"), [Path(given["--calibration"])] if "--calibration" in given else []
    with pytest.raises(FluteError, match=message):
        check_method(method, files, "auto")
        layer_spec(None, 64, given.get("--table"), method, *whole.values())


def test_every_table_of_pairs_is_named_with_its_bits() -> None:
    for name in PAIR_TABLES:
        assert named_table(name).shape == QuantSpec(int(name[-1]), 64, name, 2).table_shape
