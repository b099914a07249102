"""Interleaved wall-clock timing: one call of every provider per round, so that a busy minute falls on all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.registry import Prepared, Provider

MAX_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall time per call in milliseconds; no outlier is dropped."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def summarise(times_ms: list[float]) -> Timing:
    """Median and the 20th and 80th percentile (by linear interpolation)."""
    if len(times_ms) == 1:
        return Timing(times_ms[0], times_ms[0], times_ms[0], 1)
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(statistics.median(times_ms), fifths[0], fifths[-1], len(times_ms))


def order_of_round(names: list[str], round_index: int) -> list[str]:
    """Every round has an order of its own, the same in every run.

    What a call leaves in the caches is there for the next one: behind always the same neighbour, a search of an index would
    always find it warm, or never.
    """
    order = list(names)
    random.Random(round_index).shuffle(order)
    return order


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call_once_ms(provider: Provider, prepared: Prepared, clock: Callable[[], float] = time.perf_counter) -> float:
    """One timed call. Dropping old gradients and choosing the instruction set are not part of it."""
    prepared.reset()
    with provider.scope():
        start = clock()
        prepared.call()
        return (clock() - start) * 1e3


def time_interleaved(
    runnable: Mapping[str, tuple[Provider, Prepared]],
    min_rounds: int,
    budget_s: float,
    on_round: Callable[[float], None] = lambda fraction: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time providers that have been warmed up.

    Every provider gets ``min_rounds`` calls, and those that are quick enough as many as fit into their share of the budget,
    so that slow peers do not decide how well fast ones are measured. The calls of each are spread evenly over the whole
    time: whatever slows the machine for a while meets the same part of everyone's.

    Args:
        runnable: name -> provider and its prepared call.
        budget_s: for all providers together; each may use an equal share beyond its first ``min_rounds`` calls.
        on_round: told the share of the work that is done.
    """
    names = list(runnable)
    times: dict[str, list[float]] = {name: [] for name in names}
    share_ms = budget_s * 1e3 / max(1, len(names))
    planned = {}
    for name in order_of_round(names, 0):
        times[name].append(call_once_ms(*runnable[name], clock))
        fitting = int(share_ms * (1 + 1e-6) / max(times[name][0], 1e-6))
        planned[name] = min(max(min_rounds, fitting), max(min_rounds, MAX_ROUNDS))
    rounds = max(planned.values(), default=1)
    for round_index in range(1, rounds):
        due = [name for name in names if _due(round_index, rounds, planned[name])]
        for name in order_of_round(due, round_index):
            times[name].append(call_once_ms(*runnable[name], clock))
        on_round((round_index + 1) / rounds)
    for _, prepared in runnable.values():
        prepared.reset()
    return {name: summarise(values) for name, values in times.items()}


def _due(round_index: int, rounds: int, calls: int) -> bool:
    """Whether one of so many calls, spread evenly over the rounds from the first one on, falls into this round."""
    return -(-round_index * calls // rounds) * rounds < (round_index + 1) * calls
