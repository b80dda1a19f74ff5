"""Timing by CUDA graph replay, peers in turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch

# Call number i: it picks the i-th copy of the inputs, modulo their number.
Call = Callable[[int], object]

_ROUNDS = 15
_GRAPH_US = 3000.0


class BenchError(RuntimeError):
    """A measurement cannot be made honestly; the message says why."""


def copies_beyond_l2(bytes_a_call: int) -> int:
    """Copies of the inputs that together are three times the L2 cache, so that each is cold."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-3 * l2 // bytes_a_call))


def time_in_graphs(calls: dict[str, Call], copies: int) -> dict[str, float]:
    """Median microseconds of one call for each name.

    Every contender is captured in a CUDA graph of many calls that rotate over ``copies`` of the
    inputs. The graphs are replayed in turn, round after round, since the card's clocks drift, each
    time in another order: for some milliseconds a contender's power still slows who comes next.

    Raises:
        BenchError: a contender cannot be captured in a graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    with torch.cuda.stream(stream):
        for name, call in calls.items():
            for i in range(copies):
                call(i)
            estimate = _elapsed_us(lambda c=call: [c(i) for i in range(3)]) / 3  # type: ignore[misc]
            repeats = max(5, min(200, int(_GRAPH_US / estimate)))
            repeats = -(-repeats // copies) * copies
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    for i in range(repeats):
                        call(i)
            except RuntimeError as error:
                raise BenchError(f"{name} cannot be captured in a CUDA graph: {error}") from error
            graph.replay()
            graphs[name] = graph, repeats
        times: dict[str, list[float]] = {name: [] for name in calls}
        orders = random.Random(0)
        for _ in range(_ROUNDS):
            for name in orders.sample(list(graphs), len(graphs)):
                graph, repeats = graphs[name]
                times[name].append(_elapsed_us(graph.replay) / repeats)
    torch.cuda.current_stream().wait_stream(stream)
    return {name: statistics.median(own) for name, own in times.items()}


def time_launches(calls: dict[str, Call]) -> dict[str, float]:
    """Median microseconds from one call to the next outside a graph, of the same inputs: launch
    overhead included.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            call(0)
            times[name].append(_elapsed_us(lambda c=call: [c(0) for _ in range(20)]) / 20)  # type: ignore[misc]
    return {name: statistics.median(own) for name, own in times.items()}


def _elapsed_us(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)
