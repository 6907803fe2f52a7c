"""FlatQuant: where clips begin: the share of the range that, before anything is learned, rounds with the least error.

Learning moves a clip by some hundredths per step, and from 0.982 (the paper's start) to the 0.7 to 0.9 that 4 bits want
it takes a hundred steps. A search over a few shares is there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..flatquant.fake import fake
from ..flatquant.fold import FACTORS_OF, SITE_OF, Tensors, fold
from ..flatquant.learned import Learned, site_bits
from ..flatquant.rounding import clipped_rows, grouped
from ..flatquant.spec import FlatSpec
from ..kernels.tokens import transform
from .flat_start import Seen

_SHARES = (0.982, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)


@torch.no_grad()
def search_clips(learned: Learned, dense: Mapping[str, torch.Tensor], seen: Seen) -> None:
    """Set the clips of ``learned`` in place.

    Args:
        dense: tensors of the block, float32. seen: what its sites got, before any transform.
    """
    spec, made, scales = learned.spec, learned.made(), learned.scales()
    folded = fold(dense, made, scales, learned.shape, separate_values=spec.separate_vtrans)
    for name in SITE_OF:
        key = name.rpartition(".")[2]
        if key in learned.row_clips:
            best = _best_of_rows(folded[f"{name}.weight"], spec, spec.weight_bits(name))
            learned.row_clips[key].copy_(best.logit().unsqueeze(-1))
    if "value" in scales:
        scales["out"] = learned.shape.per_query_head(scales["value"])
    inputs: Tensors = {}
    for site, names in FACTORS_OF.items():
        left, right = (made[part].forward if part in made else None for part in names)
        x = seen.samples[site]
        inputs[site] = transform(x * scales[site] if site in scales else x, left, right, None, 0.0)
    d = learned.shape.head_dim
    bias = folded.get("self_attn.v_proj.bias", 0.0)
    inputs["value"] = (inputs["attn"] @ folded["self_attn.v_proj.weight"].mT + bias).view(-1, d)
    if spec.separate_vtrans and "out_right" in made:
        inputs["value"] = inputs["value"] @ made["out_right"].forward
    inputs["key"] = seen.samples["key"] @ made["key"].forward if "key" in made else seen.samples["key"]
    inputs["query"] = seen.samples["query"] @ made["key"].inverse if "key" in made else seen.samples["query"]
    kinds = {
        "query": (spec.q_bits, not spec.q_asym),
        "key": (spec.k_bits, not spec.k_asym),
        "value": (spec.v_bits, not spec.v_asym),
    }
    for site, logits in learned.clips.items():
        bits, symmetric = kinds.get(site, (site_bits(spec, site), not spec.a_asym))
        x = inputs[site]
        errors = _errors(x, partial(fake, x, bits, symmetric=symmetric))
        logits.copy_(_least([error.sum() for error in errors]).logit().expand_as(logits))


def _best_of_rows(weight: torch.Tensor, spec: FlatSpec, bits: int) -> torch.Tensor:
    """(N,): the share of the least squared error of each row of W (N, K)."""

    def in_groups(*, clip: torch.Tensor) -> torch.Tensor:
        rows = grouped(clipped_rows(weight, clip.expand(len(weight), 2)), spec.w_groupsize)
        return fake(rows, bits, symmetric=not spec.w_asym).flatten(1)

    whole = partial(fake, weight, bits, symmetric=not spec.w_asym)
    return _least(_errors(weight, whole if spec.w_groupsize < 0 else in_groups))


def _errors(x: torch.Tensor, rounded: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """(N,) for each share: the squared error of each row of x (N, n)."""
    return [(x - rounded(clip=x.new_full((2,), share))).square().sum(-1) for share in _SHARES]


def _least(errors: list[torch.Tensor]) -> torch.Tensor:
    """The share of the least error, number by number."""
    return errors[0].new_tensor(_SHARES)[torch.stack(errors).argmin(0)]
