"""Activation-aware scaling (AWQ) folded into the layer before, where the graph allows it.

Inputs of a linear layer differ in size by orders of magnitude, weights do not; a channel whose input is large deserves
finer steps. Multiplying column k of W by f_k and dividing the input's channel k by f_k changes only the rounding:

    y = (x / f) (W diag(f))^T,      f_k = rms(x_k)^alpha, scaled to a geometric mean of extremes of 1

(Lin et al. 2024, AWQ, section 3.2, with rms for the mean magnitude). alpha is the best of a grid: the one with which
rounding to nearest makes the least squared error in the layer's output, trace(E H E^T), which H tells exactly.

The division costs nothing when it goes into what makes x: a norm's weight, or the rows of a linear layer (v_proj before
o_proj, up_proj before down_proj). Who makes x is *tried*, not looked up by name: a candidate is scaled by random
factors, the consumers by their inverse, and if the block still computes the same it is the one. So norms that add one
to their weight, grouped-query heads, fused MLPs and unknown architectures are either right or left alone and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..quantize import dequantize, quantize
from ..spec import CUSTOM_TABLE, QuantSpec
from .capture import Call, linear_of, moments, run_block
from .hessian import loss

ALPHAS = tuple(step / 10 for step in range(11))
_SAME = 1e-3  # relative difference of a block's output that float32 rounding may make


class Source(NamedTuple):
    """What makes an input of K channels: a module whose parameters' first dimension, ``rows``, stands for its channels.

    ``repeat``: channels (K,) -> the row that makes each. ``offset``: 1 for norms that multiply by one plus weight.
    """

    name: str
    repeat: torch.Tensor
    offset: float = 0.0


def scale_source(block: nn.Module, source: Source, factors: torch.Tensor) -> None:
    """Divide what ``source`` makes by ``factors`` (rows,), in place."""
    module = block.get_submodule(source.name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    shaped = factors.view(-1, *([1] * (weight.dim() - 1)))
    weight.data = (weight.data + source.offset) / shaped - source.offset
    bias = getattr(module, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.data = bias.data / factors


def scale_columns(block: nn.Module, names: list[str], factors: torch.Tensor) -> None:
    """Multiply the columns of the layers ``names`` by ``factors`` (K,), in place."""
    for name in names:
        linear = linear_of(block, name)
        linear.weight.data = linear.weight.data * factors


@torch.no_grad()
def find_source(block: nn.Module, group: list[str], hidden: torch.Tensor, call: Call, head_dim: int) -> Source | None:
    """Who makes the input of the layers ``group``, proven by trial; None if nobody that could be scaled.

    Args:
        block: dense, float32.
        group: layers with one common input; all layers that see it must be in it.
        hidden, call: what the block is called with in the trial.
        head_dim: channels of an attention head, by which grouped-query heads are repeated.
    """
    width = linear_of(block, group[0]).in_features
    before = run_block(block, hidden, call)
    for source in _candidates(block, group, width, head_dim, hidden, call):
        rows = int(source.repeat.max()) + 1
        trial = torch.linspace(0.7, 1.4, rows, device=before.device)
        trial = trial[torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(before.device)]
        saved = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        scale_source(block, source, trial)
        scale_columns(block, group, trial[source.repeat])
        after = run_block(block, hidden, call)
        block.load_state_dict(saved)  # exactly as it was
        if float((after - before).norm()) <= _SAME * float(before.norm()):
            return source
    return None


def _candidates(
    block: nn.Module, group: list[str], width: int, head_dim: int, hidden: torch.Tensor, call: Call
) -> Iterator[Source]:
    """Modules that may make the input: a norm that returned this very tensor, else linear layers of fitting size that
    ran before, the last first."""
    order: list[str] = []
    maker: list[str] = []
    made: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name == group[0]:
                maker.extend(other for other, tensor in made.items() if tensor is arguments[0])
                order.append("")
            elif not order or order[-1]:
                order.append(name)
                made[name] = output

        return see

    leaves = [(name, module) for name, module in block.named_modules() if name and not list(module.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in leaves]
    try:
        run_block(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    channels = torch.arange(width, device=hidden.device)
    for name in maker:
        weight = getattr(block.get_submodule(name), "weight", None)
        if isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,):
            yield Source(name, channels)
            yield Source(name, channels, offset=1.0)
    for name in reversed([] if maker else [name for name in order if name]):
        module = block.get_submodule(name)
        if type(module) is not nn.Linear or name in group or width % module.out_features:
            continue
        rows, copies = module.out_features, width // module.out_features
        if copies == 1:
            yield Source(name, channels)
        elif head_dim and rows % head_dim == 0:  # every key-value head serves ``copies`` heads in a row
            heads = channels // head_dim // copies
            yield Source(name, heads * head_dim + channels % head_dim)


def search_factors(
    weights: Mapping[str, torch.Tensor],
    specs: Mapping[str, QuantSpec],
    hessian: torch.Tensor,
    repeat: torch.Tensor,
    *,
    scale_dtype: torch.dtype,
    table: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """The best alpha and its factors (rows,) for layers with a common input.

    Args:
        weights: name -> (N, K) float32. specs: name -> spec; a custom one without a table is judged by its nf table.
        hessian: (K, K).
        repeat: channel -> row of the source, as in `Source`.
    """
    matrix = hessian.float()
    rows = int(repeat.max()) + 1
    # on the CPU, where additions come in a fixed order
    power = torch.zeros(rows).index_add_(0, repeat.cpu(), matrix.diagonal().cpu()).to(matrix.device)
    rms = power.clamp_min(float(power.max()) * 1e-8 + 1e-30).sqrt()
    best, kept, least = 0.0, torch.ones_like(rms), float("inf")
    for alpha in ALPHAS:
        factors = rms.pow(alpha)
        factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-3, 1e3)
        wide = factors[repeat]
        total = 0.0
        for name, weight in weights.items():
            spec, own = specs[name], table
            if spec.table != CUSTOM_TABLE:
                own = None
            elif own is None:
                spec = QuantSpec(spec.bits, spec.group_size, f"nf{spec.bits}")
            made = quantize(weight * wide, spec, table=own, scale_dtype=scale_dtype, name=name)
            rounded = dequantize(*made, spec, table=own, dtype=torch.float32) / wide
            total += float(loss(weight - rounded, matrix).sum())
        if total < least:
            best, kept, least = alpha, factors, total
    return best, kept


def fold_block(
    block: nn.Module,
    groups: list[list[str]],
    specs: Mapping[str, QuantSpec],
    hidden: list[torch.Tensor],
    call: Call,
    *,
    head_dim: int,
    scale_dtype: torch.dtype,
    table: torch.Tensor | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Fold the best factors of every group of layers into what makes their input, in place.

    Args:
        block: dense, float32. groups: from `capture.stages`. specs: by name within the block.
        hidden: inputs of the block, batch by batch.

    Returns:
        alpha of the first layer of each group that was folded, and the names of those where the graph did not allow it.
    """
    device = next(block.parameters()).device
    chosen: dict[str, float] = {}
    left: list[str] = []
    for group in groups:
        source = find_source(block, group, hidden[0][:1].to(device), _first(call, len(hidden[0])), head_dim)
        known = moments(block, None, group[0], hidden, call) if source is not None else None
        if source is None or known is None:
            left.append(group[0])
            continue
        weights = {name: linear_of(block, name).weight.data for name in group}
        alpha, factors = search_factors(
            weights,
            specs,
            known.hessian,
            source.repeat,
            scale_dtype=scale_dtype,
            table=table,
        )
        chosen[group[0]] = alpha
        scale_source(block, source, factors)
        scale_columns(block, group, factors[source.repeat])
    return chosen, left


def _first(call: Call, size: int) -> Call:
    """The call for the first window of a batch of ``size``."""
    from .capture import _map

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1] if tensor.dim() > 1 and tensor.shape[0] == size else tensor

    return Call(_map(call.arguments, cut), _map(call.keywords, cut))
