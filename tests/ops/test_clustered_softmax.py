"""cprec::clustered_softmax, clustered_log_prob and clustered_score: the ten checks, in the order of every op's file."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import (
    assert_accurate,
    copy_weights,
    make_hidden,
    make_softmax,
    make_targets,
    weight_tensors,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE = -100


def inputs(partition, dtype=torch.float32, shape=(7, 9)):
    return make_hidden(partition, shape, dtype), make_targets(partition, shape)


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


# 4 opcheck


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bias", [False, True])
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
