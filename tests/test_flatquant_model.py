"""FlatQuant on whole models: calibration, what interrupts and damages it, checkpoints, caches, folders."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from flat_models import save_calibrated
from safetensors.torch import load_file, save_file

from flute.commands.flatness import draw
from flute.errors import CalibrationError, CheckpointError, IntegrationError
from flute.evaluate.flat import perplexities
from flute.flatquant.matrices import Matrices
from flute.flatquant.modules import Codes, IntLinear
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import blocks_of, int4_cache
from flute.integrations.flatquant import mark_flat
from flute.methods import flat_train, flatness
from flute.methods.flat_folder import FlatJob, flatquant_folder, load_matrices, save_matrices
from flute.methods.flat_start import Start
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

WINDOWS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
SHORT = Schedule(epochs=8, lr=1e-2)


def quantized(model: Any, spec: FlatSpec, matrices: list[Matrices], **options: Any) -> Any:
    made = copy.deepcopy(model)
    apply(made, spec, matrices, **options)
    return made


def same(one: list[Matrices], other: list[Matrices]) -> bool:
    pairs = [(a.to_tensors(), b.to_tensors()) for a, b in zip(one, other, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_calibration_lowers_the_error_and_leaves_the_model_alone(family: str) -> None:
    model = tiny_models.build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = []
    matrices, report = calibrate(
        model, FlatSpec(), WINDOWS, None, SHORT, batch=2, on_step=lambda done, total, loss: steps.append((done, total))
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(block.after < block.before for block in report.blocks) and not report.notes
    assert steps == [(i + 1, 32) for i in range(32)]  # 2 blocks, 8 epochs, 2 batches
    truth, ids = model(WINDOWS).logits, WINDOWS
    plain = quantized(model, FlatSpec(), [Matrices(), Matrices()], real=False)
    flat = quantized(model, FlatSpec(), matrices, real=False)
    assert (flat(ids).logits - truth).norm() < (plain(ids).logits - truth).norm()


@pytest.mark.parametrize("options", [{"factors": "hadamard"}, {"direct": True}, {"diagonal": "one_style"}], ids=str)
def test_other_starts_learn_too(options: dict[str, Any]) -> None:
    _, report = calibrate(tiny_models.build(), FlatSpec(separate_clips=True), WINDOWS, Start(**options), SHORT, batch=2)
    assert all(block.after < block.before for block in report.blocks)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    model = tiny_models.build()
    whole, _ = calibrate(model, FlatSpec(), WINDOWS, None, SHORT, batch=2)

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 20:
            raise KeyboardInterrupt("in the second block")

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, FlatSpec(), WINDOWS, None, SHORT, batch=2, state=tmp_path, on_step=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    seen: list[int] = []
    resumed, _ = calibrate(
        model, FlatSpec(), WINDOWS, None, SHORT, batch=2, state=tmp_path, on_step=lambda done, *_: seen.append(done)
    )
    assert same(resumed, whole) and min(seen) == 17
    with pytest.raises(CheckpointError, match="other options"):
        calibrate(model, FlatSpec(a_bits=8), WINDOWS, None, SHORT, batch=2, state=tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_nan_is_stepped_back_from(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_loss, true_step, count = flat_train.Job.loss, torch.optim.AdamW.step, [0]

    def loss(self: Any, learned: Any, index: int) -> torch.Tensor:
        found = true_loss(self, learned, index)
        if not torch.is_grad_enabled():
            return found
        count[0] += 1
        if count[0] == 3 and where == "loss":
            return found * float("nan")
        if count[0] == 3 and where == "gradient":
            found.register_hook(lambda gradient: gradient * float("nan"))
        return found

    def step(self: Any, *arguments: Any) -> None:
        true_step(self, *arguments)
        if count[0] == 3 and where == "parameter":
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(flat_train.Job, "loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    far = Start(factors="identity", diagonal="one_style")  # where there is much to learn
    matrices, report = calibrate(tiny_models.build(), FlatSpec(), WINDOWS, far, SHORT, batch=2)
    (note,) = (note for note in report.notes if "not finite" in note)
    assert note.startswith("block 0: step 3" if where != "parameter" else "block 0: stepped back after step 3")
    assert report.blocks[0].after < report.blocks[0].before
    assert all(torch.isfinite(tensor).all() for each in matrices for tensor in each.to_tensors().values())


def test_a_singular_transform_is_stepped_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries learned one by one may leave a matrix without inverse: that ends no run, and is not kept."""
    true_step, count = torch.optim.AdamW.step, [0]

    def step(self: Any, *arguments: Any) -> None:
        true_step(self, *arguments)
        count[0] += 1
        if count[0] == 5:
            self.param_groups[0]["params"][0].data[0] = 0

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    matrices, report = calibrate(tiny_models.build(), FlatSpec(), WINDOWS, Start(direct=True), SHORT, batch=2)
    assert [note.split(" of ")[0] for note in report.notes] == ["block 0: step 6", "block 0: stepped back after step 7"]
    assert report.blocks[0].after < report.blocks[0].before
    model = tiny_models.build()
    apply(model, FlatSpec(), matrices)
    matrices[1].factors["attn_left"].zero_()
    with pytest.raises(CalibrationError, match="singular"):
        apply(tiny_models.build(), FlatSpec(), matrices)


def test_a_damaged_model_is_refused() -> None:
    model = tiny_models.build()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises((CalibrationError, IntegrationError)):
        calibrate(model, FlatSpec(), WINDOWS, None, SHORT, batch=2)


def test_another_kind_of_block_is_refused() -> None:
    with pytest.raises(IntegrationError, match="Llama"):
        calibrate(tiny_models.build("Gemma"), FlatSpec(), WINDOWS, None, SHORT, batch=2)


def test_error_feedback_lowers_the_error_of_weights() -> None:
    model = tiny_models.build()
    spec = FlatSpec(w_bits=3, a_bits=16, k_bits=16, v_bits=16)
    windows = torch.randint(3, 97, (32, 16), generator=torch.Generator().manual_seed(1))
    matrices, _ = calibrate(model, spec, windows, None, Schedule(epochs=0), batch=8)
    truth = model(windows).logits
    nearest, feedback = (
        (quantized(model, spec, matrices, windows=each)(windows).logits - truth).norm() for each in (None, windows)
    )
    assert feedback < nearest


@pytest.mark.parametrize(  # with 4-bit activations one rounding the other way changes all
    "spec", [PRESETS["w8a8"], PRESETS["w4a16"], replace(PRESETS["w8a8"], w_asym=True)], ids=["w8a8", "w4a16", "w_asym"]
)
def test_the_real_model_is_the_simulated_one(spec: FlatSpec) -> None:
    model = tiny_models.build("Qwen3")
    matrices, _ = calibrate(model, spec, WINDOWS, None, Schedule(epochs=0), batch=2)
    simulated, real = (quantized(model, spec, matrices, real=each) for each in (False, True))
    block, other = blocks_of(simulated)[1][0], blocks_of(real)[1][0]
    x = torch.randn(1, 5, 72)
    (numbers,) = block.self_attn.input_transform(block.input_layernorm(x))
    (given,) = other.self_attn.input_transform(other.input_layernorm(x))
    if isinstance(given, Codes):
        given = (given.codes * given.scale.unsqueeze(-1)).view_as(x)
    assert torch.equal(numbers, given)  # norm, transform, clip and rounding: bit for bit
    truth = simulated(WINDOWS).logits
    assert float((real(WINDOWS).logits - truth).detach().norm() / truth.norm()) < 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_pass_through_16_bit_activations(compiled: bool) -> None:
    """Those of the simulated model, which torch derives; compiled, too."""
    model = tiny_models.build("Qwen3")
    matrices, _ = calibrate(model, PRESETS["w4a16"], WINDOWS, None, Schedule(epochs=0), batch=2)
    simulated, real = (quantized(model, PRESETS["w4a16"], matrices, real=each) for each in (False, True))
    run = torch.compile(real, backend="aot_eager") if compiled else real
    start = model.get_input_embeddings()(WINDOWS).detach()
    grads = []
    for each in (simulated, run):
        x = start.clone().requires_grad_()
        each(inputs_embeds=x).logits.square().mean().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.01


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_transforms_loads(tmp_path: Path) -> None:
    """Nothing learned, rounded to nearest: the factors in the file are identities."""
    model = tiny_models.build("Qwen2").half()
    matrices = [Matrices() for _ in blocks_of(model)[1]]
    apply(model, PRESETS["w4a4kv4"], matrices)
    mark_flat(model, PRESETS["w4a4kv4"])
    model.save_pretrained(tmp_path)
    assert tiny_models.equal_states(tiny_models.load(tmp_path), model)


STORED = PRESETS | {
    "w_asym": FlatSpec(w_asym=True, down_bits=8), "a_asym": FlatSpec(a_asym=True),
    "queries": FlatSpec(q_bits=4, q_asym=True, separate_vtrans=True),
    "groups": replace(PRESETS["w4a16"], w_groupsize=24),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    spec = STORED[name]
    model = save_calibrated(tmp_path, spec, WINDOWS, "Qwen2", tie_word_embeddings=name == "w8a8")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == spec.to_dict()
    loaded = tiny_models.load(tmp_path)
    assert tiny_models.equal_states(loaded, model)
    trained, same_trained = ({n: p.requires_grad for n, p in each.named_parameters()} for each in (loaded, model))
    assert trained == same_trained and not any(
        learns for n, learns in trained.items() if "transform" in n or "heads" in n
    )
    ids = tiny_models.prompt()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = tiny_models.load(tmp_path, dtype=torch.bfloat16)  # scales and clips stay float32
    floats = {p.dtype for name, p in again.named_parameters() if "clip" in name or "weight_scale" in name}
    assert floats <= {torch.float32} and torch.isfinite(again(ids).logits).all()
    assert tiny_models.equal_states(loaded.to(torch.bfloat16), again)  # and so they do when the model is cast


def test_offloading_is_refused(tmp_path: Path) -> None:
    save_calibrated(tmp_path, FlatSpec(), WINDOWS, "Qwen2")
    for where in ({"model": 0, "lm_head": "cpu"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(IntegrationError, match="offloads"):
            tiny_models.load(tmp_path, device_map=where)
    assert tiny_models.load(tmp_path, device_map={"": "cpu"}).device.type == "cpu"


def test_missing_and_wrong_tensors_are_refused(tmp_path: Path) -> None:
    save_calibrated(tmp_path, FlatSpec(w_asym=True), WINDOWS, "Qwen2")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name, change in {
        "model.layers.0.self_attn.q_proj.weight_zero": None,
        "model.layers.1.self_attn.v_proj.weight_zero": torch.zeros(24),  # no integers
        "model.layers.1.self_attn.heads.k_clip": None,
        "model.layers.0.mlp.down_proj.weight": torch.zeros(3, 3, dtype=torch.uint8),
        "model.layers.0.mlp.surplus": torch.zeros(3),
    }.items():
        damaged = {key: tensor for key, tensor in whole.items() if key != name}
        save_file(damaged if change is None else damaged | {name: change}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=name):
            tiny_models.load(tmp_path)


def test_the_int4_cache_holds_what_is_simulated(tmp_path: Path) -> None:
    save_calibrated(tmp_path, FlatSpec(key_offset=True), WINDOWS, "Qwen2")
    model, ids = tiny_models.load(tmp_path, dtype=torch.float32), tiny_models.prompt()
    assert torch.equal(model(ids, past_key_values=int4_cache(model, 32)).logits, model(ids, use_cache=False).logits)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=int4_cache(model, 32))
    assert torch.equal(plain, cached)
    found = perplexities(model, WINDOWS.flatten().tolist(), seq_len=16)
    simulated, cache, unrounded = found.values()
    assert simulated == cache != unrounded
    for block in blocks_of(model)[1]:
        block.self_attn.heads.bits = (4, 16)
    with pytest.raises(IntegrationError, match="int4"):
        int4_cache(model, 32)


def test_matrices_serve_other_bits(tmp_path: Path) -> None:
    model, learned = tiny_models.build(), FlatSpec()
    matrices, _ = calibrate(model, learned, WINDOWS, None, SHORT, batch=2)
    save_matrices(tmp_path / "m.safetensors", matrices, learned)
    loaded, said = load_matrices(tmp_path / "m.safetensors")
    assert said == learned and same(loaded, matrices)
    spec = PRESETS["w4a8kv4"]
    adapted = [each.adapted(learned, spec) for each in loaded]
    assert adapted[0].clips.keys() == {"key", "value"} and adapted[0].row_clips.keys() == matrices[0].row_clips.keys()
    truth = model(WINDOWS).logits
    four, eight = (quantized(model, s, m)(WINDOWS).logits for s, m in ((learned, matrices), (spec, adapted)))
    assert (eight - truth).norm() < (four - truth).norm()
    with pytest.raises(CalibrationError, match="blocks"):
        quantized(model, spec, adapted[:1])
    with pytest.raises(CalibrationError, match="no mean keys"):
        quantized(model, replace(spec, key_offset=True), adapted)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_folder(shallow: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the list of names that the module holds, and what they are for. " * 40)
    job = FlatJob(FlatSpec(), schedule=Schedule(epochs=1), samples=2, window=32, batch=2)
    report = flatquant_folder(shallow, tmp_path / "out", job, {"text": text.read_text()})
    assert len(report.blocks) == 2
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out.partial").exists()
    model = tiny_models.load(tmp_path / "out")
    assert sum(isinstance(part, IntLinear) for part in model.modules()) == 2 * 7
    with pytest.raises(CheckpointError, match="exists"):
        flatquant_folder(shallow, tmp_path / "out", job, {"text": "words"})


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_flatness_is_measured_and_drawn(tmp_path: Path) -> None:
    model = tiny_models.build()
    model.model.layers[1].input_layernorm.weight.data[5] = 40.0  # an outlier channel
    matrices, _ = calibrate(model, FlatSpec(), WINDOWS, None, Schedule(epochs=0), batch=2)
    found = flatness.curves(model, WINDOWS, 1, matrices[1])
    assert len(found) == 8 and all(set(lines) == {"none", "hadamard", "flatquant"} for lines in found.values())
    peaks = {method: values[0] for method, values in found["attn: activations"].items()}
    assert peaks["none"] > 5 > 2 > peaks["flatquant"] and peaks["none"] > peaks["hadamard"]
    assert flatness.norms(torch.ones(3, 4)) == [1.0] * 4
    draw(found, tmp_path / "flat.png", "a title")
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CalibrationError, match="block 2"):
        flatness.curves(model, WINDOWS, 2)
