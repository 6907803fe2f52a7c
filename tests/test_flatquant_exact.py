"""Simulated and real FlatQuant, layer by layer: given the same input, the same codes bit for bit.

In whole models sums of float32 come in another order, so that with 4 bits now and then a number is rounded the other
way. Here each layer of the real model gets what the simulation's had: then nothing but a product's last digits differs.
"""

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flute.evaluate.perplexity import encode
from flute.flatquant.fold import MODULE_OF, SITE_OF
from flute.flatquant.modules import IntLinear
from flute.flatquant.spec import FlatSpec
from flute.integrations import folders
from flute.integrations.flatblocks import blocks_of
from flute.kernels.attention import quantize_heads
from flute.methods.calibration import token_windows
from flute.methods.flat_train import Schedule
from flute.methods.flatquant import apply, calibrate

NORM_OF = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}


@torch.no_grad()
def seen(block: nn.Module, run: Any) -> dict[str, Any]:
    """What modules of a simulated block get and give while ``run`` runs, and keys and values before and after."""
    found: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, given: tuple[torch.Tensor, ...], output: Any) -> None:
        found[name] = given[0], output

    heads = block.get_submodule("self_attn.heads")
    true_rounded = heads.rounded

    def rounded(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found["heads"] = (k, v), true_rounded(k, v)
        return found["heads"][1]

    heads.rounded = rounded
    names = [*MODULE_OF.values(), *SITE_OF, *NORM_OF.values()]
    hooks = [block.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    run()
    for hook in hooks:
        hook.remove()
    del heads.rounded
    return found


@torch.no_grad()
def compare(simulated: nn.Module, real: nn.Module, found: dict[str, Any]) -> Counter[str]:
    """How many codes of activations, weights, keys and values there are, and how many differ; the largest relative
    error of a layer's output."""
    counts: Counter[str] = Counter()
    given = {}
    for site, path in MODULE_OF.items():
        x = found[NORM_OF.get(site, path)][0]  # the real site does the norm before it
        given[site] = real.get_submodule(path)(x)
        for codes, numbers in zip(given[site], found[path][1], strict=True):
            whole = codes.codes if codes.zero is None else codes.codes - codes.zero.unsqueeze(-1)
            counts["activations"] += whole.numel()
            counts["different"] += int((whole * codes.scale.unsqueeze(-1) != numbers.view(whole.shape)).sum())
    order = dict.fromkeys(MODULE_OF, 0)
    for name, site in SITE_OF.items():
        layer, linear = real.get_submodule(name), simulated.get_submodule(name)
        assert isinstance(layer, IntLinear) and type(linear) is nn.Linear
        zero = 0 if layer.weight_zero is None else layer.weight_zero.unsqueeze(-1)
        counts["weights"] += linear.weight.numel()
        weight = (layer.codes() - zero) * layer.weight_scale.unsqueeze(-1)
        counts["different"] += int((weight != linear.weight).sum())
        y, truth = layer(given[site][order[site] % len(given[site])]), found[name][1]
        order[site] += 1
        counts["error"] = max(counts["error"], float((y - truth).norm() / truth.norm()))
    (before, after), heads = found["heads"], real.get_submodule("self_attn.heads")
    for x, numbers, even, clip in zip(before, after, heads.symmetric, (heads.k_clip, heads.v_clip), strict=True):
        kept = quantize_heads(x, even, clip).dequantize(torch.float32)
        counts["keys and values"] += numbers.numel()
        counts["different"] += int((kept != numbers).sum())
    return counts


@pytest.mark.parametrize("change", [{}, {"a_asym": True, "separate_clips": True}, {"w_asym": True}], ids=str)
def test_every_code_of_a_real_model_is_the_simulated_one(change: dict[str, Any]) -> None:
    spec = FlatSpec(**change)
    model, tokenizer = folders.load(folders.find("tiny"), dtype=torch.float32)
    text = (folders.embedded() / "heldout.txt").read_text()
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    windows = token_windows(tokenizer, {"text": text}, samples=2, length=32)
    matrices, _ = calibrate(model, spec, windows, None, Schedule(epochs=0), batch=2)
    simulated, real = copy.deepcopy(model), model
    for each, codes in ((simulated, False), (real, True)):
        apply(each, spec, matrices, real=codes)
    ids = torch.tensor([encode(tokenizer, text)[:48]])
    total: Counter[str] = Counter()
    for one, other in zip(blocks_of(simulated)[1], blocks_of(real)[1], strict=True):
        counts = compare(one, other, seen(one, lambda: simulated(ids)))
        assert counts.pop("error") < 1e-5  # float32 sums in another order
        total += counts
    assert total["activations"] > 100_000 and total["weights"] > 300_000 and total["keys and values"] > 10_000
    assert total["different"] == 0
