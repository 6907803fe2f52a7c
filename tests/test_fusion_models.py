"""Layers in one launch in whole models: the same logits, files and tokens, also compiled and under adapters."""

from pathlib import Path

import pytest
import torch
from test_fusion import fused, launches  # noqa: F401  (a fixture)
from tiny_models import build, equal_states, load, prompt, saved

from flute import FluteConfig

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models(family: str, tmp_path: Path, launches: list[int]) -> None:  # noqa: F811
    sizes = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 1}
    source = saved(tmp_path / "dense", family, **sizes)
    model = load(source, quantization_config=FluteConfig(group_size=32), attn_implementation="eager")
    assert not model.model.layers[0].self_attn.q_proj.together.joined
    plain = load(source, quantization_config=FluteConfig(group_size=32, fuse=False), attn_implementation="eager")
    assert plain.model.layers[0].self_attn.q_proj.together is None
    fused(model)
    launches.clear()
    assert torch.equal(model(prompt()[:, :4]).logits, plain(prompt()[:, :4]).logits)
    assert len(launches) == 4 + (6 if family == "Phi" else 7)
    model.save_pretrained(tmp_path / "quantized")
    assert equal_states(load(tmp_path / "quantized"), plain) and equal_states(model, plain)
    if family == "Llama":
        keywords = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(prompt(), **keywords), plain.generate(prompt(), **keywords))
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        launches.clear()
        torch.testing.assert_close(compiled(prompt()).logits, plain(prompt()).logits, rtol=1e-4, atol=1e-4)
        assert len(launches) == 2 + 7, "two groups; compiled calls of the plain operator are not counted"


def test_adapters_on_top(tmp_path: Path, launches: list[int]) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    from flute.integrations.peft import merge_and_unload

    build(hidden_size=96, head_dim=16).save_pretrained(tmp_path)
    logits = []
    for together in (False, True):
        model = load(tmp_path, quantization_config=FluteConfig(group_size=32))
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        if together:
            fused(adapted)
        launches.clear()
        with torch.no_grad():
            logits.append(adapted(prompt()).logits)
        assert (192 in launches) == together or 160 in launches
        adapted(prompt(), labels=prompt()).loss.backward()
        with pytest.warns(UserWarning, match="merging"):
            merged = merge_and_unload(adapted)
        with torch.no_grad():
            logits.append(merged(prompt()).logits)
        if together:
            assert merged.model.layers[0].self_attn.q_proj.together.joined
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
