"""cprec::topk_index: the ten checks (2 and 3 do not apply: there is no derivative), and a hunt for a lost item."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_kernels import Partition, backend_of, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.nn.index_packing import STORAGES, pack
from cprec_kernels.ops.topk_index import topk_index
from cprec_kernels.reference.topk_index import in_id_order, unpack_weights
from cprec_kernels.testing import assert_same_items, copy_weights, make_hidden, make_softmax

BAND = 2e-5
# More than 32 leaves in one tail, a last leaf and a last group that are not full, more items than a head scan pads to.
LARGE = Partition(3_017, [101, 700], [24, 9, 4], 24)
SMALL = Partition(100, [10, 50], [8, 4, 2], 8)


def truth(hidden, weights):
    """All log-probabilities in fp64."""
    return functional.clustered_log_prob(hidden.double(), copy_weights(weights, torch.float64))


def stored_weights(arrays, weights):
    """The weights that an index without fp32 items stands for."""
    tables, first = [], 0
    for j, size in enumerate(arrays.sizes):
        table = in_id_order(unpack_weights(arrays.groups[j], arrays.scales[j], size), arrays.ids[j], first)
        tables.append(table if j else torch.cat([table, arrays.parents]))
        first += size
    return weights._replace(weights=tables)


def rounding(hidden, weights, arrays):
    """What storing the items more narrowly may change a row's scores by: twice |Q h| error, for the head and a tail."""
    head, *tails = [
        (hidden if projection.numel() == 0 else hidden @ projection.T).double().norm(dim=1) * error
        for projection, error in zip(arrays.projections, arrays.bounds[:, 0], strict=True)
    ]
    return 2 * (head + (torch.stack(tails).amax(0) if tails else 0))


def assert_best(result, log_prob, band, slack=0.0):
    """Items are the best of ``log_prob`` up to ``band``; their scores may be off by the rows' ``slack`` as well."""
    scores, items, _ = result
    left = items >= 0
    own = log_prob.gather(1, items.clamp(min=0)).masked_fill(~left, -math.inf)
    assert_same_items(items, own, log_prob, band)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.isfinite(), left)
    allowed = (torch.as_tensor(slack, dtype=torch.float64).reshape(-1, 1) + band).expand(own.shape)
    assert ((scores.double() - own).abs()[left] <= allowed[left]).all()


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


# 4 opcheck


@pytest.mark.parametrize("storage", STORAGES)
def test_opcheck(case, storage):
    args = pack(make_softmax(case.partition), storage, True, "kd").args()
    hidden = make_hidden(case.partition, (11,))
    padded = torch.randint(-1, case.partition.num_items, (11, 4))
    offsets, flat = torch.arange(0, 12), torch.randint(case.partition.num_items, (11,))
    candidates = torch.arange(0, case.partition.num_items, 2)
    for extra in ((None, None, None, True), (padded, None, candidates, True), (flat, offsets, None, False)):
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


# 8 edges


def test_empty_batches_and_k_of_zero(case, cpu_backend):
    arrays = pack(make_softmax(case.partition), "float16", True, "kd")
    width = case.partition.embedding_dim
    for rows, k in ((0, 5), (3, 0), (0, 0)):
        result = topk_index(torch.zeros(rows, width), k, arrays)
        assert [tuple(part.shape) for part in result] == [(rows, k), (rows, k), (rows, 3)]
    nobody = torch.zeros(3, 0, dtype=torch.int64)
    excluded = topk_index(torch.ones(3, width), 1, arrays, exclude=nobody)
    assert torch.equal(excluded[1], topk_index(torch.ones(3, width), 1, arrays)[1])
    nothing = topk_index(torch.ones(3, width), 1, arrays, candidates=nobody[0])
    assert nothing[1].tolist() == [[-1]] * 3


def test_an_input_of_zeros_orders_by_bias(case, cpu_backend):
    weights = make_softmax(case.partition)
    hidden = torch.zeros(2, case.partition.embedding_dim)
    for storage in STORAGES:
        result = topk_index(hidden, case.partition.num_items, pack(weights, storage, True, "kd"))
        assert_best(result, truth(hidden, weights), BAND)


def test_wrong_arguments_are_named():
    arrays = pack(make_softmax(SMALL), "float32", True, "kd")
    hidden = make_hidden(SMALL, (2,))
    with pytest.raises(ValueError, match=r"k = 101 is outside 0..100"):
        topk_index(hidden, 101, arrays)
    with pytest.raises(ValueError, match="k = -1"):
        topk_index(hidden, -1, arrays)
    with pytest.raises(TypeError, match=r"k must be an int, got 3.0"):
        topk_index(hidden, 3.0, arrays)
    with pytest.raises(TypeError, match=r"exclude must be an int64 tensor \(..., m\)"):
        topk_index(hidden, 1, arrays, exclude=[[1], [2]])
    with pytest.raises(TypeError, match=r"input must be float32, .* got torch.float64; convert it with input.float"):
        topk_index(hidden.double(), 1, arrays)
    with pytest.raises(ValueError, match=r"input must be \(..., 8\), as wide as the index, got \(2, 7\)"):
        topk_index(hidden[:, :7], 1, arrays)
    with pytest.raises(ValueError, match="input must be"):
        topk_index(torch.tensor(1.0), 1, arrays)
    with pytest.raises(IndexError, match=r"candidates\[1\] = 100"):
        topk_index(hidden, 1, arrays, candidates=torch.tensor([0, 100]))
    with pytest.raises(IndexError, match=r"exclude\[1, 0\] = 100"):
        topk_index(hidden, 1, arrays, exclude=torch.tensor([[0], [100]]))
    with pytest.raises(ValueError, match="exclude must be"):
        topk_index(hidden, 1, arrays, exclude=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="one offset more"):
        topk_index(hidden, 1, arrays, exclude=(torch.tensor([0, 1]), torch.tensor([3])))
    for offsets in ([0, 2, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match="must ascend from 0"):
            topk_index(hidden, 1, arrays, exclude=(torch.tensor(offsets), torch.tensor([3])))
    with pytest.raises(TypeError, match="candidates must be int64"):
        topk_index(hidden, 1, arrays, candidates=torch.tensor([1.0]))


@pytest.mark.parametrize("storage", STORAGES)
def test_arrays_that_do_not_fit_are_named(storage):
    """Every array, with an element too few, in another dtype, absent, or there where it should not be."""
    partition = Partition(400, [30, 40], [8, 4, 2], 8)
    arrays = pack(make_softmax(partition), storage, True, "kd")
    hidden = make_hidden(partition, (1,))
    optional = {"biases", "ids", "parent_bias"}
    for name in arrays._fields[1:]:
        entries = getattr(arrays, name)
        alone = isinstance(entries, torch.Tensor)
        entries = [entries] if alone else list(entries)
        for j, array in enumerate(entries):
            if array.numel() > 0:
                wrong = [array[:-1], array.to(torch.int64), torch.cat([array, array]), array.unsqueeze(0)]
                wrong += [array.transpose(-1, -2)] if array.dim() > 1 else []
                wrong += [array.new_empty(0)] if name not in optional else []
            else:
                wrong = [torch.zeros(3)]
            for other in wrong:
                bad = [other if i == j else entry for i, entry in enumerate(entries)]
                with pytest.raises((ValueError, TypeError), match=r"must be|must be absent|has rank"):
                    topk_index(hidden, 1, arrays._replace(**{name: bad[0] if alone else bad}))
        if not alone:
            with pytest.raises(ValueError, match=f"{name} has 2 entries for 3 levels"):
                topk_index(hidden, 1, arrays._replace(**{name: entries[:2]}))
    with pytest.raises(ValueError, match=r"groups\[1\] must be"):
        topk_index(hidden, 1, arrays._replace(sizes=[30, 50, 360]))
    with pytest.raises(ValueError, match=r"sizes\[1\] = 0 must be at least 1"):
        topk_index(hidden, 1, arrays._replace(sizes=[30, 0, 370]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_inputs_are_reported(value):
    arrays = pack(make_softmax(SMALL), "float32", True, "kd")
    hidden = make_hidden(SMALL, (3,))
    hidden[1, 2] = value
    with pytest.raises(ValueError, match="input row 1 holds NaN or inf"):
        topk_index(hidden, 1, arrays)


def test_a_finite_input_may_have_an_infinite_sum(cpu_backend):
    arrays = pack(make_softmax(SMALL), "float32", True, "kd")
    hidden = torch.full((3, SMALL.embedding_dim), 60_000.0, dtype=torch.float16)
    assert hidden.sum().isinf()
    assert torch.equal(topk_index(hidden, 2, arrays)[1], topk_index(hidden.float(), 2, arrays)[1])


# 9 determinism and independence of the batch


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_does_not_see_its_neighbours(storage, cpu_backend):
    """Alone, in a batch, with any number of threads: the same items, and with the kernels the same bits."""
    weights = make_softmax(LARGE, logit_std=3.0)
    hidden = make_hidden(LARGE, (130,)) * torch.linspace(0.1, 4.0, 130)[:, None]
    arrays = pack(weights, storage, True, "kd")
    together = topk_index(hidden, 10, arrays)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(5, 6), slice(100, 130), slice(None)):
                scores, items, counters = topk_index(hidden[rows], 10, arrays)
                assert torch.equal(items, together[1][rows])
                assert torch.equal(counters, together[2][rows])
                # The reference multiplies by the library, whose bits depend on the number of rows.
                torch.testing.assert_close(scores, together[0][rows], rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


# 10 a hunt for a counter-example


@st.composite
def searches(draw):
    """Weights, rows and a k meant to break a bound: ties, outliers, lonely items, likely tails, k near k_0."""
    head = draw(st.integers(1, 70))
    tails = draw(st.lists(st.sampled_from([1, 2, 31, 33, 64, 65, 129, 300, 521]), max_size=3))
    width = draw(st.integers(1, 12))
    ranks = sorted(draw(st.lists(st.integers(1, width), min_size=len(tails) + 1, max_size=len(tails) + 1)))[::-1]
    sizes = [head, *tails]
    cutoffs = torch.tensor(sizes).cumsum(0).tolist()
    partition = Partition(cutoffs[-1], cutoffs[:-1], ranks, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = make_softmax(partition, seed=draw(st.integers(0, 2**31)), bias=draw(st.booleans()), logit_std=1.0)
    spread = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    for table in weights.weights:
        table *= spread
        kind = draw(st.sampled_from(["as they are", "few rows", "outliers", "far from zero", "one direction", "zero"]))
        if kind == "few rows":  # ties
            table.copy_(table[torch.randint(min(3, len(table)), (len(table),), generator=generator)].clone())
        elif kind == "outliers":
            table[torch.randint(len(table), (1 + len(table) // 50,), generator=generator)] *= 20.0
        elif kind == "far from zero":
            table += 5.0 * spread
        elif kind == "one direction":
            table[:, 1:] *= 1e-3
        elif kind == "zero":
            table.zero_()
    for bias in [weights.head_bias, *weights.tail_biases] if weights.head_bias is not None else []:
        bias *= draw(st.sampled_from([0.0, 1.0, 10.0]))
    if weights.head_bias is not None and tails:
        weights.head_bias[head:] += draw(st.sampled_from([-20.0, -3.0, 0.0, 3.0]))
    rows = torch.randn(draw(st.integers(1, 5)), width, generator=generator)
    rows *= draw(st.sampled_from([1e-3, 1.0, 5.0]))
    k = draw(st.sampled_from([1, 2, 10, head - 1, head, head + 1, head + 40, partition.num_items]))
    return partition, weights, rows, min(max(k, 0), partition.num_items)


@settings(max_examples=150, deadline=None)
@given(search=searches(), storage=st.sampled_from(list(STORAGES)), blocks=st.sampled_from(["kd", "kd", None]))
def test_no_search_loses_an_item(search, storage, blocks):
    partition, weights, hidden, k = search
    arrays = pack(weights, storage, True, blocks)
    early = topk_index(hidden, k, arrays)
    full = topk_index(hidden, k, arrays, early_termination=False)
    assert torch.equal(early[1], full[1])
    if storage == "float32":
        assert torch.equal(early[0], full[0])
    # fp32 sums err by the size of what they add: |w| |Q h| of the level.
    largest = max(
        float(norm * (hidden if projection.numel() == 0 else hidden @ projection.T).norm(dim=1).max())
        for norm, projection in zip(arrays.bounds[:, 1], arrays.projections, strict=True)
    )
    largest += (
        float(arrays.parents.norm(dim=1).max()) * float(hidden.norm(dim=1).max()) * 3 if len(arrays.parents) else 0
    )
    expected = truth(hidden, weights)
    for result in (early, full):
        assert_best(result, expected, BAND + 2e-6 * largest, rounding(hidden, weights, arrays))
    # The reference multiplies by the library, which may give equal rows of weights products an ulp apart.
    if backend_of("topk_index", hidden) == "native":
        assert_equal_items_in_order(early[1], weights, partition)


def assert_equal_items_in_order(items, weights, partition):
    """Of items with the same weights and bias, those with the smallest ids are returned, in order."""
    for j in range(partition.num_clusters):
        lo, hi = partition.offsets[j : j + 2]
        table = weights.weights[j][: hi - lo]
        bias = weights.head_bias if j == 0 else (weights.tail_biases[j - 1] if weights.tail_biases else None)
        if bias is not None:
            table = torch.cat([table, bias[: hi - lo, None]], 1)
        # + 0.0: a negative zero is the same number.
        kinds = (table + 0.0).unique(dim=0, return_inverse=True)[1]
        for row in items:
            own = row[(row >= lo) & (row < hi)] - lo
            for kind in kinds[own].unique():
                wanted = (kinds == kind).nonzero().flatten()
                got = own[kinds[own] == kind]
                assert torch.equal(got, wanted[: got.numel()])
