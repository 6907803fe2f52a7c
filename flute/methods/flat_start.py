"""FlatQuant: what a block's sites see on the calibration text, and where transforms and diagonals begin from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..flatquant.factors import Parts
from ..flatquant.fold import FACTORS_OF, MODULE_OF, SITE_OF, BlockShape, Tensors
from ..flatquant.initial import balanced_pair, hadamard, identity
from ..flatquant.learned import Learned
from ..flatquant.modules import Heads, Site, unrounded_cache
from ..flatquant.sizes import factor_sizes
from ..flatquant.spec import FlatSpec
from ..kernels.heads import turned

STARTS: dict[str, Callable[[int], Parts] | None] = {"moments": None, "hadamard": hadamard, "identity": identity}
DIAGONALS = ("sq_style", "one_style")
_KEPT_TOKENS = 4096  # of each site, for second moments
_LEAST = 1e-5


@dataclass
class Seen:
    """Of one block: ``samples`` of the tokens (T, n) at each site, ``largest`` |x| of each channel over all tokens, and
    of queries and keys before their transform ``samples`` (T, d) as ``query``, ``key``, and ``key_mean``."""

    samples: Tensors = field(default_factory=dict)
    largest: Tensors = field(default_factory=dict)
    key_mean: torch.Tensor | None = None


@contextmanager
def unrounded(block: nn.Module) -> Iterator[None]:
    """Inside, a flattened block rounds nothing."""
    parts: list[tuple[Any, str]] = [(part, "bits") for part in block.modules() if isinstance(part, Site)]
    parts += [(part, "q_bits") for part in block.modules() if isinstance(part, Heads)]
    kept = [getattr(part, name) for part, name in parts]
    try:
        for part, name in parts:
            setattr(part, name, 16)
        with unrounded_cache(block):
            yield
    finally:
        for (part, name), bits in zip(parts, kept, strict=True):
            setattr(part, name, bits)


@torch.no_grad()
def watch(block: nn.Module, run: Callable[[int], Any], batches: int) -> Seen:
    """Run a flattened block whose transforms are the identity, ``run(index)`` for each batch, and keep what it sees.

    Raises:
        CalibrationError: NaN or Inf at a site.
    """
    seen = Seen()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in (*MODULE_OF, "query", "key")}
    means: list[torch.Tensor] = []
    quota = -(-_KEPT_TOKENS // batches)

    def keep(name: str, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"the input of {name!r} is NaN or Inf on the calibration text; repair the checkpoint"
            )
        peak = rows.abs().amax(0).float()
        seen.largest[name] = torch.maximum(seen.largest[name], peak) if name in seen.largest else peak
        parts[name].append(rows[:: max(1, len(rows) // quota)][:quota].to(torch.float32, copy=True))

    def heads(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        q, k = (turned(x, *arguments[2:]).transpose(1, 2) for x in arguments[:2])  # what transforms get
        keep("query", q)
        keep("key", k)
        means.append(k.float().mean((0, 2)))

    def site(name: str) -> Callable[..., None]:
        return lambda module, arguments: keep(name, arguments[0])

    hooks = [block.get_submodule(path).register_forward_pre_hook(site(name)) for name, path in MODULE_OF.items()]
    hooks.append(block.get_submodule("self_attn.heads").register_forward_pre_hook(heads))
    try:
        with unrounded(block):
            for index in range(batches):
                run(index)
    finally:
        for hook in hooks:
            hook.remove()
    seen.samples = {name: torch.cat(each) for name, each in parts.items()}
    seen.key_mean = torch.stack(means).mean(0)
    return seen


@dataclass(frozen=True)
class Start:
    """Where learning begins, and what is learned.

    Args:
        transforms: learn factors (``--cali_trans``). diagonals: learn c (``--add_diag``).
        clip_weights, clip_activations: learn clips (``--lwc``, ``--lac``).
        factors: ``"moments"``: the closed form; ``"hadamard"``, ``"identity"``.
        diagonal: ``"sq_style"``: c = w^(1 - alpha) / x^alpha of the largest magnitudes; ``"one_style"``: 1.
        direct: learn factors entry by entry (``--direct_inv``).

    Raises:
        CalibrationError: an unknown name.
    """

    transforms: bool = True
    diagonals: bool = True
    clip_weights: bool = True
    clip_activations: bool = True
    factors: str = "moments"
    diagonal: str = "sq_style"
    alpha: float = 0.5
    direct: bool = False

    def __post_init__(self) -> None:
        if self.factors not in STARTS:
            raise CalibrationError(f"transforms begin as {self.factors!r}, which is unknown; use {', '.join(STARTS)}")
        if self.diagonal not in DIAGONALS:
            raise CalibrationError(f"diag_init={self.diagonal!r} is unknown; use {', '.join(DIAGONALS)}")


def begin(start: Start, spec: FlatSpec, shape: BlockShape, dense: Mapping[str, torch.Tensor], seen: Seen) -> Learned:
    """The parameters of a block before the first step."""
    scales = _diagonals(start, shape, dense, seen) if start.diagonals else {}
    parts: dict[str, Parts] = {}
    for site, names in FACTORS_OF.items() if start.transforms else ():
        rows, columns = (shape.heads, shape.head_dim) if site == "out" else factor_sizes(shape.features(site))
        c = scales.get(site)
        if site == "out" and "value" in scales:
            c = shape.per_query_head(scales["value"])
        weights = torch.cat([dense[f"{name}.weight"] for name, where in SITE_OF.items() if where == site])
        x, w = (seen.samples[site], weights) if c is None else (seen.samples[site] * c, weights / c)
        found = _factors(start, x, w, rows, columns)
        parts |= {name: each for name, each in zip(names, found, strict=True) if len(each.values) > 1}
    if start.transforms and spec.turns_keys:
        parts["key"] = _factors(start, seen.samples["key"], seen.samples["query"], 1, shape.head_dim)[1]
    return Learned(
        spec, shape, parts, scales, seen.key_mean if spec.key_offset else None, direct=start.direct,
        clip_weights=start.clip_weights, clip_activations=start.clip_activations,
        device=dense["input_layernorm.weight"].device,
    )  # fmt: skip


def _factors(start: Start, x: torch.Tensor, w: torch.Tensor, rows: int, columns: int) -> tuple[Parts, Parts]:
    made = STARTS[start.factors]
    if made is not None:
        return made(rows), made(columns)
    return balanced_pair(x, w, rows)


def _diagonals(start: Start, shape: BlockShape, dense: Mapping[str, torch.Tensor], seen: Seen) -> Tensors:
    made: Tensors = {}
    for site in ("attn", "mlp", "down"):
        weights = [dense[f"{name}.weight"].abs().amax(0) for name, where in SITE_OF.items() if where == site]
        w, x = torch.stack(weights).amax(0).clamp_min(_LEAST), seen.largest[site].clamp_min(_LEAST)
        ratio = (w ** (1 - start.alpha) / x**start.alpha).clamp_min(_LEAST)
        made[site] = ratio if start.diagonal == "sq_style" else torch.ones_like(ratio)
    made["value"] = torch.ones(shape.kv_heads * shape.head_dim, device=made["attn"].device)
    return made
