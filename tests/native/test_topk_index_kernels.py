"""The packed search at sizes where slabs and threads matter, at logits where sums overflow, and each bound at work."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition, functional
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
from cprec_kernels.testing import assert_same_items

STORAGES = ("float32", "float16", "bfloat16", "int8")
LEAF = 64


def make_module(partition, logit_std=1.0):
    generator = torch.Generator().manual_seed(0)
    module = ClusteredSoftmaxWithLoss(partition.embedding_dim, partition)
    with torch.no_grad():
        for j, weight in enumerate(module.weights):
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            weight.mul_(logit_std if j == 0 or weight.shape[1] == partition.embedding_dim else 1.0)
        for projection in module.projections:
            projection.copy_(torch.randn(projection.shape, generator=generator) * partition.embedding_dim**-0.5)
            projection.mul_(logit_std)
    return module


def hidden_states(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def truth(module, hidden):
    weights, projections, head_bias, tail_biases = module.packed_weights()
    assert head_bias is None
    assert not tail_biases
    packed = functional.Weights([w.double() for w in weights], [p.double() for p in projections])
    return functional.clustered_log_prob(hidden.double(), packed).detach()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_change_no_bit(storage, rows, cpu_isa):
    partition = Partition(60_013, [2_501, 9_007], [64, 24, 8], 64)
    index = make_module(partition).build_index(storage, blocks="kd")
    hidden = hidden_states(rows, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(index.topk(hidden, 20, early_termination=False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].scores, other.scores)
        assert torch.equal(results[0].items, other.items)
        assert torch.equal(results[0].counters, other.counters)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("logit_std", [40.0, 3_000.0])
def test_large_logits(logit_std, storage, cpu_isa):
    """Logits far above what 2^x holds: sums are taken around a shift, and again where the first one was too high."""
    partition = Partition(3_011, [301, 1_003], [40, 24, 40 // 4], 40)
    module = make_module(partition, logit_std)
    hidden = hidden_states(23, 40)
    log_prob = truth(module, hidden)
    index = module.build_index(storage, blocks="kd")
    for early_termination in (True, False):
        result = index.topk(hidden, 10, early_termination=early_termination)
        own = log_prob.gather(1, result.items)
        # The scores of a narrow storage carry its rounding; ids have to be right.
        scores = result.scores if storage == "float32" else own.float()
        assert_same_items(result.items, scores, log_prob, 4e-6 * logit_std * 4)
        assert not result.scores.isnan().any()


def two_levels(tail, spread_head):
    """A head of 64 items at most 8 nats apart, and a tail of rank d whose parent label is among the best entries.

    ``spread_head``: the head's items point aside as much as along the rows, so that an index does not know where rows point.
    """
    width = tail.shape[1]
    module = ClusteredSoftmaxWithLoss(width, Partition(64 + tail.shape[0], [64], [width, width], width))
    direction = torch.full((width,), width**-0.5)
    with torch.no_grad():
        module.weights[0].zero_()
        steps = torch.linspace(0.0, -8.0, 64)[:, None]
        module.weights[0][:64] = steps * direction
        if spread_head:
            across = direction * torch.tensor([1.0, -1.0]).repeat(width // 2)
            module.weights[0][:64] += steps * across + tail_around([0.0], 4.0, 64, width, across=True)
        module.weights[0][64] = direction
        module.weights[1].copy_(tail)
    # Four rows share a pass over the leaves; the other three have their own.
    hidden = direction.expand(7, -1) + 0.01 * hidden_states(7, width)
    return module, hidden


def tail_around(centres, spread, size=4_096, width=16, across=False):
    """Items at a distance ``spread`` from places along the rows' direction; ``across`` it, or in any direction."""
    generator = torch.Generator().manual_seed(2)
    direction = torch.full((width,), width**-0.5)
    offsets = torch.randn(size, width, generator=generator)
    if across:
        offsets -= (offsets @ direction)[:, None] * direction
    offsets /= offsets.norm(dim=1, keepdim=True)
    which = torch.arange(size) % len(centres)
    return spread * offsets + torch.tensor(centres)[which, None] * direction


@pytest.mark.parametrize(
    ("tail", "spread_head", "without_leaves", "with_leaves", "looked"),
    [
        # All items close to their mean: the tail's own radius tells that none stands out among 4,096.
        (tail_around([0.0], 0.5), True, False, False, False),
        # Two far groups: only leaves have small radii.
        (tail_around([-7.0, 7.0], 0.1), True, True, False, False),
        # One item in 40 lies far off, but across the row: its leaf's sphere and box reach where no item is.
        (torch.cat([tail_around([0.0], 0.3, 8_000), tail_around([0.0], 8.0, 192, across=True)]), True, True, False, True),
        # The same, and the head knows that rows do not point there.
        (torch.cat([tail_around([0.0], 0.3, 8_000), tail_around([0.0], 8.0, 192, across=True)]), False, True, False, False),
        # An item that is among the best.
        (torch.cat([tail_around([0.0], 0.3), torch.full((1, 16), 3.0)]), True, True, True, False),
    ],
    ids=["whole tail", "leaves", "largest logit", "basis", "wanted"],
)  # fmt: skip
def test_each_bound_at_work(tail, spread_head, without_leaves, with_leaves, looked, cpu_isa):
    """The parent label is likely enough for every row, so what skips the tail is what each index can prove beyond it."""
    module, hidden = two_levels(tail, spread_head)
    log_prob = truth(module, hidden)
    tenth = log_prob.topk(10).values[:, -1]
    parents = torch.log_softmax(hidden.double() @ module.weights[0].double().t(), 1)[:, 64]
    assert (parents > tenth).all(), "the parent's probability must not suffice"
    for blocks, scanned in ((None, without_leaves), ("kd", with_leaves)):
        index = module.build_index(blocks=blocks)
        result = index.topk(hidden, 10)
        everything = index.topk(hidden, 10, early_termination=False)
        assert torch.equal(result.items, everything.items)
        assert torch.equal(result.scores, everything.scores)
        assert_same_items(result.items, result.scores, log_prob, 1e-5)
        levels, leaves, products = result.counters.unbind(1)
        assert (levels == 1 + scanned).all()
        if not scanned:
            assert ((leaves > 1) == (looked and blocks == "kd")).all()
            assert (products < everything.counters[:, 2]).all()
    assert (everything.counters[:, 1] == 1 + math.ceil(len(tail) / LEAF)).all()
