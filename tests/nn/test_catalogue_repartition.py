"""A catalogue that changes: repartition on BlockEmbedding and ClusteredSoftmaxWithLoss."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss
from tests.nn.catalogue_modules import IDS, assert_same, logits, make_embedding, make_head


@pytest.mark.parametrize("padding", [True, False])
def test_items_that_stay_in_their_cluster_are_kept_bit_for_bit(padding):
    """New counts that reorder within clusters alone."""
    embedding, head = make_embedding(padding), make_head()
    counts = torch.cat([torch.randperm(size) + offset for size, offset in ((10, 200), (20, 100), (30, 0))])
    order = torch.argsort(counts, descending=True)
    before, hidden = embedding(order), torch.randn(5, 16, dtype=torch.float64)
    log_prob = head.log_prob(hidden).detach()
    for module in (embedding, head):
        change = module.repartition(counts)
        assert torch.equal(change.old_ids, order)
        assert change.errors == (0.0, 0.0, 0.0)
    assert change.parent_errors == (0.0, 0.0)
    assert torch.equal(embedding(IDS), before)
    torch.testing.assert_close(head.log_prob(hidden), log_prob[:, order], rtol=1e-13, atol=1e-13)


def test_embeddings_are_exact_where_the_rank_allows_it():
    """Every new cluster is wide enough for what its items span: 6 + 3 columns of two clusters fit into 9."""
    embedding = make_embedding(padding=True)
    before = embedding(IDS).detach()
    change = embedding.repartition(partition=Partition(60, [25], [16, 9], 16))
    assert max(change.errors) < 1e-14
    torch.testing.assert_close(embedding(IDS), before, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(embedding(torch.tensor([60]))) == 0
    wider = make_embedding()
    before = wider(IDS).detach()
    wider.repartition(partition=Partition(60, [10, 30], [16, 12, 5], 16))
    torch.testing.assert_close(wider(IDS), before, rtol=1e-12, atol=1e-12)


def test_embeddings_are_the_best_there_are_otherwise_and_the_error_says_so():
    embedding = make_embedding()
    counts = torch.randperm(60).double() + 1
    order = torch.argsort(counts, descending=True)
    before = embedding(order).detach()
    change = embedding.repartition(counts, Partition(60, [10, 30], [16, 4, 2], 16))
    after = embedding(IDS).detach()
    torch.testing.assert_close(after[:10], before[:10])
    for (lo, hi), rank, error in zip(((10, 30), (30, 60)), (4, 2), change.errors[1:], strict=True):
        weights = counts[order[lo:hi]].sqrt()[:, None]
        left = (weights * (after[lo:hi] - before[lo:hi])).norm()
        values = torch.linalg.svdvals(weights * before[lo:hi])
        torch.testing.assert_close(left, values[rank:].norm())
        assert math.isclose(error, values[rank:].norm() / values.norm(), rel_tol=1e-9)


def test_items_that_nobody_has_seen_are_fitted_among_themselves():
    embedding = make_embedding()
    before = embedding(IDS).detach()
    counts = torch.cat([torch.arange(60.0, 30.0, -1.0), torch.zeros(30)])
    change = embedding.repartition(counts, Partition(60, [10, 30], [16, 6, 1], 16))
    values = torch.linalg.svdvals(before[30:])
    left = (embedding(IDS).detach() - before)[30:].norm()
    torch.testing.assert_close(left, values[1:].norm())
    assert math.isclose(change.errors[2], values[1:].norm() / values.norm(), rel_tol=1e-9)


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_one_count_that_is_none_is_refused(bad):
    counts = torch.ones(60, dtype=torch.float64)
    counts[7] = bad
    for module in (make_embedding(), make_head()):
        with pytest.raises(ValueError, match="counts must be finite and not negative"):
            module.repartition(counts)


def test_a_softmax_moves_items_between_levels_as_well_as_a_linear_function_can():
    torch.manual_seed(2)
    hidden = torch.randn(4000, 16, dtype=torch.float64)
    counts = torch.randperm(60).double() + 1
    order = torch.argsort(counts, descending=True)
    errors = {}
    for given in (False, True):
        torch.manual_seed(5)
        head = make_head()
        expected = head.log_prob(hidden).detach()[:, order]
        full = Partition(60, [10, 30], [16, 16, 16], 16)
        change = head.repartition(counts, full, inputs=hidden[:2000] if given else None)
        assert max(change.errors) < 1e-12
        errors[given] = (head.log_prob(hidden[2000:]) - expected[2000:]).square().mean().sqrt()
        assert [math.isnan(error) for error in change.parent_errors] == [not given] * 2
    untouched = expected.std()
    assert errors[True] < errors[False] < untouched / 2
    assert errors[True] < untouched / 4


def test_splitting_and_merging_tails():
    hidden = torch.randn(3000, 16, dtype=torch.float64)
    head = make_head()
    expected, (scores, _) = head.log_prob(hidden).detach(), logits(head, hidden)
    change = head.repartition(partition=Partition(60, [10, 30, 45], [16, 6, 3, 3], 16), inputs=hidden)
    assert change.errors == (0.0,) * 4  # rows are kept
    assert change.parent_errors[0] == 0.0
    assert 0 < change.parent_errors[1] < 0.15
    assert_same(logits(head, hidden)[0], scores)
    assert (head.log_prob(hidden) - expected).abs().max() < 0.5
    assert (head.log_prob(hidden) - expected).square().mean().sqrt() < 0.1
    merged = head.repartition(partition=Partition(60, [10, 30], [16, 6, 3], 16), inputs=hidden)
    assert merged.errors[2] < 1.0
    assert (head.log_prob(hidden) - expected).square().mean().sqrt() < 0.5


def test_without_biases_a_parent_label_is_fitted_without_a_constant():
    hidden = torch.randn(3000, 16, dtype=torch.float64) + 0.5
    head = make_head(bias=False)
    expected = head.log_prob(hidden).detach()
    change = head.repartition(partition=Partition(60, [10, 30, 45], [16, 6, 3, 3], 16), inputs=hidden)
    assert change.parent_errors[0] == 0.0
    assert all(0.3 < error < 0.4 for error in change.parent_errors[1:])  # not what a constant would have left
    assert (head.log_prob(hidden) - expected).square().mean().sqrt() < 0.25


@pytest.mark.parametrize("bias", [True, False])
def test_every_case_of_clusters_gives_a_softmax(case, bias):
    head = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, case.partition, head_bias=bias, tail_bias=bias)
    embedding = BlockEmbedding(case.partition.with_padding(), padding_idx=-1)
    counts = torch.rand(case.partition.num_items)
    hidden = torch.randn(20, case.partition.embedding_dim)
    for module in (head, embedding):
        module.repartition(counts)
        module.extend(3)
        module.remove([0] if case.partition.sizes[0] > 1 else [case.partition.num_items - 1])
    assert head.partition.num_items == case.partition.num_items + 2
    assert embedding.partition == head.partition.with_padding()
    torch.testing.assert_close(head.log_prob(hidden).exp().sum(1), torch.ones(20))
    head(hidden, torch.randint(head.n_classes, (20,))).loss.backward()
    fresh = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, head.partition, head_bias=bias, tail_bias=bias)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.log_prob(hidden), head.log_prob(hidden))
