"""Which layers of a checkpoint are in a module of vLLM, and how they are stored; without vLLM.

vLLM computes q, k and v, or gate and up, as one module under another name. Its models say which: ``packed`` is
{"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}.

A FlatQuant checkpoint has a transform on the attention or the MLP whose layers it is for; here it is part of the one
module that these layers are. Keys and queries are not rounded in vLLM, so their transforms and offsets, which leave
q k^T as it is (offsets: its softmax), are not needed. Values that are transformed when the model runs (``heads.value``)
are transformed behind attention instead, which is linear in them: P_v is o_proj's right factor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ...config import ModelSpec
from ...errors import IntegrationError, SpecError
from ...flatquant.fold import MODULE_OF, SITE_OF
from ...spec import QuantSpec
from ..modules import ROUTERS

_BEHIND = {"attn": "self_attn.qkv_proj", "out": "self_attn.o_proj", "mlp": "mlp.gate_up_proj", "down": "mlp.down_proj"}


def linear_specs(record: ModelSpec, packed: Mapping[str, Sequence[str]], prefix: str) -> list[QuantSpec]:
    """Spec of every layer that is in the module ``prefix``, in their order; empty if it is dense.

    Raises:
        SpecError: part of the module is dense.
    """
    if set(prefix.split(".")) & ROUTERS:  # no linear layers in transformers, so that no record names them
        return []
    parent, dot, own = prefix.rpartition(".")
    parts = [f"{parent}{dot}{part}" for part in packed.get(own, [own])]
    return _all_or_none(prefix, {part: record.spec_for(part) for part in parts})


def expert_specs(record: ModelSpec, prefix: str) -> list[QuantSpec]:
    """Specs of gate_up and down of the experts ``prefix``; empty if they are dense.

    Raises:
        SpecError: one of them is dense.
    """
    if not record.experts:
        return []
    other = prefix.replace(".block_sparse_moe.", ".mlp.")  # vLLM's Mixtral keeps the old name
    projections = [(f"{prefix}.{role}_proj", f"{other}.{role}_proj") for role in ("gate_up", "down")]
    return _all_or_none(prefix, {names[0]: record.spec_for(*names, prefix, other) for names in projections})


def _all_or_none(prefix: str, specs: Mapping[str, QuantSpec | None]) -> list[QuantSpec]:
    found = {name: spec for name, spec in specs.items() if spec is not None}
    if found and len(found) < len(specs):
        dense = ", ".join(name for name in specs if name not in found)
        raise SpecError(
            f"layer {prefix!r}: {dense} is dense and {', '.join(found)} is quantized, and vLLM computes them as one; "
            "quantize all of them, or none"
        )
    return list(found.values())


def flat_site(packed: Mapping[str, Sequence[str]], prefix: str) -> str | None:
    """The site of `flatquant.fold.SITE_OF` in front of the module ``prefix``; None if FlatQuant has none there.

    Raises:
        IntegrationError: the module has some of the layers that a transform is for, and not all of them.
    """
    parent, _, own = prefix.rpartition(".")
    owner = parent.rpartition(".")[2]
    parts = [f"{owner}.{part}" for part in packed.get(own, [own])]
    site = next((SITE_OF[part] for part in parts if part in SITE_OF), None)
    if site is not None and parts != [name for name, each in SITE_OF.items() if each == site]:
        raise IntegrationError(
            f"layer {prefix!r}: FlatQuant is served where vLLM computes q, k and v as one module, and gate and up, as "
            "in Llama, Mistral, Qwen2 and Qwen3; run this model with transformers"
        )
    return site


def flat_transform(prefix: str, site: str) -> str:
    """The checkpoint's name of the transform in front of the module ``prefix``."""
    return prefix.removesuffix(_BEHIND[site]) + MODULE_OF[site]


def flat_renames() -> dict[re.Pattern[str], str | None]:
    """Patterns of the checkpoint's names of transforms -> vLLM's names, to be tried in this order; None: not needed."""
    places: dict[str, str | None] = {
        rf"\.{re.escape(path)}\.(left|right|clip)$": rf".{_BEHIND[site]}.transform.\1"
        for site, path in MODULE_OF.items()
    }
    places[r"\.self_attn\.heads\.value$"] = f".{_BEHIND['out']}.transform.right"
    places[r"\.self_attn\.heads\.\w+$"] = None
    return {re.compile(old): new for old, new in places.items()}
