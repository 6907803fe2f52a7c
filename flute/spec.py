"""`QuantSpec`: the one record that says how a weight matrix is quantized.

Everything that depends on bits, group size, table or vector size asks this record; nothing else carries these numbers.
It checks every limit once, when it is made, and goes to JSON and back unchanged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .blocks import MOST, largest_block
from .errors import SpecError

CUSTOM_TABLE = "custom"
MAX_GROUP_SIZE = 1 << 20
# One name, one number of bits: a spec that says nf4 with 3 bits is a mistake, not a wish.
NAMED_TABLES = tuple(f"{family}{bits}" for family in ("int", "fp", "nf", "gauss") for bits in (2, 3, 4))
PAIR_TABLES = tuple(f"gausspair{bits}" for bits in (2, 3, 4))
_UNIT_FAMILIES = ("gauss", "gausspair")  # made for weights of variance 1


def _whole(field: str, value: object) -> int:
    """Accept int only: JSON's 4.0, "4" and true are somebody else's mistake and are not guessed at."""
    if type(value) is not int:
        raise SpecError(f"{field}={value!r} is not an integer; give a whole number")
    return value


def whole_group(group_size: int, in_features: int) -> int:
    """``group_size`` in weights for a row of K = ``in_features``: never -1, never more than K."""
    return in_features if group_size == -1 else min(group_size, in_features)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one weight matrix W (N, K) is stored: ``W ~ table[codes] * scales``.

    Args:
        bits: stored bits per weight, 2, 3 or 4.
        group_size: weights along K that share a scale; any positive number, or -1 for the whole row. When it does not
            divide K the last group of each row is short.
        table: a named table (``int4``, ``fp4``, ``nf4``, ... of the same number of bits) or ``"custom"``, in which case
            every layer carries its own ``table`` tensor.
        vector_size: weights per code, 1 or 2. With 2 a code has ``2 * bits`` bits and the table is a codebook of
            ``2**(2*bits)`` pairs: custom, or ``gausspair<bits>``; K must then be even.
        hadamard_size: n > 0: codes and scales are those of W H, every n neighbours along K rotated (`flute.hadamard`),
            and a layer rotates its input likewise. In one layer's spec n is a block size that divides K; in what is
            asked for a model it is the most, see `fitted`.
        zero_points: ``W ~ (table[codes] - zeros) * scales`` with a zero point for every group (`flute.zero_points`).
            Layers of other owners have them (``flute convert``); nothing here is quantized so.

    Raises:
        SpecError: a value is outside these limits.
    """

    bits: int = 4
    group_size: int = 64
    table: str = "nf4"
    vector_size: int = 1
    hadamard_size: int = 0
    zero_points: bool = False

    def __post_init__(self) -> None:
        if _whole("bits", self.bits) not in (2, 3, 4):
            raise SpecError(f"bits={self.bits} is not supported; use 2, 3 or 4")
        if _whole("group_size", self.group_size) != -1 and not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise SpecError(
                f"group_size={self.group_size} is not a group; use 32, 64, 128, 256, any other positive number, "
                "or -1 for the whole row"
            )
        if _whole("vector_size", self.vector_size) not in (1, 2):
            raise SpecError(f"vector_size={self.vector_size} is not supported; use 1 or 2")
        if not isinstance(self.table, str) or self.table not in (*NAMED_TABLES, *PAIR_TABLES, CUSTOM_TABLE):
            names = ", ".join((*NAMED_TABLES, *PAIR_TABLES))
            raise SpecError(f"table={self.table!r} is unknown; use one of {names} or {CUSTOM_TABLE!r}")
        if self.table != CUSTOM_TABLE and int(self.table[-1]) != self.bits:
            fitting = f"{self.table[:-1]}{self.bits}"
            raise SpecError(f"table={self.table!r} does not have bits={self.bits}; use table={fitting}")
        if self.vector_size == 2 and self.table in NAMED_TABLES:
            raise SpecError(
                f"table={self.table!r} holds single values; vector_size=2 needs table={CUSTOM_TABLE!r} or "
                f"gausspair{self.bits}"
            )
        if self.vector_size == 1 and self.table in PAIR_TABLES:
            raise SpecError(f"table={self.table!r} holds pairs; use vector_size=2, or table=gauss{self.bits}")
        if self.vector_size == 2 and self.group_size > 0 and self.group_size % 2:
            raise SpecError(f"group_size={self.group_size} splits a pair; vector_size=2 needs an even group_size")
        if not 0 <= _whole("hadamard_size", self.hadamard_size) <= MOST:
            raise SpecError(
                f"hadamard_size={self.hadamard_size} is not supported; use 0 (no rotation) or a block up to {MOST}"
            )
        if type(self.zero_points) is not bool or (self.zero_points and (self.vector_size == 2 or self.hadamard_size)):
            raise SpecError(
                f"zero_points={self.zero_points!r} is not supported here; it is true or false, and true without pairs "
                "and rotation"
            )

    # ---- derived numbers -------------------------------------------------------------------------------------------

    @property
    def code_bits(self) -> int:
        """Bits of one stored code: ``bits * vector_size``."""
        return self.bits * self.vector_size

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the table: ``(2**bits,)``, or ``(2**(2*bits), 2)`` for vectors."""
        return (1 << self.bits,) if self.vector_size == 1 else (1 << self.code_bits, 2)

    @property
    def unit_variance(self) -> bool:
        """Whether the table is made for weights of variance 1, so that a scale is their root mean square."""
        return self.table[:-1] in _UNIT_FAMILIES

    def fitted(self, in_features: int) -> QuantSpec:
        """The same with the largest block size up to ``hadamard_size`` that divides K = ``in_features``."""
        if self.hadamard_size == 0 or in_features < 1:
            return self
        return replace(self, hadamard_size=largest_block(in_features, self.hadamard_size))

    @property
    def unrotated(self) -> QuantSpec:
        """The same without rotation: how W H itself is stored."""
        return replace(self, hadamard_size=0)

    def group(self, in_features: int) -> int:
        """The group size in weights for a row of K = ``in_features``; see `whole_group`."""
        return whole_group(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scales per row: ``ceil(K / group)``."""
        return -(-in_features // self.group(in_features))

    def row_codes(self, in_features: int) -> int:
        """Codes per row: K / vector_size."""
        return in_features // self.vector_size

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row of codes on disk: ``ceil(K * bits / 8)``."""
        return -(-in_features * self.bits // 8)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Real bits per weight with codes, scales and zero points counted."""
        per_group = scale_bits * (1 + self.zero_points)
        return (8 * self.row_bytes(in_features) + per_group * self.num_groups(in_features)) / in_features

    def check_layer(self, name: str, out_features: int, in_features: int) -> None:
        """Raise SpecError naming the layer if a weight (N, K) cannot be stored in this spec."""
        if out_features < 1 or in_features < 1:
            raise SpecError(f"layer {name!r}: weight ({out_features}, {in_features}) is empty; nothing to quantize")
        if in_features % self.vector_size:
            raise SpecError(
                f"layer {name!r}: in_features={in_features} is odd; vector_size=2 needs an even number, "
                "use vector_size=1"
            )
        if self.hadamard_size and largest_block(in_features, self.hadamard_size) != self.hadamard_size:
            raise SpecError(
                f"layer {name!r}: hadamard_size={self.hadamard_size} is no block that divides in_features="
                f"{in_features}; use {largest_block(in_features, self.hadamard_size)}"
            )

    # ---- JSON ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one key per field; ``hadamard_size`` and ``zero_points`` only where there are such."""
        values = asdict(self)
        for name in ("hadamard_size", "zero_points"):
            if not values[name]:
                del values[name]  # versions that do not know it can read the rest
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """The inverse of `to_dict`; unknown keys are refused, missing ones take their defaults.

        A table may be left out: it is then ``nf<bits>``.
        """
        if not isinstance(values, dict):
            raise SpecError(f"a spec must be a JSON object, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise SpecError(f"unknown spec key {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")
        values = dict(values)
        if "table" not in values and type(values.get("bits")) is int and values["bits"] in (2, 3, 4):
            values["table"] = f"nf{values['bits']}" if values.get("vector_size", 1) == 1 else CUSTOM_TABLE
        return cls(**values)

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        pairs = "x2" if self.vector_size == 2 and self.table == CUSTOM_TABLE else ""
        rotated = f" h{self.hadamard_size}" if self.hadamard_size else ""
        return f"{self.table}{pairs} {self.bits}bit {group}{rotated}" + (" zeros" if self.zero_points else "")
