"""How flat things are: norms of channels of activations and weights, before and after transforms (paper, figure 1).

A curve holds the norms of all channels of one matrix, largest first, each over the root mean square of them all: a flat
matrix is a level line at 1, outliers are a peak on the left. What is rounded with one scale per row wants to be level.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import CalibrationError
from ..flatquant.factors import Pair
from ..flatquant.fold import FACTORS_OF, SITE_OF, Tensors
from ..flatquant.initial import hadamard
from ..flatquant.matrices import Matrices
from ..flatquant.sizes import factor_sizes
from ..flatquant.spec import FlatSpec
from ..integrations.flatblocks import blocks_of, flatten, shape_of
from ..kernels.tokens import transform
from .capture import record, run_block
from .flat_start import watch

Curves = dict[str, dict[str, list[float]]]  # panel -> method -> norms


@torch.no_grad()
def curves(model: Any, windows: torch.Tensor, index: int, matrices: Matrices | None = None) -> Curves:
    """Of block ``index``: without transforms, with Hadamard rotations, and with ``matrices`` if there are any.

    Args:
        model: a causal model of transformers, dense, in float32.
        windows: token ids (S, L).

    Raises:
        FluteError: no such block, or a model of another kind.
    """
    prefix, blocks = blocks_of(model)
    if not 0 <= index < len(blocks):
        raise CalibrationError(f"block {index} of {len(blocks)}: give 0 to {len(blocks) - 1}")
    stack = record(model, prefix, windows)
    hidden = stack.hidden
    for block, call in zip(blocks[:index], stack.calls, strict=False):
        hidden = [run_block(block, part, call) for part in hidden]
    block, shape = copy.deepcopy(blocks[index]), shape_of(blocks[index])
    dense = {name: tensor.detach() for name, tensor in block.named_parameters()}
    flatten(block, FlatSpec())
    samples = watch(block, lambda i: run_block(block, hidden[i], stack.calls[index]), len(hidden)).samples
    scales: Tensors = {} if matrices is None else dict(matrices.scales)
    if "value" in scales:
        scales["out"] = shape.per_query_head(scales["value"])
    found: Curves = {}
    for site, names in FACTORS_OF.items():
        x = samples[site]
        w = torch.cat([dense[f"{name}.weight"] for name, where in SITE_OF.items() if where == site])
        sizes = (shape.heads, shape.head_dim) if site == "out" else factor_sizes(shape.features(site))
        turns = [hadamard(size).matrix().float() for size in sizes]
        found[f"{site}: activations"], found[f"{site}: weights"] = {"none": norms(x)}, {"none": norms(w)}
        found[f"{site}: activations"]["hadamard"] = norms(transform(x, turns[0], turns[1], None, 0.0))
        found[f"{site}: weights"]["hadamard"] = norms(transform(w, turns[0], turns[1], None, 0.0))
        if matrices is not None:
            left, right = (matrices.factors.get(name) for name in names)
            inverses = [None if p is None else Pair.of(p).inverse for p in (left, right)]
            c = scales.get(site, x.new_ones(x.shape[-1]))
            found[f"{site}: activations"]["flatquant"] = norms(transform(x * c, left, right, None, 0.0))
            found[f"{site}: weights"]["flatquant"] = norms(transform(w / c, inverses[0], inverses[1], None, 0.0))
    return found


def norms(matrix: torch.Tensor) -> list[float]:
    """Norms of the columns of a matrix, largest first, over their root mean square."""
    each = matrix.double().square().sum(0).sqrt()
    return (each / each.square().mean().sqrt().clamp_min(1e-30)).sort(descending=True).values.tolist()
