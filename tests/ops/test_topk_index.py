"""cprec::topk_index: checks 1 to 7 of the ten (2 and 3 do not apply: there is no derivative)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.nn.index_packing import STORAGES, pack
from cprec_kernels.ops.topk_index import topk_index
from cprec_kernels.reference.topk_index import in_id_order, unpack_weights
from cprec_kernels.testing import make_hidden, make_softmax
from tests.ops.index_checks import BAND, LARGE, SMALL, assert_best, rounding, truth


def stored_weights(arrays, weights):
    """The weights that an index without fp32 items stands for."""
    tables, first = [], 0
    for j, size in enumerate(arrays.sizes):
        table = in_id_order(unpack_weights(arrays.groups[j], arrays.scales[j], size), arrays.ids[j], first)
        tables.append(table if j else torch.cat([table, arrays.parents]))
        first += size
    return weights._replace(weights=tables)


# 1 forward


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("logit_std", [0.1, 1.0, 10.0])
def test_topk_is_the_sorted_log_prob(case, storage, logit_std, cpu_backend, poison):
    weights = make_softmax(case.partition, logit_std=logit_std)
    hidden = make_hidden(case.partition, (11,))
    expected = truth(hidden, weights)
    for blocks in ("kd", None):
        arrays = pack(weights, storage, True, blocks)
        slack = rounding(hidden, weights, arrays)
        for k in (1, 10, case.partition.sizes[0] + 1, case.partition.num_items):
            result = topk_index(hidden, min(k, case.partition.num_items), arrays)
            assert_best(result, expected, BAND * max(1.0, logit_std), slack)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bias", [False, True])
def test_many_items(storage, bias, cpu_backend, poison):
    """Tails that are reordered, of many leaves: ids come back from packed positions, with their own biases."""
    weights = make_softmax(LARGE, bias=bias, logit_std=2.0)
    hidden = make_hidden(LARGE, (37,))
    arrays = pack(weights, storage, True, "kd")
    assert all(ids.numel() > 0 for ids in arrays.ids[1:])
    expected = truth(hidden, weights)
    for k in (1, 101, 1_000, LARGE.num_items):
        assert_best(topk_index(hidden, k, arrays), expected, 2 * BAND, rounding(hidden, weights, arrays))


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("blocks", ["kd", None])
def test_an_approximate_index_orders_by_the_stored_weights(storage, blocks, cpu_backend, poison):
    weights = make_softmax(LARGE, logit_std=2.0)
    hidden = make_hidden(LARGE, (13,))
    arrays = pack(weights, storage, False, blocks)
    assert all(exact.numel() == 0 for exact in arrays.exact)
    expected = truth(hidden, stored_weights(arrays, weights))
    assert_best(topk_index(hidden, 20, arrays), expected, 2 * BAND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_widened(case, dtype, cpu_backend):
    weights = make_softmax(case.partition)
    hidden = make_hidden(case.partition, (5,), dtype)
    arrays = pack(weights, "float32", True, "kd")
    assert_best(topk_index(hidden, 10, arrays), truth(hidden, weights), BAND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_searched_as_they_are(case, dtype, cpu_backend):
    weights = make_softmax(case.partition, dtype)
    hidden = make_hidden(case.partition, (5,))
    for storage in STORAGES:
        arrays = pack(weights, storage, True, "kd")
        expected = truth(hidden, weights)
        assert_best(topk_index(hidden, 10, arrays), expected, BAND, rounding(hidden, weights, arrays))


def test_the_reference_agrees_with_clustered_topk(case):
    weights = make_softmax(case.partition)
    hidden = make_hidden(case.partition, (7,))
    with use_backend("reference"):
        expected = functional.clustered_topk(hidden, 12, weights)
        for storage in STORAGES:
            scores, items, _ = topk_index(hidden, 12, pack(weights, storage, True, "kd"))
            # Not bit for bit: a library's products depend on how the memory is aligned.
            torch.testing.assert_close(scores, expected[0], rtol=1e-6, atol=1e-6)
            assert torch.equal(items, expected[1])


@pytest.mark.parametrize("biases", ["head", "tails"])
def test_a_bias_of_the_head_or_of_the_tails_alone(case, biases, cpu_backend):
    weights = make_softmax(case.partition)
    weights = weights._replace(tail_biases=[]) if biases == "head" else weights._replace(head_bias=None)
    hidden = make_hidden(case.partition, (5,))
    for storage in STORAGES:
        arrays = pack(weights, storage, True, "kd")
        result = topk_index(hidden, 10, arrays)
        assert_best(result, truth(hidden, weights), BAND, rounding(hidden, weights, arrays))


@pytest.mark.parametrize("storage", STORAGES)
def test_ties_go_to_the_smaller_id(case, storage, cpu_backend):
    """All items of a cluster score the same: the order must be that of the ids."""
    weights = make_softmax(case.partition)
    flat = Weights([torch.zeros_like(w) for w in weights.weights], weights.projections)
    hidden = make_hidden(case.partition, (11,))
    expected = truth(hidden, flat).float().sort(dim=1, descending=True, stable=True).indices
    arrays = pack(flat, storage, True, "kd")
    for k in (1, 2, case.partition.num_items // 2, case.partition.num_items):
        assert torch.equal(topk_index(hidden, k, arrays)[1], expected[:, :k])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exclusions_and_candidates(data):
    partition = data.draw(st.sampled_from([LARGE, SMALL, Partition(90, [], [5], 16)]))
    num_items = partition.num_items
    weights = make_softmax(partition, logit_std=data.draw(st.sampled_from([0.1, 1.0, 5.0])))
    hidden = make_hidden(partition, (3,))
    k = data.draw(st.integers(0, min(num_items, 200)))
    expected = truth(hidden, weights)
    best = expected.sort(dim=1, descending=True).indices
    # The best items of a row, whose leaves must not lift what the others have to reach, and any others.
    led = data.draw(st.integers(0, min(150, num_items)))
    lists = [
        best[row, :led].tolist() + data.draw(st.lists(st.integers(0, num_items - 1), max_size=20)) for row in range(3)
    ]
    candidates = data.draw(st.none() | st.lists(st.integers(0, num_items - 1), max_size=30))
    for row, seen in enumerate(lists):
        expected[row, seen] = -math.inf
    if candidates is not None:
        allowed = torch.zeros(num_items, dtype=torch.bool)
        allowed[candidates] = True
        expected[:, ~allowed] = -math.inf
    width = max(map(len, lists)) + 1
    padded = torch.tensor([seen + [-1] * (width - len(seen)) for seen in lists])
    csr = torch.tensor([0, *map(len, lists)]).cumsum(0), torch.tensor(sum(lists, []), dtype=torch.int64)
    whitelist = None if candidates is None else torch.tensor(candidates, dtype=torch.int64)
    arrays = pack(weights, data.draw(st.sampled_from(list(STORAGES))), True, data.draw(st.sampled_from(["kd", None])))
    for exclude in (padded, csr):
        for early in (True, False):
            result = topk_index(hidden, k, arrays, exclude=exclude, candidates=whitelist, early_termination=early)
            assert_best(result, expected, 1e-4, rounding(hidden, weights, arrays))


def test_everything_excluded_leaves_nothing(cpu_backend):
    partition = Partition(20, [5], [4, 2], 4)
    arrays = pack(make_softmax(partition), "float32", True, "kd")
    exclude = torch.stack([torch.arange(20), torch.arange(20).clamp(max=18)])
    scores, items, _ = topk_index(make_hidden(partition, (2,)), 3, arrays, exclude=exclude)
    assert items[0].tolist() == [-1, -1, -1]
    assert items[1].tolist() == [19, -1, -1]
    assert scores[1].isfinite().tolist() == [True, False, False]


def test_tails_that_cannot_matter_change_nothing(cpu_backend):
    """With unlikely parents no tail is looked at, with likely ones all are: the items are those of the full order."""
    hidden = make_hidden(LARGE, (9,))
    for shift in (-30.0, 0.0, 8.0):
        weights = make_softmax(LARGE)
        weights.head_bias[-2:] += shift
        for storage in STORAGES:
            arrays = pack(weights, storage, True, "kd")
            result = topk_index(hidden, 20, arrays)
            assert_best(result, truth(hidden, weights), BAND, rounding(hidden, weights, arrays))
            if shift != 0:
                assert (result[1] < LARGE.sizes[0]).all() == (shift < 0)


def test_counters_say_what_was_done(cpu_backend):
    weights = make_softmax(LARGE)
    weights.head_bias[-2:] -= 30.0
    hidden = make_hidden(LARGE, (9,))
    arrays = pack(weights, "float32", True, "kd")
    _, _, early = topk_index(hidden, 5, arrays)
    _, _, full = topk_index(hidden, 5, arrays, early_termination=False)
    assert early.shape == full.shape == (9, 3)
    assert early.dtype == full.dtype == torch.int64
    assert (full[:, 0] == 3).all()
    assert (early >= 0).all()
    assert (early <= full).all()
    assert (full[:, 2] >= LARGE.num_items).all()
    with use_backend("reference"):
        assert topk_index(hidden, 5, arrays)[2].tolist() == [[3, 2 + 10 + 37, LARGE.num_items]] * 9


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("k", "best"), [(1, 1), (3, 10), (10, 60)])
def test_without_the_best_come_the_next(k, best, storage, cpu_isa):
    hidden = make_hidden(LARGE, (20,))
    arrays = pack(make_softmax(LARGE, logit_std=2.0), storage, True, "kd")
    items = topk_index(hidden, best + k, arrays)[1]
    for early in (True, False):
        found = topk_index(hidden, k, arrays, exclude=items[:, :best], early_termination=early)[1]
        assert torch.equal(found, items[:, best:])


def test_exclusions_go_with_their_rows_in_batches_of_many(cpu_backend):
    """More rows than a chunk of them holds."""
    arrays = pack(make_softmax(Partition(300, [60, 150], [16, 8, 4], 16), logit_std=2.0), "float32", True, "kd")
    hidden = torch.randn(1_100, 16)
    best = topk_index(hidden, 2, arrays)[1]
    for exclude in (best[:, :1].contiguous(), (torch.arange(1_101), best[:, 0].contiguous())):
        assert torch.equal(topk_index(hidden, 1, arrays, exclude=exclude)[1][:, 0], best[:, 1])


# 4 opcheck


@pytest.mark.parametrize("storage", STORAGES)
def test_opcheck(case, storage):
    args = pack(make_softmax(case.partition), storage, True, "kd").args()
    hidden = make_hidden(case.partition, (11,))
    padded = torch.randint(-1, case.partition.num_items, (11, 4))
    offsets, flat = torch.arange(0, 12), torch.randint(case.partition.num_items, (11,))
    candidates = torch.arange(0, case.partition.num_items, 2)
    choices = ((padded, None, candidates, True), (None, None, None, True), (flat, offsets, None, False))
    # What may be chosen from does not depend on how weights are stored.
    for extra in choices if storage == "float32" else choices[:1]:
        torch.library.opcheck(torch.ops.cprec.topk_index.default, (hidden, 5, *args, *extra))


# 5 compile and export


def test_compile_and_export():
    arrays = pack(make_softmax(SMALL), "float16", True, "kd")
    hidden = make_hidden(SMALL, (11,))
    seen = torch.randint(100, (11, 4))

    class Search(torch.nn.Module):
        def forward(self, h, exclude):
            return topk_index(h, 5, arrays, exclude=exclude)

    expected = Search()(hidden, seen)
    for a, b in zip(torch.compile(Search(), fullgraph=True)(hidden, seen), expected, strict=True):
        assert torch.equal(a, b)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Search(), (hidden, seen), dynamic_shapes=({0: rows}, {0: rows}))
    for a, b in zip(program.module()(hidden[:4], seen[:4]), expected, strict=True):
        torch.testing.assert_close(a, b[:4])


# 6 autocast


def test_autocast_changes_nothing(cpu_backend):
    hidden = make_hidden(SMALL, (11,))
    for storage in STORAGES:
        arrays = pack(make_softmax(SMALL), storage, True, "kd")
        expected = topk_index(hidden, 5, arrays)
        with torch.autocast("cpu", torch.bfloat16):
            result = topk_index(hidden, 5, arrays)
        for ours, theirs in zip(result, expected, strict=True):
            assert torch.equal(ours, theirs)


# 7 strided and N-D inputs


def test_strided_and_n_dimensional_inputs(cpu_backend):
    arrays = pack(make_softmax(SMALL), "float32", True, "kd")
    hidden = make_hidden(SMALL, (4, 6))
    seen = torch.randint(100, (4, 6, 3))
    result = topk_index(hidden[:, ::2], 5, arrays, exclude=seen[:, ::2])
    assert [tuple(part.shape) for part in result] == [(4, 3, 5), (4, 3, 5), (4, 3, 3)]
    flat = topk_index(hidden[:, ::2].reshape(12, 8), 5, arrays, exclude=seen[:, ::2].reshape(12, 3))
    for ours, theirs in zip(result, flat, strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)
    one = topk_index(hidden[1, 2], 5, arrays, exclude=seen[1, 2])
    assert torch.equal(one[1], result[1][1, 1])
    sideways = hidden.reshape(24, 8).T.contiguous().T
    assert not sideways.is_contiguous()
    assert torch.equal(topk_index(sideways, 5, arrays)[1], topk_index(hidden.reshape(24, 8), 5, arrays)[1])
