"""cprec_kernels.fitting: the linear algebra of conversions, against its definitions."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import fitting


def weighted_error(rows, factors, weights, metric):
    difference = rows.double() - factors.left.double() @ factors.right.double()
    return float((weights[:, None] * (difference @ metric) * difference).sum().sqrt())


@pytest.mark.parametrize("items", [200, 5, 1])
@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("with_metric", [True, False])
def test_no_table_of_the_rank_is_nearer(items, rank, with_metric):
    rows, weights = torch.randn(items, 12, dtype=torch.float64), torch.rand(items, dtype=torch.float64) + 0.1
    inputs = torch.randn(300, 12, dtype=torch.float64) * torch.linspace(0.1, 3, 12)
    metric = fitting.second_moments(inputs) if with_metric else torch.eye(12, dtype=torch.float64)
    factors = fitting.truncated_svd(rows, rank, weights, metric if with_metric else None)
    assert factors.left.shape == (items, rank)
    error = weighted_error(rows, factors, weights, metric)
    # Eckart and Young: what is left are the singular values behind the rank
    root = torch.linalg.cholesky(metric)
    values = torch.linalg.svdvals(weights.sqrt()[:, None] * (rows @ root))
    assert math.isclose(error, float(values[rank:].norm()), rel_tol=1e-8, abs_tol=1e-9)
    assert math.isclose(factors.error, float(values[rank:].norm() / values.norm()), rel_tol=1e-8, abs_tol=1e-12)
    if not with_metric:
        torch.testing.assert_close(factors.right @ factors.right.T, torch.eye(rank, dtype=torch.float64))


def test_rows_of_the_rank_come_back_to_rounding_whatever_their_weights():
    rows = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    weights = torch.cat([torch.zeros(20), torch.logspace(-12, 3, 30)]).double()
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        factors = fitting.truncated_svd(rows.to(dtype), 3, weights)
        assert factors.left.dtype == factors.right.dtype == dtype
        assert (factors.left @ factors.right - rows).abs().max() < bound
    assert fitting.truncated_svd(torch.zeros(4, 6), 2).error == 0.0


def test_chunks_change_nothing(monkeypatch):
    rows, weights = torch.randn(500, 8, dtype=torch.float64), torch.rand(500)
    whole = fitting.truncated_svd(rows, 3, weights)
    monkeypatch.setattr(fitting, "chunks", lambda n, size=0: (slice(i, min(i + 70, n)) for i in range(0, n, 70)))
    parts = fitting.truncated_svd(rows, 3, weights)
    torch.testing.assert_close(parts.left @ parts.right, whole.left @ whole.right)
    hidden, biases = torch.randn(9, 8, dtype=torch.float64), torch.randn(500)
    expected = (hidden @ rows.T + biases).logsumexp(1)
    torch.testing.assert_close(fitting.log_sum_exp(hidden, rows, biases), expected)


@pytest.mark.parametrize("with_biases", [True, False])
def test_a_parent_label_bounds_its_tail_and_touches_it(with_biases):
    vectors, hidden = torch.randn(40, 8, dtype=torch.float64), torch.randn(100, 8, dtype=torch.float64)
    biases = torch.randn(40, dtype=torch.float64) if with_biases else None
    lse = fitting.log_sum_exp(hidden, vectors, biases)
    label, constant = fitting.parent_label(vectors, biases, fitting.shares_of(torch.rand(40)))
    assert (hidden @ label + constant <= lse + 1e-12).all()
    # equality where the tail's softmax is the shares
    touch = hidden[3]
    logits = vectors @ touch + (0.0 if biases is None else biases)
    label, constant = fitting.parent_label(vectors, biases, logits.softmax(0))
    torch.testing.assert_close(touch @ label + constant, lse[3])


def test_shares_of_nothing_are_equal():
    assert fitting.shares_of(torch.tensor([0, 0, 0, 0])).tolist() == [0.25] * 4
    assert fitting.shares_of(torch.tensor([3, 0, 1])).tolist() == [0.75, 0.0, 0.25]
    label, constant = fitting.parent_label(torch.ones(2, 3), None, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert constant == 0.0
    assert label.tolist() == [1.0, 1.0, 1.0]


def test_a_fitted_label_finds_a_linear_target_and_keeps_its_guess_where_nothing_is_known():
    hidden, truth = torch.randn(500, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    targets = hidden @ truth + 2.0
    label, constant, rms = fitting.fitted_parent_label(hidden, targets, truth + 0.5, 0.0, True)
    assert rms < 0.01
    assert abs(constant - 2.0) < 0.01
    assert (label - truth).abs().max() < 0.01
    label, constant, rms = fitting.fitted_parent_label(hidden, targets, truth, 1.0, False)
    assert constant == 0.0
    assert abs(rms - 2.0) < 0.1
    flat = hidden.clone()
    flat[:, 3] = 0.0
    label, _, _ = fitting.fitted_parent_label(flat, flat @ truth, torch.full((8,), 7.0, dtype=torch.float64), 0.0, True)
    # Nothing pulls at it but the rounding of the solve, over the ridge.
    assert math.isclose(float(label[3]), 7.0, rel_tol=1e-9)


def test_a_constant_is_not_shrunk():
    hidden, targets = torch.randn(200, 4, dtype=torch.float64), torch.full((200,), 7.0, dtype=torch.float64)
    label, constant, rms = fitting.fitted_parent_label(hidden, targets, torch.zeros(4, dtype=torch.float64), 0.0, True)
    assert constant == pytest.approx(7.0, rel=1e-9)
    assert label.abs().max() < 1e-9
    assert rms < 1e-9


def test_moments_of_inputs_that_are_zero_are_positive_definite():
    torch.linalg.cholesky(fitting.second_moments(torch.zeros(5, 3)))
