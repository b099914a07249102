"""Compiling before the first launch: what a rehearsal listed, in parallel, into the cache that launches look in."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel
from triton.runtime.jit import MockTensor

from .common import Launch


class CompilationError(RuntimeError):
    """A kernel that does not compile on this device."""


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return value.dtype
    # Sizes are never specialised on, but for the width of the integer that they need.
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def variant(launch: Launch) -> tuple[Any, ...]:
    """All that decides what is compiled for a launch: the kernel, types of its arguments, constants and options."""
    return launch.kernel, tuple(map(_kind, launch.args)), tuple(sorted(launch.options.items()))


def _stand_in(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_stand_in, value))
    return MockTensor(value.dtype) if isinstance(value, Tensor) else value


def _compile(launch: Launch) -> Any:
    return launch.kernel.warmup(*map(_stand_in, launch.args), grid=(1,), **launch.options)


def _fails(kernel: FutureKernel) -> bool:
    try:
        kernel.result()
    except Exception:  # whatever it is, it is raised again where the kernel is compiled by itself
        return True
    return False


def _forget_placeholders(launch: Launch) -> None:
    """Triton 3.7 and 3.8 leave in a kernel's cache what stands for one that failed, and would take it for compiled."""
    for kernels, *_ in launch.kernel.device_caches.values():
        for key in [key for key, kernel in kernels.items() if isinstance(kernel, FutureKernel)]:
            del kernels[key]


def compile_all(launches: Iterable[Launch], device: torch.device) -> int:
    """Compile the variants among ``launches`` for a device, in threads; returns how many were not compiled already.

    What fails among threads is compiled once more by itself, and only what fails there too is an error: before 3.11.8
    and 3.12.2, Python's parser keeps its depth where all threads share it, and now and then refuses good source ("AST
    constructor recursion depth mismatch", CPython's issue 106905).

    Raises:
        CompilationError: a kernel does not compile, with its name and constants.
    """
    variants = {variant(launch): launch for launch in launches}
    with torch.cuda.device(device):
        for launch in variants.values():
            _ = launch.kernel.cache_key  # parses, so before there are threads
        with (
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            started = [(launch, _compile(launch)) for launch in variants.values()]
            new = [(launch, kernel) for launch, kernel in started if isinstance(kernel, FutureKernel)]
            failed = [launch for launch, kernel in new if _fails(kernel)]
        for launch in failed:
            _forget_placeholders(launch)
            try:
                _compile(launch)
            except Exception as error:
                raise CompilationError(
                    f"{launch.kernel.__name__} with {launch.options} does not compile for {device}: {error}; "
                    "set CPREC_BACKEND=reference to run without it, and report it"
                ) from error
    return len(new)
