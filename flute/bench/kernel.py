"""Time of the operator beside torch's dense matmul and beside peers: shapes x dtypes x tokens, one harness, one run.

For every shape N x K and dtype all contestants hold the same weights, each in copies that together leave three times
the L2 cache behind; for every number of tokens M their calls are captured into CUDA graphs that are replayed in turns
(see `flute.bench.timing`), so a GPU that gets warm slows all of them alike. Every answer is checked before it is
timed. This library runs what it always would: its estimate's choice, or what ``flute tune`` found on this GPU.

    speedup     dense us / us, both of this run
    floor_us    (codes + scales) / the speed at which this GPU reads a large buffer, measured in this run
    read_share  floor_us / us: how much of what the memory can do is used; small for large M, where arithmetic decides
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ..errors import FluteError
from . import timing
from .peers import DENSE, FLUTE, PEERS, Call, Method, Prepared, check, first_line

_DEVICE = "cuda"
_MANY_TOKENS = 256  # calls of more than this take so long that fewer replays will do


@dataclass(frozen=True)
class Row:
    """One contestant on one problem; ``us`` is None when it was not timed, and ``note`` says why."""

    n: int
    k: int
    dtype: str
    m: int
    method: str
    bits: int
    group_size: int
    us: float | None
    speedup: float | None
    floor_us: float | None
    read_share: float | None
    error: float | None
    note: str


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        shapes: (N, K) of each weight.
        tokens: numbers of tokens M.
        bits, group_sizes, dtypes: formats of this library; peers are measured in those of them that they have.
        peers: other libraries, which must be installed. peer_tokens: the M at which they are measured, of ``tokens``.
    """

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    bits: Sequence[int] = (4, 3, 2)
    group_sizes: Sequence[int] = (64,)
    dtypes: Sequence[torch.dtype] = (torch.float16,)
    peers: Sequence[Method] = ()
    peer_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("shapes", "tokens", "bits", "group_sizes", "dtypes"):
            if not getattr(self, name):
                raise FluteError(f"nothing to measure: {name} is empty")


@dataclass
class _Contestant:
    """A method in one format on one weight, in as many copies as leave the cache; ``note`` if it gave up."""

    method: Method
    bits: int
    group_size: int
    nbytes: int
    calls: list[Call]
    note: str = ""
    error: float | None = None


def find_peers(names: str) -> tuple[list[Method], dict[str, str]]:
    """The peers called ``names`` ("all", "none" or a list) that can be used here, and why the others cannot.

    Raises:
        FluteError: an unknown name.
    """
    known = {peer.name: peer for peer in PEERS}
    wanted = list(known) if names == "all" else [] if names == "none" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise FluteError(f"--peers {name!r}: use all, none, or a list of {', '.join(known)}")
    reasons = {name: known[name].missing() for name in wanted}
    return [known[name] for name in wanted if not reasons[name]], {n: why for n, why in reasons.items() if why}


def measure(sweep: Sweep, ceiling: float, done: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """Every row of ``sweep``, on the current GPU.

    Args:
        ceiling: bytes per second that the GPU reads, see `timing.read_ceiling`.
        done: called with the rows of each shape and dtype as soon as they are there.
    """
    rows: list[Row] = []
    for n, k in sweep.shapes:
        for dtype in sweep.dtypes:
            made = _measure_weight(sweep, n, k, dtype, ceiling)
            rows += made
            done(made)
            torch.cuda.empty_cache()
    return rows


def _measure_weight(sweep: Sweep, n: int, k: int, dtype: torch.dtype, ceiling: float) -> list[Row]:
    random = torch.Generator(device=_DEVICE).manual_seed(n + k)
    # evenly distributed: the error of rounding is then known, and a wrong kernel is seen
    weight = (torch.rand(n, k, generator=random, device=_DEVICE) * 2 - 1).to(dtype)
    contestants = [_enter(*one, weight, sweep) for one in _formats(sweep, dtype)]
    rows: list[Row] = []
    for m in sweep.tokens:
        x = torch.randn(m, k, generator=random, device=_DEVICE, dtype=dtype)
        here = [one for one in contestants if one.method in (DENSE, FLUTE) or m in sweep.peer_tokens]
        right = F.linear(x, weight)
        for one in here:
            _try(one, x, right)
        del right
        able = [one for one in here if not one.note]
        times = timing.compare(
            *([partial(call, x) for call in one.calls] for one in able), replays=20 if m <= _MANY_TOKENS else 8
        )
        taken = {id(one): us for one, us in zip(able, times, strict=True)}
        dense = taken.get(id(contestants[0]))
        rows += [_row(one, (n, k, m, dtype), taken.get(id(one)), dense, ceiling) for one in here]
    return rows


def _formats(sweep: Sweep, dtype: torch.dtype) -> list[tuple[Method, int, int]]:
    """Who takes part: dense first, then this library and the peers in each format that they have."""
    formats = [(bits, group) for bits in sweep.bits for group in sweep.group_sizes]
    found = [(DENSE, 16, 0)]
    for method in (FLUTE, *sweep.peers):
        found += [(method, bits, group) for bits, group in formats if method.takes(bits, group, dtype)]
    return found


def _enter(method: Method, bits: int, group: int, weight: torch.Tensor, sweep: Sweep) -> _Contestant:
    tokens = sweep.tokens if method in (DENSE, FLUTE) else sweep.peer_tokens
    try:
        first = method.prepare(weight, bits, group, tokens)
        copies: list[Prepared] = [first]
        while len(copies) < timing.copies_beyond_l2(first.nbytes):
            copies.append(method.prepare(weight, bits, group, tokens))
    except Exception as error:  # noqa: BLE001, a peer may refuse in any way and the others go on
        return _Contestant(method, bits, group, 0, [], f"cannot store this weight: {first_line(error)}")
    return _Contestant(method, bits, group, first.nbytes, [one.call for one in copies])


def _try(one: _Contestant, x: torch.Tensor, right: torch.Tensor) -> None:
    """Check the answer of a contestant; one that was wrong once does not run again."""
    if one.note:
        return
    try:
        one.error, one.note = check(one.calls[0](x), right, one.bits)
    except Exception as error:  # noqa: BLE001, as above
        one.note = f"fails at M={x.shape[0]}: {first_line(error)}"


def _row(
    one: _Contestant, problem: tuple[int, int, int, torch.dtype], us: float | None, dense: float | None, ceiling: float
) -> Row:
    n, k, m, dtype = problem
    floor = 1e6 * one.nbytes / ceiling if one.nbytes else None
    return Row(
        n, k, str(dtype).removeprefix("torch."), m, one.method.name, one.bits, one.group_size, us,
        dense / us if dense and us else None, floor, floor / us if floor and us else None, one.error, one.note,
    )  # fmt: skip


def table(rows: Sequence[Row], tokens: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: for each weight and method the time and share of the read ceiling at the first M, then
    dense over it at every M.
    """
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        name = row.method if row.bits == 16 else f"{row.method} {row.bits} bit g{row.group_size}"
        cells.setdefault((f"{row.n}x{row.k} {row.dtype}", name), {})[row.m] = row
    header = ["weight", "method", f"us M={tokens[0]}", "of read ceiling", *(f"M={m}" for m in tokens)]
    lines = []
    for (weight, name), by_m in cells.items():
        first = by_m.get(tokens[0])
        time = f"{first.us:.1f}" if first and first.us else "-"
        share = f"{first.read_share:.0%}" if first and first.read_share else "-"
        speedups = [by_m[m].speedup if m in by_m else None for m in tokens]
        ratios = [f"{speedup:.2f}" if speedup else "-" for speedup in speedups]
        lines.append([weight, name, time, share, *ratios])
    return header, lines


def notes(rows: Sequence[Row]) -> list[str]:
    """One line for everything that was not timed, and why."""
    return list(
        dict.fromkeys(
            f"{row.method} {row.bits} bit on {row.n}x{row.k} {row.dtype}: {row.note}" for row in rows if row.note
        )
    )
