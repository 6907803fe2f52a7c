"""Tuning: run the most promising launches of a problem on this GPU, check their answers, keep the fastest.

Per problem: the launches that the estimate likes best, some of each kernel, run over rotated random weights inside
CUDA graphs replayed in turns (`timing.compare`); a short round finds the fastest few, a long one decides between them
and the analytic choice. A launch whose answer is wrong is out before it is timed. The winner must be more than 2 %
faster than the analytic choice, which stays otherwise: differences below that come and go from run to run. All this is
at the last M of a bucket; the winner is then tried at the first M, and kept for the last alone if it is slower there.

An answer is right if every output is within ``bound * (|x| . |W|^T)`` of the float64 product (weights and y rounded
to 16 bits, once each, stay within that) and the relative Frobenius error of all is below ``bound`` too; ``bound`` is
that of `correctness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import TuneError
from ..kernels import choice, cuda, layout, plan, reference, tuned
from ..kernels.layout import TILE_ROWS
from ..spec import CUSTOM_TABLE, QuantSpec
from . import timing
from .correctness import BOUNDS

CANDIDATES = 12
_MARGIN = 1.02
_FINALISTS = 3  # beside the analytic choice
_SHORT, _LONG = 5, 25  # replays
_COPIES = 24
_SLICE_TILES = 256  # rows of W that are decoded to float64 at once, in tiles of 16
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Weight = tuple[torch.Tensor, torch.Tensor]
Measure = Callable[[Sequence[choice.Launch], int], list[float]]


@dataclass(frozen=True)
class Result:
    """What tuning found for a problem.

    Args:
        analytic: label of the analytic choice; None: no kernel takes the problem, and nothing was measured.
        verdict: what is kept; None as above.
        wrong: labels of launches that gave wrong answers.
        measured: launches that were timed; 0 when the verdict was known before.
    """

    problem: tuned.Problem
    analytic: str | None
    verdict: tuned.Verdict | None
    wrong: tuple[str, ...] = ()
    measured: int = 0

    @property
    def gain(self) -> float:
        """Time of the analytic choice over that of the winner: 1 or more."""
        return 1.0 if self.verdict is None else self.verdict.analytic_us / self.verdict.us


def problems(
    shapes: Iterable[tuple[int, int]], tokens: Iterable[int], spec: QuantSpec, dtype: torch.dtype
) -> list[tuned.Problem]:
    """The distinct problems behind shapes (N, K) and numbers of tokens, each at the end of its bucket.

    Raises:
        TuneError: the CUDA kernels take no such dtype, group size or number of tokens.
    """
    name = next((name for name, known in _DTYPES.items() if known == dtype), None)
    if name is None:
        raise TuneError(f"dtype {dtype}: the CUDA kernels take {' and '.join(_DTYPES)}; nothing to tune")
    found: dict[tuned.Problem, None] = {}
    for n, k in shapes:
        if n < 1 or k < 1:
            raise TuneError(f"shape {n}x{k}: N and K must be positive")
        if not layout.supports(spec.group_size, k):
            raise TuneError(
                f"group_size={spec.group_size} at K={k}: the CUDA kernels take multiples of 32, or -1 for the whole "
                "row; such a layer is dequantized on every call and has nothing to tune"
            )
        for m in tokens:
            if m < 1:
                raise TuneError(f"{m} tokens: tune for 1 or more")
            found[tuned.Problem(choice.bucket(m), n, k, spec.bits, spec.group(k), name)] = None
    return list(found)


def check_gpu() -> None:
    """Raise TuneError where there is no GPU to measure on."""
    if not torch.cuda.is_available():
        raise TuneError("tuning measures on a GPU, and torch sees none; see flute doctor")


def tune(
    wanted: Iterable[tuned.Problem], *, device: int = 0, candidates: int = CANDIDATES, again: bool = False
) -> Iterator[Result]:
    """Measure problems one by one and keep what is found; yields each `Result` when it is known.

    Args:
        wanted: from `problems`.
        device: index of the GPU.
        candidates: launches to try, of each kernel.
        again: measure also what is known for this GPU, driver and version of the kernels.

    Raises:
        TuneError: there is no GPU; or, after the last result, what was found could not be kept on disk. It holds in
            this process all the same.
    """
    check_gpu()
    here, unkept = cuda.machine(device), None
    for problem in wanted:
        known = None if again else tuned.lookup(here, problem)
        found = choice.contestants(cuda.gpu(device), *problem[:-1])
        if not found or known is not None:
            yield Result(problem, found[0].label if found else None, known if found else None)
            continue
        with torch.cuda.device(device):
            result = _measured(problem, shortlist(found, candidates), device)
        try:
            if result.verdict is not None:
                tuned.keep(here, {problem: result.verdict})
        except TuneError as error:
            unkept = error
        cuda.choose.cache_clear()
        yield result
    if unkept is not None:
        raise unkept


def shortlist(found: Sequence[choice.Launch], candidates: int) -> list[choice.Launch]:
    """The first ``candidates`` of each kernel, in order; the analytic choice is always the first."""
    taken: dict[type, int] = {}
    kept = []
    for one in found:
        taken[type(one)] = taken.get(type(one), 0) + 1
        if taken[type(one)] <= candidates:
            kept.append(one)
    return kept


def decide(right: Sequence[choice.Launch], analytic: choice.Launch, measure: Measure) -> tuned.Verdict:
    """The verdict on launches whose answers are right, the analytic choice first among them if its own is."""
    short = dict(zip(right, measure(right, _SHORT), strict=True))
    fastest = sorted((one for one in right if one != analytic), key=short.__getitem__)[:_FINALISTS]
    finalists = [*([analytic] if analytic in right else []), *fastest]
    times = dict(zip(finalists, measure(finalists, _LONG), strict=True))
    best = min(finalists, key=times.__getitem__)
    base = times.get(analytic, float("inf"))
    if times[best] * _MARGIN < base:
        return tuned.Verdict(best.label, times[best], base if analytic in times else times[best])
    return tuned.Verdict(None, base, base)


def confirm(verdict: tuned.Verdict, trial: Trial, gpu: plan.Gpu) -> tuned.Verdict:
    """The verdict for the whole bucket if the winner is right and faster at its first M too, else the last alone."""
    last, *rest = trial.problem[:-1]
    first = choice.first_of(last)
    if verdict.plan is None or first == last:
        return verdict
    rivals = choice.contestants(gpu, first, *rest)
    winner = choice.named(rivals, verdict.plan)
    if winner is not None and winner == rivals[0]:
        return verdict
    if winner is not None and trial.is_right(winner, first):
        base, won = trial.times([rivals[0], winner], _LONG, first)
        if won < base:
            return verdict
    return verdict._replace(first=last)


def _measured(problem: tuned.Problem, launches: list[choice.Launch], device: int) -> Result:
    cuda.compile_ahead(device, launches, problem.bits, problem.dtype == "bfloat16")
    trial = Trial(problem)
    right = [one for one in launches if trial.is_right(one, problem.m)]
    wrong = tuple(one.label for one in launches if one not in right)
    verdict = None
    if right:
        verdict = confirm(decide(right, launches[0], partial(trial.times, tokens=problem.m)), trial, cuda.gpu(device))
    return Result(problem, launches[0].label, verdict, wrong, len(launches))


class Trial:
    """One problem on the current GPU: random x and weights, the right answer, and a stopwatch."""

    def __init__(self, problem: tuned.Problem) -> None:
        m, n, k, bits, group, name = problem
        dtype = _DTYPES[name]
        spec = QuantSpec(bits, group, CUSTOM_TABLE)
        self.problem = problem
        self.copies, self.table = timing.rotating_weights(n, k, spec, dtype, _COPIES)
        self.x = torch.randn(m, k, device=self.table.device).to(dtype)
        self.check = checker(self.x, self.copies[0], self.table, problem)

    def run(self, one: choice.Launch, tokens: int, weight: Weight) -> torch.Tensor:
        """y of the first ``tokens`` rows of x."""
        _, n, _, bits, group, _ = self.problem
        y = cuda.lut_linear(self.x[:tokens], *weight, self.table, None, n, bits, group, forced=one)
        assert y is not None, "a forced launch is run"
        return y

    def is_right(self, one: choice.Launch, tokens: int) -> bool:
        """Whether the answer is."""
        return self.check(self.run(one, tokens, self.copies[0]))

    def times(self, some: Sequence[choice.Launch], replays: int, tokens: int) -> list[float]:
        """Microseconds of each launch."""
        calls = ([partial(self.run, one, tokens, weight) for weight in self.copies] for one in some)
        return timing.compare(*calls, replays=replays)


def checker(
    x: torch.Tensor, weight: Weight, table: torch.Tensor, problem: tuned.Problem
) -> Callable[[torch.Tensor], bool]:
    """A test of answers y (tokens, N) to the first rows of x against the float64 product.

    That is computed once, by slices of rows of W, and kept in float32: 60,000 times finer than y.
    """
    _, n, k, bits, group, _ = problem
    bound, wide = BOUNDS[x.dtype], x.double()
    exact, most = (torch.empty(x.shape[0], n, device=x.device) for _ in range(2))
    for tile in range(0, len(weight[0]), _SLICE_TILES):
        tiles = slice(tile, tile + _SLICE_TILES)
        first, last = TILE_ROWS * tile, min(n, TILE_ROWS * (tile + _SLICE_TILES))
        codes = layout.unpack_weight(weight[0][tiles], bits, last - first, k)
        scales = layout.unpack_scales(weight[1][tiles], last - first)
        dense = reference.decode(codes, scales, table, k, bits, group, dtype=torch.float64)
        exact[:, first:last] = wide @ dense.T
        most[:, first:last] = bound * (wide.abs() @ dense.abs().T)

    def is_right(y: torch.Tensor) -> bool:
        right = exact[: len(y)]
        error = (y.float() - right).abs()
        each = (error <= most[: len(y)]).all()  # False for NaN too
        return bool(each & (error.norm() <= bound * right.norm()))

    return is_right
