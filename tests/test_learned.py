"""Learned scales: the gradient against its definition, the promises of the loop, and the ways in."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from flute.errors import CalibrationError, CheckpointError, IntegrationError, SpecError
from flute.integrations import folders
from flute.integrations.base import prepare_model_flute
from flute.integrations.learnable import learn_scales
from flute.learned import LearnedLinear, choose_codes, dense_weights, learned_layers
from flute.linear import LutLinear
from flute.methods import Learning, learn, losses, quantize_model
from flute.methods.calibration import token_windows
from flute.methods.capture import find_stack
from flute.quantize import quantize, spread
from flute.spec import QuantSpec
from flute.tables import named_table

PAIRS = torch.cartesian_prod(named_table("nf2"), named_table("nf2"))
SPECS = [(QuantSpec(4, 16, "nf4"), None), (QuantSpec(3, 10, "fp3"), None), (QuantSpec(2, -1, "custom", 2), PAIRS)]
NF3 = QuantSpec(3, 32, "nf3")


def windows(samples: int = 24) -> torch.Tensor:
    return torch.randint(3, 97, (samples, 64), generator=torch.Generator().manual_seed(1))


def small() -> Any:
    return tiny_models.build(num_hidden_layers=1)


def layer(spec: QuantSpec, table: Any, **options: Any) -> tuple[nn.Linear, LearnedLinear]:
    torch.manual_seed(5)
    linear = nn.Linear(24, 6)
    return linear, LearnedLinear(linear, spec, table=table, dtype=torch.float16, **options)


def test_rotated_weights_are_refused() -> None:
    """Codes would be chosen of the weight as it is, scales of the rotated one."""
    with pytest.raises(SpecError, match="hadamard_size=8"):
        layer(QuantSpec(3, 8, "nf3", hadamard_size=8), None)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "table"), SPECS, ids=str)
def test_the_gradient_is_the_difference_quotient_of_its_definition(spec: QuantSpec, table: Any) -> None:
    """L(s, T) with codes held, in float64, written out element by element."""
    _, made = layer(spec, table, learn_table=True)
    x, towards = torch.randn(7, 24), torch.randn(7, 6)
    (made(x) * towards).sum().backward()
    codes, group = made.quantized().codes.long(), spec.group(24)

    def loss(scales: torch.Tensor, values: torch.Tensor) -> float:
        weight = torch.zeros(6, 24, dtype=torch.float64)
        for n, k in itertools.product(range(6), range(24)):
            code = int(codes[n, k // spec.vector_size])
            entry = values[code] if spec.vector_size == 1 else values[code, k % 2]
            weight[n, k] = entry * scales[n, k // group]
        return float(((x.double() @ weight.T + made.bias.detach().double()) * towards).sum())

    point = [made.scales.detach().half().double(), made.table.detach().half().double()]
    for which, gradient in ((0, made.scales.grad), (1, made.table.grad)):
        for index in itertools.product(*map(range, point[which].shape)):
            up, down = [part.clone() for part in point], [part.clone() for part in point]
            up[which][index] += 1e-3
            down[which][index] -= 1e-3
            assert float(gradient[index]) == pytest.approx((loss(*up) - loss(*down)) / 2e-3, rel=1e-4, abs=1e-4)
    assert made.weight.grad is None


@pytest.mark.parametrize(("spec", "table"), SPECS, ids=str)
def test_it_computes_what_will_be_stored(spec: QuantSpec, table: Any) -> None:
    linear, made = layer(spec, table)
    begun = quantize(linear.weight, spec, table=table, scale_dtype=torch.float16)
    assert torch.equal(made.quantized().codes, begun.codes) and torch.equal(made.quantized().scales, begun.scales)
    made.scales.data *= 1 + 0.1 * torch.rand_like(made.scales)
    x, dense = torch.randn(3, 24), linear(torch.ones(24))
    finished = made.finished()
    assert isinstance(finished, LutLinear) and finished.spec == spec
    weight = finished.table.float()[made.quantized().codes.long()].flatten(1) * spread(
        finished.scales, spec.group(24), 24
    )
    torch.testing.assert_close(made(x), x @ weight.T + linear.bias, rtol=1e-6, atol=1e-6)
    with dense_weights(made):
        assert torch.equal(made(torch.ones(24)), dense)


def test_the_gradient_of_x_and_codes_of_zero_scales() -> None:
    _, made = layer(*SPECS[0], fixed_codes=True)
    x = torch.randn(2, 5, 24, requires_grad=True)
    made(x).sum().backward()
    weight = made.finished(torch.float32).dequantize()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-3, atol=1e-4)
    codes = choose_codes(torch.zeros(2, 8), torch.zeros(2, 2), named_table("nf3"), 4)
    assert torch.equal(codes, torch.full((2, 8), 3, dtype=torch.uint8))


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["nll", "kl", "block"])
@pytest.mark.parametrize("learn_table", [False, True])
def test_it_never_ends_worse_than_it_began(objective: str, learn_table: bool) -> None:
    """Also with steps so large that they only do harm."""
    model = small()
    report = quantize_model(
        model, NF3, windows(), method="nfl", learning=Learning(3, objective=objective, learn_table=learn_table)
    ).learned
    assert report is not None and report.after < report.before and report.steps == (3 if objective == "block" else 9)
    if objective == "nll":  # what was reported is what the finished model does
        assert learn.nll(model, windows()).item() == pytest.approx(report.after, rel=1e-5)
        return  # of a random model on random text great harm may be a gain
    wild, begun = small(), small()
    quantize_model(begun, NF3, method="rtn", dtype=torch.float32)
    learning = Learning(1, lr=50.0, objective=objective, scale="absmax", learn_table=learn_table)
    made = quantize_model(wild, NF3, windows(), method="nfl", learning=learning).learned
    assert made is not None and made.after == made.before and made.best_step == 0
    for name, module in begun.named_modules():
        if isinstance(module, LutLinear):
            kept = wild.get_submodule(name)
            assert torch.equal(kept.weight, module.weight) and torch.equal(kept.scales, module.scales)


def test_scales_of_kept_codes_take_smaller_steps() -> None:
    """Adam's first step is the rate itself, up or down."""
    for bits, kept, rate in ((4, False, 5e-3), (4, True, 5e-4), (3, True, 1.5e-3), (2, True, 5e-3), (2, False, 5e-3)):
        _, made = layer(QuantSpec(bits, 8, f"nf{bits}"), None, fixed_codes=kept)
        begun, x, moved = made.scales.detach().clone(), torch.randn(7, 24), []
        learn.learn(
            {"one": made}, 1, lambda index: made(x).square().sum(), Learning(epochs=1),  # noqa: B023
            on_step=lambda *_: moved.append((made.scales.detach() - begun).abs()),  # noqa: B023
        )  # fmt: skip
        torch.testing.assert_close(
            moved[0], torch.full_like(begun, rate * float(begun.abs().mean())), rtol=1e-3, atol=0
        )


def test_what_is_kept_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, activations and codes kept, or all computed anew: the same bytes; and what is kept is used."""
    results, runs = [], []
    for kept in (losses._KEPT_BYTES, 0):
        monkeypatch.setattr(losses, "_KEPT_BYTES", kept)
        model, forwards = small(), []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_, calls=forwards: calls.append(1))
        learning = Learning(2, learn_table=True)
        specs = {f"model.layers.0.mlp.{name}": NF3 for name in ("gate_proj", "down_proj")}
        learn.learn_model(model, specs, windows(), learning)
        results.append([part for layer in learned_layers(model).values() for part in layer.learnable()])
        runs.append(len(forwards))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    # 3 batches: 3 dense, 9 in evaluations, 6 in steps, 1 to see what a block keeps; else dense with each, steps twice
    assert runs == [3 + 9 + 6 + 1, 1 + 2 * 15 + 6 + 1]


def test_logits_of_hidden_states_that_do_not_lead_there_are_not_used() -> None:
    """A model that adds a block's input to the last one's output: then the dense model is run each time."""
    model, seen = tiny_models.build(), []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(_[2]) and None)
    model.model.norm.register_forward_pre_hook(lambda module, given: (given[0] + seen[-1],))
    parts, expected = [windows(2), windows(3)], model(windows(3)).logits
    dense = losses.DenseLogits(model, list(model.get_submodule(find_stack(model, ["model.layers.0"]))), parts)
    assert not dense.keeps and torch.equal(dense(1), expected)


@pytest.mark.parametrize("objective", ["kl", "block"])
def test_one_seed_one_result_also_when_interrupted(objective: str, tmp_path: Path) -> None:
    learning = Learning(4, objective=objective, save_every=1)

    def run(state: Path | None, stop: int = 1000, **changes: Any) -> Any:
        def on_step(done: int, total: int, loss: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        model = small()
        report = quantize_model(
            model, NF3, windows(), method="nfl", learning=Learning(**{**vars(learning), **changes}), state=state,
            on_step=on_step,
        )  # fmt: skip
        return model.state_dict(), report.learned

    one, two = run(None), run(tmp_path / "whole")
    for stop in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", stop)
    three = run(tmp_path / "cut")
    assert all(torch.equal(one[0][key], two[0][key]) and torch.equal(one[0][key], three[0][key]) for key in one[0])
    assert one[1] == two[1] and three[1].after == one[1].after
    assert any("went on at step" in note for note in three[1].notes)
    with pytest.raises(CheckpointError, match="other options"):
        run(tmp_path / "cut", lr=1e-3)
    for file in (tmp_path / "cut").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path / "cut")
    if objective == "kl":
        other = run(None, seed=1)[0]
        assert any(not torch.equal(one[0][key], other[key]) for key in other)


@pytest.mark.parametrize(
    ("method", "spec", "learn_table"),
    [("gptq", NF3, True), ("awq+gptq", NF3, False), ("best", QuantSpec(2, 24, "custom", 2), True)],
    ids=str,
)
def test_learning_goes_on_from_another_methods_codes(method: str, spec: QuantSpec, learn_table: bool) -> None:
    """It begins at what that method gives, keeps its codes, and is nearer to the dense model in the end."""
    dense, first, model = small(), small(), small()
    quantize_model(first, spec, windows(), method=method)
    report = quantize_model(
        model, spec, windows(), method=f"{method}+nfl", learning=Learning(3, 5e-3, learn_table=learn_table)
    )
    truth, guess = (each(windows()).logits.log_softmax(-1).flatten(0, 1) for each in (dense, first))
    begun = nn.functional.kl_div(guess, truth, log_target=True, reduction="batchmean")
    made = report.learned
    assert made is not None and made.before == pytest.approx(begun.item(), rel=1e-4) and made.after < 0.99 * made.before
    assert len(report.layers) == 7 and all(layer.error is not None for layer in report.layers)
    for layer in report.layers:
        one, two = (each.get_submodule(layer.name) for each in (first, model))
        assert torch.equal(one.weight, two.weight) and not torch.equal(one.scales, two.scales)
        assert layer.spec == two.spec and (two.spec.table == "custom") is learn_table
        assert learn_table is (not torch.equal(one.table, two.table))


def test_a_rotation_is_refused_before_the_work() -> None:
    seen: list[str] = []
    with pytest.raises(SpecError, match="hadamard_size=8"):
        quantize_model(
            small(), QuantSpec(3, 24, "nf3", hadamard_size=8), windows(), method="gptq+nfl",
            progress=lambda name, weights: seen.append(name),
        )  # fmt: skip
    assert not seen


def test_a_loss_that_is_not_finite_ends_learning_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = learn.nll, []

    def broken(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return true(model, tokens) * (float("nan") if calls.count(True) >= 5 and calls[-1] else 1.0)

    monkeypatch.setattr(learn, "nll", broken)
    model = small()
    report = quantize_model(model, NF3, windows(), method="nfl", learning=Learning(3, objective="nll"))
    assert report.learned is not None and report.learned.steps == 4 and report.learned.best_step in (0, 3)
    assert report.notes == ["loss or gradient not finite at step 5 of 9: learning ended there"]
    assert bool(torch.isfinite(model(windows(1)).logits).all())


def test_what_cannot_be_learned_is_refused_in_one_line() -> None:
    broken = small()
    broken.model.norm.weight.data[3] = float("nan")
    for model, given, options, message in [
        (broken, windows(), {}, "calibration loss is nan before the first step"),
        (small(), None, {}, "needs calibration windows"),
        (small(), windows() + 90, {}, "the model knows 0 to 96"),
        (small(), windows(), {"epochs": 0}, "above zero"),
        (small(), windows(), {"lr": float("nan")}, "above zero"),
        (small(), windows(), {"relative": False}, "relative=False wants an lr"),
        (small(), windows(), {"objective": "mse"}, "use nll, kl, block"),
        (small(), windows(), {"learn_table": "row"}, "tables per row gain less than smaller groups"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            quantize_model(model, NF3, given, method="nfl", learning=Learning(**options))  # type: ignore[arg-type]


# ---- upstream's name -------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer without a pad token, without anything: a letter is a token."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}


TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20, "pack my box with five dozen liquor jugs. " * 4]


@pytest.mark.parametrize("fake", [False, True])
def test_learn_scales_and_then_prepare(fake: bool) -> None:
    model = small()
    made = learn_scales(
        model=model, tokenizer=Letters(), num_bits=3, group_size=32, custom_corpora=TEXTS, samples=4, lr=1e-3
    )
    assert made is model and len(learned_layers(model)) == 7 and type(model.lm_head) is nn.Linear
    plain, before = small(), {name: module.quantized() for name, module in learned_layers(model).items()}
    prepare_model_flute("model.layers", plain.model.layers, 3, 32)
    expected = model(windows(2)).logits.detach()
    with pytest.raises(IntegrationError, match="learned for nf3 3bit g32, not for nf4 4bit g32"):
        prepare_model_flute("model.layers", model.model.layers, 4, 32)
    prepare_model_flute("model.layers", model.model.layers, 3, 32, fake=fake)
    assert not learned_layers(model)
    torch.testing.assert_close(model(windows(2)).logits, expected, rtol=1e-4, atol=1e-4)
    if not fake:
        assert all(torch.equal(model.get_submodule(name).scales, each.scales) for name, each in before.items())
        assert any(not torch.equal(plain.get_submodule(name).scales, each.scales) for name, each in before.items())


def test_the_start_is_the_searched_scales_unless_asked_for_upstreams() -> None:
    """With a step that moves nothing, what is left of learning is where it began."""
    text, found = (folders.embedded() / "heldout.txt").read_text()[:20000], {}
    for name, options in {"mse": {}, "absmax": {"scale": "absmax"}}.items():
        model, tokenizer = folders.load(folders.find("tiny"), dtype=torch.float32)
        weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        learn_scales(model, tokenizer, 2, 64, [text], samples=1, window=128, lr=1e-12, **options)
        begun = quantize(weight, QuantSpec(2, 64, "nf2"), scale=name, scale_dtype=torch.float32).scales
        torch.testing.assert_close(model.model.layers[0].mlp.up_proj.scales, begun, rtol=1e-4, atol=1e-8)
        found[name] = learn.nll(model, token_windows(tokenizer, {"": text}, samples=1, length=128)).item()
    assert found["mse"] < found["absmax"] - 1


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        (None, "no list of texts"),
        ("one text", "no list of texts"),
        ([TEXTS[0], " "], r"empty \(custom_corpora\[1\]\)"),
        ([TEXTS[0], "short"], r"custom_corpora\[1\].*has 5 tokens, a window 64"),
    ],
)
def test_corpora_that_cannot_serve(corpora: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        learn_scales(small(), Letters(), custom_corpora=corpora)
    with pytest.raises(CalibrationError, match="float16 model underflow"):
        learn_scales(small().half(), Letters(), custom_corpora=TEXTS)
