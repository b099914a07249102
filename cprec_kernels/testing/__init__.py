"""Named cases and comparisons, shared by tests and benchmarks."""

from .cases import (
    CASES,
    Case,
    copy_weights,
    make_embedding,
    make_hidden,
    make_ids,
    make_softmax,
    make_targets,
    weight_tensors,
)
from .compare import EPS, assert_accurate, assert_all_accurate, assert_same_items, relative_error

__all__ = [
    "CASES",
    "EPS",
    "Case",
    "assert_accurate",
    "assert_all_accurate",
    "assert_same_items",
    "copy_weights",
    "make_embedding",
    "make_hidden",
    "make_ids",
    "make_softmax",
    "make_targets",
    "relative_error",
    "weight_tensors",
]
