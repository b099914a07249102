"""Numerics that users can trust: log-sum-exps, z-loss, determinism, ids that are checked."""

from __future__ import annotations

import copy

import pytest
import torch

from cprec_kernels import functional
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import (
    CASES,
    assert_accurate,
    copy_weights,
    make_hidden,
    make_ids,
    make_softmax,
    make_targets,
    weight_tensors,
)

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def terms_by_definition(hidden, target, weights):
    """Dense logits of every level, by autograd: (log_prob, uniform, lse_head, lse_tail) per token."""
    levels = ref.levels_of(*weights)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]).to(wide), target.reshape(-1)
    zero = rows.new_zeros(flat.shape)
    out = [zero, zero, zero, zero]
    for level in levels:
        logits = level.logits(level.hidden(rows))
        lse, counted = logits.logsumexp(1), flat != IGNORE
        if level.index == 0:
            column = flat.clamp(0, level.hi - 1)
            for tail in levels[1:]:
                column = torch.where((flat >= tail.lo) & (flat < tail.hi), level.hi + tail.index - 1, column)
        else:
            counted = (flat >= level.lo) & (flat < level.hi)
            column = (flat - level.lo).clamp(0, level.hi - level.lo - 1)
        parts = [logits.gather(1, column[:, None])[:, 0] - lse, logits.mean(1) - lse]
        parts += [lse, zero] if level.index == 0 else [zero, lse]
        out = [total + torch.where(counted, part, 0.0) for total, part in zip(out, parts, strict=True)]
    return [term.reshape(target.shape) for term in out]


def graded(function, hidden, target, weights, mix):
    """Values of all terms, and gradients of a mixture of them: of the input and of every weight."""
    hidden = hidden.clone().requires_grad_()
    weights = copy_weights(weights, requires_grad=True)
    terms = function(hidden, target, weights)
    sum((part * term).sum() for part, term in zip(mix, terms, strict=True)).backward()
    return [term.detach() for term in terms], [hidden.grad, *(weight.grad for weight in weight_tensors(weights))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_terms_and_their_gradients(case, dtype, bias, cpu_backend):
    weights = make_softmax(case.partition, dtype, bias=bias)
    hidden, target = make_hidden(case.partition, dtype=dtype), make_targets(case.partition)
    mix = torch.randn(4, *target.shape, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    ours = graded(functional.clustered_target_terms, hidden, target, weights, mix.to(wide))
    base = graded(terms_by_definition, hidden, target, weights, mix.to(wide))
    truth = graded(terms_by_definition, hidden.double(), target, copy_weights(weights, torch.float64), mix)
    for kind in (0, 1):
        for number, (mine, plain, exact) in enumerate(zip(ours[kind], base[kind], truth[kind], strict=True)):
            assert_accurate(mine, plain, exact, dtype, f"{('value', 'gradient')[kind]} {number}")


def test_terms_are_those_of_the_fused_op(case):
    weights = make_softmax(case.partition)
    hidden, target = make_hidden(case.partition), make_targets(case.partition)
    terms = functional.clustered_target_terms(hidden, target, weights)
    log_prob, uniform = functional.clustered_target_log_prob(hidden, target, weights)
    torch.testing.assert_close(terms.log_prob, log_prob)
    torch.testing.assert_close(terms.uniform, uniform)
    assert all(torch.count_nonzero(term[target == IGNORE]) == 0 for term in terms)
    assert torch.count_nonzero(terms.lse_tail[target < case.partition.offsets[1]]) == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_is_added_to_every_counted_token(case, reduction, smoothing):
    options = {"reduction": reduction, "label_smoothing": smoothing}
    head = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, case.partition, z_loss=0.01, **options).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden, target = make_hidden(case.partition, dtype=torch.float64), make_targets(case.partition)
    log_prob, uniform, lse_head, lse_tail = terms_by_definition(hidden, target, head.packed_weights())
    each = -(1 - smoothing) * log_prob - smoothing * uniform + 0.01 * (lse_head.square() + lse_tail.square())
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / (target != IGNORE).sum()}[reduction]
    output, loss = head(hidden, target)
    torch.testing.assert_close(output, log_prob)
    torch.testing.assert_close(loss, expected)
    head.z_loss = 0.0
    assert not torch.allclose(head(hidden, target).loss, expected)


def test_z_loss_pulls_the_normalisers_to_one():
    partition = make_partition()
    head = ClusteredSoftmaxWithLoss(32, partition, z_loss=1.0, head_bias=True, tail_bias=True)
    hidden, target = make_hidden(partition), make_ids(partition)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    before = head.target_terms(hidden, target)
    for _ in range(60):
        optimizer.zero_grad()
        head(hidden, target).loss.backward()
        optimizer.step()
    after = head.target_terms(hidden, target)
    assert after.lse_head.abs().mean() < before.lse_head.abs().mean() / 4
    assert after.lse_tail.abs().mean() < before.lse_tail.abs().mean() / 4


def make_partition():
    return CASES[0].partition


def test_z_loss_does_not_look_at_ignored_tokens():
    """NaN states, as attention over nothing but padding makes them."""
    partition = make_partition()
    hidden, target = make_hidden(partition), make_targets(partition)
    target[::3] = IGNORE
    grads = []
    for value in (0.0, float("nan")):
        torch.manual_seed(0)
        head = ClusteredSoftmaxWithLoss(32, partition, z_loss=1e-2)
        states = torch.where((target == IGNORE)[..., None], value, hidden).requires_grad_()
        head(states, target).loss.backward()
        grads.append([states.grad, *(parameter.grad for parameter in head.parameters())])
    for clean, beside_nan in zip(*grads, strict=True):
        assert torch.equal(clean, beside_nan)


@pytest.mark.parametrize("make", [ClusteredSoftmaxWithLoss, None], ids=["softmax", "tied"])
def test_z_loss_with_every_kind_of_training(make):
    partition = make_partition()
    head = TiedBlocks(partition, z_loss=1e-3) if make is None else make(32, partition, z_loss=1e-3)
    hidden, target = make_hidden(partition), make_targets(partition)
    expected = head(hidden, target)
    compiled = torch.compile(head, fullgraph=True)(hidden, target)
    torch.testing.assert_close(tuple(compiled), tuple(expected))
    program = torch.export.export(head, (hidden, target))
    torch.testing.assert_close(tuple(program.module()(hidden, target)), tuple(expected))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = head(hidden.bfloat16(), target)
    narrow.loss.backward()
    assert narrow.loss.dtype == torch.float32
    assert abs(narrow.loss - expected.loss) < 0.02
    empty = head(hidden[:0], target[:0])
    assert empty.loss == 0
    ignored = head(hidden, torch.full_like(target, IGNORE))
    head.zero_grad()
    ignored.loss.backward()
    assert ignored.loss == 0
    assert all(
        torch.count_nonzero(parameter.grad) == 0 for parameter in head.packed_weights().weights if parameter.is_leaf
    )
    assert head.to(device="meta")(hidden.to("meta"), target.to("meta")).loss.shape == ()


def test_gradients_of_the_terms_in_fp64():
    partition = make_partition()
    weights = make_softmax(partition, torch.float64)
    target = torch.tensor([0, 29, 30, 130, 499, IGNORE])
    hidden = make_hidden(partition, (6,), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, *w: functional.clustered_target_terms(h, target, weights), (hidden,), fast_mode=True
    )


def test_the_terms_check_what_the_loss_checks():
    partition = make_partition()
    weights = make_softmax(partition)
    hidden, target = make_hidden(partition, (3,)), torch.tensor([0, 5, 500])
    with pytest.raises(IndexError, match=r"target\[2\] = 500 is outside 0\.\.499"):
        functional.clustered_target_terms(hidden, target, weights)
    with pytest.raises(TypeError, match="target must be int64"):
        functional.clustered_target_terms(hidden, target.int(), weights)
    with pytest.raises(ValueError, match="to go with input"):
        functional.clustered_target_terms(hidden, target[:2], weights)
    with pytest.raises(TypeError, match="must share one dtype"):
        functional.clustered_target_terms(hidden.double(), target.clamp(max=5), weights)
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="z_loss must be at least 0"):
            ClusteredSoftmaxWithLoss(32, partition, z_loss=bad)


# Determinism: there is no flag because there is nothing to turn off


def test_results_are_the_same_bits_with_torchs_deterministic_algorithms_and_any_number_of_threads(poison):
    partition = make_partition()
    blocks = TiedBlocks(partition, padding=True)
    ids, target = make_ids(partition, (40, 30)), make_targets(partition, (40, 30))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            copied = copy.deepcopy(blocks)
            hidden = copied.embedding(ids)
            loss = functional.clustered_cross_entropy(hidden, target, copied.packed_weights())
            loss.backward()
            results.append(
                [loss.detach(), *(p.grad for p in copied.parameters()), *copied.topk(hidden.detach()[:, 0], 5)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Ids are always checked: on the host for the CPU, by an assertion in the stream on a device (tests/gpu)


@pytest.mark.parametrize("bad", [-1, 500, 2**40, -(2**40)])
def test_ids_out_of_range_are_found_before_anything_is_read(bad):
    partition = make_partition()
    embedding, head = BlockEmbedding(partition), ClusteredSoftmaxWithLoss(32, partition)
    ids = torch.tensor([[3, 7], [bad, 0]])
    for call in (embedding, lambda i: head(torch.randn(2, 2, 32), i), lambda i: head.rank(torch.randn(2, 2, 32), i)):
        with pytest.raises(IndexError, match=rf"\[1, 0\] = {bad} is outside|\[2\] = {bad} is outside"):
            call(ids)
