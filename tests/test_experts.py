"""Mixtures of experts: chosen, quantized in ways that agree, saved, loaded, computed; nothing stays dense unsaid."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import flute
from tiny_models import build, dense_linears, equal_states, load, prompt, saved
from torch import nn

from flute import FluteConfig, LutLinear, QuantSpec
from flute.checkpoint import streaming
from flute.checkpoint.plan import make_plan
from flute.config import ModelSpec
from flute.errors import CheckpointError, QuantizeError, SpecError
from flute.experts import ROLES, LutExperts
from flute.integrations import folders, mixtures
from flute.integrations.base import prepare_model_flute
from flute.integrations.modules import choose

QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {**QWEN, "mlp_only_layers": []},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 40},
}
BOTH = pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
HOME = "model.layers.0.mlp.experts"


def mixtures_of(model: nn.Module) -> dict[str, LutExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LutExperts)}


def sixteen_bit_stacks(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.named_parameters() if tensor.dim() == 3 and tensor.dtype != torch.uint8
            and not name.endswith("_scales")]  # fmt: skip


def stream(source: str | Path, out: Path, record: ModelSpec, **options: Any) -> Path:
    plan = make_plan(Path(source), folders.architecture(Path(source), record, check_names=True), record)
    streaming.run(plan, out, **options)
    return out


# ---- the module ----------------------------------------------------------------------------------------------------


def pair(experts: int = 5, hidden: int = 72, inner: int = 40) -> tuple[LutExperts, nn.Module]:
    """`LutExperts`, and transformers' own with the weights that the codes stand for."""
    torch.manual_seed(0)
    config = build("Mixtral", num_local_experts=experts, hidden_size=hidden, intermediate_size=inner).config
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    made = LutExperts(experts, hidden, inner, {"gate_up": QuantSpec(4, 32), "down": QuantSpec(3, 24, "nf3")})
    dense = MixtralExperts(config)
    for role in ROLES:
        made.fill(role, 0.2 * torch.randn(getattr(dense, f"{role}_proj").shape))
        setattr(dense, f"{role}_proj", nn.Parameter(made.dequantize(role)))
    return made, dense


@pytest.mark.parametrize("routes", ["any", "one", "all to one", "the last two"])
def test_it_computes_what_dense_experts_with_its_weights_compute(routes: str) -> None:
    made, dense = pair()
    tokens = 1 if routes == "one" else 33
    x, weights = torch.randn(tokens, 72), torch.rand(tokens, 2)
    index = torch.rand(tokens, 5).topk(2).indices
    if routes == "all to one":
        index, weights = torch.full((tokens, 1), 3), weights[:, :1]
    elif routes == "the last two":
        index = torch.tensor([[4, 3]]).expand(tokens, 2)
    for implementation in ("eager", "grouped_mm"):
        dense.config._experts_implementation = implementation
        torch.testing.assert_close(made(x, index, weights), dense(x, index, weights), rtol=1e-5, atol=1e-5)
    assert made(x[:0], index[:0], weights[:0]).shape == (0, 72)


def test_gradients_reach_tokens_and_routing_weights() -> None:
    made, dense = pair()
    dense.config._experts_implementation = "eager"
    x, weights = torch.randn(9, 72, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    index, grad = torch.rand(9, 5).topk(2).indices, torch.randn(9, 72)
    found = torch.autograd.grad(made(x, index, weights), (x, weights), grad)
    expected = torch.autograd.grad(dense(x, index, weights), (x, weights), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_state_and_dtype() -> None:
    made, _ = pair()
    other = LutExperts(5, 72, 40, made.specs)
    other.load_state_dict(made.state_dict())
    assert equal_states(made, other)
    assert set(made.state_dict()) == {f"{role}_{part}" for role in ROLES for part in ("proj", "scales")}
    half = made.bfloat16()
    assert half.gate_up_proj.dtype == torch.uint8 and half.down_table.dtype == torch.bfloat16
    assert torch.equal(half.down_table, LutExperts(5, 72, 40, made.specs, dtype=torch.bfloat16).down_table)
    index = torch.zeros(3, 1, dtype=torch.long)
    assert half(torch.randn(3, 72).bfloat16(), index, torch.ones(3, 1)).dtype == torch.bfloat16


# ---- which are taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_taken_and_routers_are_not(family: str) -> None:
    model = build(family, **FAMILIES[family])
    choice = choose(model, ModelSpec(experts=True))
    stacks = {f"model.layers.{i}.mlp.experts.{role}_proj" for i in range(2) for role in ROLES}
    assert set(choice.experts) == stacks <= choice.specs.keys() and choice.left == {}
    assert not {name.rpartition(".")[2] for name in choice.specs} & {"gate", "router", "shared_expert_gate"}
    assert choose(model, ModelSpec()).experts == ()  # a checkpoint of a version that knew no experts


def test_what_cannot_be_represented_stays_dense_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "dense", "GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=None)
    with pytest.warns(
        UserWarning, match=rf"{HOME} and 1 more stay dense: GptOssExperts has transposed weights, biases"
    ):
        model = load(source, quantization_config=FluteConfig())
    assert not mixtures_of(model) and HOME in model.config.quantization_config.record.modules_to_not_convert
    model.save_pretrained(tmp_path / "out")
    assert "experts" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say again, nor where a pattern asked for it
        again = load(tmp_path / "out")
        load(source, quantization_config=FluteConfig(modules_to_not_convert=["*.experts"]))
    assert equal_states(model, again)
    code, out, err = flute("quantize", source, "-o", tmp_path / "cli", "--quiet", "--json", capsys=capsys)
    assert code == 0 and "stay dense: GptOssExperts" in err
    assert set(json.loads(out)["left_dense"]) == {HOME, HOME.replace("0", "1")}


def test_stacks_that_nothing_describes_are_named_too() -> None:
    class Stack(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(shape))

    model = nn.Module()
    model.layers = nn.ModuleList([Stack(4, 8, 8), Stack(8, 8), nn.Conv1d(4, 4, 3)])
    assert list(choose(model, ModelSpec(experts=True)).left) == ["layers.0"]


def test_patterns(tmp_path: Path) -> None:
    source = saved(tmp_path, "Mixtral", **FAMILIES["Mixtral"])
    overrides = {"*.down_proj": {"bits": 3}, f"{HOME}.gate_up_proj": {"group_size": 24}}
    skip = ["model.layers.1.mlp.experts"]
    model = load(source, quantization_config=FluteConfig(overrides=overrides, modules_to_not_convert=skip))
    found = mixtures_of(model)
    assert found.keys() == {HOME}
    assert found[HOME].specs == {"gate_up": QuantSpec(4, 24), "down": QuantSpec(3, 64, "nf3")}
    assert sixteen_bit_stacks(model) == [f"{skip[0]}.{role}_proj" for role in ROLES]
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert equal_states(model, again) and mixtures_of(again)[HOME].specs == found[HOME].specs
    assert skip[0] in again.config.quantization_config.record.modules_to_not_convert
    with pytest.raises(SpecError, match=r"leaves one projection of .* dense and not the other"):
        load(source, quantization_config=FluteConfig(modules_to_not_convert=["*.experts.down_proj"]))
    with pytest.raises(SpecError, match="names no linear layer"):
        load(source, quantization_config=FluteConfig(modules_to_not_convert=["*.experts.up_proj"]))


# ---- quantize, save, load ------------------------------------------------------------------------------------------


@BOTH
def test_logits_are_those_of_the_dense_model_with_the_decoded_weights(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", family, **FAMILIES[family])
    model = load(source, quantization_config=FluteConfig(group_size=32))
    assert sixteen_bit_stacks(model) == [] and len(mixtures_of(model)) == 2
    assert dense_linears(model).keys() == {"lm_head"}
    original = load(source)
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(model.get_parameter(router), original.get_parameter(router))
    logits = model(prompt()).logits
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert equal_states(model, again) and torch.equal(again(prompt()).logits, logits)
    plain = again.dequantize()
    assert not mixtures_of(plain) and sixteen_bit_stacks(plain) == sixteen_bit_stacks(original)
    torch.testing.assert_close(plain(prompt()).logits, logits, rtol=1e-4, atol=1e-4)
    keywords = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt(), **keywords), load(tmp_path / "out").generate(prompt(), **keywords))


@BOTH
@pytest.mark.parametrize("custom", [False, True], ids=["named", "custom"])
def test_streaming_and_loading_quantize_alike(family: str, custom: bool, tmp_path: Path) -> None:
    build(family, torch.float16, **FAMILIES[family]).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 4
    table = torch.tensor([-1.0, -0.25, 0.25, 1.0]) if custom else None
    spec = QuantSpec(2, 64, "custom") if custom else QuantSpec(4, 32)
    config = FluteConfig(spec, table_values=table, overrides=None if custom else {"*.down_proj": {"bits": 3}})
    out = stream(tmp_path / "dense", tmp_path / "out", config.record, table=table)
    report = folders.validate(out)
    stacks = [layer for layer in report.layers if len(layer.shape) == 3]
    assert len(stacks) == 4 and all(
        layer.weights == layer.shape[0] * layer.shape[1] * layer.shape[2] for layer in stacks
    )
    streamed, at_load = load(out), load(tmp_path / "dense", quantization_config=config)
    assert equal_states(streamed, at_load)
    assert streamed.config.quantization_config.to_dict() == at_load.config.quantization_config.to_dict()
    assert streamed.config.quantization_config.to_dict()["experts"] is True
    at_load.save_pretrained(tmp_path / "again")
    assert equal_states(load(tmp_path / "again"), at_load)
    assert {layer.name for layer in folders.validate(tmp_path / "again").layers} == {
        layer.name for layer in report.layers
    }


def test_another_dtype(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", "Mixtral", **FAMILIES["Mixtral"])
    load(source, quantization_config=FluteConfig(group_size=32)).save_pretrained(tmp_path / "out")
    half, moved = load(tmp_path / "out", dtype=torch.bfloat16), load(tmp_path / "out").to(torch.bfloat16)
    experts = mixtures_of(half)[HOME]
    assert experts.gate_up_scales.dtype == experts.down_table.dtype == torch.bfloat16
    other = mixtures_of(moved)[HOME]
    assert equal_states(experts, other) and torch.equal(experts.down_table, other.down_table)


def test_files_that_hold_stacks_as_they_are(tmp_path: Path) -> None:
    """Some families save the fused parameters; then codes are fused too."""
    model = build("Mixtral", torch.float16, **FAMILIES["Mixtral"])
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    assert f"{HOME}.gate_up_proj" in load_file(tmp_path / "dense" / "model.safetensors")
    config = FluteConfig(group_size=32)
    out = stream(tmp_path / "dense", tmp_path / "out", config.record)
    tensors = load_file(out / "model.safetensors")
    assert tensors[f"{HOME}.gate_up_proj"].shape == (5, 240, 36) and tensors[f"{HOME}.gate_up_scales"].shape == (
        5,
        240,
        3,
    )
    folders.validate(out)
    streamed, at_load = load(out), load(tmp_path / "dense", quantization_config=config)
    assert equal_states(streamed, at_load)
    at_load.save_pretrained(tmp_path / "again")
    assert equal_states(load(tmp_path / "again"), at_load)


OFFLOAD = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"),
    "model.layers.1": "disk",
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("device_map", ["auto", OFFLOAD], ids=["auto", "disk"])
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", "Mixtral", **FAMILIES["Mixtral"])
    load(source, quantization_config=FluteConfig(group_size=32)).save_pretrained(tmp_path / "out")
    reference = load(tmp_path / "out")
    model = load(tmp_path / "out", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(model(prompt()).logits.cpu(), reference(prompt()).logits)


def test_the_upstream_way_says_that_it_leaves_experts() -> None:
    model = build("Mixtral", **FAMILIES["Mixtral"])
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.experts.*stays dense"):
        prepare_model_flute("model.layers", model.model.layers, 4, 32)
    assert sixteen_bit_stacks(model) and isinstance(model.model.layers[0].self_attn.q_proj, LutLinear)


W1 = "model.layers.1.block_sparse_moe.experts.2.w1"
DAMAGES: dict[str, tuple[Any, str]] = {
    "an expert's codes": (lambda t: t.pop(f"{W1}.weight"), r"layers\.1\.mlp\.experts\.gate_up_proj"),
    "an expert's scales": (lambda t: t.pop(f"{W1}.scales"), r"layers\.1\.mlp\.experts\.gate_up_scales"),
    "wrong codes": (lambda t: t.update({f"{W1}.weight": torch.zeros(120, 36)}), r"experts\.gate_up_proj"),
    "NaN": (lambda t: t[f"{W1}.scales"].fill_(torch.nan), r"gate_up_scales hold NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_experts_are_one_line(damage: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", "Mixtral", **FAMILIES["Mixtral"])
    load(source, quantization_config=FluteConfig(group_size=32)).save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    edit, message = DAMAGES[damage]
    edit(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)
    if damage != "NaN":
        with pytest.raises(CheckpointError, match=message):
            folders.validate(tmp_path / "out")


def test_bad_weights_are_named(tmp_path: Path) -> None:
    model = build("Mixtral", **FAMILIES["Mixtral"])
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizeError, match=r"model\.layers\.1\.mlp\.experts\.down_proj.*NaN"):
        load(tmp_path, quantization_config=FluteConfig())


def test_scales_of_one_group_keep_their_shape() -> None:
    """transformers up to 5.17 drops every dimension of 1 when it cuts a stack apart."""
    cut = mixtures.StackScales(0).reverse_op
    made = cut.convert({"a": torch.ones(3, 4, 1)}, source_patterns=["a"], target_patterns=["e.*.w"])
    assert {name: tuple(part.shape) for name, part in made.items()} == {f"e.{i}.w": (4, 1) for i in range(3)}


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_gives_what_the_cpu_gives(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", family, dtype, **FAMILIES[family])
    load(source, quantization_config=FluteConfig(group_size=32)).save_pretrained(tmp_path / "out")
    expected, model = load(tmp_path / "out"), load(tmp_path / "out", device_map="cuda")
    experts = model.get_submodule(HOME)
    assert isinstance(experts, LutExperts) and all(experts.in_kernel_order(role) for role in ROLES)
    logits = model(prompt().cuda()).logits.cpu()
    assert (logits - expected(prompt()).logits).norm() < 0.05 * logits.norm()
    model.save_pretrained(tmp_path / "again")
    assert equal_states(load(tmp_path / "again"), expected)
    assert equal_states(model.cpu(), expected) and not experts.in_kernel_order("down")


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_mixture_takes_other_routes_at_every_replay() -> None:
    """One graph, any routing: nothing in the module asks the host. Against dense experts of the decoded weights."""
    torch.manual_seed(0)
    specs = {"gate_up": QuantSpec(4, 64), "down": QuantSpec(4, 64)}
    made = LutExperts(16, 256, 384, specs, device="cuda", dtype=torch.float16)
    for role in ROLES:
        n, k = made.shapes[role]
        made.fill(role, (torch.randn(16, n, k, device="cuda") / k**0.5).half())
    wide = {role: made.dequantize(role).double() for role in ROLES}
    x, index = torch.randn(24, 256, device="cuda").half(), torch.zeros(24, 4, dtype=torch.long, device="cuda")
    weights = torch.rand(24, 4, device="cuda").half()

    def exact() -> torch.Tensor:
        gate, up = torch.einsum("th,tkih->tki", x.double(), wide["gate_up"][index]).chunk(2, -1)
        out = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * up, wide["down"][index])
        return (out * weights.double().unsqueeze(-1)).sum(1)

    made(x, index, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x, index, weights)
    for seed in range(10):
        index.copy_(torch.rand(24, 16, device="cuda").topk(4).indices if seed else torch.full_like(index, 5))
        graph.replay()
        assert (y.double() - exact()).norm() < 2e-3 * exact().norm()
        assert torch.equal(y, made(x, index, weights))
    compiled = torch.compile(made, fullgraph=True)
    assert (compiled(x, index, weights) - y).double().norm() < 2e-3 * y.double().norm()
