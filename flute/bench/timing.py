"""Timing of small GPU kernels, without the usual lies.

Calls are captured into one CUDA graph that runs over as many copies of the weights as it takes to leave the L2 cache
behind (three times its size and more), so neither launch overhead of Python nor a warm cache is measured. The figure is
the median over replays of (time of one replay) / (calls in it). What is to be compared is replayed in turns: a GPU at
its power limit runs slower the longer it has run, and whoever is measured second would look worse.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from ..kernels.layout import TILE_ROWS, packed_shape
from ..spec import QuantSpec

_L2_FACTOR = 3
_WARM_UP_SECONDS = 0.1
_FEWEST_COPIES = 8  # what a graph's first call costs more than the others should not count


def copies_beyond_l2(bytes_each: int, device: int = 0) -> int:
    """How many buffers of this size exceed three times the L2 cache (between 8 and 64)."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(_FEWEST_COPIES, min(64, _L2_FACTOR * cache // bytes_each + 1))


def rotating_weights(
    n: int, k: int, spec: QuantSpec, dtype: torch.dtype, most: int = 64
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Random codes and scales of (n, k) in kernel order, at most ``most`` copies beyond the L2 cache; and a table."""
    shape = packed_shape(n, k, spec.bits)
    copies = [
        (
            torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8),
            torch.rand(shape[0], spec.num_groups(k), TILE_ROWS, device="cuda").to(dtype),
        )
        for _ in range(min(most, copies_beyond_l2(math.prod(shape))))
    ]
    return copies, torch.randn(spec.table_shape, device="cuda").to(dtype)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it ever met."""
    return torch.cuda.Stream(device)


def captured(calls: Sequence[Callable[[], object]], warm_ups: int = 1) -> torch.cuda.CUDAGraph:
    """``calls``, one after the other, as a CUDA graph; first they run ``warm_ups`` times as they are."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def compare(*contestants: Sequence[Callable[[], object]], replays: int = 20) -> list[float]:
    """Median microseconds of one call of each contestant, whose calls run one after the other in a replayed graph."""
    graphs = [captured(calls) for calls in contestants]
    begun = time.monotonic()
    while time.monotonic() - begun < _WARM_UP_SECONDS:  # clocks fall while kernels are compiled
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(replays):
        for graph, calls, mine in zip(graphs, contestants, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine.append(1e3 * start.elapsed_time(end) / len(calls))
    return [statistics.median(mine) for mine in times]


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median microseconds of one of ``calls``."""
    return compare(calls, replays=replays)[0]


def read_ceiling(bytes_read: int = 1 << 30) -> float:
    """Bytes per second at which this GPU reads a large buffer (a sum over it), best of several."""
    buffer = torch.ones(bytes_read // 4, dtype=torch.float32, device="cuda")
    return bytes_read / (1e-6 * microseconds([lambda: buffer.sum()]))
