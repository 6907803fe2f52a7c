"""``flute::decode_attention`` against explicit softmax, transformers' models on it; then the kernel on a GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compiler import needs_nvrtc
from gpus import GPUS
from test_compile import complaints, report
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import flute.integrations.attention as integration
from flute.errors import IntegrationError, OperatorError
from flute.kernels import attention_cuda
from flute.kernels.decode_attention import decode_attention

HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # at most, of a number


def given(
    batch: int, heads: int, group: int, tokens: int, positions: int, dims: tuple[int, int], dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    make = torch.Generator().manual_seed(batch * 1000 + positions)
    shapes = (
        (batch, heads * group, tokens, dims[0]),
        (batch, heads, positions, dims[0]),
        (batch, heads, positions, dims[1]),
    )
    query, key, value = (torch.randn(shape, generator=make).to(dtype).to(device) for shape in shapes)
    return query, key, value


def causal(tokens: int, positions: int, hidden: int = 0) -> torch.Tensor:
    """bool (T, S) of the last T of S tokens, of which the first ``hidden`` are padding."""
    seen = torch.ones(tokens, positions, dtype=torch.bool).tril(positions - tokens)
    seen[:, :hidden] = False
    return seen


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_definition(group: int, tokens: int) -> None:
    query, key, value = given(2, 2, group, tokens, 10, (16, 24), torch.float32)
    mask = torch.stack([causal(tokens, 10), causal(tokens, 10, 4)])[:, None]
    for one in (mask, None):
        y = decode_attention(query, key, value, one, 0.3)
        wanted = F.scaled_dot_product_attention(query, key, value, one, scale=0.3, enable_gqa=True)
        assert torch.allclose(y, wanted.transpose(1, 2), atol=1e-6) and y.is_contiguous()
    assert not decode_attention(query, key, value, torch.zeros_like(mask), 0.3).any()  # nobody sees anything


def test_opcheck_and_refusals() -> None:
    query, key, value = given(2, 2, 2, 1, 6, (8, 8), torch.float32)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.flute.decode_attention, (query, key, value, mask, 0.5))
    for bad, message in (
        ((query[:1], key, value, mask), "query"),
        ((query, key, value.half(), mask), "float16"),
        ((query[:, :3], key, value, mask), "3 query heads"),
        ((query, key, value, mask.float()), "bool"),
        ((query, key, value, mask[..., :5]), "mask"),
    ):
        with pytest.raises(OperatorError, match=message):
            decode_attention(*bad, 0.5)


def test_parts_fill_a_gpu() -> None:
    """One sequence of an 8B model: eight heads, a cluster of eight blocks each; more of a long cache."""
    h100, old = GPUS["H100"], GPUS["A100"]
    assert attention_cuda.decode_parts(8, 64, h100) == (8, 8, True)
    assert attention_cuda.decode_parts(8, 8, h100) == (8, 1, True)
    assert attention_cuda.decode_parts(8, 2048, h100) == (8, 16, False)
    assert attention_cuda.decode_parts(128, 2048, h100) == (8, 1, True)
    assert attention_cuda.decode_parts(512, 2048, h100) == (4, 1, True)
    assert attention_cuda.decode_parts(8, 64, old) == (8, 8, False)


@pytest.mark.parametrize("numbers", [2, 8])
def test_rows_are_copied_where_lanes_could_not_read_them(numbers: int) -> None:
    """A contiguous tensor at an odd place, too: `contiguous` would hand it back."""
    whole = torch.arange(2 * 3 * 8 + 1, dtype=torch.float16)
    even, odd = whole[:-1].view(2, 3, 8), whole[1:].view(2, 3, 8)
    assert attention_cuda._rows_aligned(even, numbers) is even
    assert attention_cuda._rows_aligned(even[:, :1], numbers).data_ptr() == even.data_ptr()
    for x in (odd, whole[:42].view(2, 3, 7), even.transpose(1, 2)):
        made = attention_cuda._rows_aligned(x, numbers)
        assert torch.equal(made, x) and made.data_ptr() != x.data_ptr()


# ---- transformers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("window", [None, 4])
def test_models_generate_the_same(window: int | None, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of cache, padded prompts, sliding windows; through the operator, as if the CPU were a GPU."""
    torch.manual_seed(0)
    small = dict(
        hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    if window is None:
        net = LlamaForCausalLM(LlamaConfig(**small)).eval()
    else:
        net = MistralForCausalLM(MistralConfig(**small, sliding_window=window)).eval()
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    called = 0

    def counted(query: torch.Tensor, *others: torch.Tensor) -> bool:
        nonlocal called
        called += query.shape[2] == 1
        return query.shape[2] == 1

    monkeypatch.setattr(integration, "_takes", counted)
    logits = {}
    for name in ("sdpa", integration.ATTENTION):
        net.set_attn_implementation(name)
        made = net.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits[name] = torch.stack(made.logits)
    assert called == 2 * 5
    assert torch.allclose(logits["sdpa"], logits[integration.ATTENTION], atol=1e-5)


def test_what_models_ask_for_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of positions goes to torch's attention, which adds it; sinks, which nobody here adds, are refused."""
    query, key, value = given(2, 2, 1, 1, 10, (16, 16), torch.float32)
    bias, mask = torch.randn(2, 2, 1, 10), causal(1, 10, 3)[None, None]
    monkeypatch.setattr(integration, "_takes", lambda *_: True)
    module = torch.nn.Module()
    y, _ = integration.attention(module, query, key, value, mask, 0.3, position_bias=bias)
    wanted = F.scaled_dot_product_attention(query, key, value, bias.masked_fill(~mask, -torch.inf), scale=0.3)
    assert torch.allclose(y, wanted.transpose(1, 2), atol=1e-6)
    with pytest.raises(IntegrationError, match="sinks"):
        integration.attention(module, query, key, value, mask, 0.3, s_aux=torch.zeros(2))


# ---- compiled --------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_no_spills(arch: str) -> None:
    for dim, warps in itertools.product((64, 128, 192), (4, 8)):
        macros = attention_cuda.decode_macros(dim == 64, dim, dim, warps)
        assert not complaints(report("decode_attention.cu", dict(macros), arch)), macros


# ---- GPU -------------------------------------------------------------------------------------------------------------


def bound(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer in float32, and how far one in the inputs' dtype may lie: weights and sums are rounded once."""
    wide = [x.float() for x in (query, key, value)]
    wanted = decode_attention(*wide, mask, scaling)
    size = decode_attention(wide[0], wide[1], wide[2].abs(), mask, scaling)
    return wanted, HALF_ULP[query.dtype] * (size + wanted.abs()) + 1e-4 * size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(HALF_ULP), ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (192, 192), (8, 40)], ids=str)
@pytest.mark.parametrize(("batch", "heads", "group", "tokens", "positions"), [
    (1, 8, 4, 1, 17), (1, 8, 4, 1, 2049), (1, 8, 4, 1, 4500), (1, 1, 3, 8, 20000), (2, 3, 8, 5, 333),
    (64, 8, 4, 1, 300), (5, 8, 1, 2, 1000), (16, 2, 16, 1, 129),
])  # fmt: skip
def test_kernel(
    batch: int, heads: int, group: int, tokens: int, positions: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Every way of cutting, with and without a mask, twice the same bits."""
    query, key, value = given(batch, heads, group, tokens, positions, dims, dtype, "cuda")
    random = torch.rand(batch, 1, tokens, positions, device="cuda")
    padded = torch.stack([causal(tokens, positions, 7 * b % positions) for b in range(batch)])[:, None].cuda()
    empty = random < 0.01  # hardly anything: whole steps are skipped, some queries may see nothing
    for mask in (None, padded, padded[:1], random < 0.7, empty):
        y = decode_attention(query, key, value, mask, dims[0] ** -0.5)
        wanted, allowed = bound(query, key, value, mask, dims[0] ** -0.5)
        assert ((y.float() - wanted).abs() <= allowed).all()
        assert torch.equal(decode_attention(query, key, value, mask, dims[0] ** -0.5), y)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [40, 3000, 30000])
def test_who_sees_one_position_gets_its_value(positions: int) -> None:
    query, key, value = given(3, 4, 4, 2, positions, (128, 128), torch.bfloat16, "cuda")
    at = torch.randint(0, positions, (3, 2), device="cuda")
    mask = torch.zeros(3, 1, 2, positions, dtype=torch.bool, device="cuda").scatter_(3, at[:, None, :, None], True)
    y = decode_attention(query, key, value, mask, 1.0)
    for b, t in itertools.product(range(3), range(2)):
        assert torch.equal(y[b, t], value[b, :, at[b, t]].repeat_interleave(4, 0))


@pytest.mark.gpu
def test_any_strides() -> None:
    """A static cache cut short, queries of a fused product, keys that lie token by token, odd places, a mask's rows."""
    query, key, value = given(2, 4, 2, 3, 50, (64, 64), torch.float16, "cuda")
    mask = causal(3, 50).cuda()[None, None]
    y = decode_attention(query, key, value, mask, 0.1)
    rows = torch.zeros(2, 3, 8 * 64 + 40, dtype=query.dtype, device="cuda")
    rows[..., 40:] = query.transpose(1, 2).flatten(2)
    longer = torch.randn(2, 4, 70, 64, dtype=query.dtype, device="cuda")
    longer[:, :, :50] = key
    odd = torch.zeros(value.numel() + 1, dtype=value.dtype, device="cuda")[1:].view(value.shape).copy_(value)
    wide = torch.zeros(1, 1, 3, 77, dtype=torch.bool, device="cuda")
    wide[..., :50] = mask
    taken = rows[..., 40:].unflatten(2, (8, 64)).transpose(1, 2)
    apart = key.transpose(1, 2).contiguous().transpose(1, 2)
    for one, two, three in ((taken, longer[:, :, :50], odd), (query, apart, value)):
        assert torch.equal(decode_attention(one, two, three, wide[..., :50], 0.1), y)


@pytest.mark.gpu
def test_a_graph_replays_the_same_bits() -> None:
    query, key, value = given(1, 8, 4, 1, 3000, (128, 128), torch.bfloat16, "cuda")
    mask = causal(1, 3000, 5).cuda()[None, None]
    wanted = decode_attention(query, key, value, mask, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(query, key, value, mask, 0.1)
    for _ in range(100):
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
    mask[..., 1000:] = False  # a mask is read anew
    graph.replay()
    assert torch.equal(y, decode_attention(query, key, value, mask, 0.1)) and not torch.equal(y, wanted)


@pytest.mark.gpu
@torch.no_grad()
def test_a_compiled_model() -> None:
    """A static cache under torch.compile, as ``generate`` makes it: the same as torch's attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    net = LlamaForCausalLM(config).cuda().bfloat16().eval()
    ids, logits = torch.randint(0, 64, (2, 9), device="cuda"), {}
    for name in ("sdpa", integration.ATTENTION):
        net.set_attn_implementation(name)
        made = net.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation="static",
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits[name] = torch.stack(made.logits).float()
    assert (logits["sdpa"] - logits[integration.ATTENTION]).abs().max() < 0.05
