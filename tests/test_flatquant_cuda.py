"""FlatQuant models on a GPU, beside what the same checkpoint computes on a CPU."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from flat_models import save_calibrated

from flute.flatquant.fake import fake
from flute.flatquant.modules import Codes, IntLinear, Site
from flute.flatquant.rounding import codes, grid
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import int4_cache
from flute.kernels.tokens import quantize_rows
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import _kept, apply, calibrate

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "intermediate_size": 448, "num_attention_heads": 4, "head_dim": 64}
WINDOWS = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grids_are_the_same_bits_on_both(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    clip = torch.tensor([0.9, 0.8])
    here = grid(x, bits, symmetric=symmetric, clip=clip, dtype=dtype)
    there = grid(x.cuda(), bits, symmetric=symmetric, clip=clip.cuda(), dtype=dtype)
    assert torch.equal(here.scale, there.scale.cpu())
    assert torch.equal(codes(x, here, bits), codes(x.cuda(), there, bits).cpu())
    units, scale, _ = quantize_rows(x.cuda(), bits, symmetric, clip.cuda(), dtype)  # the kernels' definition
    shift = 0 if symmetric else 1 << (bits - 1)
    assert torch.equal(codes(x.cuda(), there, bits) - shift, units.float())
    assert torch.equal(scale.float(), there.scale.squeeze(-1))


@pytest.mark.parametrize("preset", ["w4a8kv4", "w8a8", "w4a16"])
def test_a_gpu_computes_what_a_cpu_does(preset: str, tmp_path: Path) -> None:
    save_calibrated(tmp_path, PRESETS[preset], WINDOWS, "Qwen3", **SIZES)
    there, here = (tiny_models.load(tmp_path, dtype=torch.float16, device_map=d) for d in ("cuda", "cpu"))
    layers = [part for part in there.modules() if isinstance(part, IntLinear)]
    assert all(layer.weight.dim() == 3 for layer in layers) and (layers or preset == "w4a16")
    states = there.state_dict(), here.state_dict()
    assert all(torch.equal(states[0][name].cpu(), states[1][name]) for name in states[1])  # the checkpoint's order
    found, truth = there(WINDOWS.cuda()).logits.cpu().float(), here(WINDOWS).logits.float()
    assert float((found - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("zeros", ["w_asym", "a_asym"])
def test_layers_with_zeros_give_the_same_bits(zeros: str) -> None:
    asked = {zeros: True}
    weight = torch.randn(40, 96) + 0.3
    made = grid(weight, 4, symmetric=zeros != "w_asym")
    here = IntLinear(96, 40, 4, bias=True, dtype=torch.float16, **asked)
    here.store(codes(weight, made, 4), made)
    there = copy.deepcopy(here).cuda()
    x = Site(0, 0, 4, symmetric=zeros != "a_asym", real=True)(torch.randn(11, 96).half())[0]
    moved = Codes(*(None if part is None else part.cuda() for part in x))
    assert there.weight.dim() == 3 and torch.equal(there(moved).cpu(), here(x))


def test_a_captured_block_gives_the_same_bits() -> None:
    """Norms, transforms and all products of a block's MLP, replayed."""
    model = tiny_models.build("Qwen3", **SIZES).half()
    apply(model, FlatSpec(w_asym=True), calibrate(model, FlatSpec(w_asym=True), WINDOWS, None, Schedule(epochs=0))[0])
    block = model.cuda().model.layers[1]
    x = torch.randn(2, 3, 256, device="cuda").half()

    def step() -> torch.Tensor:
        return block.mlp(block.post_attention_layernorm(x))

    first = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, first)


def test_generation_with_the_int4_cache(tmp_path: Path) -> None:
    save_calibrated(tmp_path, FlatSpec(a_bits=8), WINDOWS, "Qwen3", **SIZES)
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


@pytest.mark.parametrize("clamped", [True, False])
def test_rounding_learns_as_on_a_cpu(clamped: bool) -> None:
    x, ratios, g = torch.randn(300, 512), 0.6 + 0.4 * torch.rand(300, 2), torch.randn(300, 512)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [each.detach().to(device).requires_grad_() for each in (x, ratios)]
        y = fake(leaves[0], 4, clip=leaves[1], clamped=clamped)
        y.backward(g.to(device))
        found.append([y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])  # type: ignore[union-attr]
    assert torch.equal(found[0][0], found[1][0])
    for here, there in zip(found[0][1:], found[1][1:], strict=True):
        assert float((here - there).norm() / here.norm()) < 1e-5


def test_hidden_states_wait_where_a_gpu_reads_them() -> None:
    x = torch.randn(3, 5, device="cuda")
    kept = _kept(x, torch.device("cpu"))
    assert kept.is_pinned() and torch.equal(kept, x.cpu()) and _kept(x, x.device) is x
