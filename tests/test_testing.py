"""The comparison helpers find the errors that they exist to find."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels.testing import (
    CASES,
    assert_accurate,
    assert_all_accurate,
    assert_same_items,
    make_ids,
    make_targets,
    relative_error,
)


def test_an_error_above_the_rule_is_found():
    truth = torch.randn(100, dtype=torch.float64)
    base = truth.float()
    assert_accurate(base, base, truth, torch.float32)
    planted = base.clone()
    planted[17] += 1e-4
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(planted, base, truth, torch.float32)


def test_of_several_tensors_each_is_judged_and_small_ones_together():
    truth = [torch.randn(size, dtype=torch.float64) for size in (3, 40, 5)]
    base = [tensor.float() for tensor in truth]
    assert_all_accurate(base, base, truth, torch.float32)
    assert_all_accurate([], [], [], torch.float32)
    for place in range(3):
        planted = [tensor.clone() for tensor in base]
        planted[place][1] += 1e-4
        with pytest.raises(AssertionError, match=r"rows\[1\]" if place == 1 else "all rows"):
            assert_all_accurate(planted, base, truth, torch.float32, "rows")
    with pytest.raises(AssertionError, match=r"results\[2\]: shape \(4,\), expected \(5,\)"):
        assert_all_accurate([*base[:2], base[2][:4]], base, truth, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_value_is_an_infinite_error(value):
    truth = torch.ones(4)
    wrong = truth.clone()
    wrong[1] = value
    assert relative_error(wrong, truth) == math.inf
    with pytest.raises(AssertionError, match="inf"):
        assert_accurate(wrong, truth, truth, torch.bfloat16)
    with pytest.raises(ValueError, match=r"the reference in torch\.bfloat16 is not finite"):
        assert_accurate(wrong, wrong, truth, torch.bfloat16)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.ones(3), torch.ones(3, 1))


def test_zero_truth_is_judged_absolutely():
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1.0


@pytest.mark.parametrize(
    ("items", "scores", "message"),
    [
        ([[2, 0]], [[-1.0, -3.0]], "expected 1"),  # a better item is missing
        ([[2, 2]], [[-1.0, -1.0]], "twice"),
        ([[2, -1]], [[-1.0, -math.inf]], "are left"),
        ([[2, 1]], [[-1.0, -2.5]], "off by more"),
    ],
)
def test_wrong_items_are_found(items, scores, message):
    log_prob = torch.tensor([[-3.0, -2.0, -1.0]], dtype=torch.float64)
    with pytest.raises(AssertionError, match=message):
        assert_same_items(torch.tensor(items), torch.tensor(scores), log_prob, 1e-3)


def test_a_tie_within_the_band_may_swap():
    log_prob = torch.tensor([[-2.0, -1.00001, -1.0]], dtype=torch.float64)
    assert_same_items(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -1.0]]), log_prob, 1e-3)


def test_cases_reach_the_edges():
    for case in CASES:
        ids = make_ids(case.partition)
        assert ids.max() == case.partition.num_items - 1
        assert ids.min() == 0
        assert ids.unique().numel() < ids.numel()
        assert (make_targets(case.partition) == -100).any()
