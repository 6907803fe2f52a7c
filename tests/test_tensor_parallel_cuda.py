"""One decoder layer of large models on two GPUs: the results of one GPU, in kernel order, saved as one GPU saves it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from test_tensor_parallel import run_ranks
from tiny_models import equal_states, load
from transformers import AutoModelForCausalLM

from flute import FluteConfig
from flute.linear import LutLinear

SLICES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-70B": ("Llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                                "num_key_value_heads": 8}),
    "Llama-3.1-405B": ("Llama", {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
                                 "num_key_value_heads": 8}),
    "Gemma-2-27B": ("Gemma2", {"hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
                               "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144}),
}  # fmt: skip


def quantized(family: str, sizes: dict[str, Any]) -> Any:
    """One layer with random weights, quantized on this rank's GPU."""
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=1, vocab_size=512, tie_word_embeddings=False, dtype=torch.bfloat16, **sizes
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return type(dense).from_pretrained(
        None, config=config, state_dict=dense.state_dict(), dtype=torch.bfloat16,
        device_map={"": torch.cuda.current_device()}, quantization_config=FluteConfig(bits=4, group_size=64),
    )  # fmt: skip


def rank_main(folder: Path) -> None:
    """What each process does."""
    from transformers.distributed import DistributedConfig

    dist.init_process_group("nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    for name, (family, sizes) in SLICES.items():
        whole = quantized(family, sizes).eval()
        if rank == 0:
            whole.save_pretrained(folder / name)
        dist.barrier()
        shared = load(folder / name, distributed_config=DistributedConfig(tp_plan="auto")).eval()
        layers = [layer for layer in shared.modules() if isinstance(layer, LutLinear)]
        assert len(layers) == 7
        assert all(layer.in_kernel_order for layer in layers)
        # Not token 0: that is Gemma's padding, whose embedding is zero.
        prompts = [torch.arange(3, 3 + tokens, device="cuda").view(1, -1) for tokens in (1, 16, 300)]
        with torch.no_grad():
            alone = [whole(ids).logits for ids in prompts]
            exact = whole.dequantize().float()
            for ids, one in zip(prompts, alone, strict=True):
                truth, two = exact(ids).logits, shared(ids).logits
                errors = [((made.float() - truth).norm() / truth.norm()).item() for made in (one, two)]
                if rank == 0:
                    print(f"{name}: {ids.numel()} tokens, error on one GPU {errors[0]:.1e}, on two {errors[1]:.1e}")
                assert errors[1] < 2 * errors[0], (name, errors)  # the ranks' sums are rounded before they are added
        if name == "Gemma-2-27B":
            shared.save_pretrained(folder / "saved")
            dist.barrier()
            if rank == 0:
                assert equal_states(load(folder / "saved"), load(folder / name))
        del whole, shared, layers, exact
        torch.cuda.empty_cache()
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    print(run_ranks(__file__, tmp_path, devices="0,1"))


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
