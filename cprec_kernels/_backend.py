"""Which implementation of an op runs, and why.

Every op lists its implementations in order of preference when it is registered; the choice follows from the device, the
dtype and what was built, never from probing inside a forward. ``CPREC_BACKEND`` or :func:`set_backend` ask for one by
name, and then nothing else will do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _native

BACKENDS = ("native", "triton", "reference")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op. ``device_types`` and ``dtypes`` of None mean any."""

    backend: str
    call: Callable[..., Any]
    device_types: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    available: Callable[[], str] = str  # "" when it can run here, else the reason why not

    def refusal(self, dtype: torch.dtype) -> str:
        """Why this implementation cannot serve its devices in a dtype; "" when it can."""
        missing = self.available()
        if missing:
            return missing
        if self.dtypes is not None and dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"{self.backend} serves {names}, not {str(dtype).removeprefix('torch.')}"
        return ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that will run and the reasons why the preferred ones will not."""

    implementation: Implementation
    reason: str


_OPS: dict[str, tuple[Implementation, ...]] = {}
_requested: str = "auto"


def register(op: str, *implementations: Implementation) -> None:
    """Declare an op's implementations, the preferred one first. The last must be the reference."""
    _OPS[op] = implementations


def ops() -> tuple[str, ...]:
    """Names of all registered ops."""
    return tuple(_OPS)


@functools.cache
def _native_symbol(name: str) -> str:
    """ "" when the compiled module has the kernel ``name``, else why not."""
    if _native.STATUS.module is None:
        return _native.STATUS.reason
    if name not in _native.STATUS.module.build_config()["kernels"]:
        return f"_C was built without {name}, for a torch without CUDA" if "/cuda" in name else f"_C has no {name}"
    return ""


def native(name: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> Implementation:
    """The C++ or CUDA kernel ``torch.ops.cprec_native.<name>`` for one device type."""

    def call(*args: Any) -> Any:
        return getattr(torch.ops.cprec_native, name)(*args)

    return Implementation("native", call, (device_type,), dtypes, lambda: _native_symbol(f"{name}/{device_type}"))


@functools.cache
def _triton_missing() -> str:
    """ "" when Triton kernels can run on this machine's CUDA devices, else why not. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0 or newer"
    return ""


def launches_triton() -> bool:
    """Whether Triton kernels may serve CUDA tensors at the moment."""
    return _requested in ("auto", "triton") and not _triton_missing()


def triton(stem: str, name: str, dtypes: tuple[torch.dtype, ...], otherwise: Callable[..., Any]) -> Implementation:
    """The function ``name`` of ``_triton/<stem>.py``, imported when it first runs, for CUDA tensors.

    The module's ``refusal(*args)`` says why it cannot take the shapes of a call ("" if it can); ``otherwise`` then runs,
    unless Triton was asked for by name.
    """

    def call(*args: Any) -> Any:
        module = importlib.import_module(f"._triton.{stem}", __package__)
        reason = module.refusal(*args)
        if reason and _requested == "triton":
            raise BackendError(f"backend 'triton' was asked for and cannot run {name}: {reason}")
        if reason:
            _warn_once(f"{name} runs on the GPU through slower reference code: {reason}")
        return (otherwise if reason else getattr(module, name))(*args)

    return Implementation("triton", call, ("cuda",), dtypes, _triton_missing)


def reference(call: Callable[..., Any]) -> Implementation:
    """The implementation in plain PyTorch."""
    return Implementation("reference", call)


def choose(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation of ``op`` for a device type and dtype.

    Raises:
        BackendError: a backend was requested by name and cannot serve this.
    """
    if _requested not in ("auto", *BACKENDS):
        raise BackendError(f"CPREC_BACKEND={_requested} is not one of auto, {', '.join(BACKENDS)}")
    refusals: list[str] = []
    for implementation in _OPS[op]:
        serves_device = implementation.device_types is None or device_type in implementation.device_types
        if _requested not in ("auto", implementation.backend) or not serves_device:
            continue
        refusal = implementation.refusal(dtype)
        if not refusal:
            return Choice(implementation, "; ".join(refusals))
        refusals.append(refusal)
    reasons = "; ".join(refusals) or f"there is no {_requested} implementation for this device"
    raise BackendError(f"backend {_requested!r} was asked for and cannot run {op} on {device_type}: {reasons}")


@functools.lru_cache(maxsize=1024)
def _choose_cached(op: str, device_type: str, dtype: torch.dtype, _requested_now: str) -> Callable[..., Any]:
    choice = choose(op, device_type, dtype)
    if choice.implementation.backend == "reference" and _requested_now == "auto":
        if not _native.STATUS.intended and _native.STATUS.module is None:
            _warn_once(
                f"cprec_kernels runs without its compiled kernels, through slower reference code: {_native.STATUS.reason}"
            )
        elif device_type == "cuda" and choice.reason:
            _warn_once(f"{op} runs on the GPU through slower reference code: {choice.reason}")
    return choice.implementation.call


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def dispatch(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs ``op`` for tensors like ``tensor``."""
    return _choose_cached(op, tensor.device.type, tensor.dtype, _requested)


def backend_of(op: str, tensor: torch.Tensor) -> str:
    """Backend that will run ``op`` for tensors of this device and dtype: "native", "triton" or "reference".

    Raises:
        KeyError: no such op; :func:`ops` lists them.
        BackendError: the backend requested by name cannot serve it.
    """
    if op not in _OPS:
        raise KeyError(f"no op {op!r}; there are {', '.join(_OPS)}")
    return choose(op, tensor.device.type, tensor.dtype).implementation.backend


def set_backend(name: str) -> None:
    """Ask for one backend for all ops of this process, or "auto" for the best there is.

    Raises:
        ValueError: unknown name.
    """
    global _requested
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend {name!r} is not one of auto, {', '.join(BACKENDS)}")
    _requested = name


def get_backend() -> str:
    """The backend asked for, "auto" unless :func:`set_backend` or ``CPREC_BACKEND`` said otherwise."""
    return _requested


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block, process-wide."""
    previous = _requested
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


# A wrong name in the environment must not break the import: it is kept, and the first op that runs reports it.
_requested = os.environ.get("CPREC_BACKEND", "auto") or "auto"
