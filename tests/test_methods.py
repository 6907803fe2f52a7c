"""Calibrated methods: the arithmetic against plain definitions, then whole models."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from flute.config import ModelSpec
from flute.errors import CalibrationError, FluteError, IntegrationError, QuantizeError, SpecError
from flute.linear import LutLinear
from flute.methods import RECIPES, awq, capture, gptq, quantize_model, refine, token_windows
from flute.methods.calibration import check_windows
from flute.methods.capture import Moments
from flute.methods.hessian import DAMPING, damped, dense_target, inverse_factor, loss
from flute.methods.recipes import solve
from flute.quantize import quantize, spread
from flute.spec import QuantSpec
from flute.tables import named_table

PAIRS = torch.cartesian_prod(named_table("nf2"), named_table("nf2"))
SPECS = [
    (QuantSpec(4, 64, "nf4"), None),
    (QuantSpec(3, 40, "fp3"), None),  # the last group is short
    (QuantSpec(2, -1, "int2"), None),
    (QuantSpec(2, 48, "custom", 2), PAIRS),
]


def weights(rows: int = 24, width: int = 144) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def inputs(tokens: int = 600, width: int = 144) -> torch.Tensor:
    """Correlated, of unlike sizes."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator) ** 2
    return torch.randn(tokens, width, generator=generator) @ mix


def known(x: torch.Tensor) -> Moments:
    return Moments((x.T @ x).double(), None)


def solved(w: torch.Tensor, x: Moments, spec: QuantSpec, method: str, table: Any = None) -> Any:
    return solve(w, x, spec, RECIPES[method], table=table, scale_dtype=torch.float16)


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "table"), SPECS, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_without_correlation_it_is_rounding_to_nearest(spec: QuantSpec, table: Any, act_order: bool) -> None:
    w = weights()
    made = quantize(w, spec, table=table, scale_dtype=torch.float16)
    values = (named_table(spec.table) if table is None else table).half().float()
    wide = spread(made.scales, spec.group(144), 144)
    diagonal = (
        torch.rand(144, generator=torch.Generator().manual_seed(0)) + 0.5 if spec.vector_size == 1 else torch.ones(144)
    )
    codes = gptq.round_with_feedback(w, damped(torch.diag(diagonal)), wide, gptq.as_pairs(values), act_order=act_order)
    assert torch.equal(codes, made.codes.long())


def test_each_column_is_made_up_for_by_those_left() -> None:
    """Against the definition: after a column is rounded, the others move to where the error is least."""
    w, made = weights(5, 12).double(), damped(inputs(60, 12).T @ inputs(60, 12))
    table = named_table("nf3")
    h, left = made.matrix.double(), w.clone()
    order = gptq.column_order(made.matrix.diagonal(), 1).tolist()
    expected = torch.zeros(5, 12, dtype=torch.int64)
    for position, column in enumerate(order):
        expected[:, column] = (left[:, column, None].float() - table).abs().argmin(-1)
        rest = order[position + 1 :]
        error = left[:, column] - table[expected[:, column]]
        if rest:  # minimise over the rest: H_rr d = H_rc error
            left[:, rest] += torch.linalg.solve(h[rest][:, rest], torch.outer(h[rest][:, column], error)).T
    codes = gptq.round_with_feedback(w.float(), made, torch.ones(5, 12), table[:, None])
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(("spec", "table"), SPECS, ids=str)
def test_feedback_and_refinement_lower_the_output_error(spec: QuantSpec, table: Any) -> None:
    w, x = weights(), known(inputs())
    errors = [solved(w, x, spec, method, table).error for method in ("rtn", "gptq", "best")]
    assert errors[2] < errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("vector", [1, 2])
def test_no_step_of_refinement_raises_the_error(vector: int) -> None:
    w, made = weights(), damped(known(inputs()).hessian)
    spec = QuantSpec(2, 40, "custom", vector)
    table = (PAIRS if vector == 2 else named_table("nf2")).half().float()
    begun = quantize(w, spec, table=table, scale_dtype=torch.float16)
    codes, scales, table = begun.codes.long(), begun.scales, gptq.as_pairs(table)

    def error() -> float:
        return float(loss(w - gptq.decode(codes, spread(scales, 40, 144), table), made.matrix).sum())

    errors = [error()]
    for _ in range(2):
        scales = refine.fit_scales(w, made.matrix, codes, scales, table, 40)
        errors.append(error())
        table = refine.fit_table(w, made.matrix, codes, spread(scales, 40, 144), table, torch.float16)
        errors.append(error())
        codes = refine.sweep_codes(w, made.matrix, codes, spread(scales, 40, 144), table)
        errors.append(error())
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]


def test_fitted_scales_and_table_are_the_least_squares_solution() -> None:
    w, x = weights(4, 24), inputs(200, 24)
    made, table = damped(x.T @ x), named_table("int2")[:, None]
    begun = quantize(w, QuantSpec(2, 8, "int2"), scale_dtype=torch.float32)
    codes, scales = begun.codes.long(), begun.scales
    root = torch.linalg.cholesky(made.matrix.double())
    fitted = refine.fit_scales(w, made.matrix, codes, scales, table, 8)
    for row in range(4):
        basis = torch.zeros(24, 3, dtype=torch.float64)
        for g in range(3):
            basis[8 * g : 8 * g + 8, g] = table[codes[row, 8 * g : 8 * g + 8], 0].double()
        exact = torch.linalg.lstsq(root.T @ basis, root.T @ w[row].double()).solution
        torch.testing.assert_close(fitted[row].double(), exact, rtol=1e-3, atol=1e-4)
    wide = spread(scales, 8, 24)
    basis = torch.stack([(root.T @ ((codes == entry) * wide).T.double()).flatten() for entry in range(4)], 1)
    exact = torch.linalg.lstsq(basis, (root.T @ w.T.double()).flatten()).solution
    found = refine.fit_table(w, made.matrix, codes, wide, table, torch.float32)
    torch.testing.assert_close(found[:, 0].double(), exact, rtol=1e-2, atol=1e-2)


# ---- what is known of the inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_singular_hessian_is_damped_until_it_serves(rank: int) -> None:
    x = torch.zeros(8, 144)
    x[:rank] = inputs(rank, 144) if rank else x[:rank]
    x[:, 3] = 0
    made = damped(x.T @ x)
    assert made.dead == (144 if rank == 0 else 1) and made.share >= DAMPING
    upper = inverse_factor(made.factor).double()
    torch.testing.assert_close(upper.T @ upper @ made.matrix.double(), torch.eye(144).double(), rtol=1e-2, atol=1e-2)
    result = solved(weights(), known(x), QuantSpec(3, 64, "nf3"), "gptq")
    assert bool(torch.isfinite(result.weight).all())


def test_damping_grows_for_a_matrix_that_is_not_positive() -> None:
    made = damped(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    assert made.share > 1 and bool(torch.isfinite(made.factor).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_damaged_hessian_is_refused(value: float) -> None:
    bad = torch.eye(4)
    bad[1, 1] = value
    with pytest.raises(QuantizeError, match=r"layer 'here'.*Hessian"):
        damped(bad, name="here")
    with pytest.raises(QuantizeError, match="square"):
        damped(torch.ones(3, 4))


def test_the_dense_target_is_least_squares() -> None:
    x, w = inputs(300, 16), weights(6, 16)
    changed = x + 0.3 * inputs(300, 16).roll(7, 0)
    made = damped(changed.T @ changed, share=1e-9)
    shift = w.double() @ ((x - changed).T @ changed).double()
    exact = torch.linalg.lstsq(changed.double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close(dense_target(w, made, shift).double(), exact, rtol=1e-2, atol=1e-2)
    assert torch.equal(dense_target(w, made, None), w)


# ---- calibration text ------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer without a pad token, without anything: a letter is a token."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}


def test_windows_are_drawn_by_seed() -> None:
    texts = {"one": "abcdefghij" * 20, "two": "klmnopqrst" * 3}
    first = token_windows(Letters(), texts, samples=4, length=16, seed=1)
    assert first.shape == (4, 16) and torch.equal(first, token_windows(Letters(), texts, samples=4, length=16, seed=1))
    assert not torch.equal(first, token_windows(Letters(), texts, samples=4, length=16, seed=2))
    assert len(token_windows(Letters(), texts, samples=1000, length=16)) == 200 // 16 + 30 // 16


@pytest.mark.parametrize(
    ("texts", "message"),
    [({}, "empty"), ({"a.txt": " \n"}, r"empty \(a.txt\)"), ({"a.txt": "short"}, "has 5 tokens, a window 16")],
)
def test_text_that_cannot_serve_is_refused(texts: dict[str, str], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        token_windows(Letters(), texts, length=16)


def test_windows_must_fit_the_model() -> None:
    good = torch.zeros(2, 8, dtype=torch.int64)
    check_windows(good, 97, 64)
    with pytest.raises(CalibrationError, match="token 97"):
        check_windows(good + 97, 97, 64)
    with pytest.raises(CalibrationError, match="8 tokens, the model was made for 4"):
        check_windows(good, 97, 4)
    with pytest.raises(CalibrationError, match="int64"):
        check_windows(good.float(), 97, 64)


# ---- whole models ----------------------------------------------------------------------------------------------------


def windows() -> torch.Tensor:
    return torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distance(model: nn.Module, logits: torch.Tensor) -> float:
    return float((model(windows()).logits - logits).norm() / logits.norm())


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX"])
def test_methods_in_the_order_of_their_effort(family: str) -> None:
    with torch.no_grad():
        logits = tiny_models.build(family)(windows()).logits
    far = {}
    for method in ("rtn", "gptq", "best"):
        model = tiny_models.build(family)
        spec = QuantSpec(3, 32, "custom", 2) if method == "best" else QuantSpec(3, 32, "nf3")
        report = quantize_model(model, spec, windows(), method=method)
        assert len(report.layers) == sum(isinstance(module, LutLinear) for module in model.modules())
        far[method] = distance(model, logits)
    assert far["best"] < far["gptq"] < far["rtn"]


def test_the_order_of_columns_is_a_choice() -> None:
    """It changes the codes of a whole model, and either is nearer to the dense one than rounding to nearest."""
    with torch.no_grad():
        logits = tiny_models.build()(windows()).logits
    models, far = [], []
    for options in ({"method": "rtn"}, {"method": "gptq"}, {"method": "gptq", "act_order": False}):
        models.append(tiny_models.build())
        quantize_model(models[-1], QuantSpec(3, 32, "nf3"), windows(), **options)  # type: ignore[arg-type]
        far.append(distance(models[-1], logits))
    _, one, two = (model.model.layers[1].mlp.down_proj for model in models)
    assert not torch.equal(one.weight, two.weight) and torch.equal(one.table, two.table) and max(far[1:]) < far[0]


@pytest.mark.parametrize("method", ["awq+gptq", "best"])
def test_the_same_seed_gives_the_same_bytes_and_a_checkpoint_that_loads(method: str, tmp_path: Path) -> None:
    spec = QuantSpec(2, 32, "custom", 2) if method == "best" else QuantSpec(4, 32, "nf4")
    for folder in ("one", "two"):
        model = tiny_models.build()
        quantize_model(model, spec, windows(), method=method, dtype=torch.float16)
        model.save_pretrained(tmp_path / folder)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert first == second
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded = tiny_models.load(tmp_path / "one")
    assert loaded.dtype == torch.float16 and tiny_models.equal_states(loaded, model)


def folded(model: nn.Module) -> list[str]:
    """Fold every block and quantize nothing; what was left."""
    prefix = capture.find_stack(model, tiny_models.dense_linears(model))
    stack = capture.record(model, prefix, windows())
    left = []
    for block, call in zip(stack.blocks, stack.calls, strict=True):
        names = list(tiny_models.dense_linears(block))
        groups = capture.stages(block, names, stack.hidden[0], call)
        specs = dict.fromkeys(names, QuantSpec(3, 32, "nf3"))
        alphas, missed = awq.fold_block(
            block, groups, specs, stack.hidden, call, head_dim=12, scale_dtype=torch.float16
        )
        assert any(alphas.values())
        left += missed
    return left


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("Llama", []),  # grouped-query heads
        ("Gemma2", []),  # norms multiply by one plus their weight
        ("Phi3", ["self_attn.o_proj", "mlp.down_proj"] * 2),  # q, k, v are one matrix, gate and up another
        ("OPT", ["fc2"] * 2),  # an activation lies between
    ],
)
def test_folding_changes_nothing_where_it_is_done(family: str, left: list[str]) -> None:
    changes = {"word_embed_proj_dim": 72, "ffn_dim": 120} if family == "OPT" else {}
    model = tiny_models.build(family, **changes)
    with torch.no_grad():
        logits = model(windows()).logits
    assert folded(model) == left and distance(model, logits) < 1e-4


def test_layers_that_no_token_reaches_are_rounded_and_reported() -> None:
    model = tiny_models.build()
    report = quantize_model(model, ModelSpec(QuantSpec(4, 32, "nf4"), lm_head=True), windows(), method="gptq")
    (head,) = [layer for layer in report.layers if layer.name == "lm_head"]
    assert head.error is None and "rounded to nearest" in head.note
    assert isinstance(model.lm_head, LutLinear) and not model.config.tie_word_embeddings


def test_bad_input_is_refused_in_one_line() -> None:
    spec = QuantSpec(4, 32, "nf4")
    for arguments, message in [
        ({"method": "no"}, "rtn, gptq"),
        ({"method": "gptq"}, "needs calibration windows"),
        ({"windows": windows() + 90, "method": "gptq"}, "the model knows 0 to 96"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            quantize_model(tiny_models.build(), spec, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="custom"):
        quantize_model(tiny_models.build(), QuantSpec(4, 32, "custom"), windows(), method="gptq")
    model = tiny_models.build()
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        quantize_model(model, spec, windows(), method="gptq")
    model = tiny_models.build()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(FluteError, match=r"layers\.1\.mlp\.up_proj"):
        quantize_model(model, spec, windows(), method="gptq")


def test_a_model_that_is_no_chain_of_blocks_is_refused() -> None:
    model = tiny_models.build()
    second = model.model.layers[1]
    call = type(second).__call__

    class Shifted(type(second)):  # type: ignore[misc]
        def __call__(self, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            return call(self, hidden + 1, *arguments, **keywords)

    second.__class__ = Shifted
    with pytest.raises(IntegrationError, match="not called with what the block before"):
        quantize_model(model, QuantSpec(4, 32, "nf4"), windows(), method="gptq")
