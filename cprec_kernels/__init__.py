"""Fused kernels for compressed next-item recommenders: block embeddings, clustered softmax, exact top-N (CpRec)."""

from . import convert, functional, nn, optim, planning
from ._backend import BackendError, backend_of, get_backend, set_backend, use_backend
from ._native import available_cpu_isas, cpu_isa, release_memory, serving_library, set_cpu_isa
from ._version import __version__
from ._warmup import warmup
from .convert import compress
from .ops._library import accumulate_in_place
from .partition import Partition

__all__ = [
    "BackendError",
    "Partition",
    "__version__",
    "accumulate_in_place",
    "available_cpu_isas",
    "backend_of",
    "compress",
    "convert",
    "cpu_isa",
    "functional",
    "get_backend",
    "nn",
    "optim",
    "planning",
    "release_memory",
    "serving_library",
    "set_backend",
    "set_cpu_isa",
    "use_backend",
    "warmup",
]
