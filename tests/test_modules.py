"""Which layers are quantized, family by family; and how patterns choose among them."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import build, dense_linears, equal_states, load, prompt, saved
from torch import nn

from flute import FluteConfig, LutLinear, QuantSpec
from flute.config import ModelSpec, matches
from flute.errors import SpecError
from flute.integrations.modules import choose, quantizable

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
ROLES = {
    **dict.fromkeys(("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text"), ATTENTION | GATED),
    "Phi": ATTENTION - {"self_attn.o_proj"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "Phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
}


@pytest.mark.parametrize("family", ROLES)
def test_every_linear_of_attention_and_mlp_is_taken(family: str) -> None:
    model = build(family)
    prefix = re.compile(r"model\.layers\.(\d+)\.")
    names = quantizable(model)
    assert {prefix.sub("", name) for name in names} == ROLES[family]
    assert set(names) == dense_linears(model).keys() - {"lm_head"}
    assert quantizable(model, lm_head=True) == [*names, "lm_head"]
    assert [f"model.{name}" for name in quantizable(model.base_model)] == names


def test_routers_and_other_towers_stay_dense() -> None:
    moe = choose(
        build("Qwen2Moe", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40), ModelSpec()
    )
    assert (
        "model.layers.0.mlp.shared_expert_gate" in moe.dense and "model.layers.0.mlp.shared_expert.up_proj" in moe.specs
    )

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleList([nn.Linear(16, 16)])
            self.text = nn.Module()
            self.text.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(16, 64), "tiny": nn.Linear(16, 1)})])
            self.text.layers.append(nn.ModuleDict({"up": nn.Linear(16, 32)}))

        def get_decoder(self) -> nn.Module:
            return self.text

    assert quantizable(Towers()) == ["text.layers.1.up"]


@pytest.mark.parametrize("family", ROLES)
def test_each_family_loads_generates_and_reloads(family: str, tmp_path: Path) -> None:
    model = load(saved(tmp_path / "dense", family), quantization_config=FluteConfig(bits=4, group_size=32))
    assert sum(isinstance(module, LutLinear) for module in model.modules()) == 2 * len(ROLES[family])
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert equal_states(model, again)
    keywords = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt(), **keywords), again.generate(prompt(), **keywords))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.1", "model.layers.1", True),
        ("model.layers.1", "model.layers.10", False),
        ("model.layers.1", "model.layers.1.mlp", False),
        ("*.q_proj", "model.layers.3.self_attn.q_proj", True),
        ("*.q_proj", "model.layers.3.self_attn.q_proj_old", False),
        ("model.layers.?.mlp.*", "model.layers.10.mlp.up_proj", False),
        (r"re:.*layers\.[0-3]\.mlp.*", "model.layers.2.mlp.up_proj", True),
        (r"re:layers", "model.layers.2", False),
    ],
)
def test_patterns_match_whole_names(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_record_answers_and_goes_to_json_and_back() -> None:
    record = ModelSpec(QuantSpec(), {"*.up": {"bits": 3}, "a.up": {"group_size": 32}}, ("b.up", "*.down"))
    assert record.spec_for("x.up") == QuantSpec(3, 64, "nf3")
    assert record.spec_for("a.up") == QuantSpec(4, 32, "nf4")
    assert record.spec_for("up", "x.up") == QuantSpec(3, 64, "nf3")  # under its other name
    assert record.spec_for("b.up") is None and record.spec_for("x.down") is None
    assert record.spec_for("x.other") == QuantSpec()
    assert ModelSpec.from_dict(record.to_dict()) == record
    for patterns in ({"re:(": {"bits": 3}}, {"": {}}, {"x": "nf3"}, {"x": {"bits": 5}}):
        with pytest.raises(SpecError):
            ModelSpec(QuantSpec(), patterns)
