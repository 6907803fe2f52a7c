"""Layers of one activation multiplied together: the same bits as apart; a FlatQuant block as one compiled graph."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import equal_states
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flute.bench import decoder
from flute.bench.flat import flat_model, flat_spec
from flute.flatquant.joint import Joint, join, joint_product, products
from flute.flatquant.modules import Codes, IntLinear, project
from flute.integrations.flatblocks import blocks_of, int4_cache
from flute.kernels.integer import pack_nibbles
from flute.kernels.joined import neighbours

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip


def layers(rows: tuple[int, ...], bits: int, bias: bool = False, k: int = 128) -> list[IntLinear]:
    made = [IntLinear(k, n, bits, bias=bias, dtype=torch.float16) for n in rows]
    for layer in made:
        codes = torch.randint(-8, 8, (layer.out_features, k), dtype=torch.int8)
        layer.weight.data = pack_nibbles(codes) if bits == 4 else codes
        layer.weight_scale.data = torch.rand(layer.out_features)
        if bias:
            layer.bias.data = torch.randn(layer.out_features).half()  # type: ignore[union-attr]
    return made


def activation(m: int, k: int = 128, device: str = "cpu") -> Codes:
    codes = torch.randint(-8, 8, (m, k), dtype=torch.int8, device=device)
    return Codes(codes, torch.rand(m, device=device), None, torch.empty(m, 1, k, dtype=torch.float16, device=device))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_together_as_apart(bits: int, bias: bool) -> None:
    made, given = layers((32, 16, 12), bits, bias), activation(3)
    wanted = [layer(given) for layer in made]
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in made]
    for joined in (False, True):
        if joined:
            join(made, anywhere=True)
            assert neighbours([layer.weight.detach() for layer in made]) is not None
        assert all(map(torch.equal, products(made, [given]), wanted))
    for layer, state in zip(made, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


class Owner(Joint):
    joint, anywhere = ("first", "second", "third"), True

    def __init__(self) -> None:
        super().__init__()
        for name, layer in zip(self.joint, layers((32, 16, 12), 4, bias=True), strict=True):
            self.add_module(name, layer)

    def is_joined(self) -> bool:
        held = [[getattr(self.get_submodule(name), part).detach() for name in self.joint]
                for part in ("weight", "weight_scale", "bias")]  # fmt: skip
        return all(neighbours(each) is not None for each in held)


def test_layers_stay_together() -> None:
    """Whatever gives them other memory: moves, casts, states, copies, pickles."""
    owner, other = Owner(), Owner()
    assert not owner.is_joined()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for made in (
        owner.half(),
        copy.deepcopy(owner),
        pickle.loads(pickle.dumps(owner)),
        copy.deepcopy(nn.ModuleList([owner]))[0],
    ):
        assert made.is_joined() and equal_states(made, owner)
    for assign in (False, True):
        owner.load_state_dict(state, assign=assign)
        assert owner.is_joined() and equal_states(owner, other)
        owner.second.load_state_dict(Owner().second.state_dict())
        assert owner.is_joined(), "a layer's state by itself is loaded in place"
    owner.second.weight_scale = nn.Parameter(torch.ones(16, device="meta"))
    owner.join()  # on two devices there is nothing to lay together
    assert not owner.is_joined()


def test_no_tokens() -> None:
    assert [tuple(y.shape) for y in products(layers((32, 16), 4), [activation(0)])] == [(0, 1, 32), (0, 1, 16)]


def test_what_stays_apart() -> None:
    made, given = layers((20, 16), 4), activation(3)
    join(made, anywhere=True)  # 20 rows are no whole tiles
    assert neighbours([layer.weight.detach() for layer in made]) is None
    assert all(map(torch.equal, products(made, [given]), [layer(given) for layer in made]))
    assert joint_product(made, [given, given]) is None  # each clips for itself
    assert joint_product(made, [given._replace(zero=torch.zeros(3, dtype=torch.int32))]) is None
    assert joint_product([*made, torch.nn.Linear(128, 4)], [given]) is None


def test_opcheck() -> None:
    made, given = layers((32, 16), 4, bias=True), activation(3)
    parameters = [[getattr(layer, name).detach() for layer in made] for name in ("weight", "weight_scale", "bias")]
    torch.library.opcheck(torch.ops.flute.int_linears, (given.codes, given.scale, *parameters, torch.float16))


def random_model(method: str = "flatquant", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return flat_model(AutoConfig.for_model("llama", **SIZES), flat_spec(method), dtype, device)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_is_part_of_the_transform(dtype: torch.dtype) -> None:
    """What the block launches is, bit for bit, the MLP written out."""
    mlp = blocks_of(random_model(dtype=dtype))[1][0].mlp
    x = torch.randn(2, 3, 64).to(dtype)
    (given,) = mlp.input_transform(x)
    inner = mlp.act_fn(mlp.gate_proj(given)) * mlp.up_proj(given)
    assert torch.equal(mlp(x), mlp.down_proj(mlp.down_transform(inner)[0]))
    mlp.silu = False
    assert torch.equal(mlp(x), mlp.down_proj(mlp.down_transform(inner)[0]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residuals_are_part_of_the_products(dtype: torch.dtype) -> None:
    """A block is, bit for bit, Llama's with its two additions written out, and still one by its class."""
    model = random_model(dtype=dtype)
    block, x = blocks_of(model)[1][0], torch.randn(2, 3, 64).to(dtype)
    rotation = model.get_decoder().rotary_emb(x, torch.arange(3)[None])
    found = block(x, position_embeddings=rotation)
    middle = x + block.self_attn(x, rotation)[0]
    assert torch.equal(found, middle + block.mlp(middle))
    assert isinstance(block, LlamaDecoderLayer) and type(block).__name__ == "LlamaDecoderLayer"
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(copied) is type(block) and torch.equal(copied(x, position_embeddings=rotation), found)
    (integer,), given = layers((16,), 4), activation(3)
    residual = torch.randn_like(integer(given))
    assert torch.equal(project(integer, given, residual), residual + integer(given))
    plain, numbers, residual = torch.nn.Linear(4, 16), torch.randn(3, 4), torch.randn(3, 16)  # as weights in tables
    assert torch.equal(project(plain, numbers, residual), residual + plain(numbers))


@torch.no_grad()
@pytest.mark.parametrize("method", ["flatquant", "flatquant-w8a8"])
def test_all_layers_are_one_graph(method: str) -> None:
    """A decode step's layers compile once, without a break, and compute what they do uncompiled."""
    model, tokens = random_model(method), []
    decoder.share_layer_step(model, compiled=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(decoder._layer_step, backend=counter, fullgraph=True)
    for compiled in (False, True):
        for layer in model.get_decoder().layers:
            layer.step = step if compiled else decoder._layer_step
        torch.manual_seed(1)
        steps = decoder.Decoder(model, 2, 4, room=8)
        for _ in range(2):
            steps.step()
            tokens.append(steps.tokens.clone())
    assert counter.frame_count == 1
    assert torch.equal(torch.cat(tokens[:2]), torch.cat(tokens[2:]))


@torch.no_grad()
def test_a_step_on_the_int4_cache_has_no_break() -> None:
    """What users compile: the model itself, `Int4Cache` as it is."""
    model, ids = random_model(), torch.randint(0, 50, (2, 6))
    model.set_attn_implementation("flute")
    caches = [int4_cache(model, 32) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    both = zip((compiled, model), caches, strict=True)
    found, wanted = (each(ids[:, :1], past_key_values=cache) for each, cache in both)
    assert torch.equal(found.logits, wanted.logits)
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length()) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 300])
def test_joint_layers_on_a_gpu(bits: int, m: int) -> None:
    """One launch gives each layer's bits, and those of the CPU; moving keeps what a state dict shows."""
    made, given = layers((64, 32, 24), bits, bias=True), activation(m)
    here = [layer(given) for layer in made]
    there = [layer.cuda() for layer in made]
    on_gpu = Codes(given.codes.cuda(), given.scale.cuda(), None, given.like.cuda())
    apart = [layer(on_gpu) for layer in there]
    join(there)
    assert neighbours([layer.weight.detach() for layer in there]) is not None
    together = products(there, [on_gpu])
    assert all(map(torch.equal, together, apart)) and all(map(torch.equal, [y.cpu() for y in together], here))


def joined(model: Any) -> bool:
    return all(
        neighbours([part.get_submodule(name).weight.detach() for name in part.joint]) is not None
        for part in model.modules()
        if isinstance(part, Joint)
    )


@pytest.mark.gpu
@torch.no_grad()
def test_joint_models_on_a_gpu() -> None:
    """Moved, copied, or with another state, q, k, v and gate, up are neighbours; and the tensors are what they were."""
    model, ids = random_model(dtype=torch.float16), torch.zeros(1, 4, dtype=torch.long, device="cuda")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.cuda()
    assert joined(model)
    wanted = model(ids).logits
    assert torch.isfinite(wanted).all()
    copied = copy.deepcopy(model)
    for assign in (False, True):
        where = [part.weight.data_ptr() for part in model.modules() if isinstance(part, IntLinear)]
        model.load_state_dict({name: tensor.cuda() for name, tensor in state.items()}, assign=assign)
        assert assign or where == [part.weight.data_ptr() for part in model.modules() if isinstance(part, IntLinear)]
        for each in (model, copied, copy.deepcopy(model)):
            assert joined(each) and torch.equal(each(ids).logits, wanted)
            assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in each.state_dict().items())
