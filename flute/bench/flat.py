"""FlatQuant's models with random integers, for measuring speed: nothing is calibrated and nothing is ever dense.

Blocks are flattened on the meta device and get their memory as they will run, so that a model of 8 billion parameters
takes 5 GB and seconds. Everything that costs time is there: transforms, clips, integer weights, the deferred norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import FluteError
from ..flatquant.spec import PRESETS, FlatSpec

FLATQUANT = "flatquant"
_DEFAULT = "w4a4kv4"


def flat_spec(method: str) -> FlatSpec:
    """Of ``"flatquant"`` or ``"flatquant-PRESET"``.

    Raises:
        FluteError: no such preset, or one whose weights are no integers to multiply with.
    """
    preset = method.removeprefix(FLATQUANT).removeprefix("-") or _DEFAULT
    measured = [name for name, spec in PRESETS.items() if spec.a_bits < 16]
    if preset not in measured:
        raise FluteError(f"--methods {method!r}: behind {FLATQUANT}- give one of {', '.join(measured)}")
    return PRESETS[preset]


@torch.no_grad()
def flat_model(config: Any, spec: FlatSpec, dtype: torch.dtype, device: str) -> Any:
    """A model of ``config`` as a FlatQuant checkpoint would load it, with random numbers of usual magnitudes."""
    from transformers import AutoModelForCausalLM

    from ..integrations.flatblocks import blocks_of, flatten

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for block in blocks_of(model)[1]:
        flatten(block, spec, real=True)
    model.to_empty(device=device)
    decoder = model.get_decoder()
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)  # holds no parameters, but computed frequencies
    for name, parameter in model.named_parameters():
        _randomize(name, parameter)
    model.tie_weights()
    return model.eval()


def _randomize(name: str, parameter: nn.Parameter) -> None:
    last = name.rpartition(".")[2]
    if not parameter.is_floating_point():
        limits = (0, 256) if parameter.dtype == torch.uint8 else (-128, 128)
        parameter.random_(*limits)
    elif last == "weight_scale":
        parameter.fill_(0.004)  # some 0.02 a weight of 4 bits
    elif "clip" in last:
        parameter.fill_(0.9)
    elif last in ("left", "right", "key", "query"):
        parameter.normal_(0.0, len(parameter) ** -0.5)  # as long as a rotation's rows
    elif "norm" in name:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02)
