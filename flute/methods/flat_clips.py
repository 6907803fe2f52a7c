"""FlatQuant: where clips begin: the share of the range that, before anything is learned, rounds with the least error.

Learning moves a clip by some hundredths per step, and from 0.982 (the paper's start) to the 0.7 to 0.9 that 4 bits want
it takes a hundred steps. A search over a few shares is there at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..flatquant.fold import FACTORS_OF, SITE_OF, Tensors, fold
from ..flatquant.learned import Learned, site_bits
from ..flatquant.rounding import fake
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
    folded = fold(dense, made, scales, learned.shape)
    for name in SITE_OF:
        key = name.rpartition(".")[2]
        if key in learned.row_clips:
            best = _best(folded[f"{name}.weight"], spec.weight_bits(name), not spec.w_asym, rows=True)
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
    inputs["key"] = seen.samples["key"] @ made["key"].forward if "key" in made else seen.samples["key"]
    kinds = {"key": (spec.k_bits, not spec.k_asym), "value": (spec.v_bits, not spec.v_asym)}
    for site, logits in learned.clips.items():
        bits, symmetric = kinds.get(site, (site_bits(spec, site), not spec.a_asym))
        logits.copy_(_best(inputs[site], bits, symmetric, rows=False).logit().expand_as(logits))


def _best(x: torch.Tensor, bits: int, symmetric: bool, *, rows: bool) -> torch.Tensor:
    """The share of the least squared error: (N,) for each row of x (N, n), or () for all rows together."""
    errors = []
    for share in _SHARES:
        error = (x - fake(x, bits, symmetric=symmetric, clip=x.new_full((2,), share))).square().sum(-1)
        errors.append(error if rows else error.sum())
    return x.new_tensor(_SHARES)[torch.stack(errors).argmin(0)]
