"""The clustered softmax kernels at sizes where tiles, blocks and slabs end raggedly, and their determinism."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels import Partition, accumulate_in_place, functional, release_memory
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import (
    assert_accurate,
    copy_weights,
    make_hidden,
    make_softmax,
    make_targets,
    weight_tensors,
)
from tests.called_ops import CalledOps

IGNORE = -100


# Eight columns are written where they belong and fill half an AVX-512 vector; six go by way of a buffer.
@pytest.mark.parametrize("ranks", [[48, 19, 6], [48, 8, 8]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_and_entries(dtype, ranks, cpu_backend, poison):
    """More tokens than a gradient tile holds, more blocks than a partial sum, several slabs, ragged ends of all of them."""
    partition = Partition(30_011, [1_501, 8_003], ranks, 48)
    weights = make_softmax(partition, dtype, logit_std=2.0)
    hidden, target = make_hidden(partition, (1_301,), dtype), make_targets(partition, (1_301,))
    upstream = torch.rand(1_301) - 0.3

    def run(compute_dtype, function):
        h = hidden.to(compute_dtype, copy=True).requires_grad_()
        w = copy_weights(weights, compute_dtype, requires_grad=True)
        log_prob, uniform = function(h, w)
        (0.9 * log_prob + 0.1 * uniform).backward(upstream.to(log_prob.dtype))
        return [log_prob, uniform, *(leaf.grad for leaf in (h, *weight_tensors(w)))]

    def plain(h, w):
        return ref.clustered_softmax(h, target, *w, IGNORE)[:2]

    results = [run(torch.float64, plain), run(dtype, plain)]
    ours = run(dtype, lambda h, w: functional.clustered_target_log_prob(h, target, w))
    for i, (a, t, b) in enumerate(zip(ours, *results, strict=True)):
        assert_accurate(a, b, t, dtype, f"result {i}")


def test_the_kernels_do_not_depend_on_the_number_of_threads(cpu_isa):
    """The reference makes no such promise: its products are the BLAS library's."""
    partition = Partition(5_000, [100, 1_000], [64, 16, 4], 64)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = make_hidden(partition, (700,)), make_targets(partition, (700,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = functional.clustered_cross_entropy(hidden, target, weights)
            results.append([loss, *torch.autograd.grad(loss, [*weights.weights, *weights.tail_biases])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_raw_kernel_refuses_what_the_op_would_have(cpu_isa):
    """torch.ops.cprec_native is reachable without our checks: it must still not read out of bounds."""
    partition = Partition(20, [5], [4, 2], 4)
    tables, projections, head_bias, tail_biases = make_softmax(partition).args()
    hidden, target = torch.randn(2, 4), torch.tensor([0, 19])

    def call(target=target, tables=tables, projections=projections, head_bias=head_bias, tail_biases=tail_biases):
        return torch.ops.cprec_native.clustered_softmax(
            hidden, target, tables, projections, head_bias, tail_biases, IGNORE, True, None
        )

    assert call()[0].isfinite().all()
    with pytest.raises(IndexError, match=r"target\[1\] = 20 is outside 0..19"):
        call(target=torch.tensor([0, 20]))
    with pytest.raises(ValueError, match=r"bias of level 0 must be \(6,\)"):
        call(head_bias=head_bias[:2])
    with pytest.raises(ValueError, match=r"bias of level 1 must be \(15,\)"):
        call(tail_biases=[tail_biases[0][:2]])
    with pytest.raises(ValueError, match="2 tail biases for 1 tails"):
        call(tail_biases=tail_biases * 2)
    with pytest.raises(ValueError, match=r"weights\[1\] needs a projection \(2, 4\)"):
        call(projections=[])
    with pytest.raises(ValueError, match="does not fit input of width 4"):
        call(tables=[torch.randn(6, 8), tables[1]])
    with pytest.raises(ValueError, match="does not fit input of width 4"):
        call(tables=[tables[0][:1], tables[1]])


def test_gradients_are_added_in_place(cpu_backend, poison):
    """As two backward passes add up in .grad by autograd; here without a gradient of their own."""
    partition = Partition(3_001, [150, 800], [24, 9, 8], 24)
    hidden, target = make_hidden(partition, (300,)), make_targets(partition, (300,))

    def twice(in_place):
        weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
        accumulate_in_place(weight_tensors(weights), in_place)
        with CalledOps() as called:
            for part in (slice(0, 100), slice(100, 300)):
                functional.clustered_cross_entropy(hidden[part], target[part], weights, reduction="sum").backward()
                places = [weight.grad.data_ptr() for weight in weights.weights]
        # The first gradients make room for the second ones.
        assert called.count("clustered_softmax_backward_into") == in_place
        assert called.count("clustered_softmax_backward") == 2 - in_place
        return weights, places

    weights, places = twice(True)
    functional.clustered_cross_entropy(hidden[:0], target[:0], weights).backward()
    assert places == [weight.grad.data_ptr() for weight in weights.weights]
    for ours, expected in zip(weight_tensors(weights), weight_tensors(twice(False)[0]), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_in_place_needs_gradients_that_fit(cpu_isa):
    partition = Partition(40, [5], [8, 4], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = make_hidden(partition, (6,)), make_targets(partition, (6,))
    accumulate_in_place(weights.weights)
    loss = functional.clustered_cross_entropy(hidden, target, weights)
    loss.backward(retain_graph=True)
    once = [weight.grad.clone() for weight in weights.weights]
    weights.weights[1].grad = weights.weights[1].grad.T.contiguous().T  # a layout that the kernel cannot add to
    loss.backward()
    for before, weight in zip(once, weights.weights, strict=True):
        torch.testing.assert_close(weight.grad, 2 * before)
    with pytest.raises(ValueError, match="only leaf tensors"):
        accumulate_in_place([loss])


def test_memory_is_kept_for_the_next_step_and_given_back(cpu_isa):
    partition = Partition(100_000, [2_000], [64, 16], 64)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = make_hidden(partition, (20,)), make_targets(partition, (20,))
    release_memory()
    places = []
    for _ in range(3):
        for tensor in weight_tensors(weights):
            tensor.grad = None
        functional.clustered_cross_entropy(hidden, target, weights).backward()
        places.append(weights.weights[1].grad.data_ptr())
    assert places[0] == places[1] == places[2]
    kept = weights.weights[1].grad.clone()
    weights.weights[1].grad = None
    assert release_memory() >= kept.nbytes
    assert release_memory() == 0
    functional.clustered_cross_entropy(hidden, target, weights).backward()
    assert torch.equal(weights.weights[1].grad, kept)


def test_an_odd_rank_in_bf16_does_not_read_what_scratch_held(cpu_isa):
    hidden, target = torch.ones(40, 16, dtype=torch.bfloat16), torch.arange(40)
    dirt = functional.Weights([torch.full((300, 16), torch.nan, dtype=torch.bfloat16)])
    assert functional.clustered_cross_entropy(hidden, target, dirt).isnan()
    table, projection = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((300, 5), (5, 16)))
    assert functional.clustered_cross_entropy(hidden, target, functional.Weights([table], [projection])).isfinite()


def test_gradients_add_up_after_one_that_has_a_graph(cpu_backend):
    partition = Partition(40, [5], [8, 4], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = make_hidden(partition, (6,)), make_targets(partition, (6,))
    accumulate_in_place(weight_tensors(weights))
    functional.clustered_cross_entropy(hidden, target, weights).backward(create_graph=True)
    once = [leaf.grad.detach().clone() for leaf in weight_tensors(weights)]
    with CalledOps() as called:
        functional.clustered_cross_entropy(hidden, target, weights).backward()
    assert "clustered_softmax_backward_into" not in called.names  # it writes behind the graph's back
    for leaf, before in zip(weight_tensors(weights), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * before)
