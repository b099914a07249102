"""cprec::clustered_softmax: checks 7 to 10 of the ten, strides, edges, wrong arguments, determinism and backends."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition, available_cpu_isas, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import copy_weights, make_softmax, weight_tensors
from tests.ops.softmax_inputs import IGNORE, inputs

# 7 strided and sliced inputs


def test_strided_inputs(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden, target = inputs(partition, shape=(6, 10))
    expected = functional.clustered_cross_entropy(hidden[:, ::2].contiguous(), target[:, ::2].contiguous(), weights)
    sliced = functional.clustered_cross_entropy(hidden[:, ::2], target[:, ::2], weights)
    transposed = Weights([w.T.contiguous().T for w in weights.weights], weights.projections, *weights[2:])
    torch.testing.assert_close(sliced, expected)
    torch.testing.assert_close(functional.clustered_cross_entropy(hidden[:, ::2], target[:, ::2], transposed), expected)


# 8 edges


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty_batch(case, shape, cpu_backend):
    weights = copy_weights(make_softmax(case.partition), torch.float32, requires_grad=True)
    hidden = torch.zeros(*shape, case.partition.embedding_dim)
    target = torch.zeros(shape, dtype=torch.int64)
    loss = functional.clustered_cross_entropy(hidden, target, weights)
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(leaf.grad) == 0 for leaf in weight_tensors(weights))
    assert functional.clustered_cross_entropy(hidden, target, weights, reduction="none").shape == shape
    assert functional.clustered_log_prob(hidden, weights).shape == (*shape, case.partition.num_items)
    items = torch.zeros(*shape, 3, dtype=torch.int64)
    assert functional.clustered_score(hidden, items, weights).shape == (*shape, 3)


def test_all_ignored(case, cpu_backend):
    weights = copy_weights(make_softmax(case.partition), torch.float32, requires_grad=True)
    hidden, target = inputs(case.partition)
    loss = functional.clustered_cross_entropy(hidden, torch.full_like(target, IGNORE), weights)
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(leaf.grad) == 0 for leaf in weight_tensors(weights))


def test_another_ignore_index():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden, target = inputs(partition)
    moved = target.masked_fill(target == IGNORE, 100)
    torch.testing.assert_close(
        functional.clustered_cross_entropy(hidden, moved, weights, ignore_index=100),
        functional.clustered_cross_entropy(hidden, target, weights),
    )


def test_one_hidden_state_without_a_batch():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    loss = functional.clustered_cross_entropy(torch.randn(8), torch.tensor(99), weights, reduction="none")
    assert loss.shape == ()
    assert loss > 0


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_stay_finite(scale, cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition)
    loss = functional.clustered_cross_entropy(hidden * scale, target, weights)
    truth = functional.clustered_cross_entropy(hidden.double() * scale, target, copy_weights(weights, torch.float64))
    loss.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert all(leaf.grad.isfinite().all() for leaf in weight_tensors(weights))


def test_nan_input_gives_nan_loss_not_a_crash(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    hidden, target = inputs(partition)
    hidden[0, 0] = math.nan
    target[0, 0] = 99
    assert functional.clustered_cross_entropy(hidden, target, make_softmax(partition)).isnan()


def test_wrong_arguments_are_named():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden, target = inputs(partition)
    call = functional.clustered_cross_entropy
    with pytest.raises(IndexError, match=r"target\[5\] = 100 is outside 0..99 \(or -100, ignored\)"):
        call(hidden[0, :6], torch.tensor([0, 1, 2, 3, 4, 100]), weights)
    with pytest.raises(IndexError, match=r"target\[0\] = -1"):
        call(hidden[0, :1], torch.tensor([-1]), weights)
    with pytest.raises(TypeError, match="target must be int64"):
        call(hidden, target.int(), weights)
    with pytest.raises(ValueError, match=r"target must be \(7, 9\) to go with input \(7, 9, 8\), got \(7, 8\)"):
        call(hidden, target[:, 1:], weights)
    with pytest.raises(ValueError, match=r"input must be \(..., 8\)"):
        call(hidden[..., 1:], target, weights)
    with pytest.raises(TypeError, match=r"must share one dtype.*autocast"):
        call(hidden.double(), target, weights)
    with pytest.raises(ValueError, match="reduction must be"):
        call(hidden, target, weights, reduction="max")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        call(hidden, target, weights, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"head_bias must be \(12,\), got \(10,\)"):
        call(hidden, target, weights._replace(head_bias=weights.head_bias[:10]))
    with pytest.raises(ValueError, match="1 tail biases were given for 2 tail clusters"):
        call(hidden, target, weights._replace(tail_biases=weights.tail_biases[:1]))
    with pytest.raises(ValueError, match="leave no item in the head"):
        call(hidden, target, Weights([torch.ones(2, 8), torch.ones(3, 8), torch.ones(3, 8)]))
    with pytest.raises(IndexError, match=r"items\[0, 1\] = 100"):
        functional.clustered_score(hidden[0, :1], torch.tensor([[3, 100]]), weights)


# 9 determinism


def test_results_repeat_bit_for_bit(case, cpu_backend):
    weights = copy_weights(make_softmax(case.partition), torch.float32, requires_grad=True)
    hidden, target = inputs(case.partition, shape=(40, 20))

    def run():
        loss = functional.clustered_cross_entropy(hidden, target, weights)
        return loss, *torch.autograd.grad(loss, weight_tensors(weights))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# 10 backends: the accelerator form, which may not wait for counts, must agree with the CPU's


def test_the_form_without_counts_agrees(case, monkeypatch):
    """On a device the reference works on every token under a mask instead of asking how many a cluster has."""
    weights = copy_weights(make_softmax(case.partition), torch.float64, requires_grad=True)
    hidden, target = inputs(case.partition, torch.float64)

    def run():
        loss = functional.clustered_cross_entropy(hidden, target, weights, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, weight_tensors(weights))

    expected = run()
    calls = []

    def every_token(member):
        calls.append(1)
        return torch.arange(member.numel()), member

    monkeypatch.setattr(ref, "select_tokens", every_token)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert calls


@pytest.mark.parametrize("bias", [89.0, 200.0, 1e3])
def test_large_biases_have_finite_gradients(bias, cpu_backend):
    """Rows that fill up a vector have no hidden state, so their logits are the biases: exp of 89 is inf in fp32."""
    partition = Partition(50, [20], [16, 4], 16)
    weights = copy_weights(make_softmax(partition, bias=True), torch.float32, requires_grad=True)
    with torch.no_grad():
        for each in (weights.head_bias, *weights.tail_biases):
            each += bias
    hidden, target = inputs(partition, shape=(5,))
    functional.clustered_cross_entropy(hidden, target, weights).backward()
    truth = copy_weights(weights, torch.float64, requires_grad=True)
    with use_backend("reference"):
        functional.clustered_cross_entropy(hidden.double(), target, truth).backward()
    for leaf, true in zip(weight_tensors(weights), weight_tensors(truth), strict=True):
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=1e-3, atol=1e-4)


def test_without_smoothing_the_second_result_has_no_gradient(cpu_backend):
    partition = Partition(50, [20], [16, 4], 16)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition, shape=(5,))
    log_prob, uniform = functional.clustered_target_log_prob(hidden, target, weights, smooth=False)
    assert log_prob.requires_grad
    assert not uniform.requires_grad
    assert torch.count_nonzero(uniform) == 0
    assert functional.clustered_target_log_prob(hidden, target, weights, smooth=True)[1].requires_grad


@pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")
def test_gradients_of_another_number_of_tokens_are_refused():
    partition = Partition(50, [20], [16, 4], 16)
    hidden, target = inputs(partition, shape=(5,))
    args = hidden, target, *copy_weights(make_softmax(partition), torch.float32).args()
    _, _, lse_head, lse_tail, kept = torch.ops.cprec.clustered_softmax(*args, IGNORE, True, None, False)
    for short in range(4):
        grads = [torch.ones(5), torch.ones(5), lse_head, lse_tail]
        grads[short] = grads[short][:1]
        with pytest.raises(ValueError, match="must have the shape of target"):
            torch.ops.cprec.clustered_softmax_backward(*grads[:2], *args, *grads[2:], kept, IGNORE, None, [True] * 5)


def test_a_logit_far_above_those_of_the_slabs_before_it(cpu_backend):
    weight = torch.zeros(600, 8)
    weight[500] = 1_000.0
    target = torch.tensor([500, 500, 0])
    log_prob, _ = functional.clustered_target_log_prob(torch.ones(3, 8), target, Weights([weight]))
    torch.testing.assert_close(log_prob, torch.tensor([0.0, 0.0, -8_000.0]), rtol=0, atol=1e-3)


def test_gradients_of_biases_are_exact_where_logits_are_large(cpu_isa):
    """The reference subtracts a rounded normaliser of about 300, and is off by up to 1e-5."""
    bias = torch.full((100,), 301.0, requires_grad=True)
    weights = Weights([torch.zeros(100, 8)], [], bias)
    functional.clustered_cross_entropy(torch.ones(1, 8), torch.tensor([0]), weights).backward()
    assert (bias.grad[1:] * 100 - 1).abs().max() < 2e-6


@pytest.mark.parametrize("gap", [18.0, 22.0, 30.4, 60.0, 200.0])
def test_no_probability_is_above_one_and_no_gradient_turns_round(gap, cpu_backend):
    """Where hardly anything but the target is in the sum, fp32 may find the sum smaller than the target's own term."""
    weights = torch.zeros(200, 4)
    target = torch.full((64,), 7)
    for seed in range(20):
        bias = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        bias[7] = bias.max() + gap + torch.rand((), generator=torch.Generator().manual_seed(seed))
        bias.requires_grad_()
        log_prob, _ = functional.clustered_target_log_prob(torch.zeros(64, 4), target, Weights([weights], [], bias, []))
        assert (log_prob <= 0).all()
        log_prob.sum().backward()
        assert bias.grad[7] >= 0
