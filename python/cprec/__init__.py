"""The recommender built on cprec_kernels: data, a thin NextItNet, training, evaluation, serving, command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cprec.exported import ExportedModel
    from cprec_kernels import __version__

__all__ = ["__version__", "export", "load"]


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> ExportedModel:
    """Read a folder made by ``cprec export``, with torch alone; see :func:`cprec.exported.load`."""
    # Imported here: `cprec --help` and the data layer need no torch.
    from cprec.exported import load as read

    return read(folder, device)


def export(
    run_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that :func:`load` reads, as ``cprec export`` does; see :func:`cprec.exported.export`."""
    from cprec.exported import export as write

    return write(run_folder, out, data=data, overwrite=overwrite)


def __getattr__(name: str) -> Any:
    # cprec_kernels imports torch, which takes seconds: `cprec --help` should not wait for it.
    if name == "__version__":
        from cprec_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
