"""FlatQuant's arithmetic: transforms that change nothing, folds, grids code for code; then whole blocks."""

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flute.errors import SpecError
from flute.flatquant.factors import Factor, Pair, cayley, pairs
from flute.flatquant.fake import _defined, _Kind, fake
from flute.flatquant.fold import FACTORS_OF, SITE_OF, BlockShape, fold
from flute.flatquant.initial import balanced, flat_rotation, hadamard, identity
from flute.flatquant.learned import Learned
from flute.flatquant.modules import Codes, Heads, IntLinear, Site
from flute.flatquant.rounding import codes, decode, grid
from flute.flatquant.sizes import factor_sizes
from flute.flatquant.spec import PRESETS, FlatSpec
from flute.integrations.flatblocks import blocks_of, shape_of
from flute.kernels.tokens import quantize_rows, transform

PAIRS = {
    576: (24, 24), 1536: (32, 48), 3584: (56, 64), 5120: (64, 80), 8960: (80, 112), 11008: (86, 128),
    14336: (112, 128), 18944: (128, 148), 29568: (168, 176), 4098: (6, 683), 97: (1, 97),
}  # fmt: skip


def random_parts(size: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    return balanced(a @ a.T, b @ b.T)


def random_learned(spec: FlatSpec, shape: BlockShape, *, key: bool = True) -> Learned:
    """Transforms and diagonals that are far from the identity."""
    parts = {"key": random_parts(shape.head_dim, 9)} if key else {}
    for site, names in FACTORS_OF.items():
        sizes = (shape.heads, shape.head_dim) if site == "out" else factor_sizes(shape.features(site))
        parts |= {name: random_parts(size, index) for index, (name, size) in enumerate(zip(names, sizes, strict=True))}
    generator = torch.Generator().manual_seed(5)
    widths = {site: shape.features(site) for site in ("attn", "mlp", "down")}
    widths["value"] = shape.kv_heads * shape.head_dim
    scales = {name: 0.5 + torch.rand(width, generator=generator) for name, width in widths.items()}
    mean = torch.randn(shape.kv_heads, shape.head_dim, generator=generator) if spec.key_offset else None
    made = Learned(spec, shape, parts, scales, mean)
    with torch.no_grad():
        for parameter in made.factors.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


# ---- sizes and factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", PAIRS)
def test_factors_have_the_least_sum(features: int) -> None:
    best = min((a + features // a, a) for a in range(1, features + 1) if features % a == 0)
    assert factor_sizes(features) == PAIRS[features] == (best[1], features // best[1])


def test_no_features_are_refused() -> None:
    with pytest.raises(SpecError, match="positive"):
        factor_sizes(0)


@pytest.mark.parametrize("direct", [False, True])
def test_the_inverse_is_the_inverse(direct: bool) -> None:
    factor = Factor(random_parts(24, 1), direct=direct)
    for parameter in factor.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    made = pairs({"a": factor, "b": Factor(random_parts(24, 3))})["a"]
    assert torch.allclose(made.forward.double() @ made.inverse.double().T, torch.eye(24).double(), atol=1e-5)
    if not direct:
        with torch.no_grad():  # it begins where it was told to
            assert torch.allclose(
                pairs({"b": Factor(random_parts(24, 3))})["b"].forward, random_parts(24, 3).matrix().float(), atol=1e-5
            )


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4, 1e18])
def test_no_parameter_is_singular(size: float) -> None:
    raw = size * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    turned = cayley(raw)
    assert torch.isfinite(turned).all()
    if size <= 1e4:
        assert torch.allclose(turned @ turned.mT, torch.eye(16).expand(3, -1, -1), atol=1e-3)
    factor = Factor(identity(16))
    factor.log_values.data = torch.linspace(-30, 30, 16)  # of condition 1e26
    made = pairs({"p": factor})["p"]
    assert torch.isfinite(made.forward).all() and torch.isfinite(made.inverse).all()


@pytest.mark.parametrize("size", [9, 24, 32, 97])
def test_the_closed_form_gives_both_sides_one_flat_covariance(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-0.5, 0.5, size).double()
    m = torch.diag(spread**2)
    w = torch.randn(4 * size, size, generator=generator).double() / spread
    g = w.T @ w / len(w)
    p = balanced(m, g).matrix()
    q = torch.linalg.inv(p).T
    sides = [p.T @ m @ p, q.T @ g @ q]
    product = float(sides[0].trace() * sides[1].trace())
    assert product < 0.5 * float(m.trace() * g.trace())
    a, b = (side / side.trace() * size for side in sides)
    assert torch.allclose(a, b, atol=0.15)  # up to the damping of moments
    assert float(a.diagonal().max()) < (1.1 if size in (24, 32) else 2.0)


@pytest.mark.parametrize("size", [1, 9, 12, 32, 86, 97])
def test_rotations_are_orthogonal_and_flat(size: int) -> None:
    h = flat_rotation(size)
    assert torch.allclose(h @ h.T, torch.eye(size).double(), atol=1e-10)
    assert float(h.abs().max()) <= (2 / size) ** 0.5 + 1e-9 or size == 1
    assert torch.equal(hadamard(size).matrix(), h)


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [576, 1536, 3584, 5120, 11008, 14336])
def test_a_transform_changes_nothing(features: int) -> None:
    n1, n2 = factor_sizes(features)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, features, generator=generator).double() for rows in (3, 5))
    left, right = (Pair.of(random_parts(n, n).matrix()) for n in (n1, n2))
    y = transform(x, left.forward, right.forward, None, 0.0) @ transform(w, left.inverse, right.inverse, None, 0.0).T
    assert torch.allclose(y, x @ w.T, rtol=1e-9, atol=1e-9)


def test_the_transform_is_the_kronecker_product() -> None:
    left, right = torch.randn(3, 3).double(), torch.randn(5, 5).double()
    x = torch.randn(4, 15).double()
    assert torch.allclose(transform(x, left, right, None, 0.0), x @ torch.kron(left, right))


def test_the_fold_is_the_online_form() -> None:
    """Each layer of a folded block, given transformed input, gives what the dense one gives (values: transformed)."""
    model = tiny_models.build("Qwen2")
    block = blocks_of(model)[1][0]
    shape, dense = shape_of(block), {name: p.detach().double() for name, p in block.named_parameters()}
    learned = random_learned(FlatSpec(), shape)
    made = {name: Pair.of(pair.forward.detach().double()) for name, pair in learned.made().items()}
    scales = {name: scale.detach().double() for name, scale in learned.scales().items()}
    folded = fold(dense, made, scales, shape)
    turn = torch.kron(torch.eye(shape.kv_heads).double(), made["out_right"].forward)
    for name, site in SITE_OF.items():
        x = torch.randn(7, shape.features(site)).double()
        bias = dense.get(f"{name}.bias", torch.zeros(1))
        y = x @ dense[f"{name}.weight"].T + bias
        if name == "self_attn.v_proj":
            y = y * scales["value"] @ turn
        if name == "mlp.up_proj":
            y = y * scales["down"]
        c = shape.per_query_head(scales["value"]) if site == "out" else scales[site]
        z = x * c @ torch.kron(*(made[part].forward for part in FACTORS_OF[site]))
        assert torch.allclose(z @ folded[f"{name}.weight"].T + folded.get(f"{name}.bias", 0), y, rtol=1e-8, atol=1e-8)
    for site, norm in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
        assert torch.equal(folded[f"{norm}.weight"], dense[f"{norm}.weight"] * scales[site])


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grids_are_the_kernels_code_for_code(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 200).unsqueeze(-1)
    x[0], x[1], x[2] = 0, x[1].abs(), 5.0
    clip = torch.tensor([0.9, 0.8])
    made = grid(x, bits, symmetric=symmetric, clip=clip, dtype=dtype)
    truth, scale, zero = quantize_rows(x, bits, symmetric, clip, dtype)
    shift = 0 if symmetric else 1 << (bits - 1)  # the kernels store asymmetric codes lower
    assert torch.equal(codes(x, made, bits) - shift, truth.float())
    assert torch.equal(made.scale.squeeze(-1), scale.float())
    assert made.zero is None if symmetric else torch.equal(made.zero.squeeze(-1) - shift, zero.float())
    assert torch.equal(fake(x, bits, symmetric=symmetric, clip=clip, dtype=dtype), decode(codes(x, made, bits), made))


class Divisors(TorchDispatchMode):
    """Everything that a tensor was divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket == torch.ops.aten.div:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_divided_and_not_multiplied(bits: int, symmetric: bool) -> None:
    """By a Python number CUDA multiplies with its rounded inverse; tensors are divided as IEEE says, as numpy does."""
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(3))
    with Divisors() as divisors:
        made = grid(x, bits, symmetric=symmetric)
    assert divisors.seen and all(isinstance(one, torch.Tensor) and one.dim() for one in divisors.seen)
    low, high = x.amin(-1).numpy(), x.amax(-1).numpy()
    steps = np.float32(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
    width = np.maximum(np.abs(low), high) if symmetric else high - low
    assert np.array_equal(made.scale.squeeze(-1).numpy(), width / steps)
    inverse = width * (np.float32(1) / steps)
    assert steps == 1 or not np.array_equal(width / steps, inverse)  # these values tell the two apart


def test_rounding_passes_the_gradient() -> None:
    x = torch.tensor([[0.3, -1.0, 0.6, 1.0]], requires_grad=True)
    made = grid(x.detach(), 4)
    decode(codes(x, made, 4), made).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, torch.ones_like(x))
    assert fake(x, 16) is x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("clipped", "clamped"), [(True, True), (True, False), (False, False)])
def test_the_gradient_by_hand_is_autograds(bits: int, symmetric: bool, clipped: bool, clamped: bool) -> None:
    torch.manual_seed(bits)
    start = torch.randn(40, 96) * torch.logspace(-3, 3, 40).unsqueeze(-1)
    start[0] = start[0].abs()  # extremes on one side of zero
    ratios, g = 0.6 + 0.4 * torch.rand(40, 2), torch.randn(40, 96)
    found = []
    for rounded in (
        lambda x, clip: fake(x, bits, symmetric=symmetric, clip=clip, clamped=clamped),
        lambda x, clip: _defined(x, clip, _Kind(bits, symmetric, torch.float32, clamped)),
    ):
        leaves = [start.clone().requires_grad_(), ratios.clone().requires_grad_()][: 1 + clipped]
        y = rounded(leaves[0], leaves[1] if clipped else None)
        y.backward(g)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    (y, *gradients), (truth, *others) = found
    assert torch.equal(y, truth)
    for one, other in zip(gradients, others, strict=True):
        assert other.abs().sum() > 0
        scale = other.norm(dim=-1, keepdim=True)  # sums of a row, taken in another order
        assert float(((one - other) / scale).abs().max()) < 1e-3


def test_a_row_of_zeros_and_16_bit_numbers() -> None:
    x = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    clip = torch.full((2,), 0.9, requires_grad=True)
    y = fake(x, 4, clip=clip)
    assert y.dtype == torch.bfloat16 and not y.any()
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and (x.grad == 1).all() and not clip.grad.any()
    half = torch.randn(5, 8).bfloat16()
    assert torch.equal(fake(half, 4), fake(half.float(), 4).bfloat16())


class Kept:
    """Bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def test_nothing_but_x_is_kept() -> None:
    x, clip = torch.randn(64, 512, requires_grad=True), torch.full((64, 2), 0.8, requires_grad=True)
    for rounded, most in (
        (lambda: fake(x, 4, clip=clip, clamped=True), 1.1),
        (lambda: _defined(x, clip, _Kind(4, True, torch.float32, True)), 9),
    ):
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            y = rounded()
        assert most - 8 < sum(kept.storages.values()) / x.nbytes < most
        del y


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("a_asym", "w_asym"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("clips", [1, 3])
def test_real_sites_and_layers_are_the_simulated_ones(bits: int, a_asym: bool, w_asym: bool, clips: int) -> None:
    torch.manual_seed(0)
    sites = [Site(6, 12, bits, symmetric=not a_asym, clips=clips, real=real) for real in (False, True)]
    values = {"left": torch.randn(6, 6), "right": torch.randn(12, 12), "clip": 0.7 + 0.3 * torch.rand(clips, 2)}
    for site in sites:
        site.load_state_dict(values)
    x = torch.randn(2, 5, 72)
    simulated, real = (site(x) for site in sites)
    assert len(simulated) == len(real) == clips
    dense = torch.randn(20, 72) + 0.3
    made = grid(dense, bits, symmetric=not w_asym)
    units = codes(dense, made, bits)
    layer = IntLinear(72, 20, bits, bias=True, w_asym=w_asym, a_asym=a_asym)
    layer.bias.data = torch.randn(20)
    layer.store(units, made)
    whole = layer.codes().long() - (layer.weight_zero.long()[:, None] if w_asym else 0)
    assert torch.equal(whole, (units if made.zero is None else units - made.zero).long())
    for one, other in zip(simulated, real, strict=True):
        assert isinstance(other, Codes)
        numbers = other.codes.long() if other.zero is None else other.codes.long() - other.zero.unsqueeze(-1)
        assert torch.equal(numbers * other.scale.unsqueeze(-1), one.view(-1, 72))  # bit for bit
        sums = (numbers @ whole.T).float()
        exact = sums * (other.scale[:, None] * layer.weight_scale) + layer.bias
        assert torch.equal(layer(other).view(-1, 20), exact)
        truth = one.double() @ decode(units, made).double().T + layer.bias.double()
        assert torch.allclose(layer(other).double(), truth, rtol=1e-5, atol=1e-4)


def test_sums_of_rows_are_made_once_and_follow_the_weight() -> None:
    made = grid(weight := torch.randn(20, 72), 4)
    layer, other = (IntLinear(72, 20, 4, a_asym=True) for _ in range(2))
    layer.store(codes(weight, made, 4), made)
    assert torch.equal(layer.row_sum, codes(weight, made, 4).sum(-1).int()) and "row_sum" not in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.row_sum, layer.row_sum) and torch.equal(other.half().row_sum, layer.row_sum)
    x = Site(0, 0, 4, symmetric=False, real=True)(torch.randn(3, 72))[0]
    kept, layer.codes = layer(x), None  # what would sum them anew
    assert torch.equal(layer(x), kept)


def test_a_mean_key_does_not_change_attention() -> None:
    torch.manual_seed(0)
    heads = Heads(8, 2, (4, 4), (False, False), head_dim=8, offset=True)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    still = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)  # cos, sin
    before = (q.transpose(1, 2) @ k.transpose(1, 2).mT).softmax(-1)
    heads.offset.data = 10 * torch.randn(2, 8)
    moved = heads(q, k, *still)
    assert torch.allclose((moved[0] @ moved[1].mT).softmax(-1), before, atol=1e-5)


# ---- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_specs_go_to_json_and_back(name: str) -> None:
    spec = PRESETS[name]
    assert FlatSpec.from_dict(spec.to_dict()) == spec
    spec.check_storable()


@pytest.mark.parametrize(
    "change", [{"w_bits": 1}, {"a_bits": 9}, {"k_bits": True}, {"more": 1}, {"version": 2}, {"k_asym": 1}], ids=str
)
def test_what_a_config_may_not_say(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        FlatSpec.from_dict(FlatSpec().to_dict() | change)


@pytest.mark.parametrize(
    "spec",
    [FlatSpec(w_asym=True, a_asym=True), FlatSpec(w_asym=True, a_bits=16), FlatSpec(16, 4), FlatSpec(8, 16)],
    ids=str,
)
def test_what_has_no_layer_is_not_stored(spec: FlatSpec) -> None:
    with pytest.raises(SpecError, match=r"evaluated, not saved|need quantized activations"):
        spec.check_storable()
    FlatSpec(w_asym=True).check_storable()
