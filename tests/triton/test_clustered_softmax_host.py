"""The host's side of the clustered softmax's Triton kernels: what it reads and launches, and which calls come to them."""

from __future__ import annotations

import pytest
import torch
from softmax_checks import ALL, COUNT, DTYPES, IGNORE, MODULES, SMALL, flat, inputs, run, run_reference, upstream
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec_kernels import Partition, _backend, functional, use_backend
from cprec_kernels._triton import (
    clustered_softmax as kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_backward as backward_kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_plan as plan_kernels,
)
from cprec_kernels._triton import common, configs
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import assert_accurate, copy_weights, make_softmax, weight_tensors

pytestmark = pytest.mark.usefixtures("tiny_softmax_tiles")


def test_nothing_is_read_by_the_host(monkeypatch):
    """Fake tensors have no values: .item(), nonzero() and x[mask] raise on them."""
    launched = []
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: launched.append(kernel.__name__))
    with FakeTensorMode():
        weights = copy_weights(make_softmax(SMALL))
        hidden, target = torch.randn(COUNT, 8), torch.zeros(COUNT, dtype=torch.int64)
        for with_rows in (False, True):
            results, gradients = run(
                hidden, target, weights, torch.randn(COUNT), torch.randn(COUNT), with_rows=with_rows
            )
            assert [tuple(result.shape) for result in results] == [(COUNT,)] * 4
            assert [g.shape for g in gradients] == [
                g.shape for g in (hidden, *weights.weights, *weights.projections, weights.head_bias, *weights.tail_biases)
            ]  # fmt: skip
    assert len(set(launched)) == 13


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_the_ops_agree_with_the_reference_under_autocast(with_rows):
    """What ``_backend`` calls: fp32 parameters, products in bf16, fp32 gradients, added to given ones on request."""
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    g1, g2 = upstream(COUNT, "smooth")
    narrow = torch.bfloat16
    *results, kept = kernels.clustered_softmax(hidden, target, *weights.args(), IGNORE, True, narrow, with_rows)
    assert [k.dtype for k in kept] == [*[narrow] * 3, torch.int64, torch.int32] * with_rows
    args = (g1, g2, hidden, target, *weights.args(), *results[2:], kept, IGNORE, narrow)
    gradients = backward_kernels.clustered_softmax_backward(*args, ALL)
    truth = run_reference(hidden, target, weights, g1, g2, torch.float64)
    base = run_reference(hidden.to(narrow), target, copy_weights(weights, narrow), g1, g2)
    for a, b, t in zip([*results, *flat(gradients)], base[0] + tuple(base[1]), truth[0] + tuple(truth[1]), strict=True):
        assert a.dtype in (torch.float32, torch.float64)
        assert_accurate(a, b, t, narrow)
    given = [torch.ones_like(weight) for weight in weights.weights]
    backward_kernels.clustered_softmax_backward_into(*args, given, ALL)
    for accumulated, own in zip(given, gradients[1], strict=True):
        assert torch.equal(accumulated, 1 + own)


def test_a_training_step_scans_the_weights_once(through_triton, monkeypatch):
    """With the descents of its forward pass, the backward pass of a step computes logits for the weights alone."""
    launched = []

    def launch(kernel, grid, anchor, *args, **options):
        launched.append((kernel.__name__, options.get("WITH_LSE"), options.get("WITH_ROWS")))
        common.launch(kernel, grid, anchor, *args, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch)
    scan = "clustered_softmax_scan_kernel"
    weights = copy_weights(make_softmax(SMALL), requires_grad=True)
    hidden, target = inputs(SMALL)
    leaves = [hidden.requires_grad_(), *weight_tensors(weights)]

    def step():
        return functional.clustered_cross_entropy(hidden, target, weights, label_smoothing=0.1)

    with torch.no_grad():
        expected = step()
    assert {entry for entry in launched if entry[0] == scan} == {(scan, True, False)}
    launched.clear()
    loss = step()
    gradients = torch.autograd.grad(loss, leaves)
    assert [entry for entry in launched if entry[0] == scan] == [(scan, True, True)] * 3
    torch.testing.assert_close(loss, expected)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients, strict=True))
    # The encoder alone is trained: nothing is computed for the weights.
    launched.clear()
    frozen = copy_weights(weights)
    (d_input,) = torch.autograd.grad(
        functional.clustered_cross_entropy(hidden, target, frozen, label_smoothing=0.1), hidden
    )
    torch.testing.assert_close(d_input, gradients[0])
    assert {entry[0] for entry in launched if "bwd" in entry[0]} == {
        "clustered_softmax_bwd_mean_kernel", "clustered_softmax_bwd_input_kernel",
    }  # fmt: skip
    # No one asks for dz: the forward pass is that of an evaluation.
    launched.clear()
    weights.weights[0].grad = None
    bare = weights._replace(projections=[p.detach() for p in weights.projections])
    functional.clustered_cross_entropy(hidden.detach(), target, bare).backward()
    assert {entry for entry in launched if entry[0] == scan} == {(scan, True, False)}


@pytest.mark.parametrize("with_descents", [False, True])
def test_opcheck(through_triton, with_descents):
    weights = copy_weights(make_softmax(SMALL), requires_grad=True)
    hidden, target = inputs(SMALL, count=20)
    options = IGNORE, True, None, with_descents
    torch.library.opcheck(
        torch.ops.cprec.clustered_softmax.default, (hidden.requires_grad_(), target, *weights.args(), *options)
    )
    args = hidden.detach(), target, *copy_weights(weights).args()
    saved = torch.ops.cprec.clustered_softmax(*args, *options)[2:]
    torch.library.opcheck(
        torch.ops.cprec.clustered_softmax_backward.default,
        (torch.randn(20), torch.randn(20), *args, *saved, IGNORE, None, ALL),
    )


def test_the_choice_of_backend():
    for op in ("clustered_softmax", "clustered_softmax_backward", "clustered_softmax_backward_into"):
        for dtype in DTYPES:
            assert _backend.choose(op, "cuda", dtype).implementation.backend == "triton"
        assert _backend.choose(op, "cuda", torch.float64).implementation.backend == "reference"
        assert _backend.choose(op, "cpu", torch.float32).implementation.backend != "triton"


def test_ranks_beyond_the_kernels_go_to_the_reference_unless_triton_was_asked_for():
    partition = Partition.single(5, 600)
    weights = make_softmax(partition)
    hidden, target = inputs(partition, count=3)
    args = (hidden, target, *weights.args(), IGNORE, True, None, True)
    call = _backend.choose("clustered_softmax", "cuda", torch.float32).implementation.call
    log_prob, *_, kept = call(*args)
    torch.testing.assert_close(log_prob, ref.clustered_softmax(hidden, target, *weights, IGNORE)[0])
    torch.testing.assert_close(kept[:-2], ref.clustered_softmax_descents(hidden, target, *weights, IGNORE))
    with use_backend("triton"), pytest.raises(_backend.BackendError, match="rank 600 is above 512"):
        call(*args)


def test_more_clusters_than_the_kernels_take_go_to_the_reference():
    weights = [torch.zeros(12, 4), *(torch.zeros(2, 4) for _ in range(8))]
    args = (torch.randn(3, 4), torch.tensor([1, 5, 10]), weights, [], None, [], IGNORE, True, None, True)
    assert kernels.refusal(*args) == "9 clusters are more than 8"
    assert kernels.refusal(*args[:2], weights[:8]) == ""
    assert _backend.choose("clustered_softmax", "cuda", torch.float32).implementation.call(*args)[0].isfinite().all()


def test_items_are_numbered_in_32_bits():
    with FakeTensorMode(), pytest.raises(ValueError, match="number items in 32 bits"):
        plan_kernels.levels_of([torch.empty(2, 1), torch.empty(2**31 - 1, 1)], [], None, [])


def test_tables_have_a_tile_for_every_rank_dtype_and_architecture():
    for rank in range(1, common.MAX_RANK + 1):
        for dtype in DTYPES:
            for arch in (*configs.ARCHITECTURES, 86, 89, 103, 120):
                for kernel in ("scan_lse", "scan_rows", "weight", "weight_unbiased", "token"):
                    assert configs.tile_for(kernel, rank, dtype, arch).block_t >= 16


def test_cards_with_less_shared_memory_have_tiles_of_their_own():
    """``make aot`` compiles those of sm_86; the others of its kind take the same."""
    for kernel, rank, itemsize in configs.TABLE:
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        tiles = {arch: configs.tile_for(kernel, rank, dtype, arch) for arch in (80, 86, 87, 89, 90, 103, 120, 121)}
        assert tiles[86] == tiles[89] == tiles[120] == tiles[121]
        assert tiles[87] == tiles[80]
        assert tiles[103] == tiles[90]
        if rank <= 128:
            assert tiles[86] == tiles[80]
    assert configs.tile_for("scan_lse", 200, torch.bfloat16, 120).block_v < configs.TABLE["scan_lse", 256, 2].block_v
