"""The recommender built on cprec_kernels: data, a thin NextItNet, training, evaluation, serving, command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cprec.exported import export, load
    from cprec_kernels import __version__

__all__ = ["__version__", "export", "load"]


def __getattr__(name: str) -> Any:
    # All of these import torch, which takes seconds: `cprec --help` and the data layer should not wait for it.
    if name in ("export", "load"):
        from cprec import exported

        return getattr(exported, name)
    if name == "__version__":
        from cprec_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
