"""Decoder blocks in four products: the bits of transformers' own forward, which runs where there is more to do."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, equal_states, load, saved
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Cache, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flute import FluteConfig, LutLinear, QuantSpec
from flute.bench import decoder
from flute.integrations import fusion, lutblocks
from flute.kernels.fused import MOST_TOKENS

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
SIZES = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16, "sliding_window": 6}
PRODUCTS = 2 * 4  # of both blocks


def quantized(
    family: str = "Llama", dtype: torch.dtype = torch.float32, spec: QuantSpec | None = None, **changes: Any
) -> Any:
    model = build(family, dtype, **SIZES, **changes)
    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            model.model.set_submodule(name, LutLinear.from_linear(layer, spec or QuantSpec(group_size=32)))
    return model


def fused(model: Any) -> Any:
    model = copy.deepcopy(model)
    assert fusion.fuse(model, anywhere=True) == 2 * len(model.model.layers)
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every product of a block that runs as four."""
    real, found = lutblocks.lut_fused, []

    def counted(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        found.append(rest[4])
        return real(x, *rest, **named)

    monkeypatch.setattr(lutblocks, "lut_fused", counted)
    yield found


CACHES: dict[str, Callable[[Any], Cache | None]] = {
    "none": lambda model: None,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}


def decoded(model: Any, batch: int, tokens: int, cache: str = "dynamic", **keywords: Any) -> torch.Tensor:
    """Logits of a prompt of 8 and two steps."""
    ids, past, logits = torch.arange(3, 3 + 12 * batch).view(batch, 12) % 97, CACHES[cache](model), []
    for first, last in ((0, 8), (8, 8 + tokens), (8 + tokens, 8 + 2 * tokens)):
        keywords["use_cache"] = past is not None
        logits.append(model(ids[:, first:last] + first, past_key_values=past, **keywords).logits)
    return torch.cat(logits, 1)


def both(one: Any, other: Any, ids: torch.Tensor, caches: list[Any]) -> Iterator[torch.Tensor]:
    """Logits of two models, each with its own cache."""
    return (model(ids, past_key_values=cache).logits for model, cache in zip((one, other), caches, strict=True))


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")], ids=str
)
@torch.no_grad()
def test_the_same_bits(family: str, dtype: torch.dtype, attention: str, products: list[int]) -> None:
    plain = quantized(family, dtype)
    plain.set_attn_implementation(attention)
    model = fused(plain)
    assert equal_states(model, plain)
    for batch, tokens in [(count, 1) for count in range(1, MOST_TOKENS + 1)] + [(2, 2)]:
        for cache in CACHES:
            products.clear()
            assert torch.equal(decoded(model, batch, tokens, cache), decoded(plain, batch, tokens, cache))
            assert products == [160, 96, 256, 96] * 4, "two blocks, two steps; not the prompt"
    fusion.separate(model)
    products.clear()
    assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1)) and not products
    assert type(model.model.layers[0]) is type(plain.model.layers[0])


@torch.no_grad()
def test_other_specs_and_modes(products: list[int]) -> None:
    for spec in (QuantSpec(3, 48, "nf3"), QuantSpec(2, -1, "int2"), QuantSpec(4, 32, "gausspair4", 2)):
        plain = quantized("Qwen3", torch.float16, spec)
        assert torch.equal(decoded(fused(plain), 2, 1), decoded(plain, 2, 1))
    assert len(products) == 3 * 2 * PRODUCTS
    model = fused(plain)
    with torch.inference_mode():
        assert torch.equal(decoded(model, 2, 1), decoded(plain, 2, 1))
    assert len(products) == 4 * 2 * PRODUCTS


@torch.no_grad()
def test_a_table_or_codes_that_change(products: list[int]) -> None:
    plain = quantized()
    model = fused(plain)
    for each in (plain, model):
        each.model.layers[0].self_attn.k_proj.weight.add_(1)
    assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1)) and len(products) == 2 * PRODUCTS
    for each in (plain, model):
        each.model.layers[0].self_attn.k_proj.table.mul_(2)
    assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1))
    assert len(products) == 3 * PRODUCTS, "the block whose keys have a table of their own is as it was"


# ---- the model stays what it is --------------------------------------------------------------------------------------


@torch.no_grad()
def test_from_files_and_back(tmp_path: Path, products: list[int]) -> None:
    config = FluteConfig(group_size=32)
    model = load(saved(tmp_path / "dense", **SIZES), quantization_config=config)
    plain = copy.deepcopy(model)
    fusion.separate(plain)
    decoded(model, 1, 1)
    assert not products, "on a CPU only when asked"
    fusion.fuse(model, anywhere=True)
    block = model.model.layers[0]
    assert isinstance(block, LlamaDecoderLayer) and type(block).__name__ == "LlamaDecoderLayer"
    ids, keywords = torch.arange(3, 8)[None], {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **keywords), plain.generate(ids, **keywords))
    assert len(products) == 4 * PRODUCTS
    model.save_pretrained(tmp_path / "fused")
    again = load(tmp_path / "fused")
    assert equal_states(model, plain) and equal_states(again, plain)
    fusion.fuse(again, anywhere=True)
    for assign in (False, True):
        again.load_state_dict(plain.state_dict(), assign=assign)
        products.clear()
        logits = decoded(again, 1, 1)
        assert len(products) == 2 * PRODUCTS
    fusion.separate(again)
    assert torch.equal(logits, decoded(again, 1, 1)) and len(products) == 2 * PRODUCTS


@torch.no_grad()
def test_copies_and_pickles(products: list[int]) -> None:
    plain = quantized("Qwen2")
    model = fused(plain)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
        torch.load(file, weights_only=False),
    ):
        products.clear()
        assert torch.equal(decoded(made, 1, 1), decoded(plain, 1, 1)) and len(products) == 2 * PRODUCTS
        assert type(made.model.layers[0]) is type(model.model.layers[0])
        fusion.separate(made)
        assert type(made.model.layers[0]) is type(plain.model.layers[0])
    assert type(model.to(torch.bfloat16).model.layers[0]) is not type(plain.model.layers[0])
    products.clear()
    assert torch.equal(decoded(model, 1, 1), decoded(plain.to(torch.bfloat16), 1, 1)) and len(products) == 2 * PRODUCTS


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hidden_states_and_attentions(family: str, products: list[int]) -> None:
    plain = quantized(family)
    plain.set_attn_implementation("eager")
    model = fused(plain)
    for asked in ("output_hidden_states", "output_attentions"):
        for count in (1, 7):
            ids = torch.arange(3, 3 + count)[None]
            found, wanted = (each(ids, **{asked: True}) for each in (model, plain))
            held = asked.removeprefix("output_")
            assert len(found[held]) == len(wanted[held]) and torch.equal(found.logits, wanted.logits)
            assert all(torch.equal(*pair) for pair in zip(found[held], wanted[held], strict=True))


# ---- where it is no such step ----------------------------------------------------------------------------------------


def _wrapped(block: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base_layer(x)

    block.self_attn.v_proj = Wrapper(block.self_attn.v_proj)


def _patched(name: str) -> Callable[[Any], Any]:
    def change(block: Any) -> None:
        module = block.get_submodule(name)
        own = module.forward
        module.forward = lambda *args, **kwargs: _doubled(own(*args, **kwargs))

    return change


def _doubled(made: Any) -> Any:
    return (2 * made[0], *made[1:]) if isinstance(made, tuple) else 2 * made


def _hooked(name: str) -> Callable[[Any], Any]:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda m, args, made: _doubled(made))


def _pre_hooked(block: Any) -> None:
    block.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _dense(block: Any) -> None:
    torch.manual_seed(3)
    block.self_attn.o_proj = nn.Linear(96, 96, bias=False)


def _other_norm(block: Any) -> None:
    block.input_layernorm = nn.RMSNorm(96)


def _activation(block: Any) -> None:
    block.mlp.act_fn = nn.ReLU()


def _rotated(block: Any) -> None:
    torch.manual_seed(3)
    spec = QuantSpec(group_size=32, hadamard_size=32)
    block.mlp.down_proj = LutLinear.from_linear(nn.Linear(128, 96, bias=False), spec)


def _wide_norm(block: Any) -> None:
    block.post_attention_layernorm.to(torch.bfloat16)


def _alone(block: Any) -> None:
    block.mlp.up_proj.together = None


SKIPPED = ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm", *(
    f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]  # fmt: skip
CHANGES: dict[str, Callable[[Any], Any]] = {
    "wrapped": _wrapped, "pre-hook": _pre_hooked, "dense": _dense, "norm": _other_norm, "activation": _activation,
    "rotated": _rotated, "norm's dtype": _wide_norm, "alone": _alone,
    **{f"hook on {name}": _hooked(name) for name in SKIPPED}, **{f"patched {name}": _patched(name) for name in SKIPPED},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_blocks_with_more_in_them(change: Callable[[Any], Any], products: list[int]) -> None:
    plain = quantized()
    model = fused(plain)
    before = decoded(model, 1, 1)
    products.clear()
    for block in (*model.model.layers, *plain.model.layers):
        change(block)
    after = decoded(model, 1, 1)
    assert torch.equal(after, decoded(plain, 1, 1)) and not products
    assert change is _alone or change is _wide_norm or not torch.equal(before, after), "or this test shows nothing"


def test_steps_with_more_to_do(products: list[int]) -> None:
    plain = quantized()
    model = fused(plain)
    assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1)), "gradients"
    with torch.no_grad():
        decoded(model, 1, 1)
        assert len(products) == 2 * PRODUCTS
        products.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1))
        ids = torch.arange(MOST_TOKENS + 1)[:, None]
        assert torch.equal(model(ids).logits, plain(ids).logits)
        seen: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: seen.append(type(module).__name__)
        )
        decoded(model, 1, 1)
        handle.remove()
        assert seen.count("LutLinear") == 3 * 2 * 7
        model.train(), plain.train()
        assert torch.equal(decoded(model, 1, 1), decoded(plain, 1, 1))
    assert not products


def test_only_known_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LlamaDecoderLayer):
        pass

    model = quantized()
    model.model.layers[0].__class__ = Own
    fusion.fuse(model, anywhere=True)
    assert type(model.model.layers[0]) is Own and type(model.model.layers[1]) is not LlamaDecoderLayer
    fusion.separate(model)
    attention = type(model.model.layers[1].self_attn)
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: None)
    fusion.fuse(model, anywhere=True)
    assert type(model.model.layers[1]) is LlamaDecoderLayer, "somebody has patched its attention"


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_compiled() -> None:
    """A step has no break, and nothing is fused in it by us."""
    plain = quantized("Qwen3", num_hidden_layers=1)
    plain.set_attn_implementation("eager")  # which takes the same mask compiled or not
    model = fused(plain)
    calls: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(sum(node.target is torch.ops.flute.lut_fused for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    compiled, caches = torch.compile(model, fullgraph=True, backend=counting), [CACHES["static"](plain) for _ in "ab"]
    for tokens in (8, 1):
        ids = torch.arange(3, 3 + tokens)[None]
        found, wanted = both(compiled, plain, ids, caches)
        assert torch.equal(found, wanted) and calls[-1] == 0


@torch.no_grad()
def test_the_benchmarks_step_is_one_graph() -> None:
    """As `flute bench model` compiles it, once for all layers; the same tokens as uncompiled and apart."""
    model, plain, tokens = fused(quantized()), quantized(), []
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(decoder._layer_step, backend=counter, fullgraph=True)
    for each in (model, plain):
        decoder.share_layer_step(each, compiled=False)
    for each, function in ((plain, decoder._layer_step), (model, decoder._layer_step), (model, step)):
        for layer in each.get_decoder().layers:
            layer.step = function
        torch.manual_seed(1)
        steps = decoder.Decoder(each, 2, 4, room=8)
        for _ in range(2):
            steps.step()
            tokens.append(steps.tokens.clone())
    assert counter.frame_count == 1
    assert all(map(torch.equal, tokens[2:], tokens[:4])), "both steps of all three"
    (graph,) = counter.graphs
    assert not any(node.target is torch.ops.flute.lut_fused for node in graph.graph.nodes)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuda(family: str, products: list[int]) -> None:
    """Near the block apart, whose sums add in another order; moved there after it was fused."""
    plain = quantized(family, torch.float16)
    model = copy.deepcopy(plain)
    fusion.fuse(model)
    model, plain = model.cuda(), plain.cuda()
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    for tokens in range(1, MOST_TOKENS + 1):
        ids, caches = torch.arange(3, 3 + tokens, device="cuda")[None], [CACHES["static"](plain) for _ in "ab"]
        products.clear()
        found, wanted = both(model, plain, ids, caches)
        assert len(products) == (PRODUCTS if clusters else 0)
        assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_compiled() -> None:
    plain = quantized("Qwen3", torch.float16, num_hidden_layers=1).cuda()
    model = copy.deepcopy(plain)
    fusion.fuse(model)
    torch.compiler.reset()
    compiled, caches = torch.compile(model, fullgraph=True), [CACHES["static"](plain) for _ in "ab"]
    ids = torch.arange(3, 5, device="cuda")[:, None]
    for step in range(3):
        found, wanted = both(compiled, plain, ids + step, caches)
        assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
