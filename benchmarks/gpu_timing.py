"""Times on a device: of calls, of their replays from a CUDA graph, of single kernels; and the memory that calls take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS_S = 0.25  # seconds of timed calls per row, about


def timed(call: Callable[[], object], device: str, rounds: int = 20) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms, after a call that compiles and two that warm up.

    A slow call gets fewer rounds, three at least: time on a device is dear.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    warm_s = (time.perf_counter() - begin) / 2
    times = []
    for _ in range(max(3, min(rounds, int(ROUNDS_S / max(warm_s, 1e-6)))) if device == "cuda" else 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[3]


def graph_ms(call: Callable[[], object]) -> float:
    """Median of replays of a call from a CUDA graph: what it takes without the host."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    median = timed(graph.replay, "cuda")[0]
    del kept
    return median


def extra_mb(call: Callable[[], object], device: str) -> float | None:
    """What a call allocates at its peak beyond what was there, in MB; None off a device."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def launches(call: Callable[[], object], device: str) -> list[tuple[str, float]]:
    """Name and ms of every kernel (and fill and copy) of a call, in order; off a device, of torch's operators."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as seen:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    # What the host did (launches, buffers of the profiler) is among the events as well, in no fixed order to the device's.
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    found = (event for event in seen.events() if event.time_range is not None and event.device_type == wanted)
    events = sorted(found, key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in events]
