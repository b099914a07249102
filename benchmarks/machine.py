"""Where and with what a run was made: processor, versions, commit. Never a host's name or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from cprec_kernels import __version__, available_cpu_isas

PACKAGES = ("numpy", "faiss-cpu", "cut-cross-entropy")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor, with family and model number, since virtual machines hide what the name would say.

    The architecture where the system does not tell.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip().lower(), " ".join(value.split()))
    if "model name" not in found:
        return platform.machine()
    numbers = [f"{key} {found[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in found]
    return found["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_line() -> str:
    """Processor, cores and widest instruction set, as it stands on every row."""
    isas = available_cpu_isas()
    return f"{processor()}, {cores()} core{'s' if cores() > 1 else ''}, {isas[-1] if isas else 'no native kernels'}"


def versions() -> dict[str, str]:
    """Versions of everything that is timed."""
    found = {"cprec-kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout, with "-dirty" for uncommitted changes; "" outside of a checkout."""
    root = Path(__file__).parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
