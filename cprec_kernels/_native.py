"""Loads the compiled module ``_C`` if there is one that fits this torch, and remembers why when there is not.

Importing this never raises: without ``_C`` every op runs through ``reference/``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_SERVING = "libcprec_serving.so"
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclasses.dataclass(frozen=True)
class NativeStatus:
    """State of the compiled module: the module itself, or None with one sentence on why and how to mend it."""

    module: ModuleType | None
    reason: str
    intended: bool  # True when it was left out on purpose (CPREC_BUILD=none)


def _minor(version: str) -> tuple[int, int]:
    """(major, minor) of a torch version such as ``2.13.0+cpu``; extensions fit within one minor release."""
    parts = version.split("+")[0].split(".")
    return int(parts[0]), int(parts[1])


def build_info(folder: Path | None = None) -> dict[str, Any] | None:
    """What the build recorded beside the package, or None for a source tree that was never built."""
    path = (folder or Path(__file__).parent) / "_build_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def load(info: dict[str, Any] | None, import_module: Any = importlib.import_module) -> NativeStatus:
    """Import ``_C`` when ``info`` says that it was built for this torch."""
    if info is None:
        return NativeStatus(None, f"the C++ module was never built here; build it with `{_REBUILD}`", False)
    if not info.get("native"):
        reason = str(info.get("reason") or "the package was built with CPREC_BUILD=none")
        return NativeStatus(None, reason, info.get("mode") == "none")
    built_for = str(info.get("torch", ""))
    try:
        fits = _minor(built_for) == _minor(torch.__version__)
    except (ValueError, IndexError):
        fits = False
    if not fits:
        return NativeStatus(
            None,
            f"_C was built for torch {built_for}, this is torch {torch.__version__}; rebuild it with `{_REBUILD}`",
            False,
        )
    if hasattr(torch.ops.cprec_native, "block_embedding") and "cprec_kernels._C" not in sys.modules:
        # To register the kernels a second time would end the process.
        return NativeStatus(None, f"another library, such as {_SERVING}, has registered its kernels already", False)
    try:
        return NativeStatus(import_module("cprec_kernels._C"), "", False)
    except (ImportError, OSError, RuntimeError) as error:
        return NativeStatus(None, f"_C does not load ({error}); rebuild it with `{_REBUILD}`", False)


STATUS = load(build_info())


def _loaded() -> ModuleType:
    if STATUS.module is None:
        raise RuntimeError(f"there are no CPU kernels to choose among: {STATUS.reason}")
    return STATUS.module


def serving_library() -> Path:
    """The shared library that defines the ops for programs without Python, such as a server in C++.

    To be loaded before a package of AOTInductor, with the libraries of the torch that it was built for, and never in a
    process that imports cprec_kernels. It serves the CPU, in float32, bfloat16 and float16.

    Raises:
        RuntimeError: the package was built without native code, or for another torch.
    """
    path = Path(__file__).parent / _SERVING
    if STATUS.module is None:
        raise RuntimeError(f"there is no {_SERVING}: {STATUS.reason}")
    if not path.exists():
        raise RuntimeError(f"{_SERVING} is not beside _C; rebuild it with `{_REBUILD}`")
    return path


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use: "scalar", "avx2", "avx512" or "avx512_bf16".

    Raises:
        RuntimeError: there is no native module. ValueError: ``CPREC_CPU_ISA`` names one that cannot run here.
    """
    return str(_loaded().cpu_isa())


def available_cpu_isas() -> list[str]:
    """Instruction sets that :func:`set_cpu_isa` takes on this processor, narrowest first; empty without native module."""
    return [] if STATUS.module is None else list(STATUS.module.available_cpu_isas())


def set_cpu_isa(name: str) -> None:
    """Use the CPU kernels of one instruction set in this process, or "auto" for the widest that runs.

    No op may be running meanwhile, in any thread: one that has packed its operands for one set would go on with another.

    Raises:
        RuntimeError: there is no native module. ValueError: an unknown name, or one that cannot run here.
    """
    _loaded().set_cpu_isa(name)


def release_memory() -> int:
    """Give memory that the kernels keep for the next step's gradients back to the system; returns the bytes.

    The kernels never keep more, in use and idle, than was in use at once.
    """
    return 0 if STATUS.module is None else int(STATUS.module.release_memory())
