"""cprec::clustered_softmax and clustered_score: checks 4 to 6 of the ten, opcheck, compilation and autocast."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.testing import assert_accurate, copy_weights, make_softmax, weight_tensors
from tests.ops.softmax_inputs import IGNORE, inputs

# 4 opcheck


@pytest.mark.parametrize(("bias", "keep"), [(True, True), (False, False)])
def test_opcheck(case, bias, keep):
    weights = copy_weights(make_softmax(case.partition, bias=bias), torch.float32, requires_grad=True)
    hidden, target = inputs(case.partition, shape=(20,))
    torch.library.opcheck(
        torch.ops.cprec.clustered_softmax.default,
        (hidden.requires_grad_(), target, *weights.args(), IGNORE, True, None, keep),
    )
    plain = copy_weights(weights, torch.float32)
    args = hidden.detach(), target, *plain.args()
    saved = torch.ops.cprec.clustered_softmax(*args, IGNORE, True, None, keep)[2:]
    for mask in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(
            torch.ops.cprec.clustered_softmax_backward.default,
            (torch.randn(20), torch.randn(20) if all(mask) else None, *args, *saved, IGNORE, None, mask),
        )
    # Fake and real results must agree in strides for parameters that are not contiguous, too.
    transposed = plain._replace(
        weights=[w.T.contiguous().T for w in plain.weights], projections=[p.T.contiguous().T for p in plain.projections]
    )
    for backend in ("auto", "reference"):
        with use_backend(backend):
            torch.library.opcheck(
                torch.ops.cprec.clustered_softmax_backward.default,
                (
                    torch.randn(20),
                    torch.randn(20),
                    args[0],
                    target,
                    *transposed.args(),
                    *saved,
                    IGNORE,
                    None,
                    [True] * 5,
                ),
            )
    items = torch.randint(case.partition.num_items, (20, 3))
    torch.library.opcheck(torch.ops.cprec.clustered_score.default, (hidden.detach(), items, *plain.args()))


# 5 compile and export


def test_compile_fullgraph_with_gradients():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition)

    def step(h, t):
        return functional.clustered_cross_entropy(h, t, weights, label_smoothing=0.1)

    eager = torch.autograd.grad(step(hidden, target), weight_tensors(weights))
    compiled_step = torch.compile(step, fullgraph=True)
    compiled = torch.autograd.grad(compiled_step(hidden, target), weight_tensors(weights))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    # Another batch size, and one that leaves a cluster out: nothing in the graph depends on the data.
    torch.testing.assert_close(compiled_step(hidden[:3], target[:3]), step(hidden[:3], target[:3]))
    torch.testing.assert_close(compiled_step(hidden, target.clamp(max=5)), step(hidden, target.clamp(max=5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arithmetic", [None, torch.bfloat16])
def test_fake_results_have_the_real_ones_shapes(case, arithmetic, dtype, cpu_backend):
    weights = make_softmax(case.partition, dtype)
    hidden, target = inputs(case.partition, dtype, shape=(20,))
    for keep in (False, True):
        options = IGNORE, True, arithmetic, keep
        real = torch.ops.cprec.clustered_softmax(hidden, target, *weights.args(), *options)
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(tensor) for tensor in (hidden, target)]
            fake = torch.ops.cprec.clustered_softmax(*args, *tree_map(mode.from_tensor, weights.args()), *options)
        assert tree_structure(fake) == tree_structure(real)
        for ours, theirs in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_a_training_step_in_one_graph_keep(epsilon, monkeypatch):
    """As on a device: the choice follows grad mode and who needs a gradient, within the graph too."""
    monkeypatch.setattr("cprec_kernels.ops.clustered_softmax.KEEPING_DEVICES", ("cpu",))
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition)
    hidden.requires_grad_()
    graphs = []

    def keep_graph(graph, _inputs):
        calls = [node for node in graph.graph.nodes if node.target is torch.ops.cprec.clustered_softmax]
        graphs.extend(node.args[-1] for node in calls)
        return graph

    def step(h, t):
        return functional.clustered_cross_entropy(h * 2, t, weights, label_smoothing=epsilon)

    leaves = [hidden, *weight_tensors(weights)]
    eager = torch.autograd.grad(step(hidden, target), leaves)
    in_graph = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(in_graph(hidden, target), leaves), eager, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(step, backend=keep_graph, fullgraph=True)
    compiled(hidden, target)
    with torch.no_grad():
        compiled(hidden, target)
    with use_backend("reference"):
        compiled(hidden, target)
    assert graphs == [True, False, False]


# 6 autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype, cpu_backend, poison):
    """Products in the narrow type, as exact as the narrow reference's; losses, weights and their gradients stay fp32."""
    weights = make_softmax(case.partition)
    hidden, target = inputs(case.partition)

    def run(compute_dtype, narrow):
        h = hidden.to(compute_dtype, copy=True).requires_grad_()
        w = copy_weights(weights, compute_dtype, requires_grad=True)
        leaves = [h, *weight_tensors(w)]
        with torch.autocast("cpu", dtype, enabled=narrow):
            loss = functional.clustered_cross_entropy(h, target, w, label_smoothing=0.1)
        grads = torch.autograd.grad(loss, leaves)
        assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
        return [loss, *grads]

    ours = run(torch.float32, True)
    assert ours[0].dtype == torch.float32
    with use_backend("reference"):
        truth, base = run(torch.float64, False), run(dtype, False)
    for i, (a, t, b) in enumerate(zip(ours, truth, base, strict=True)):
        assert_accurate(a, b, t, dtype, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_accepts_any_mix_of_dtypes(dtype):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = copy_weights(make_softmax(partition), torch.float32, requires_grad=True)
    hidden, target = inputs(partition)
    with torch.autocast("cpu", dtype):
        loss = functional.clustered_cross_entropy(hidden.to(dtype), target, weights)
        loss.backward()
        assert functional.clustered_score(hidden, target.clamp(min=0)[..., None], weights).dtype == torch.float32
        log_prob = functional.clustered_log_prob(hidden.to(dtype), weights)
    assert loss.dtype == log_prob.dtype == torch.float32
    assert torch.equal(log_prob, functional.clustered_log_prob(hidden.to(dtype), copy_weights(weights, dtype)))
    assert all(leaf.grad.dtype == torch.float32 for leaf in weight_tensors(weights))
