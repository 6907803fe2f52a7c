"""`FlatSpec`: how many bits each thing has, checked once; presets; JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import SpecError

QUANT_METHOD = "flatquant"
VERSION = 1
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_CODED = range(2, 9)
_DENSE = 16


@dataclass(frozen=True)
class FlatSpec:
    """Bits, 2 to 8, or 16: left as it is.

    Args:
        w_bits, a_bits: of weights (a scale per row) and of activations (a scale per token).
        k_bits, v_bits: of keys and values (a scale per token and head).
        down_bits: of weights and activations of down_proj, the hardest site; None: as the others.
        w_asym, a_asym, k_asym, v_asym: grids with a zero point.
        separate_clips: every layer clips its own activations, as upstream does; else one clip per site, so that q, k
            and v (and gate and up) share one quantized activation.
        key_offset: subtract each head's mean key before keys are rounded. All scores of a query change by the same
            number, so attention stays what it is; what it saves are models whose key biases are large.
        q_bits, q_asym: of queries (a scale per token and head), as they go into attention.
        w_groupsize: columns of a weight that share a scale; -1: the row.
        separate_vtrans: values are transformed when the model runs, instead of v_proj once.

    Raises:
        SpecError: a number of bits outside these, or no size of a group.
    """

    w_bits: int = 4
    a_bits: int = 4
    k_bits: int = 4
    v_bits: int = 4
    down_bits: int | None = None
    w_asym: bool = False
    a_asym: bool = False
    k_asym: bool = True
    v_asym: bool = True
    separate_clips: bool = False
    key_offset: bool = False
    q_bits: int = _DENSE
    q_asym: bool = False
    w_groupsize: int = -1
    separate_vtrans: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_bits"):
                if value is None and field.name == "down_bits":
                    continue
                if type(value) is not int or (value not in _CODED and value != _DENSE):
                    raise SpecError(f"{field.name}={value!r} is not possible; use 2 to 8, or 16: not quantized")
            elif field.name == "w_groupsize":
                if type(value) is not int or (value < 1 and value != -1):
                    raise SpecError(f"w_groupsize={value!r} is no number of columns; use a divisor of K, or -1")
            elif type(value) is not bool:
                raise SpecError(f"{field.name}={value!r} is not true or false")

    def weight_bits(self, linear: str) -> int:
        """Bits of the weights of a layer of a block, by its name."""
        return self.w_bits if self.down_bits is None or not linear.endswith("down_proj") else self.down_bits

    def activation_bits(self, linear: str) -> int:
        """Bits of what goes into a layer."""
        if self.a_bits == _DENSE or self.down_bits is None or not linear.endswith("down_proj"):
            return self.a_bits
        return self.down_bits

    @property
    def turns_keys(self) -> bool:
        """Whether keys and queries go through a transform."""
        return min(self.k_bits, self.q_bits) < _DENSE

    def check_storable(self) -> None:
        """Raise SpecError if there are no layers that run this."""
        for name in LINEARS:
            weight, activation = self.weight_bits(name), self.activation_bits(name)
            if self.w_asym and weight != _DENSE and (self.a_asym or activation == _DENSE):
                kind = "16-bit activations" if activation == _DENSE else "activations that have them too"
                raise SpecError(f"{name}: weights with zero points on {kind} are evaluated, not saved; drop --w_asym")
            if self.w_groupsize > 0 and _DENSE not in (weight, activation):
                raise SpecError(
                    f"{name}: groups of weights on {activation}-bit activations are evaluated, not saved; leave "
                    "--w_groupsize out, or --a_bits"
                )
            if weight == _DENSE and activation != _DENSE:
                raise SpecError(f"{name}: dense weights with {activation}-bit activations are evaluated, not saved")
            if activation == _DENSE and weight not in (2, 3, 4, _DENSE):
                raise SpecError(f"{name}: {weight}-bit weights need quantized activations; use --a_bits 8, or 4 bits")

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of a config.json."""
        return {"quant_method": QUANT_METHOD, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlatSpec:
        """The inverse of `to_dict`, strictly.

        Raises:
            SpecError: an unknown key, another version, a value out of its limits.
        """
        given = dict(values)
        method, version = given.pop("quant_method", None), given.pop("version", None)
        if method != QUANT_METHOD or version != VERSION:
            raise SpecError(
                f"quantization_config has quant_method={method!r}, version={version!r}; this flute reads "
                f"{QUANT_METHOD!r}, version {VERSION}"
            )
        unknown = sorted(given.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise SpecError(f"quantization_config has the unknown key {unknown[0]!r}; use a newer flute, or remove it")
        return cls(**given)


PRESETS: dict[str, FlatSpec] = {
    "w4a4kv4": FlatSpec(),
    "w4a4kv4-down8": FlatSpec(down_bits=8),
    "w4a8kv4": FlatSpec(a_bits=8),
    "w8a8": FlatSpec(w_bits=8, a_bits=8, k_bits=16, v_bits=16),
    "w4a16": FlatSpec(a_bits=16, k_bits=16, v_bits=16),
    "w3a16": FlatSpec(w_bits=3, a_bits=16, k_bits=16, v_bits=16),
}
