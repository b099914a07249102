"""The recommender built on cprec_kernels: data, a thin NextItNet, training, evaluation, serving, command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cprec_kernels._version import __version__

if TYPE_CHECKING:
    import torch

    from cprec.exported import ExportedModel

__all__ = ["__version__", "load"]


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> ExportedModel:
    """Read a folder made by ``cprec export``, with torch alone; see :func:`cprec.exported.load`."""
    # Imported here: `cprec --help` and the data layer need no torch.
    from cprec.exported import load as read

    return read(folder, device)
