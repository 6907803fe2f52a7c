"""Two processes share a model as transformers shares it: same results, same files, clear refusals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import foreign
import pytest
import torch
import torch.distributed as dist
from test_convert import run, uniform_layer
from tiny_models import equal_states, load, prompt, saved

from flute import FluteConfig
from flute.errors import IntegrationError
from flute.experts import LutExperts
from flute.linear import LutLinear
from flute.methods import higgs_spec

MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 192},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "mlp_only_layers": []},
}
WIDE = FluteConfig(bits=3, group_size=16, overrides={"*.experts.down_proj": {"group_size": 64}})
SHARE = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 8, "vocab_size": 98}


def mixtures_main(folder: Path) -> None:
    """Experts: each rank holds its rows of gate and up and its columns of down of every one, and no expert whole."""
    from transformers.distributed import DistributedConfig

    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    for family, sizes in MIXTURES.items():
        whole, config = load(folder / family / "quantized"), FluteConfig(bits=3, group_size=16)
        for source, keywords in (("quantized", {}), ("dense", {"quantization_config": config})):
            model, inner = load(folder / family / source, **plan, **keywords), list(sizes.values())[2] // 2
            experts = model.model.layers[1].mlp.experts
            assert experts.shapes == {"gate_up": (2 * inner, 96), "down": (96, inner)}
            assert experts.gate_up_proj.to_local().shape[1:] == (2 * inner, 36)
            assert experts.down_scales.to_local().shape[1:] == (96, inner // 16)
            with torch.no_grad():
                found, expected = model(prompt()).logits, whole(prompt()).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            model.save_pretrained(folder / family / f"saved {source}")
            dist.barrier()
            assert equal_states(load(folder / family / f"saved {source}"), whole)
    with mock.patch.object(LutExperts, "_suits_kernels", lambda layer, role: True):
        model = load(folder / "Mixtral" / "quantized", **plan)
        assert all(layer.in_kernel_order("down") for layer in model.modules() if isinstance(layer, LutExperts))
        model.save_pretrained(folder / "saved from kernel order")
    dist.barrier()
    assert equal_states(load(folder / "saved from kernel order"), load(folder / "Mixtral" / "quantized"))
    with torch.no_grad():
        made, whole = (load(folder / "zero points", dtype=torch.float32, **keywords) for keywords in (plan, {}))
        experts = made.model.layers[1].mlp.experts
        assert experts.gate_up_zeros.to_local().shape == (6, 64, 6) and experts.gate_up_shift.shape == (6, 64, 6)
        assert experts.down_zeros.to_local().shape == experts.down_scales.to_local().shape == (6, 96, 2)
        torch.testing.assert_close(made(prompt()).logits, whole(prompt()).logits, rtol=1e-4, atol=1e-4)
    made.save_pretrained(folder / "saved zero points")
    dist.barrier()
    assert equal_states(load(folder / "saved zero points"), whole)
    for source, keywords in (("Mixtral/dense", {"quantization_config": WIDE}), ("wide groups", {})):
        with pytest.raises(IntegrationError, match=r"experts\.down_proj': 96 of 192 columns per rank do not hold"):
            load(folder / source, **plan, **keywords)
    newer = hasattr(DistributedConfig, "ep_size")
    options = {"tp_size": 2, "ep_size": 2} if newer else {"tp_plan": "auto", "enable_expert_parallel": True}
    plan = {"distributed_config": DistributedConfig(**options)}
    for source, keywords in (("quantized", {}), ("dense", {"quantization_config": WIDE})):
        with pytest.raises(IntegrationError, match="experts cannot be spread by expert parallelism; use tensor paral"):
            load(folder / "Qwen3Moe" / source, **plan, **keywords)
    dist.barrier()


def layers_main(folder: Path) -> None:
    """Layers: each rank holds its rows or columns; a cut through blocks of a rotation or through groups is refused."""
    from transformers.distributed import DistributedConfig

    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    whole = load(folder / "quantized")
    expected = whole(prompt()).logits
    for source, config in (("quantized", None), ("dense", FluteConfig(bits=3, group_size=16))):
        keywords = {} if config is None else {"quantization_config": config}
        model = load(folder / source, **plan, **keywords)
        up, down = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
        assert up.weight.to_local().shape == (80, 36) and down.weight.to_local().shape == (96, 30)
        with torch.no_grad():
            torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
        model.save_pretrained(folder / f"saved {source}")
        dist.barrier()
        assert equal_states(load(folder / f"saved {source}"), whole)
    with mock.patch.object(LutLinear, "_suits_kernels", lambda layer: True):  # the order that kernels want
        model = load(folder / "quantized", **plan)
        assert all(layer.in_kernel_order for layer in model.modules() if isinstance(layer, LutLinear))
        model.save_pretrained(folder / "saved from kernel order")
    dist.barrier()
    assert equal_states(load(folder / "saved from kernel order"), whole)
    with torch.no_grad():
        made, expected = (load(folder / "zero points", dtype=torch.float32, **keywords) for keywords in (plan, {}))
        assert made.model.layers[0].mlp.down_proj.zeros.to_local().shape == (96, 5)
        torch.testing.assert_close(made(prompt()).logits, expected(prompt()).logits, rtol=1e-4, atol=1e-4)
    rotated = higgs_spec(3, 16, hadamard_size=16)
    with torch.no_grad():
        expected = load(folder / "dense", quantization_config=FluteConfig(rotated))(prompt()).logits
        made = load(folder / "dense", quantization_config=FluteConfig(rotated), **plan)(prompt()).logits
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IntegrationError, match="80 of 160 columns per rank do not hold whole Hadamard blocks of 160"):
        load(folder / "dense", quantization_config=FluteConfig(higgs_spec(3, 16)), **plan)
    with pytest.raises(IntegrationError, match="do not hold whole groups"):
        load(folder / "dense", quantization_config=FluteConfig(group_size=-1), **plan)
    with pytest.raises(IntegrationError, match="do not hold whole groups"):
        load(folder / "wide groups", **plan)
    dist.barrier()


def run_ranks(file: str, folder: Path, devices: str) -> str:
    """Run ``file`` on two ranks that see ``devices`` (CUDA_VISIBLE_DEVICES); what they print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launcher, file, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks(tmp_path: Path) -> None:
    """Experts, and layers, in one start of two processes: most of the time is their imports."""
    save_layers(tmp_path / "layers")
    config = FluteConfig(bits=3, group_size=16)
    for family, sizes in MIXTURES.items():
        dense = saved(tmp_path / family / "dense", family, **{**SHARE, **sizes})
        load(dense, quantization_config=config).save_pretrained(tmp_path / family / "quantized")
    load(tmp_path / "Mixtral" / "dense", quantization_config=WIDE).save_pretrained(tmp_path / "wide groups")
    layer, sizes = uniform_layer({}, foreign.awq, 16, 4, list(range(16))), {**SHARE, **MIXTURES["Qwen3Moe"]}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16}
    run(foreign.checkpoint(tmp_path / "awq", layer, settings, family="Qwen3Moe", **sizes), tmp_path / "zero points")
    run_ranks(__file__, tmp_path, devices="")


def save_layers(folder: Path) -> None:
    """What `layers_main` loads."""
    dense = saved(folder / "dense", "Qwen2", **SHARE)
    load(dense, quantization_config=FluteConfig(bits=3, group_size=16)).save_pretrained(folder / "quantized")
    load(dense, quantization_config=FluteConfig(bits=3, group_size=64)).save_pretrained(folder / "wide groups")
    layer = uniform_layer({}, foreign.awq, 16, 4, list(range(16)))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16}
    run(foreign.checkpoint(folder / "awq", layer, settings, family="Qwen2", **SHARE), folder / "zero points")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    mixtures_main(place)
    layers_main(place / "layers")
