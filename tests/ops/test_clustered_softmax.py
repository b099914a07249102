"""cprec::clustered_softmax, clustered_log_prob and clustered_score: the first of the ten checks; the others are beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cprec_kernels import Partition, functional
from cprec_kernels.functional import Weights
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import assert_accurate, copy_weights, make_softmax, weight_tensors
from tests.ops.softmax_inputs import DTYPES, IGNORE, inputs


def definition(hidden, target, weights, epsilon=0.0):
    """Per-token loss written from the definition with dense logits; ignored tokens give 0."""
    levels = ref.levels_of(*weights)
    loss = torch.zeros(target.shape, dtype=hidden.dtype)
    for token in (target != IGNORE).nonzero():
        place = tuple(token.tolist())
        item, h = int(target[place]), hidden[place]
        j = next(level.index for level in levels if level.lo <= item < level.hi)
        column = item if j == 0 else levels[0].hi + j - 1
        for level, entry in ((levels[0], column), *([(levels[j], item - levels[j].lo)] if j else [])):
            log_p = level.logits(level.hidden(h[None])).log_softmax(1)[0]
            loss[place] -= (1 - epsilon) * log_p[entry] + epsilon * log_p.mean()
    return loss


# 1 forward


def test_one_cluster_is_cross_entropy():
    partition = Partition.single(90, 16)
    weights = make_softmax(partition, torch.float64)
    hidden, target = inputs(partition, torch.float64)
    logits = F.linear(hidden, weights.weights[0], weights.head_bias)
    for reduction in ("none", "mean", "sum"):
        for epsilon in (0.0, 0.1):
            ours = functional.clustered_cross_entropy(
                hidden, target, weights, reduction=reduction, label_smoothing=epsilon
            )
            theirs = F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction=reduction, label_smoothing=epsilon
            )
            torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=1e-10, atol=1e-12)


def test_equals_torchs_adaptive_softmax():
    partition = Partition(500, [30, 120], [32, 8, 2], 32)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(32, 500, [30, 120], div_value=4.0, head_bias=True).double()
    weights = Weights(
        [theirs.head.weight, *(tail[1].weight for tail in theirs.tail)],
        [tail[0].weight for tail in theirs.tail],
        theirs.head.bias,
    )
    hidden, target = inputs(partition, torch.float64, (64,))
    counted = target != IGNORE
    output, loss = theirs(hidden[counted], target[counted])
    ours, _ = functional.clustered_target_log_prob(hidden, target, weights)
    torch.testing.assert_close(ours[counted], output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(functional.clustered_cross_entropy(hidden, target, weights), loss)
    torch.testing.assert_close(functional.clustered_log_prob(hidden, weights), theirs.log_prob(hidden))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_forward_is_the_definition(case, epsilon):
    weights = make_softmax(case.partition, torch.float64)
    hidden, target = inputs(case.partition, torch.float64)
    expected = definition(hidden, target, weights, epsilon)
    none = functional.clustered_cross_entropy(hidden, target, weights, reduction="none", label_smoothing=epsilon)
    torch.testing.assert_close(none, expected, rtol=1e-10, atol=1e-12)
    total = functional.clustered_cross_entropy(hidden, target, weights, reduction="sum", label_smoothing=epsilon)
    torch.testing.assert_close(total, expected.sum())
    mean = functional.clustered_cross_entropy(hidden, target, weights, label_smoothing=epsilon)
    torch.testing.assert_close(mean, expected.sum() / (target != IGNORE).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_accuracy(case, dtype, bias, cpu_backend, poison):
    weights = make_softmax(case.partition, dtype, bias=bias)
    hidden, target = inputs(case.partition, dtype)
    args = (hidden.flatten(0, 1), target.flatten())
    truth = ref.clustered_softmax(args[0].double(), args[1], *copy_weights(weights, torch.float64), IGNORE)
    base = ref.clustered_softmax(*args, *weights, IGNORE)
    ours = functional.clustered_target_log_prob(hidden, target, weights)
    for i, name in enumerate(("log_prob", "uniform")):
        assert ours[i].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(ours[i].flatten(), base[i], truth[i], dtype, name)


def test_log_prob_and_score(case):
    weights = make_softmax(case.partition, torch.float64)
    hidden, target = inputs(case.partition, torch.float64)
    log_prob = functional.clustered_log_prob(hidden, weights)
    assert log_prob.shape == (7, 9, case.partition.num_items)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(7, 9, dtype=torch.float64))
    picked, _ = functional.clustered_target_log_prob(hidden, target, weights)
    counted = target != IGNORE
    expected = log_prob.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(picked[counted], expected[counted])
    items = torch.randint(case.partition.num_items, (7, 9, 5))
    torch.testing.assert_close(functional.clustered_score(hidden, items, weights), log_prob.gather(-1, items))


def test_chunks_do_not_change_the_result(case, monkeypatch):
    weights = copy_weights(make_softmax(case.partition), torch.float64, requires_grad=True)
    hidden, target = inputs(case.partition, torch.float64)

    def loss_and_gradients():
        loss = functional.clustered_cross_entropy(hidden, target, weights, label_smoothing=0.1)
        return loss, torch.autograd.grad(loss, weight_tensors(weights))

    loss, expected = loss_and_gradients()
    monkeypatch.setattr("cprec_kernels.reference.common.MAX_LOGITS", 1)
    monkeypatch.setattr(ref.row_chunks, "__defaults__", (2,))
    chunked, gradients = loss_and_gradients()
    torch.testing.assert_close(chunked, loss)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
