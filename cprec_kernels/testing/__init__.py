"""Named cases and comparisons, shared by tests and benchmarks."""

from .cases import CASES, Case, make_embedding, make_ids, make_softmax, make_targets
from .compare import EPS, assert_accurate, assert_same_items, relative_error

__all__ = [
    "CASES",
    "EPS",
    "Case",
    "assert_accurate",
    "assert_same_items",
    "make_embedding",
    "make_ids",
    "make_softmax",
    "make_targets",
    "relative_error",
]
