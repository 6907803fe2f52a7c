"""Which layers of a checkpoint are in a module of vLLM, and how they are stored; without vLLM.

vLLM computes q, k and v, or gate and up, as one module under another name. Its models say which: ``packed`` is
{"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...config import ModelSpec
from ...errors import SpecError
from ...spec import QuantSpec
from ..modules import ROUTERS


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
