"""Fused kernels for compressed next-item recommenders: block embeddings, clustered softmax, exact top-N (CpRec)."""

from . import functional, nn
from ._backend import BackendError, backend_of, get_backend, set_backend, use_backend
from ._native import available_cpu_isas, cpu_isa, set_cpu_isa
from ._version import __version__
from .partition import Partition

__all__ = [
    "BackendError",
    "Partition",
    "__version__",
    "available_cpu_isas",
    "backend_of",
    "cpu_isa",
    "functional",
    "get_backend",
    "nn",
    "set_backend",
    "set_cpu_isa",
    "use_backend",
]
