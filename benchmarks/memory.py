"""Memory of one call: the high-water mark of a process of its own, beyond its inputs and weights.

The child builds a provider's inputs and weights, makes one call on a tiny case (libraries load, pools start), gives freed
memory back to the system, resets its high-water mark, makes the one call and reads the mark. What the call allocates and
keeps (gradients) counts, and is also reported on its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.registry import Prepared, Provider, Setting, get_op
from benchmarks.timing import torch_threads

WARM_UP_CASE = "tiny-d32-t64"
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Peak:
    """Megabytes (10^6 bytes). peak_mb: beyond inputs and weights. gradients_mb: the part that the caller gets to keep."""

    peak_mb: float
    gradients_mb: float


def available_bytes() -> int:
    """Memory that processes can still get. 0 where the system does not tell."""
    return _meminfo_field(Path("/proc/meminfo"), "MemAvailable")


def _meminfo_field(path: Path, field: str) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int:
    found = _meminfo_field(Path("/proc/self/status"), "VmHWM")
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back_freed_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _gradient_bytes(leaves: Sequence[torch.Tensor]) -> int:
    total = 0
    for leaf in leaves:
        if leaf.grad is None:
            continue
        parts = [leaf.grad._values(), leaf.grad._indices()] if leaf.grad.is_sparse else [leaf.grad]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def _call(provider: Provider, prepared: Prepared) -> None:
    prepared.reset()
    with provider.scope():
        prepared.call()


def measure_here(setting: Setting, provider: Provider) -> Peak:
    """The measurement, in a process that has done nothing else."""
    op = get_op(setting.op)
    with torch_threads(setting.threads):
        warm = dataclasses.replace(setting, case=Case.parse(WARM_UP_CASE))
        _call(provider, provider.prepare(op.problem(warm)))
        prepared = provider.prepare(op.problem(setting))
        prepared.reset()
        _give_back_freed_memory()
        before = _meminfo_field(Path("/proc/self/status"), "VmRSS")
        if not _reset_high_water():
            # Without a reset the mark may date from the set-up: touch nothing and take the larger of the two.
            before = max(before, _high_water_bytes())
        _call(provider, prepared)
        peak = _high_water_bytes()
        return Peak(max(0, peak - before) / MB, _gradient_bytes(prepared.leaves) / MB)


def measure_in_child(setting: Setting, provider: Provider) -> Peak:
    """:func:`measure_here` in a fresh process.

    Raises:
        RuntimeError: the child failed, with the last line of what it said.
    """
    values = dataclasses.asdict(setting) | {"case": setting.case.name, "provider": provider.name}
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(values)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    return Peak(**json.loads(result.stdout.splitlines()[-1]))


def _main() -> None:
    values = json.loads(sys.argv[1])
    name = values.pop("provider")
    setting = Setting(**values | {"case": Case.parse(values["case"])})
    peak = measure_here(setting, get_op(setting.op).provider(name))
    sys.stdout.write(json.dumps(dataclasses.asdict(peak)) + "\n")


if __name__ == "__main__":
    _main()
