"""Kernels on CPU tensors through Triton's interpreter. It must be asked for before a kernel is imported, hence a process
of its own: ``TRITON_INTERPRET=1 pytest tests/triton``, which `make test` runs after everything else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parent))
    pytest.register_assert_rewrite("softmax_checks")
    import interpreter

    interpreter.repair_bf16_dot()
    interpreter.exchange_once()
    interpreter.remember_dtypes()
    interpreter.check_integers_in_numpy()


@pytest.fixture
def tiny_softmax_tiles() -> Iterator[None]:
    """Tiles of the softmax's kernels that are so tiny that every loop turns."""
    from softmax_checks import TINY

    from cprec_kernels._triton import configs

    with configs.override(**TINY):
        yield
