"""cprec::clustered_softmax: checks 2 and 3 of the ten, gradients and gradcheck."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels import Partition, functional
from cprec_kernels.functional import Weights
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import assert_accurate, copy_weights, make_softmax, weight_tensors
from tests.ops.softmax_inputs import DTYPES, IGNORE, inputs

# 2 gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_gradients(case, dtype, epsilon, cpu_backend, poison):
    """Against autograd through the forward in fp64; the upstream gradient differs per token."""
    weights = make_softmax(case.partition, dtype)
    hidden, target = inputs(case.partition, dtype)
    upstream = torch.rand(target.shape) + 0.5

    def run(compute_dtype, function):
        h = hidden.to(compute_dtype, copy=True).requires_grad_()
        w = copy_weights(weights, compute_dtype, requires_grad=True)
        log_prob, uniform = function(h, w)
        loss = -(1 - epsilon) * log_prob - epsilon * uniform
        loss.backward(upstream.to(loss.dtype).reshape(loss.shape))
        return [leaf.grad for leaf in (h, *weight_tensors(w))]

    def plain(h, w):
        return ref.clustered_softmax(h.flatten(0, 1), target.flatten(), *w, IGNORE)[:2]

    truth = run(torch.float64, plain)
    base = run(dtype, plain)
    ours = run(dtype, lambda h, w: functional.clustered_target_log_prob(h, target, w))
    for i, (a, b, t) in enumerate(zip(ours, base, truth, strict=True)):
        assert a is not None
        t = torch.zeros_like(a, dtype=torch.float64) if t is None else t
        b = torch.zeros_like(a) if b is None else b
        assert_accurate(a, b, t, dtype, f"gradient {i}")


def test_descents_are_the_gradient_without_the_upstream_one(case, cpu_backend):
    weights = make_softmax(case.partition, torch.float64)
    hidden, target = inputs(case.partition, torch.float64, (40,))
    hidden.requires_grad_()
    log_prob, *_, kept = torch.ops.cprec.clustered_softmax(hidden, target, *weights.args(), IGNORE, False, None, True)
    (expected,) = torch.autograd.grad(-log_prob.sum(), hidden)
    *descents, order, ids = kept
    assert not any(tensor.requires_grad for tensor in kept)
    levels = ref.levels_of(*weights)
    through = (
        d if level.projection is None else d @ level.projection for d, level in zip(descents, levels, strict=True)
    )
    assert torch.equal(ids, torch.where(target == IGNORE, 2**31 - 1, target)[order].int())
    assert (ids.diff() >= 0).all()
    torch.testing.assert_close(sum(through), expected, rtol=1e-10, atol=1e-12)


def test_only_needed_gradients_are_computed(case, cpu_backend):
    weights = make_softmax(case.partition)
    hidden, target = inputs(case.partition)
    weights.weights[0].requires_grad_()
    functional.clustered_cross_entropy(hidden, target, weights).backward()
    assert weights.weights[0].grad is not None
    assert hidden.grad is None
    assert all(leaf.grad is None for leaf in weight_tensors(weights)[1:])


def test_untouched_clusters_have_zero_gradients_not_none(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden = torch.randn(3, 8)
    functional.clustered_cross_entropy(hidden, torch.tensor([0, 1, 2]), weights).backward()
    assert weights.weights[0].grad.abs().sum() > 0
    for leaf in (*weights.weights[1:], *weights.projections, *weights.tail_biases):
        assert torch.count_nonzero(leaf.grad) == 0


# 3 gradcheck


def test_gradcheck():
    partition = Partition(12, [2, 5], [4, 3, 1], 4)
    weights = copy_weights(make_softmax(partition), torch.float64, requires_grad=True)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 4, 11, IGNORE])

    def function(h, *flat):
        packed = Weights(flat[:3], flat[3:5], flat[5], flat[6:])
        return functional.clustered_target_log_prob(h, target, packed)

    assert torch.autograd.gradcheck(function, (hidden, *weight_tensors(weights)))
    assert torch.autograd.gradcheck(
        lambda h, *flat: functional.clustered_log_prob(h, Weights(flat[:3], flat[3:5], flat[5], flat[6:])),
        (hidden, *weight_tensors(weights)),
    )


def test_a_second_derivative_is_refused_clearly(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition)
    hidden.requires_grad_()
    loss = functional.clustered_cross_entropy(hidden, target, weights)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="clustered_softmax is not twice differentiable"):
        first.sum().backward()
