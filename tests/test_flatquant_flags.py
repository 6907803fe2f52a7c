"""FlatQuant's rarer flags: rounded queries, values transformed while the model runs, groups of weights, GPTQ's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from flute.commands import flatquant
from flute.commands.flat_published import job_of, main, parser
from flute.errors import CalibrationError, CheckpointError, FluteError, SpecError
from flute.flatquant.fake import fake
from flute.flatquant.matrices import Matrices
from flute.flatquant.rounding import grouped
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import blocks_of
from flute.methods.flat_folder import FlatJob, learn
from flute.methods.flat_gptq import Feedback
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

WINDOWS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
WEIGHTS_ONLY = PRESETS["w4a16"]


def closed_form(spec: FlatSpec) -> tuple[Any, list[Matrices]]:
    model = tiny_models.build()
    return model, calibrate(model, spec, WINDOWS, None, Schedule(epochs=0), batch=2)[0]


def asked(*flags: str) -> FlatJob:
    return job_of(parser().parse_args(["--model", "tiny", *" ".join(flags).split()]))


PUBLISHED = """model seed hf_token a_bits a_groupsize a_asym w_bits w_groupsize w_asym gptq gptq_mse percdamp
    act_order epochs cali_dataset nsamples cali_bsz flat_lr cali_trans add_diag lwc lac resume
    save_matrix reload_matrix matrix_path diag_init diag_alpha warmup deactive_amp direct_inv
    separate_vtrans q_bits q_asym q_groupsize k_bits k_asym k_groupsize v_bits v_asym v_groupsize
    output_dir exp_name lm_eval tasks lm_eval_batch_size distribute_model quantized_save"""


def test_every_published_flag_is_taken() -> None:
    assert set(PUBLISHED.split()) <= set(vars(parser().parse_args(["--model", "tiny", "--epoch", "3"])))


def test_flags_are_what_they_say() -> None:
    job = asked("--w_bits 4 --q_bits 8 --q_asym --q_groupsize 64 --w_groupsize 128 --separate_vtrans --w_asym")
    assert job.spec == FlatSpec(
        4, 16, 16, 16, w_asym=True, k_asym=False, v_asym=False, separate_clips=True, q_bits=8, q_asym=True,
        w_groupsize=128, separate_vtrans=True,
    )  # fmt: skip
    assert job.gptq is None and asked("--gptq").gptq == Feedback(0.01, act_order=False)
    assert asked("--gptq --percdamp 0.1 --act_order --distribute_model --hf_token x").gptq == Feedback(0.1, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--gptq_mse", "--lwc"), ("--a_groupsize 128", "leave it at -1"), ("--w_groupsize 0", "w_groupsize=0"),
     ("--q_bits 12", "q_bits=12"), ("--gptq --percdamp 0", "percdamp=0.0")],
)  # fmt: skip
def test_what_is_refused_says_why(flags: str, words: str) -> None:
    with pytest.raises(FluteError, match=words) as refusal:
        asked(flags)
    assert "\n" not in str(refusal.value)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="w_groupsize=16 does not divide the 72 columns"):
        closed_form(replace(WEIGHTS_ONLY, w_groupsize=16))
    with pytest.raises(SpecError, match="groups of weights on 4-bit activations"):
        FlatSpec(w_groupsize=24).check_storable()


def test_what_cannot_be_saved_is_refused_before_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("words")  # too few to calibrate with
    flags = f"--model tiny --w_bits 4 --quantized_save --cali_dataset {tmp_path}/text --output_dir {tmp_path}/out"
    for more in ("--a_bits 4 --w_groupsize 8", "--w_asym", "--a_bits 8 --a_asym --w_asym"):
        assert main([*flags.split(), *more.split()]) == 1
        err = capsys.readouterr().err
        assert "evaluated, not saved" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("out/**/config.json"))


def test_error_feedback_needs_a_text() -> None:
    with pytest.raises(CheckpointError, match="--gptq"):
        learn(None, None, FlatJob(FlatSpec(), gptq=Feedback()), device="cpu", state=None, on_step=lambda *_: None)
    with pytest.raises(CalibrationError, match="percdamp"):
        Feedback(damping=float("nan"))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_queries_are_rounded_as_they_go_into_attention(asymmetric: bool) -> None:
    spec = FlatSpec(q_bits=4, q_asym=asymmetric)
    model, matrices = closed_form(spec)
    assert matrices[0].clips["query"].shape == (2,) and float(matrices[0].clips["query"].max()) < 1
    apply(model, spec, matrices)
    heads = blocks_of(model)[1][1].self_attn.heads
    assert torch.equal(heads.q_clip.data, matrices[1].clips["query"])
    given = torch.randn(1, 5, 6, 12), torch.randn(1, 5, 2, 12), torch.ones(1, 5, 12), torch.zeros(1, 5, 12)
    rounded, heads.q_bits = heads(*given)[0], 16
    turned = heads(*given)[0]
    assert torch.equal(rounded, fake(turned, 4, symmetric=not asymmetric, clip=heads.q_clip))
    assert 8 < max(len(row.unique()) for row in rounded.reshape(-1, 12)) <= 12 < 16 < len(turned.unique())


def test_values_are_transformed_when_the_model_runs() -> None:
    """v_proj is left without P_v, which turns what it gives; o_proj is the same."""
    joined = FlatSpec(w_bits=16, a_bits=16, v_bits=4)
    _, matrices = closed_form(joined)
    models = tiny_models.build(), tiny_models.build()
    for model, spec in zip(models, (joined, replace(joined, separate_vtrans=True)), strict=True):
        apply(model, spec, matrices, real=False)
    one, other = (blocks_of(model)[1][0].self_attn for model in models)
    turn = matrices[0].factors["out_right"]
    assert one.heads.value is None and torch.equal(other.heads.value, turn)
    v = torch.randn(1, 2, 5, 12)
    assert torch.equal(other.heads.turned_values(v), v @ turn) and one.heads.turned_values(v) is v
    turned = (turn.T @ other.v_proj.weight.view(2, 12, 72)).flatten(0, 1)
    assert torch.allclose(turned, one.v_proj.weight, atol=1e-5)
    assert not torch.allclose(other.v_proj.weight, one.v_proj.weight, atol=0.1)
    assert torch.equal(one.o_proj.weight, other.o_proj.weight)


@pytest.mark.parametrize("size", [-1, 24, 6])
def test_groups_in_a_checkpoint_are_those_of_the_simulation(size: int) -> None:
    spec = replace(WEIGHTS_ONLY, w_groupsize=size)
    _, matrices = closed_form(spec)
    simulated, real = tiny_models.build(), tiny_models.build()
    apply(simulated, spec, matrices, real=False)
    apply(real, spec, matrices)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        one, other = (blocks_of(each)[1][0].get_submodule(name) for each in (simulated, real))
        assert torch.equal(one.weight, other.dequantize())
        rows = grouped(one.weight.detach(), size)
        assert max(len(group.unique()) for group in rows.flatten(0, 1)) <= 16
        assert other.scales.shape == rows.shape[:2]


@pytest.mark.parametrize("change", [{}, {"w_asym": True}, {"w_groupsize": 24}], ids=str)
def test_error_feedback_helps_every_grid(change: dict[str, Any]) -> None:
    spec = replace(PRESETS["w3a16"], **change)
    windows = torch.randint(3, 97, (32, 16), generator=torch.Generator().manual_seed(1))
    model = tiny_models.build()
    matrices, _ = calibrate(model, spec, windows, None, Schedule(epochs=0), batch=8)
    truth, errors = model(windows).logits, []
    for options in ({}, {"windows": windows}, {"windows": windows, "feedback": Feedback(0.1, act_order=False)}):
        made = tiny_models.build()
        apply(made, spec, matrices, real=False, **options)
        errors.append(float((made(windows).logits - truth).detach().norm()))
    assert max(errors[1:]) < errors[0] and errors[1] != errors[2]


def test_a_gpu_learns_in_bfloat16_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[bool] = []
    monkeypatch.setattr(flatquant, "run", lambda model, output, job, *rest, **more: asked_for.append(job.schedule.amp))
    for device, amp in (("cpu", None), ("cuda", None), ("cuda", False), ("cpu", True)):
        flatquant.flatquant("tiny", Path("out"), device=device, amp=amp)
    assert asked_for == [False, True, False, True]
    for flags, amp in (("--device cpu", False), ("--device cuda", True), ("--device cuda --deactive_amp", False)):
        assert asked(flags).schedule.amp == amp
