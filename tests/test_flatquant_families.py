"""FlatQuant on every family it is for, small: transforms that change nothing, checkpoints, the cache of every shape."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from flat_models import save
from test_flatquant import random_learned

from flute.flatquant.matrices import Matrices
from flute.flatquant.modules import IntLinear
from flute.flatquant.spec import FlatSpec
from flute.integrations.flatblocks import blocks_of, flatten, int4_cache, shape_of
from flute.methods.flatquant import apply

ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2": ("Llama", {"num_key_value_heads": 6}),
    "Llama-3": ("Llama", {"rope_theta": 5e5}),
    "Llama-3.1, 3.3": ("Llama", {"rope_parameters": ROPE}),
    "Llama-3.2": ("Llama", {"rope_parameters": ROPE | {"factor": 32.0}, "head_dim": 16, "tie_word_embeddings": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"sliding_window": 4}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2.5": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "Qwen3": ("Qwen3", {}),
}


def built(name: str) -> Any:
    family, options = FAMILIES[name]
    return tiny_models.build(family, **options)


def test_families_have_what_they_are_here_for() -> None:
    names = {name: {n.rpartition(".layers.0.")[2] for n, _ in built(name).named_parameters()} for name in FAMILIES}
    assert "self_attn.q_norm.weight" in names["Qwen3"] and "self_attn.q_proj.bias" in names["Qwen2"]
    assert {"self_attn.o_proj.bias", "mlp.down_proj.bias"} <= names["Llama with biases"]
    frequencies = [built(name).model.rotary_emb.inv_freq for name in ("Llama-3", "Llama-3.1, 3.3")]
    assert not torch.equal(*frequencies)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", [{}, {"key_offset": True}, {"k_bits": 16, "q_bits": 4, "separate_vtrans": True}])
def test_transforms_alone_leave_a_model_as_it_is(name: str, change: dict[str, Any]) -> None:
    model, ids = built(name), tiny_models.prompt()
    truth = model(ids).logits.detach()
    spec = replace(FlatSpec(w_bits=16, a_bits=16), **change)
    for block in blocks_of(model)[1]:
        shape = shape_of(block)
        flatten(block, spec)
        block.self_attn.heads.bits, block.self_attn.heads.q_bits = (16, 16), 16
    assert torch.allclose(model(ids).logits, truth, rtol=1e-5, atol=1e-5)  # nothing but the place for it
    for block in blocks_of(model)[1]:
        learned = random_learned(spec, shape)
        with torch.no_grad():
            made = learned.tensors(dict(block.named_parameters()))
            assert ("self_attn.heads.value" in made) is spec.separate_vtrans
            block.load_state_dict(block.state_dict() | made)
    assert float((model(ids).logits - truth).detach().abs().max() / truth.abs().max()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = built(name), tiny_models.prompt()
    truth = model(ids).logits.detach()
    spec = FlatSpec(8, 8, 8, 8)
    save(tmp_path, model, spec, [Matrices(), Matrices()])
    loaded = tiny_models.load(tmp_path, dtype=torch.float32)
    assert sum(type(part) is IntLinear for part in loaded.modules()) == 14
    assert tiny_models.equal_states(loaded, model) and torch.equal(loaded(ids).logits, model(ids).logits)
    assert float((loaded(ids).logits - truth).detach().norm() / truth.norm()) < 0.1


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=lambda pair: f"group {pair[0] // pair[1]}")
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_cache_of_every_shape_is_what_is_simulated(head_dim: int, heads: tuple[int, int], asymmetric: bool) -> None:
    """Bit for bit, for a prompt and for a token after it."""
    model = tiny_models.build(head_dim=head_dim, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    matrices = [Matrices(clips={"key": torch.tensor([0.9, 0.8]), "value": torch.tensor([0.95, 0.9])})] * 2
    apply(model, FlatSpec(16, 16, k_asym=asymmetric, v_asym=asymmetric), matrices, real=False)
    ids, cache = tiny_models.prompt(), int4_cache(model, 16)
    simulated = model(ids, use_cache=False).logits
    assert torch.equal(model(ids[:, :5], past_key_values=cache).logits, model(ids[:, :5], use_cache=False).logits)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (5, 6)]
    assert torch.allclose(torch.cat(steps, 1), simulated[:, 5:], rtol=1e-4, atol=1e-4)  # sums in another order
