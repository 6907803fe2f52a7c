"""Two processes share a model as transformers shares it: same results, same files, clear refusals."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny_models import equal_states, load, prompt, saved

from flute import FluteConfig
from flute.errors import IntegrationError
from flute.linear import LutLinear
from flute.methods import higgs_spec

SHARE = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 8, "vocab_size": 98}


def rank_main(folder: Path) -> None:
    """What each process does."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
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
    dense = saved(tmp_path / "dense", "Qwen2", **SHARE)
    load(dense, quantization_config=FluteConfig(bits=3, group_size=16)).save_pretrained(tmp_path / "quantized")
    load(dense, quantization_config=FluteConfig(bits=3, group_size=64)).save_pretrained(tmp_path / "wide groups")
    run_ranks(__file__, tmp_path, devices="")


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
