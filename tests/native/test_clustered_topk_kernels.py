"""The search kernels at sizes where blocks, slabs and chunks of rows end raggedly, and what they promise about rows."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.testing import assert_same_items, copy_weights, make_hidden, make_softmax

PARTITION = Partition(30_011, [1_501, 8_003], [48, 19, 6], 48)


def truth(hidden, weights):
    return functional.clustered_log_prob(hidden.double(), copy_weights(weights, torch.float64))


@pytest.mark.parametrize("logit_std", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 10, 700, 3_000])
def test_many_items(k, logit_std, cpu_isa, poison):
    """More blocks than slabs, k above and below the number of blocks, the threshold of blocks and that of pruning."""
    weights = make_softmax(PARTITION, logit_std=logit_std)
    hidden = make_hidden(PARTITION, (37,))
    scores, items = functional.clustered_topk(hidden, k, weights)
    assert_same_items(items, scores, truth(hidden, weights), 2e-5 * max(1.0, logit_std))


def test_exclusions_of_the_best(cpu_isa, poison):
    """Each row's best hundred are excluded: the blocks that they lead must not lift the threshold."""
    weights = make_softmax(PARTITION)
    hidden = make_hidden(PARTITION, (20,))
    log_prob = truth(hidden, weights)
    best = log_prob.topk(100).indices
    scores, items = functional.clustered_topk(hidden, 10, weights, exclude=best)
    assert_same_items(items, scores, log_prob.scatter(1, best, -math.inf), 2e-5)


@pytest.mark.parametrize("count", [0, 3, 2_000])
def test_candidates(count, cpu_isa, poison):
    weights = make_softmax(PARTITION)
    hidden = make_hidden(PARTITION, (20,))
    candidates = torch.randperm(PARTITION.num_items)[:count]
    log_prob = torch.full((20, PARTITION.num_items), -math.inf, dtype=torch.float64)
    log_prob[:, candidates] = truth(hidden, weights)[:, candidates]
    scores, items = functional.clustered_topk(hidden, 10, weights, candidates=candidates)
    assert_same_items(items, scores, log_prob, 2e-5)


def test_tails_that_cannot_matter_change_nothing(cpu_isa, poison):
    """With unlikely parents no tail is scanned, with likely ones all are: the items are those of the full order."""
    hidden = make_hidden(PARTITION, (33,))
    for shift in (-30.0, 0.0, 8.0):
        weights = make_softmax(PARTITION)
        bias = weights.head_bias.clone()
        bias[-2:] += shift
        weights = weights._replace(head_bias=bias)
        scores, items = functional.clustered_topk(hidden, 20, weights)
        assert_same_items(items, scores, truth(hidden, weights), 2e-5)
        if shift != 0:
            assert (items < 1_501).all() == (shift < 0)


def test_rank_of_every_place(cpu_isa):
    weights = make_softmax(PARTITION, logit_std=2.0)
    hidden = make_hidden(PARTITION, (19,))
    _, items = functional.clustered_topk(hidden, PARTITION.num_items, weights)
    for place in (0, 7, 1_500, 20_000, PARTITION.num_items - 1):
        assert (functional.clustered_rank(hidden, items[:, place], weights) == place).all()


def test_equal_scores_go_by_id(cpu_isa):
    weights = make_softmax(PARTITION)
    flat = Weights([torch.zeros_like(table) for table in weights.weights], weights.projections)
    hidden = make_hidden(PARTITION, (5,))
    # Uniform within a cluster: the head's 1,503 entries first, then 6,502 and 22,008 items below a parent each.
    _, items = functional.clustered_topk(hidden, 9_000, flat)
    assert torch.equal(items, torch.arange(9_000).expand(5, -1))
    target = torch.tensor([0, 1_500, 1_501, 8_003, 30_010])
    assert torch.equal(functional.clustered_rank(hidden, target, flat), target)


@pytest.mark.parametrize("distinct", [5, 1_000_000])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_ranks_of_targets_all_over(rows, distinct, cpu_isa):
    """Every row has its own target; of five distinct items in every cluster, thousands tie on either side of it."""
    weights = make_softmax(PARTITION)
    few = [table[torch.arange(len(table)) % distinct] for table in weights.weights]
    few[0][-2:] = weights.weights[0][-2:]  # the parents' labels
    bias = weights.head_bias.clone()
    bias[:-2] = 0.0
    weights = weights._replace(weights=few, head_bias=bias, tail_biases=())
    hidden = make_hidden(PARTITION, (rows,))
    _, items = functional.clustered_topk(hidden, PARTITION.num_items, weights)
    borders = torch.tensor([0, 1, 47, 48, 143, 144, 1_500, 1_501, 1_502, 1_549, 8_002, 8_003, 8_147, 30_009, 30_010])
    generator = torch.Generator().manual_seed(rows)
    for target in (
        borders[torch.arange(rows) % len(borders)],
        borders[torch.arange(7, 7 + rows) % len(borders)],
        torch.randint(PARTITION.num_items, (rows,), generator=generator),
    ):
        expected = (items == target[:, None]).int().argmax(dim=1)
        assert torch.equal(functional.clustered_rank(hidden, target, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_see_its_neighbours(dtype, cpu_isa):
    """Bit for bit: alone, in a batch, in another chunk of rows, with any number of threads."""
    weights = make_softmax(PARTITION, dtype, logit_std=3.0)
    hidden = make_hidden(PARTITION, (1_100,), dtype) * torch.linspace(0.1, 4.0, 1_100, dtype=dtype)[:, None]
    target = torch.arange(1_100) * 27

    def run(rows):
        scores, items = functional.clustered_topk(hidden[rows], 10, weights)
        picked = functional.clustered_score(hidden[rows], target[rows, None], weights)
        return scores, items, functional.clustered_rank(hidden[rows], target[rows], weights), picked

    together = run(slice(None))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(5, 6), slice(1_030, 1_100)):
                for part, whole in zip(run(rows), together, strict=True):
                    assert torch.equal(part, whole[rows])
    finally:
        torch.set_num_threads(threads)


def test_scores_of_given_items(cpu_isa, poison):
    weights = make_softmax(PARTITION, logit_std=2.0)
    hidden = make_hidden(PARTITION, (21,))
    items = torch.randint(0, PARTITION.num_items, (21, 13))
    items[3] = 5  # a row that needs no tail
    expected = truth(hidden, weights).gather(1, items)
    assert (functional.clustered_score(hidden, items, weights).double() - expected).abs().max() < 4e-5
    assert functional.clustered_score(hidden, items[:, :0], weights).shape == (21, 0)


def test_weights_that_are_not_numbers_are_reported(cpu_isa):
    hidden = make_hidden(PARTITION, (3,))
    for value in (math.nan, math.inf):
        weights = make_softmax(PARTITION)
        weights.weights[0][700] = value
        for call in (
            lambda w=weights: functional.clustered_topk(hidden, 5, w),
            lambda w=weights: functional.clustered_rank(hidden, torch.tensor([1, 2, 3]), w),
        ):
            with pytest.raises(ValueError, match="scores of row 0 are NaN"):
                call()


def test_an_impossible_item_is_not_returned(cpu_isa):
    """A bias of -inf masks an item, as the reference has it."""
    partition = Partition(100, [10], [8, 4], 8)
    weights = make_softmax(partition)
    weights.head_bias[2] = weights.tail_biases[0][5] = -math.inf
    hidden = make_hidden(partition, (4,))
    scores, items = functional.clustered_topk(hidden, 100, weights)
    assert (items[:, -2:] == -1).all()
    assert (scores[:, -2:] == -math.inf).all()
    with use_backend("reference"):
        expected = functional.clustered_topk(hidden, 100, weights)
    assert torch.equal(items, expected[1])


def test_the_raw_kernels_refuse_what_the_ops_would_have(cpu_isa):
    partition = Partition(20, [5], [4, 2], 4)
    weights = make_softmax(partition).args()
    hidden = torch.randn(2, 4)
    native = torch.ops.cprec_native
    with pytest.raises(ValueError, match=r"k = 21 is outside 0..20"):
        native.clustered_topk(hidden, 21, *weights, None, None, None)
    with pytest.raises(IndexError, match=r"candidates hold 20, outside 0..19"):
        native.clustered_topk(hidden, 1, *weights, None, None, torch.tensor([0, 20]))
    with pytest.raises(IndexError, match=r"target\[1\] = -1 is outside 0..19"):
        native.clustered_rank(hidden, torch.tensor([0, -1]), *weights)
    with pytest.raises(IndexError, match=r"items\[0, 1\] = 20 is outside 0..19"):
        native.clustered_score(hidden, torch.tensor([[0, 20], [1, 2]]), *weights)
    with pytest.raises(ValueError, match="exclude"):
        native.clustered_topk(hidden, 1, *weights, torch.tensor([1]), torch.tensor([0, 1, 9]), None)
    with pytest.raises(ValueError, match="exclude"):
        native.clustered_topk(hidden, 1, *weights, torch.tensor([[1]]), None, None)
    with pytest.raises(ValueError, match="one target per row"):
        native.clustered_rank(hidden, torch.tensor([0]), *weights)
