"""The int4 cache: what is stored, attention against explicit softmax, transformers' models on it; then the GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from gpus import GPUS
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flute.errors import IntegrationError, OperatorError
from flute.integrations.attention import ATTENTION
from flute.integrations.kv_cache import Int4Cache
from flute.kernels import attention_cuda
from flute.kernels.attention import Store, kv_append, kv_attention, quantize_heads
from flute.kernels.integer import unpack_nibbles
from flute.kernels.tokens import quantize_rows

SYMMETRIC = [(True, True), (False, False), (True, False)]


def stores(
    batch: int, heads: int, slots: int, dim: int, symmetric: tuple[bool, bool], device: str = "cpu"
) -> tuple[Store, Store]:
    clip = torch.tensor([0.95, 0.9], device=device)
    keys = Store.empty(batch, heads, slots, dim, symmetric[0], device, clip)
    return keys, Store.empty(batch, heads, slots, dim, symmetric[1], device)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_what_is_stored(dim: int, symmetric: bool) -> None:
    x = torch.randn(2, 3, 5, dim).half() + 0.5
    kept = quantize_heads(x, symmetric)
    codes, scale, zero = quantize_rows(x, 4, symmetric, None, torch.float16)
    assert torch.equal(unpack_nibbles(kept.codes), codes) and torch.equal(kept.scale, scale)
    assert (kept.zero is None) is symmetric and (zero is None or torch.equal(kept.zero.int(), zero))
    back = kept.dequantize(torch.float32)
    assert ((back - x).abs() <= scale.float()[..., None] * (0.502 if symmetric else 1.002)).all()
    assert kept.nbytes <= (0.29 if dim > 64 or symmetric else 0.2813) * x.nbytes


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("symmetric", SYMMETRIC, ids=str)
def test_attention_is_softmax_over_what_is_stored(symmetric: tuple[bool, bool], group: int, dim: int) -> None:
    batch, heads, tokens = 2, 2, 3
    keys, values = stores(batch, heads, 24, dim, symmetric)
    key, value = torch.randn(2, batch, heads, 10, dim).half()
    seen = torch.tensor([10, 17], dtype=torch.int32)
    kv_append(key, value, keys, values, seen)
    query = torch.randn(batch, heads * group, tokens, dim).half()
    starts = torch.tensor([0, 9], dtype=torch.int32)
    y = kv_attention(query, keys, values, seen, dim**-0.5, starts)
    fresh = [
        quantize_heads(x, s, store.clip) for x, s, store in zip((key, value), symmetric, (keys, values), strict=True)
    ]
    wide = [one.dequantize(torch.float32).repeat_interleave(group, 1) for one in fresh]
    for b, first in ((0, 0), (1, 2)):  # sequence 1: these ten tokens lie in slots 7 to 16, of which 9 on count
        mask = torch.ones(tokens, 10, dtype=torch.bool).tril(10 - tokens)
        mask[:, :first] = False
        wanted = F.scaled_dot_product_attention(query[b].float(), wide[0][b], wide[1][b], mask)
        assert ((y[b] - wanted).abs() <= 1e-3 * (1 + wanted.abs())).all()  # y is float16


@pytest.mark.parametrize("symmetric", SYMMETRIC, ids=str)
def test_pages_hold_the_same(symmetric: tuple[bool, bool]) -> None:
    static, paged = stores(2, 2, 32, 16, symmetric), stores(8, 2, 8, 16, symmetric)
    table = torch.tensor([[3, 1, 0, 5], [2, 7, 4, 6]], dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    for tokens in (7, 1, 12):
        key, value = torch.randn(2, 2, 2, tokens, 16).half()
        lengths += tokens
        kv_append(key, value, *static, lengths)
        kv_append(key, value, *paged, lengths, table)
    for one, other in zip(static, paged, strict=True):
        assert torch.equal(one.dequantize(torch.float32), other.dequantize(torch.float32, table))
    query = torch.randn(2, 4, 1, 16).half()
    assert torch.equal(
        kv_attention(query, *static, lengths, 0.3), kv_attention(query, *paged, lengths, 0.3, table=table)
    )


def test_what_finds_no_slot_is_dropped_and_nobody_to_see_is_zero() -> None:
    keys, values = stores(1, 1, 4, 8, (True, True))
    x = torch.randn(1, 1, 6, 8).half()
    kv_append(x, x, keys, values, torch.tensor([6], dtype=torch.int32))
    assert torch.equal(keys.codes, quantize_heads(x[:, :, :4], True, keys.clip).codes)
    y = kv_attention(x[:, :, :1], keys, values, torch.zeros(1, dtype=torch.int32), 1.0)
    assert not y.any()


def test_opcheck_and_refusals() -> None:
    keys, values = stores(1, 2, 4, 8, (False, True))
    x, one = torch.randn(1, 2, 1, 8).half(), torch.ones(1, dtype=torch.int32)
    inside = (keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero)
    torch.library.opcheck(torch.ops.flute.kv_attention, (x, *inside, one, None, None, 1.0))
    given = (x, x, *inside[:3], None, *inside[3:], None, one, None)
    torch.library.opcheck(torch.ops.flute.kv_append, given)
    torch.library.opcheck(torch.ops.flute.kv_dequantize, (*inside[:3], torch.float16))
    for bad, message in (
        ((x[:, :1], x[:, :1], keys, values, one), "1 heads"),
        ((x, x.float(), keys, values, one), "value"),
        ((x, x, keys, values, one.long()), "int32"),
        ((x, x, keys, stores(1, 2, 5, 8, (True, True))[1], one), "differ"),
        ((x, x, keys, values, one, torch.zeros(2, 1, dtype=torch.int32)), "table"),
    ):
        with pytest.raises(OperatorError, match=message):
            kv_append(*bad)
    with pytest.raises(OperatorError, match="3 query heads"):
        kv_attention(torch.randn(1, 3, 1, 8).half(), keys, values, one, 1.0)


# ---- transformers ----------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, vocab_size=64)


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=3, head_dim=24)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_run_on_it(kind: str) -> None:
    """Every way of attention computes the same from the same codes; padded prompts, one token at a time, beams."""
    net, ids = model(kind), torch.randint(0, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    logits = {}
    for name in ("eager", "sdpa", ATTENTION):
        net.set_attn_implementation(name)
        cache = Int4Cache(net.config, 24)
        made = net.generate(ids, **given, past_key_values=cache, output_logits=True, return_dict_in_generate=True)
        assert int(cache.get_seq_length()) == 17
        logits[name] = torch.stack(made.logits)
    assert (logits["eager"] - logits["sdpa"]).abs().max() < 1e-5
    assert (logits["eager"] - logits[ATTENTION]).abs().max() < 1e-5
    net.set_attn_implementation("sdpa")
    exact = net.generate(ids, **given, output_logits=True, return_dict_in_generate=True).logits
    error = (logits["sdpa"][0] - exact[0]).norm() / exact[0].norm()
    assert 1e-4 < error < 0.2  # the prompt, too, is read from codes
    assert net.generate(ids, **given | {"num_beams": 3}, past_key_values=Int4Cache(net.config, 24)).shape == (2, 18)


@torch.no_grad()
def test_a_prompt_at_once_or_token_by_token() -> None:
    net, ids = model("llama"), torch.randint(0, 64, (1, 10))
    net.set_attn_implementation(ATTENTION)
    at_once = net(ids, past_key_values=Int4Cache(net.config, 16)).logits
    cache = Int4Cache(net.config, 16)
    stepwise = torch.cat([net(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10)], 1)
    assert (at_once - stepwise).abs().max() < 1e-5
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert (net(ids, past_key_values=cache).logits - at_once).abs().max() < 1e-6


@torch.no_grad()
def test_clips_are_used_and_counted() -> None:
    net, ids = model("llama"), torch.randint(0, 64, (1, 10))
    tight = [(torch.tensor([0.5, 0.5]), None)] * 2
    plain, clipped = (net(ids, past_key_values=Int4Cache(net.config, 16, clips=c)).logits for c in (None, tight))
    assert (plain - clipped).abs().max() > 1e-3
    with pytest.raises(IntegrationError, match="1 pairs of clips for 2 layers"):
        Int4Cache(net.config, 16, clips=tight[:1])


@torch.no_grad()
def test_bytes() -> None:
    net = LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": 768}, num_key_value_heads=2)).half()
    cache = Int4Cache(net.config, 100)
    net(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    dense = 2 * 2 * 2 * 100 * 128 * 2  # keys and values, layers, heads, tokens, dim, bytes
    assert cache.nbytes == dense * (64 + 4) // 256 <= 0.29 * dense


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", SYMMETRIC, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_append_writes_the_same_bytes(dim: int, symmetric: tuple[bool, bool], dtype: torch.dtype) -> None:
    mine, there = stores(3, 2, 48, dim, symmetric), stores(3, 2, 48, dim, symmetric, "cuda")
    lengths = torch.tensor([0, 5, 40], dtype=torch.int32)
    for tokens in (1, 9):
        key, value = torch.randn(2, 3, tokens, 2, dim).to(dtype).transpose(2, 3)  # as models hand them over
        lengths += tokens
        kv_append(key, value, *mine, lengths)
        kv_append(key.cuda(), value.cuda(), *there, lengths.cuda())
    for one, other in zip(mine, there, strict=True):
        for a, b in ((one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero)):
            assert a is b is None or torch.equal(a, b.cpu())
        assert torch.equal(one.dequantize(dtype), other.dequantize(dtype).cpu())


def answers(
    dim: int, group: int, symmetric: tuple[bool, bool], dtype: torch.dtype, tokens: int, slots: int, paged: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's and, from the same codes, float32's."""
    batch, heads = 3, 2
    table = torch.randperm(3 * batch, device="cuda").int().view(batch, 3) if paged else None
    pages = 3 * batch if paged else batch
    keys, values = stores(pages, heads, slots, dim, symmetric, "cuda")
    capacity = slots * (3 if paged else 1)
    key, value = torch.randn(2, batch, heads, capacity, dim, device="cuda").to(dtype) + 0.3
    full = torch.full((batch,), capacity, dtype=torch.int32, device="cuda")
    kv_append(key, value, keys, values, full, table)
    lengths = torch.tensor([tokens, capacity // 3 + tokens, capacity], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 7, 18], dtype=torch.int32, device="cuda")
    query = torch.randn(batch, heads * group, tokens, dim, device="cuda").to(dtype)
    given = (lengths, dim**-0.5, starts, table)
    first = kv_attention(query, keys, values, *given)
    assert all(torch.equal(kv_attention(query, keys, values, *given), first) for _ in range(3))
    return first, kv_attention(query.float(), keys, values, *given)  # float32 is for plain torch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attention_of_every_shape(dim: int, dtype: torch.dtype) -> None:
    cases = itertools.product((1, 3, 8), SYMMETRIC, (1, 4), ((37, False), (1000, False), (64, True)))
    for number, (group, symmetric, tokens, (slots, paged)) in enumerate(cases):
        if number % 3 != dim // 16 % 3:  # a third of them each
            continue
        y, wanted = answers(dim, group, symmetric, dtype, tokens, slots, paged)
        bound = 2e-3 if dtype == torch.float16 else 1.5e-2
        assert (y.float() - wanted).norm() <= bound * wanted.norm(), (group, symmetric, tokens, slots, paged)


@pytest.mark.gpu
def test_uniform_attention_is_the_exact_mean() -> None:
    """Zero queries weigh all tokens alike: the mean of integers that sum to a power of two is exact."""
    keys, values = stores(1, 1, 64, 128, (True, True), "cuda")
    value = torch.randint(-7, 8, (1, 1, 64, 128), device="cuda").half()
    value[..., 0] = 7.0  # every scale is 1
    lengths = torch.tensor([64], dtype=torch.int32, device="cuda")
    kv_append(torch.randn(1, 1, 64, 128, device="cuda").half(), value, keys, values, lengths)
    y = kv_attention(torch.zeros(1, 4, 1, 128, device="cuda").half(), keys, values, lengths, 1.0)
    assert torch.equal(y, value.float().mean(2, keepdim=True).half().expand_as(y))


@pytest.mark.gpu
def test_a_captured_step_goes_on_as_lengths_grow() -> None:
    keys, values = stores(2, 2, 256, 128, (False, False), "cuda")
    mine = stores(2, 2, 256, 128, (False, False), "cuda")
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    key, value = torch.randn(2, 2, 2, 1, 128, device="cuda").half()
    query = torch.randn(2, 8, 1, 128, device="cuda").half()

    def step(pair: tuple[Store, Store]) -> torch.Tensor:
        kv_append(key, value, *pair, lengths)
        return kv_attention(query, *pair, lengths, 0.1)

    step((keys, values))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lengths.add_(1)
        y = step((keys, values))
    lengths.zero_()
    for number in range(100):
        for fresh in (key, value, query):
            fresh.normal_()
        graph.replay()
        assert int(lengths[0]) == number + 1
        assert torch.equal(step(mine), y)


def test_parts_of_the_cache() -> None:
    h100, a100 = GPUS["H100"], GPUS["A100"]
    parts = attention_cuda.parts
    assert parts(8, 2048, 64, h100) == (8, True)  # one sequence of an 8B model
    assert parts(8, 2048, 32, h100) == (8, True)
    assert parts(8, 8192, 64, h100) == (8, True)
    assert parts(8, 16384, 64, h100) == (33, False)  # blocks for all SMs
    assert parts(32, 2048, 64, h100) == (4, True)  # 30 clusters of eight run at once
    assert parts(128, 2048, 64, h100) == (2, True)  # three would not run all at once
    assert parts(128, 2048, 64, a100) == (1, False)
    assert parts(48, 2048, 64, a100) == (4, False)
    assert parts(512, 2048, 64, h100) == (1, True)
    assert parts(1, 32, 64, h100) == (1, True)
    assert not attention_cuda.takes(torch.float16, 128, 128, 24, True)  # pages of whole blocks only
    assert not attention_cuda.takes(torch.float16, 100, 128, 64, False)
