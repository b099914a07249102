"""``python -m cprec_kernels``: versions, what was built, and which implementation each op uses on each device, and why."""

from __future__ import annotations

import importlib.util
import platform
import sys

import torch

from . import _backend, _native
from ._version import __version__

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed; `pip install triton` (GPU kernels need it)"
    import triton

    return str(triton.__version__)


def _serving() -> str:
    try:
        return str(_native.serving_library())
    except RuntimeError as error:
        return f"none: {error}"


def _native_lines() -> list[str]:
    module = _native.STATUS.module
    if module is None:
        return [f"native module  absent: {_native.STATUS.reason}"]
    config = module.build_config()
    cuda = config["cuda_compiler"] or "no nvcc at build time"
    linked = any(kernel.endswith("/cuda") for kernel in config["kernels"])
    if config["cuda_compiler"]:
        state = "linked" if linked else "compiled, not linked: torch was built without CUDA"
        cuda += f" for sm {config['cuda_architectures']}, {state}"
    try:
        isa = f"{module.cpu_isa()} in use, of {', '.join(module.available_cpu_isas())} (CPREC_CPU_ISA chooses)"
    except ValueError as error:
        isa = f"none in use: {error}"
    return [
        f"native module  built for torch {config['torch']} with {config['compiler']}",
        f"CPU kernels    {isa}",
        f"CUDA kernels   {cuda}",
        f"without Python {_serving()}",
    ]


def _choice_lines(device_type: str) -> list[str]:
    lines = [f"on {device_type}"]
    for op in _backend.ops():
        by_text: dict[str, list[str]] = {}
        for dtype in _DTYPES:
            try:
                choice = _backend.choose(op, device_type, dtype)
                text = choice.implementation.backend + (f" ({choice.reason})" if choice.reason else "")
            except _backend.BackendError as error:
                text = f"none: {error}"
            by_text.setdefault(text, []).append(str(dtype).removeprefix("torch."))
        for text, dtypes in by_text.items():
            which = "" if len(by_text) == 1 else f"  [{', '.join(dtypes)}]"
            lines.append(f"  {op:34s} {text}{which}")
    return lines


def report() -> str:
    """The whole report, as text."""
    cuda = torch.version.cuda or "none"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        f"cprec-kernels  {__version__}",
        f"python         {platform.python_version()} on {platform.machine()}",
        f"torch          {torch.__version__} (CUDA {cuda}), {torch.get_num_threads()} threads",
        f"triton         {_triton_version()}",
        f"GPUs           {', '.join(devices) or 'none'}",
        *_native_lines(),
        f"backend        {_backend.get_backend()} (CPREC_BACKEND chooses)",
    ]
    for device_type in ("cpu", "cuda"):
        lines += _choice_lines(device_type)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
