"""FlatQuant models on a GPU, beside what the same checkpoint computes on a CPU."""

from pathlib import Path

import pytest
import tiny_models
import torch

from flute.flatquant.modules import IntLinear
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import int4_cache
from flute.integrations.flatquant import mark_flat
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "intermediate_size": 448, "num_attention_heads": 4, "head_dim": 64}
WINDOWS = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, spec: FlatSpec) -> None:
    model = tiny_models.build("Qwen3", **SIZES)
    matrices, _ = calibrate(model, spec, WINDOWS, None, Schedule(epochs=0), batch=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    apply(model, spec, matrices)
    mark_flat(model, spec)
    model.save_pretrained(folder)


@pytest.mark.parametrize("preset", ["w4a8kv4", "w8a8", "w4a16"])
def test_a_gpu_computes_what_a_cpu_does(preset: str, tmp_path: Path) -> None:
    saved(tmp_path, PRESETS[preset])
    there, here = (tiny_models.load(tmp_path, dtype=torch.float16, device_map=d) for d in ("cuda", "cpu"))
    layers = [part for part in there.modules() if isinstance(part, IntLinear)]
    assert all(layer.weight.dim() == 3 for layer in layers) and (layers or preset == "w4a16")
    states = there.state_dict(), here.state_dict()
    assert all(torch.equal(states[0][name].cpu(), states[1][name]) for name in states[1])  # the checkpoint's order
    found, truth = there(WINDOWS.cuda()).logits.cpu().float(), here(WINDOWS).logits.float()
    assert float((found - truth).norm() / truth.norm()) < 0.05


def test_generation_with_the_int4_cache(tmp_path: Path) -> None:
    saved(tmp_path, FlatSpec(a_bits=8))
    model, ids = tiny_models.load(tmp_path, dtype=torch.float16, device_map="cuda"), WINDOWS[:2].cuda()
    plain = model(ids, use_cache=False).logits
    cached = model(ids, past_key_values=int4_cache(model, 64)).logits
    assert float((plain - cached).norm() / plain.norm()) < 0.05
    made = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=int4_cache(model, 64))
    assert made.shape[1] <= 40 and torch.equal(made[:, :32], ids)


def test_calibration_on_a_gpu() -> None:
    model = tiny_models.build("Llama", **SIZES)
    schedule = Schedule(epochs=8, lr=1e-2, amp=True)
    matrices, report = calibrate(model, FlatSpec(), WINDOWS, None, schedule, batch=2, device="cuda")
    assert all(block.after <= block.before for block in report.blocks)
    assert all(
        t.device.type == "cpu" and torch.isfinite(t).all() for each in matrices for t in each.to_tensors().values()
    )
