"""Timing of small GPU kernels, without the usual lies.

Calls are captured into one CUDA graph that runs over as many copies of the weights as it takes to leave the L2 cache
behind (three times its size and more), so neither launch overhead of Python nor a warm cache is measured. The figure is
the median over replays of (time of one replay) / (calls in it).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_L2_FACTOR = 3


def copies_beyond_l2(bytes_each: int, device: int = 0) -> int:
    """How many buffers of this size exceed three times the L2 cache (between 2 and 64)."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, _L2_FACTOR * cache // bytes_each + 1))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median time in microseconds of one of ``calls``, which run one after the other in a replayed CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def read_ceiling(bytes_read: int = 1 << 30) -> float:
    """Bytes per second at which this GPU reads a large buffer (a sum over it), best of several."""
    buffer = torch.ones(bytes_read // 4, dtype=torch.float32, device="cuda")
    return bytes_read / (1e-6 * microseconds([lambda: buffer.sum()]))
