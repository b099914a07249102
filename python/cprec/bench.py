"""``cprec bench``: hands over to the benchmarks of the source checkout, which are not installed with the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import cprec_kernels


def find_benchmarks() -> bool:
    """Whether ``benchmarks`` can be imported: from the path, or from the checkout that an editable install points to."""
    if importlib.util.find_spec("benchmarks") is not None:
        return True
    checkout = Path(cprec_kernels.__file__).parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        return False
    sys.path.insert(0, str(checkout))
    return True


def run_bench(arguments: Sequence[str]) -> None:
    """Run the benchmarks' command line; without arguments its ``quick`` preset.

    Raises:
        FileNotFoundError: there is no checkout here.
    """
    if not find_benchmarks():
        raise FileNotFoundError(
            "the benchmarks are part of the source checkout, not of the installed package; "
            "run `make bench` or `python -m benchmarks` there"
        )
    importlib.import_module("benchmarks.cli").main(list(arguments) or ["quick"])
