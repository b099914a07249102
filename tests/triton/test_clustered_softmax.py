"""The Triton kernels of the clustered softmax in the interpreter, against fp64; tiles are tiny, so that every loop turns."""

from __future__ import annotations

import math

import interpreter
import pytest
import torch
from softmax_checks import ALL, COUNT, DTYPES, IGNORE, MODULES, SMALL, check, inputs, run, run_reference, upstream

from cprec_kernels import Partition
from cprec_kernels._triton import (
    clustered_softmax as kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_backward as backward_kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_plan as plan_kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_weight as weight_kernels,
)
from cprec_kernels._triton import common, configs
from cprec_kernels._triton.configs import Tile
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import assert_accurate, copy_weights, make_softmax, make_targets

pytestmark = pytest.mark.usefixtures("tiny_softmax_tiles")


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("with_rows", "bias"), [(False, True), (True, False)], ids=["two-pass-bias", "one-pass"])
def test_values_and_gradients(case, dtype, bias, with_rows, poison):
    weights = make_softmax(case.partition, dtype, bias=bias)
    check(*inputs(case.partition, dtype), weights, *upstream(COUNT, "smooth" if bias else "plain"), with_rows=with_rows)


@pytest.mark.parametrize(("with_rows", "bias"), [(False, False), (True, True)], ids=["two-pass", "one-pass-bias"])
def test_values_and_gradients_the_other_way_round(bias, with_rows, poison):
    weights = make_softmax(SMALL, bias=bias)
    check(*inputs(SMALL), weights, *upstream(COUNT, "plain" if bias else "smooth"), with_rows=with_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_upstream_gradients_of_any_sign_and_size(dtype, with_rows, poison):
    weights = make_softmax(SMALL, dtype)
    hidden, target = inputs(SMALL, dtype)
    g1, g2 = upstream(COUNT, "mixed")
    check(hidden, target, weights, g1, g2, with_rows=with_rows)
    # A mean over many tokens, in a dtype that ends at 6e-8.
    small = 1e-3 if dtype == torch.float16 else 1e-20
    check(hidden, target, weights, g1 * small, g2 * small, with_rows=with_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept(case, dtype, poison):
    """Descents in the batch's order, so that an op of any backend can take them, zero for tokens of other levels; order."""
    weights = make_softmax(case.partition, dtype)
    args = inputs(case.partition, dtype)
    *ours, order, ids = kernels.forward(*args, *weights, IGNORE, False, True)[-1]
    keys = torch.where(args[1] == IGNORE, 2**31 - 1, args[1])
    assert torch.equal(order, keys.sort(stable=True).indices)
    assert torch.equal(ids, keys[order].int())
    base = ref.clustered_softmax_descents(*args, *weights, IGNORE)
    truth = ref.clustered_softmax_descents(args[0].double(), args[1], *copy_weights(weights, torch.float64), IGNORE)
    for j, (a, b, t) in enumerate(zip(ours, base, truth, strict=True)):
        assert a.dtype == dtype
        assert_accurate(a, b, t, dtype, f"level {j}")
        assert torch.count_nonzero(a[(t == 0).all(1)]) == 0
    assert kernels.forward(*args, *weights, IGNORE, False, False)[-1] == []


def test_plan_of_many_clusters(poison):
    """As many as there may be, among them clusters without a token, and a batch of one."""
    sizes = [7, 1, 3, 2, 5, 1, 1, 4]
    cutoffs = torch.tensor(sizes).cumsum(0).tolist()
    partition = Partition(cutoffs[-1], cutoffs[:-1], [8] * len(sizes), 8)
    levels = plan_kernels.levels_of(*make_softmax(partition))
    for target in (make_targets(partition, (60,)), torch.tensor([cutoffs[-1] - 1]), torch.tensor([IGNORE])):
        plan = plan_kernels.make_plan(target, levels, IGNORE)
        keys = torch.where(target == IGNORE, 2**31 - 1, target)
        assert torch.equal(plan.ids, keys.sort().values.int())
        edges = torch.tensor([0, *cutoffs])
        assert plan.offsets.tolist() == torch.searchsorted(plan.ids.long(), edges).tolist()
        counted = plan.ids[: plan.offsets[-1]].long()
        cluster = torch.searchsorted(edges, counted, right=True) - 1
        head = torch.where(cluster == 0, counted, sizes[0] + cluster - 1)
        assert torch.equal(plan.columns[0][: len(counted)].long(), head)
        assert (plan.columns[0][len(counted) :] == 2**31 - 1).all()
        for j in range(1, len(sizes)):
            assert torch.equal(plan.columns[j], plan.ids - edges[j].int())


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_no_gradient_of_the_second_result_is_one_of_zeros(with_rows, case, poison):
    weights, args = make_softmax(case.partition), inputs(case.partition)
    g1 = upstream(COUNT)[0].expand(COUNT)
    for a, b in zip(
        run(*args, weights, g1, None, with_rows)[1],
        run(*args, weights, g1, torch.zeros(COUNT), with_rows)[1],
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_a_nan_among_the_upstream_gradients_spoils_all(with_rows):
    """As it does where torch takes the largest of them: none is left that looks right."""
    hidden, target = inputs(SMALL)
    g1, g2 = upstream(COUNT, "smooth")
    g1[target != IGNORE] = torch.nan
    for gradient in run(hidden, target, make_softmax(SMALL), g1, g2, with_rows)[1]:
        assert gradient.isnan().all()


def test_bounds_are_those_of_a_bisection():
    for count, entries, lowest in ((1, 1, 0), (37, 100, 5), (64, 2000, 1000)):
        keys = torch.randint(lowest, lowest + entries + 3, (count,), dtype=torch.int32).sort().values
        tiles = -(-entries // 16)
        bounds = torch.empty(tiles + 1, dtype=torch.int32)
        common.launch(
            weight_kernels.clustered_softmax_bounds_kernel, 1, keys,
            keys, bounds, count, entries, lowest, tiles, count.bit_length(), BLOCK_V=16, BLOCK=1024,
        )  # fmt: skip
        edges = (torch.arange(tiles + 1) * 16).clamp(max=entries) + lowest
        assert torch.equal(bounds, torch.searchsorted(keys, edges.int(), out_int32=True))


TILES = {
    "wide": {"scan_lse": Tile(64, 64, 4, 2), "scan_rows": Tile(32, 64, 4, 2), "weight": Tile(32, 64, 4, 2)},
    "transposed": {"weight": Tile(16, 32, 4, 2, transposed=True)},
    "many-units": {"scan_lse": Tile(16, 16, 4, 1, 5), "scan_rows": Tile(16, 16, 4, 1, 5), "weight": Tile(16, 64, 4, 1, 5)},
}  # fmt: skip


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_tiles(tiles, dtype, poison):
    partition = Partition(211, [17, 74], [19, 7, 3], 27)
    with configs.override(**tiles):
        for with_rows in (False, True):
            check(
                *inputs(partition, dtype),
                make_softmax(partition, dtype),
                *upstream(COUNT, "mixed"),
                with_rows=with_rows,
            )


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 33, 512])
def test_ranks(rank, poison):
    partition = Partition(40, [9], [rank, min(rank, 3)], 512)
    hidden, target = inputs(partition, count=20)
    check(hidden / 20, target, make_softmax(partition), *upstream(20, "smooth"))


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_gradients_stay_exact_where_the_target_is_certain(with_rows, poison):
    """1 - p is about 1e-5 here: formed as a difference in fp32 it would keep two digits."""
    partition = Partition.single(90, 16)
    weights = make_softmax(partition, bias=False)
    target = torch.arange(COUNT)
    w = weights.weights[0]
    hidden = w[target] / w[target].norm(dim=1, keepdim=True) ** 2 * 20
    log_prob = run(hidden, target, weights, *upstream(COUNT))[0][0]
    assert -1e-3 < log_prob.median() < 0
    check(hidden, target, weights, *upstream(COUNT), with_rows=with_rows)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_stay_finite(scale):
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    for with_rows in (False, True):
        results, gradients = run(hidden * scale, target, weights, *upstream(COUNT), with_rows=with_rows)
        truth = run_reference(hidden * scale, target, weights, *upstream(COUNT), torch.float64)
        torch.testing.assert_close(results[0].double(), truth[0][0], rtol=1e-5, atol=1e-5)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_spoils_its_own_token_alone():
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    target[:2] = 99
    clean = run(hidden, target, weights, *upstream(COUNT))[0][0]
    hidden[0, 0] = math.nan
    for with_rows in (False, True):
        spoilt = run(hidden, target, weights, *upstream(COUNT), with_rows=with_rows)[0][0]
        assert spoilt[0].isnan()
        assert torch.equal(spoilt[1:], clean[1:])


# Edges


def test_empty_batch(case):
    weights = make_softmax(case.partition)
    hidden, target = torch.zeros(0, case.partition.embedding_dim), torch.zeros(0, dtype=torch.int64)
    for with_rows in (False, True):
        results, gradients = run(hidden, target, weights, target.float(), target.float(), with_rows=with_rows)
        assert all(result.shape == (0,) for result in results)
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("target", [[IGNORE] * 20, [99] * 20, [0], [10, 49, 50, 9]], ids=["ignored", "last", "one", "edges"])  # fmt: skip
def test_few_targets(target, poison):
    hidden, _ = inputs(SMALL, count=len(target))
    for with_rows in (False, True):
        check(
            hidden,
            torch.tensor(target),
            make_softmax(SMALL),
            *upstream(len(target), "smooth"),
            with_rows=with_rows,
        )


def test_another_ignore_index():
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    g1, g2 = upstream(COUNT)
    moved = target.masked_fill(target == IGNORE, 7)
    expected = run(hidden, target.masked_fill(target == 7, IGNORE), weights, g1, g2)
    ours = run(hidden, moved.masked_fill(moved == 7, 7), weights, g1, g2, ignore=7)
    for a, b in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)


def test_strided_weights():
    weights = make_softmax(SMALL)
    transposed = weights._replace(weights=[w.T.contiguous().T for w in weights.weights])
    args = (*inputs(SMALL), weights, *upstream(COUNT))
    for a, b in zip(run(*args)[1], run(*args[:2], transposed, *args[3:])[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [[i == j for i in range(5)] for j in range(5)], ids=str)
@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_only_wanted_gradients(mask, with_rows):
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    g1, g2 = upstream(COUNT)
    *results, kept = kernels.forward(hidden, target, *weights, IGNORE, True, with_rows)
    args = (g1, g2, hidden, target, *weights, *results[2:], IGNORE)
    everything, ours = (backward_kernels.backward(*args, m, torch.float32, kept) for m in (ALL, mask))
    for got, whole, wanted in zip(ours, everything, mask, strict=True):
        got, whole = ([x] if isinstance(x, torch.Tensor) else x for x in (got, whole))
        if wanted:
            assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
        else:
            assert sum(x.numel() for x in got) == 0


# Repeatable


@pytest.mark.parametrize("order", [None, [6, 2, 4, 0, 5, 1, 3]], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("programs", [1, 3, 7])
def test_bits_depend_on_no_grid_and_no_order_of_programs(programs, order, monkeypatch, poison):
    """One program after another hides a program that needs another's result; another order, or other owners, shows it."""
    partition = Partition(211, [17, 74], [19, 7, 3], 27)
    args = (*inputs(partition), make_softmax(partition), *upstream(COUNT, "smooth"))
    expected = [run(*args, with_rows=with_rows) for with_rows in (False, True)]

    def launch(kernel, _programs, anchor, *kernel_args, **options):
        kernel = kernel if order is None else interpreter.shuffle_programs(kernel, order)
        common.launch(kernel, programs, anchor, *kernel_args, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch)
    for with_rows in (False, True):
        ours = run(*args, with_rows=with_rows)
        for a, b in zip(sum(ours, []), sum(expected[with_rows], []), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_tokens_that_do_not_count_may_hold_anything(with_rows):
    weights = make_softmax(SMALL)
    hidden, target = inputs(SMALL)
    g1, g2 = upstream(COUNT, "smooth")
    _, want = run(hidden, target, weights, g1, g2, with_rows=with_rows)
    hidden = hidden.clone()
    hidden[target == IGNORE] = math.nan
    _, got = run(hidden, target, weights, g1, g2, with_rows=with_rows)
    assert (target == IGNORE).any()
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(one, other), f"gradient {i}"


def check_gradients(hidden, target, weights, g1, g2, **options):
    results, gradients = run(hidden, target, weights, g1, g2, **options)
    _, base = run_reference(hidden, target, weights, g1, g2)
    exact, truth = run_reference(hidden, target, weights, g1, g2, torch.float64)
    for i, (one, rough, true) in enumerate(zip(gradients, base, truth, strict=True)):
        assert_accurate(one, rough, true, torch.float32, f"gradient {i}")
    return results, exact


@pytest.mark.parametrize("with_rows", [False, True], ids=["two-pass", "one-pass"])
def test_a_target_that_its_bias_rules_out_leaves_the_others_their_gradients(with_rows):
    weights = make_softmax(SMALL)
    weights.head_bias[3] = -math.inf
    hidden, target = inputs(SMALL)
    target = torch.where(target == 3, 2, target)
    target[0] = 3
    g1, none = upstream(COUNT)
    for first in (0.0, -1.0):
        g1[0] = first
        results, exact = check_gradients(hidden, target, weights, g1, none, with_rows=with_rows)
        assert results[0][0] == exact[0][0] == -math.inf


def test_a_tail_without_items():
    weights = make_softmax(SMALL)
    weights = weights._replace(
        weights=[*weights.weights[:-1], weights.weights[-1][:0]],
        tail_biases=[*weights.tail_biases[:-1], weights.tail_biases[-1][:0]],
    )
    hidden, target = inputs(SMALL)
    check_gradients(hidden, target.clamp(max=49), weights, *upstream(COUNT, "smooth"))
