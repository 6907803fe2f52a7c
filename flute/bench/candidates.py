"""What stands in the table of `flute.bench.quality`: the dense model, our methods, other libraries' rounding.

A row of ours is nothing but options of ``flute quantize``, so each can be repeated by hand. All are in groups of 64.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import FluteError
from ..methods import RECIPES
from .quality_peers import GROUP, PEERS, Peer


@dataclass(frozen=True)
class Candidate:
    """A row to be.

    Attributes:
        name: unique. family: the marker in the plot: a method with its kind of table.
        bits: nominal bits per weight.
        options: of ``flute quantize``; empty for others. peer: whose rounding it is; neither: the dense model.
    """

    name: str
    family: str
    bits: float
    options: tuple[str, ...] = ()
    peer: Peer | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration text."""
        return "--method" in self.options and RECIPES[self.options[self.options.index("--method") + 1]].calibrated


def _ours(name: str, family: str, bits: float, *options: str) -> Candidate:
    return Candidate(
        f"{name} {bits:g}-bit", family, bits, ("--group-size", str(GROUP), "--bits", f"{bits:g}", *options)
    )


def _of_bits(bits: int) -> list[Candidate]:
    rows = [
        _ours(f"rtn int{bits}", "rtn int", bits, "--table", f"int{bits}"),
        _ours(f"rtn nf{bits}", "rtn nf", bits),
        _ours(f"rtn nf{bits} mse", "rtn nf mse", bits, "--scale", "mse"),
        *[
            _ours(f"higgs p={p}", f"higgs p={p}", bits, "--method", "higgs", "--vector-size", str(p))
            for p in (1, 2)
        ],
        _ours("higgs per layer", "higgs per layer", bits, "--method", "higgs", "--per-layer"),
        *[
            _ours(f"{method} nf{bits}", f"{method} nf", bits, "--method", method)
            for method in ("gptq", "awq", "awq+gptq", "nfl", "gptq+nfl", "awq+gptq+nfl")
        ],
        *[_ours(method, method, bits, "--method", method) for method in ("best", "best+nfl")],
    ]  # fmt: skip
    peers = [Candidate(f"{peer.name} {bits}-bit", peer.name, bits, peer=peer) for peer in PEERS if bits in peer.bits]
    return rows + peers


def _averages() -> list[Candidate]:
    """Layers of 2, 3 and 4 bits by what they need; the average counts codes, scales come on top."""
    return [
        _ours(f"{method} average", f"{method} average", bits, "--method", method)
        for bits in (3.25, 2.5) for method in ("higgs", "best")
    ]  # fmt: skip


DENSE = Candidate("dense", "dense", 16)
CANDIDATES = (DENSE, *[one for bits in (4, 3, 2) for one in _of_bits(bits)], *_averages())


def chosen(only: Sequence[str], there: Collection[str]) -> list[Candidate]:
    """Who is to be measured: who matches one of the globs ``only``, or, without any, who is not ``there`` yet.

    Raises:
        FluteError: a glob matches nobody.
    """
    for pattern in only:
        if not any(fnmatchcase(one.name, pattern) for one in CANDIDATES):
            names = ", ".join(one.name for one in CANDIDATES)
            raise FluteError(f"--only {pattern!r} matches no row; there are {names}")
    if only:
        return [one for one in CANDIDATES if any(fnmatchcase(one.name, pattern) for pattern in only)]
    return [one for one in CANDIDATES if one.name not in there]
