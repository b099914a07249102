"""Roofs of this machine, measured with our own instructions: FMA, exponentials and read bandwidth.

Rates are those of the instruction set in use (:func:`cprec_kernels.set_cpu_isa`). Every thread runs the probe on data
of its own while the interpreter's lock is released. A roof is a maximum, so the best of several trials counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import ModuleType

import torch

from .. import _native

TRIALS = 7
TRIAL_S = 0.02


def _probes() -> ModuleType:
    if _native.STATUS.module is None:
        raise RuntimeError(f"roofs are measured by the native module: {_native.STATUS.reason}")
    return _native.STATUS.module


def _best_rate(probe: Callable[[int, int], float], threads: int, trials: int, trial_s: float) -> float:
    """Units per second of ``probe(thread, repeats) -> units`` on several threads at once, the best of the trials."""
    repeats, elapsed = 1, 0.0
    while elapsed < trial_s:
        start = time.perf_counter()
        probe(0, repeats)
        elapsed = time.perf_counter() - start
        if elapsed < trial_s:
            repeats = max(repeats + 1, min(repeats * 16, int(repeats * 1.2 * trial_s / max(elapsed, 1e-9))))
    barrier = Barrier(threads)

    def trial(thread: int) -> tuple[float, float, float]:
        barrier.wait()
        start = time.perf_counter()
        units = probe(thread, repeats)
        return start, time.perf_counter(), units

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(trials):
            starts, ends, units = zip(*pool.map(trial, range(threads)), strict=True)
            best = max(best, sum(units) / (max(ends) - min(starts)))
    return best


def fma_gflops(threads: int = 1, *, trials: int = TRIALS, trial_s: float = TRIAL_S) -> float:
    """10^9 FLOPs per second of the logits' tile product with operands in the first-level cache.

    Raises:
        RuntimeError: there is no native module.
    """
    probes = _probes()
    return _best_rate(lambda _, repeats: float(probes.probe_fma(repeats * 64)), threads, trials, trial_s) / 1e9


def bf16_gflops(threads: int = 1, *, trials: int = TRIALS, trial_s: float = TRIAL_S) -> float:
    """As :func:`fma_gflops`, of products of bf16 pairs summed in fp32: in hardware where the instruction set has them.

    Raises:
        RuntimeError: there is no native module.
    """
    probes = _probes()
    return _best_rate(lambda _, repeats: float(probes.probe_bf16(repeats * 64)), threads, trials, trial_s) / 1e9


def exp_gexps(threads: int = 1, *, trials: int = TRIALS, trial_s: float = TRIAL_S) -> float:
    """10^9 exponentials per second (2^x to fp32 accuracy) with operands in the first-level cache.

    Raises:
        RuntimeError: there is no native module.
    """
    probes = _probes()
    return _best_rate(lambda _, repeats: float(probes.probe_exp2(repeats * 16)), threads, trials, trial_s) / 1e9


def read_gbps(working_set_bytes: int, threads: int = 1, *, trials: int = TRIALS, trial_s: float = TRIAL_S) -> float:
    """10^9 bytes per second when a working set, split among the threads, is read over and over.

    Raises:
        RuntimeError: there is no native module. ValueError: fewer than 4 KiB per thread.
    """
    probes = _probes()
    count = working_set_bytes // 4 // threads
    if count < 1024:
        raise ValueError(f"a working set of {working_set_bytes} bytes is too small for {threads} threads")
    parts = [torch.ones(count).numpy() for _ in range(threads)]

    def read(thread: int, repeats: int) -> float:
        return sum(float(probes.probe_read(parts[thread])) for _ in range(repeats))

    return _best_rate(read, threads, trials, trial_s) / 1e9
