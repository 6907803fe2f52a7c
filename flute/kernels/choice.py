"""Problem -> launch: the analytic choice, unless this very GPU was measured to run another plan faster.

The analytic choice is the legal launch with the best estimate (`plan`, `tiles`, `mma`); it needs no measurement and is
what runs until somebody tunes. A measurement (`tuned`) is made once per bucket of M, at its last M; a winner that is
not the faster one at the first M too is kept for the last alone.

Buckets end at 1, 2, 4, 8 and at the widths of the matmul kernel's tiles, 16 to 256; above, at powers of two. Up to 256
tokens every M of a bucket thus has the same tile widths and the same passes of the decode kernel, and what is legal at
its end is legal in all of it (where x fits in shared memory at all). Below 16 the decode kernel is the same for all M,
but x takes up shared memory and time as M grows, hence four buckets. Above 256 the number of waves changes inside a
bucket, so between its ends a winner is followed only as far as the estimate agrees that it wins there (`choose`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeAlias

from . import mma, plan, tiles, tuned

DECODE_TOKENS = 64  # the most tokens the decode kernel is asked for
BUCKETS = (1, 2, 4, 8, *sorted({tokens for tokens, *_ in tiles.variants()}))
Launch: TypeAlias = plan.Plan | tiles.Tiling | mma.Tiling


def bucket(m: int) -> int:
    """The last M of the bucket of ``m``."""
    return BUCKETS[bisect_left(BUCKETS, m)] if m <= BUCKETS[-1] else 1 << (m - 1).bit_length()


def first_of(last: int) -> int:
    """The first M of the bucket that ends with ``last``."""
    return (0, *BUCKETS)[BUCKETS.index(last)] + 1 if last in BUCKETS else last // 2 + 1


def contestants(gpu: plan.Gpu, m: int, n: int, k: int, bits: int, group: int) -> list[Launch]:
    """Every legal launch of all kernels that this GPU has, the best estimate first; none where no kernel takes it."""
    if k > plan.MAX_IN_FEATURES:
        return []
    found: list[Launch] = []
    if m <= DECODE_TOKENS:
        found += plan.candidates(gpu, m, n, k, bits, group)
    if gpu.has_wgmma and (m > tiles.FEWEST_TOKENS or not found):
        found += tiles.candidates(gpu, m, n, k, bits, plan.group_block(group, k))
    if not gpu.has_wgmma and (m > mma.FEWEST_TOKENS or not found):
        found += mma.worthwhile(gpu, m, n, k, bits, group)
    return sorted(found, key=lambda one: one.cycles)


def choose(
    gpu: plan.Gpu, problem: tuned.Problem, measured: Callable[[tuned.Problem], tuned.Verdict | None]
) -> Launch | None:
    """The launch for ``problem``, whose ``m`` is here the true number of tokens; None when no kernel takes it.

    Args:
        measured: what is known about a problem of a bucket.

    The winner w of the bucket's last M beat the analytic choice a there by a measured factor. Estimates of both are
    wrong by factors of their own, which are taken to be the same at ``m``: w is followed if

        cycles_w(m) / cycles_a(m)  <  cycles_w(last) / cycles_a(last) * us_a(last) / us_w(last)
    """
    found = contestants(gpu, *problem[:-1])
    if not found:
        return None
    last = problem._replace(m=bucket(problem.m))
    verdict = measured(last)
    winner = None if verdict is None or problem.m < verdict.first else named(found, verdict.plan)
    if verdict is None or winner is None or last == problem:
        return winner or found[0]
    there = contestants(gpu, *last[:-1])
    won = named(there, verdict.plan)
    if won is None:
        return found[0]
    expected = winner.cycles / found[0].cycles * there[0].cycles / won.cycles * verdict.us / verdict.analytic_us
    return winner if expected < 1 else found[0]


def named(found: list[Launch], label: str | None) -> Launch | None:
    """The launch of that label; None where it is not among them."""
    return next((one for one in found if one.label == label), None)
