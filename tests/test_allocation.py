"""Bits for every layer from an average: the exact optimum, the budget kept, joined layers alike."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import dense, flute, text  # noqa: F401  (fixtures)
from tiny_models import build, equal_states

from flute.config import ModelSpec
from flute.errors import CalibrationError, SpecError
from flute.integrations import folders
from flute.integrations.modules import choose
from flute.methods import allocate, higgs_spec
from flute.methods.allocation import BITS, families, joined, knapsack
from flute.methods.sensitivity import divergence, log_probabilities, own_text, weights_replaced
from flute.spec import QuantSpec


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_trying_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (6,), generator=generator).tolist()
    costs = [[size * bits for bits in BITS] for size in sizes]
    harms = torch.rand(6, 3, generator=generator, dtype=torch.float64).sort(1, descending=seed % 2 == 0).values.tolist()
    for budget in range(2 * sum(sizes), 4 * sum(sizes) + 2, 3):
        every = itertools.product(range(3), repeat=6)
        within = [each for each in every if sum(costs[i][o] for i, o in enumerate(each)) <= budget]
        least = min(sum(harms[i][o] for i, o in enumerate(each)) for each in within)
        chosen = knapsack(costs, harms, budget)
        assert sum(costs[i][o] for i, o in enumerate(chosen)) <= budget
        assert sum(harms[i][o] for i, o in enumerate(chosen)) == pytest.approx(least, rel=1e-12)


def test_equal_layers_get_equal_bits_where_the_budget_is_whole() -> None:
    """Errors that fall by the same factor with every bit are convex: the even choice is the best."""
    for bits in BITS:
        harms = [[4.0**-each for each in BITS] for _ in range(7)]
        chosen = knapsack([[10 * each for each in BITS]] * 7, harms, 70 * bits)
        assert chosen == [BITS.index(bits)] * 7


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(SpecError, match="raise the average"):
        knapsack([[4, 6, 8]], [[3.0, 2.0, 1.0]], 3)


def test_joined_layers_and_experts_are_one() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
    names += ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    names += [f"model.layers.1.mlp.experts.{i}.{p}" for i in (0, 1) for p in ("w1", "w2", "w3")]
    assert [len(group) for group in joined(names)] == [3, 1, 3, 1, 2, 1, 6]
    assert [name for group in joined(names) for name in group][:3] == names[:3]


def test_what_the_model_writes_is_its_own_and_repeatable() -> None:
    model = build()
    state = torch.random.get_rng_state()
    one, two = own_text(model, seed=3), own_text(model, seed=3)
    assert torch.equal(one, two) and one.shape == (8, 64) and not torch.equal(one, own_text(model, seed=4))
    assert torch.equal(state, torch.random.get_rng_state())
    truth = log_probabilities(model, one).view(8, 64, -1)
    said = truth[:, :-1].gather(2, one[:, 1:, None]).mean()
    assert float(said) > float(truth.mean()) + 1  # likelier than any tokens


def test_weights_are_put_back_and_tied_ones_left_alone() -> None:
    model = build(tie_word_embeddings=True)
    before, windows = copy.deepcopy(model), own_text(build())
    truth = log_probabilities(model, windows)
    assert divergence(model, windows, truth) == 0
    with weights_replaced(model, {"lm_head.weight": model.lm_head.weight * 0.9}):
        assert divergence(model, windows, truth) > 0
        assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight and equal_states(model, before)
    with (
        weights_replaced(model, {"lm_head.weight": model.lm_head.weight * float("nan")}),
        pytest.raises(CalibrationError, match="nan"),
    ):
        divergence(model, windows, truth)


@pytest.mark.parametrize("spec", [QuantSpec(4, 24), higgs_spec(4, 24), QuantSpec(2, 24, "custom", 2)], ids=str)
def test_layers_that_do_little_get_few_bits(spec: QuantSpec) -> None:
    """The MLP of the first block is made to whisper; the budget is kept, and the model is as it was."""
    model = build()
    model.model.layers[0].mlp.down_proj.weight.data *= 1e-4
    before = copy.deepcopy(model)
    made = allocate(model, ModelSpec(spec), 3.5)
    assert equal_states(model, before)
    specs = choose(model, made.record).specs
    bits = {name: each.bits for name, each in specs.items()}
    quiet = [bits.pop(name) for name in list(bits) if "layers.0.mlp" in name]
    assert quiet[:2] == [2, 2] and quiet[2] < 4 and min(bits.values()) >= 3
    sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in specs}
    spent = sum(specs[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert spent == pytest.approx(made.bits) and 3.4 < made.bits <= 3.5 and made.predicted < made.uniform
    for group in joined(specs):
        assert len({specs[name] for name in group}) == 1
    allowed = {(each.table.rstrip("234"), each.vector_size, each.hadamard_size > 0) for each in families(spec)}
    assert {(each.table.rstrip("234"), each.vector_size, each.hadamard_size > 0) for each in specs.values()} <= allowed


def test_a_rotation_that_harms_is_left_out() -> None:
    """One input of o_proj is a thousand times the others, its weights are zero: exact, unless rotated."""
    model = build()
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data[5] *= 1000
    attention.o_proj.weight.data[:, [5, 17, 29]] = 0  # channel 5 of key-value head 0 serves three heads
    made = allocate(model, ModelSpec(higgs_spec(3, 24)), 3)
    specs = choose(model, made.record).specs
    assert specs.pop("model.layers.0.self_attn.o_proj").table[:2] == "nf"
    assert any(each.hadamard_size for each in specs.values()) and made.bits <= 3


def test_experts_are_one_group_and_get_bits() -> None:
    model = build("Qwen3Moe", moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[])
    made = allocate(model, ModelSpec(QuantSpec(4, 24), experts=True), 2.5)
    stacks = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    bits = [choose(model, made.record).specs[name].bits for name in stacks]
    assert len(stacks) == 4 and bits[0] == bits[1] and bits[2] == bits[3] and made.bits <= 2.5


def test_what_cannot_be_allocated() -> None:
    model = build()
    with pytest.raises(SpecError, match=r"average of 4\.5"):
        allocate(model, ModelSpec(), 4.5)
    with pytest.raises(SpecError, match="overrides"):
        allocate(model, ModelSpec(QuantSpec(), {"*.up_proj": {"bits": 2}}), 3.5)
    with pytest.raises(CalibrationError, match="no layer"):
        allocate(model, ModelSpec(QuantSpec(4, 24), modules_to_not_convert=("*",)), 3.5)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "higgs", "--bits", 2.5],
        ["--table", "int4", "--bits", 2.5],
        ["--scale", "mse", "--bits", 3, "--per-layer"],
        ["--method", "gptq", "--calibration", "TEXT", "--window", "16", "--bits", 2.5],
    ],
    ids=lambda options: options[1],
)
def test_the_command(
    options: list[Any],
    dense: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    made = []
    for name, form in (("one", ["--json"]), ("two", [])):
        code, out, err = flute("quantize", dense, "-o", tmp_path / name, *given, *form, capsys=capsys)
        assert code == 0 and err == ""
        made.append(((tmp_path / name / "model.safetensors").read_bytes(), out))
    (one, told), (two, text_out) = made
    figures = json.loads(told)
    assert one == two and figures["average"]["bits"] <= options[options.index("--bits") + 1]
    assert sum(figures["average"]["layers"].values()) == figures["layers"] == 14
    assert len(figures["average"]["layers"]) > 1 and folders.validate(tmp_path / "one").bits_per_weight > 2.3
    assert "on average, scales not counted" in text_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4.5"], "--bits 4.5 is not supported"),
        (["--bits", "nan"], "--bits nan is not supported"),
        (["--bits", "3.5", "--override", "*.up_proj=bits:2"], "--override does not go with --bits 3.5"),
        (["--bits", "3.5", "--table", "t.json"], "one number of bits"),
        (["--epochs", "3"], "--epochs is not used by --method rtn"),
        (["--window", "16"], "--window is not used by --method rtn"),
        (["--no-act-order"], "--act-order is not used by --method rtn, only by gptq and best"),
        (["--seed", "16"], "--seed is not used by --method rtn"),
        (["--method", "gptq", "--calibration", "TEXT", "--learn-table"], "--learn-table is not used by --method gptq"),
        (["--method", "best", "--calibration", "TEXT", "--lr", "1"], "--lr is not used by --method best"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_would_be_ignored(
    options: list[str],
    message: str,
    dense: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    code, out, err = flute("quantize", dense, "-o", tmp_path / "out", *given, capsys=capsys)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1
