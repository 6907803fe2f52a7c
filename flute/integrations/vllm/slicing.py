"""What a tensor-parallel rank takes of a checkpoint's bytes: plain arithmetic on tensors, without vLLM.

Rows of a weight are rows of bytes and rows of scales, so a share of N is a slice of both. A share of K is a slice of
every row's bytes, for a row is a bit stream that can be cut wherever a share's codes fill whole bytes. Where the cut
goes through a group, the share gets the smaller groups that fit both, and a scale stands once for each of them: the
same numbers as before, so that every rank multiplies with exactly its columns of W = table[codes] * scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from ...errors import SpecError
from ...spec import QuantSpec


@dataclass(frozen=True)
class Share:
    """Columns of one rank.

    Args:
        in_features: K of the share.
        spec: how the share is stored; its groups may be smaller than those of the file.
        codes: which bytes of a row of codes.
        groups: the file's number of each group of the share.
    """

    in_features: int
    spec: QuantSpec
    codes: slice
    groups: tuple[int, ...]

    def take_codes(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 (N, row_bytes of the file) -> (N, row_bytes of the share); a view."""
        return rows[:, self.codes]

    def take_scales(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, G of the file) -> (N, G of the share); a view where the groups are neighbours."""
        first, last = self.groups[0], self.groups[-1]
        if last - first + 1 == len(self.groups):
            return rows[:, first : last + 1]
        return rows[:, list(self.groups)]


def share(name: str, spec: QuantSpec, in_features: int, rank: int, ranks: int) -> Share:
    """Columns [rank K / ranks, (rank + 1) K / ranks) of a weight with K = ``in_features``.

    Raises:
        SpecError: naming layer ``name``: the cut goes through a byte, a pair or a Hadamard block.
    """
    spec.check_layer(name, 1, in_features)
    if ranks == 1:
        groups = tuple(range(spec.num_groups(in_features)))
        return Share(in_features, spec, slice(0, spec.row_bytes(in_features)), groups)
    width = in_features // ranks
    where = f"layer {name!r}: {width} of {in_features} columns per rank"
    if in_features % ranks or width * spec.bits % 8 or width % spec.vector_size:
        raise SpecError(f"{where} do not fill whole bytes at {spec.bits} bits; use fewer ranks, a divisor of K / 8")
    if spec.hadamard_size and width % spec.hadamard_size:
        raise SpecError(
            f"{where} do not hold whole Hadamard blocks of {spec.hadamard_size}; use fewer ranks, or quantize with "
            f"--hadamard-size {gcd(width, spec.hadamard_size)}"
        )
    first, group = rank * width, spec.group(in_features)
    size = width if group == in_features else gcd(group, width)
    row_bytes = width * spec.bits // 8
    return Share(
        width,
        replace(spec, group_size=-1 if group == in_features else size),
        slice(rank * row_bytes, (rank + 1) * row_bytes),
        tuple((first + start) // group for start in range(0, width, size)),
    )


def runs(keys: Sequence[object]) -> list[range]:
    """Places of neighbours that are equal: [a, a, b] -> [0..1, 2..2]."""
    starts = [place for place in range(len(keys)) if place == 0 or keys[place] != keys[place - 1]]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]
