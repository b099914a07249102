"""The Triton kernels of the exact search in the interpreter, against fp64; tiles are tiny, so that every loop turns."""

from __future__ import annotations

import math

import interpreter
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec_kernels import Partition, _backend, use_backend
from cprec_kernels._triton import (
    clustered_topk,
    clustered_topk_lse,
    clustered_topk_prune,
    clustered_topk_rows,
    clustered_topk_scan,
    clustered_topk_select,
    common,
    configs,
)
from cprec_kernels._triton.clustered_softmax_plan import levels_of
from cprec_kernels._triton.clustered_topk_rows import Rows
from cprec_kernels._triton.configs import Tile
from cprec_kernels.functional import Weights
from cprec_kernels.reference import clustered_topk as ref
from cprec_kernels.reference.clustered_softmax import levels_of as reference_levels
from cprec_kernels.testing import assert_same_items, copy_weights, make_hidden, make_softmax

MODULES = (clustered_topk_lse, clustered_topk_prune, clustered_topk_rows, clustered_topk_scan, clustered_topk_select)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEARCH = ("topk_bound", "topk_append", "topk_exhaustive", "rank_count", "score")
TINY = dict.fromkeys(("scan_lse", "token", *SEARCH), Tile(16, 16, 4, 1))
SMALL = Partition(100, [10, 50], [8, 4, 2], 8)
# Both levels have more items than are taken whole, and neither is a multiple of a tile.
LARGE = Partition(1100, [501], [8, 5], 8)
BAND = 2e-5


@pytest.fixture(autouse=True)
def _tiny_tiles(monkeypatch):
    # Any number of settled bits gives a valid threshold, and each takes the interpreter a while.
    monkeypatch.setattr(clustered_topk_prune, "THRESHOLD_BITS", 12)
    with configs.override(**TINY):
        yield


def truth(hidden, weights):
    """All log-probabilities in fp64, of the hidden states as the kernels project them: rounded to their dtype."""
    blocks = []
    for level in reference_levels(*weights):
        bias = 0 if level.bias is None else level.bias.double()
        logits = level.hidden(hidden).double() @ level.weight.double().T + bias
        blocks.append(logits.log_softmax(1))
    k0 = blocks[0].shape[1] - len(blocks) + 1
    return torch.cat([blocks[0][:, :k0], *(b + blocks[0][:, k0 + j, None] for j, b in enumerate(blocks[1:]))], 1)


def search(hidden, k, weights, exclude=None, offsets=None, candidates=None):
    return clustered_topk.clustered_topk(hidden, k, *weights.args(), exclude, offsets, candidates)


def check(hidden, k, weights, exclude=None, offsets=None, candidates=None, band=BAND):
    scores, items = search(hidden, k, weights, exclude, offsets, candidates)
    assert scores.dtype == torch.float32
    expected = truth(hidden, weights)
    if candidates is not None:
        keep = torch.zeros(expected.shape[1], dtype=torch.bool)
        keep[candidates] = True
        expected[:, ~keep] = -math.inf
    if exclude is not None:
        for row in range(hidden.shape[0]):
            own = exclude[row] if offsets is None else exclude[offsets[row] : offsets[row + 1]]
            expected[row, own[own >= 0]] = -math.inf
    assert_same_items(items, scores, expected, band)
    return scores, items


def flat(partition):
    """Weights under which all items of a cluster tie."""
    weights = make_softmax(partition)
    return Weights([torch.zeros_like(w) for w in weights.weights], weights.projections)


@pytest.fixture
def counted(monkeypatch):
    """How many rows each log-sum-exp was taken of."""
    counts = []
    inner = clustered_topk.log_sum_exp

    def watched(level, z, rows, *out):
        counts.append(int(rows.offsets[rows.last] - rows.offsets[rows.first]))
        inner(level, z, rows, *out)

    monkeypatch.setattr(clustered_topk, "log_sum_exp", watched)
    return counts


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_items(case, dtype, poison):
    weights = make_softmax(case.partition, dtype, bias=dtype != torch.float16)
    check(
        make_hidden(case.partition, (17,), dtype), min(case.partition.sizes[0] + 2, case.partition.num_items), weights
    )


@pytest.mark.parametrize(("logit_std", "bits"), [(0.1, 12), (1.0, 22), (5.0, 12)])
def test_floors_and_bounds_lose_nothing(logit_std, bits, monkeypatch, poison):
    monkeypatch.setattr(clustered_topk_prune, "THRESHOLD_BITS", bits)
    assert all(clustered_topk.chunks_for(size, 4) > 0 for size in LARGE.sizes)
    check(make_hidden(LARGE, (19,)), 4, make_softmax(LARGE, logit_std=logit_std), band=BAND * max(1, logit_std))


@pytest.mark.parametrize("most", [2048, 0], ids=["compared", "sorted"])
@pytest.mark.parametrize("fold", [4, 10**6], ids=["folded", "all"])
def test_every_way_to_the_best_of_a_row(most, fold, monkeypatch, poison):
    """Rows are left with fewer than k items by the first exclusions, and the second ones fill whole blocks."""
    monkeypatch.setattr(clustered_topk_select, "MAX_COMPARED", most)
    monkeypatch.setattr(clustered_topk_prune, "FOLD", fold)
    weights, hidden = make_softmax(LARGE, logit_std=2.0), make_hidden(LARGE, (7,))
    plain = check(hidden, 6, weights)
    few = check(hidden, 6, weights, plain[1][:, :3].contiguous(), candidates=plain[1][:, :5].flatten())
    assert few[1].min() >= -1
    check(hidden, 70, weights, truth(hidden, weights).argsort(1, descending=True)[:, :130])


def test_all_items_in_order(poison):
    check(make_hidden(SMALL, (5,)), SMALL.num_items, make_softmax(SMALL))


@pytest.mark.parametrize("tile", [Tile(32, 64, 4, 2, 5), Tile(16, 32, 4, 1)], ids=["wide", "uneven"])
def test_other_tiles(tile, poison):
    with configs.override(**dict.fromkeys(SEARCH, tile)):
        check(make_hidden(LARGE, (19,), torch.bfloat16), 5, make_softmax(LARGE, torch.bfloat16))


@pytest.mark.parametrize("rank", [1, 17, 512])
def test_ranks(rank, poison):
    partition = Partition(40, [9], [rank, min(rank, 3)], 512)
    check(make_hidden(partition, (5,)) / 20, 12, make_softmax(partition))


def test_large_logits(poison):
    """fp32 keeps three decimals of a log-sum-exp of 10^4."""
    check(make_hidden(SMALL, (19,)) * 1e3, 12, make_softmax(SMALL, logit_std=3.0), band=0.02)


def test_strided_weights_and_inputs():
    weights = make_softmax(SMALL)
    transposed = weights._replace(weights=[w.T.contiguous().T for w in weights.weights])
    hidden = make_hidden(SMALL, (10,))
    for a, b in zip(search(hidden[::2], 7, transposed), search(hidden[::2].contiguous(), 7, weights), strict=True):
        assert torch.equal(a, b)


def test_slices_of_rows_change_nothing(monkeypatch):
    weights, hidden = make_softmax(LARGE), make_hidden(LARGE, (9,))
    exclude = torch.randint(LARGE.num_items, (9, 5))
    whole = search(hidden, 4, weights, exclude)
    monkeypatch.setattr(clustered_topk, "MAX_BYTES", 5 * clustered_topk.bytes_per_row(599, 14, 4))
    for exclusions in ((exclude, None), (exclude.flatten(), torch.arange(10) * 5)):
        scores, items = search(hidden, 4, weights, *exclusions)
        assert torch.equal(items, whole[1])
        # Not bit for bit: numpy's product, which stands for tl.dot here, may depend on a row's place in its tile.
        torch.testing.assert_close(scores, whole[0], rtol=1e-6, atol=0)


# Exclusions, candidates, ties


@pytest.mark.parametrize("partition", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("candidates", [False, True], ids=["all", "candidates"])
def test_exclusions_and_candidates(partition, candidates, poison):
    weights, hidden = make_softmax(partition, logit_std=2.0), make_hidden(partition, (9,))
    # The best are what is excluded: thresholds that forgot about exclusions would be too high.
    best = truth(hidden, weights).argsort(1, descending=True)[:, :8]
    best[::2, 5:] = -1
    chosen = torch.arange(3, partition.num_items, 3) if candidates else None
    check(hidden, 5, weights, best, candidates=chosen)
    check(hidden, 5, weights, best[best >= 0], torch.tensor([0, *(best >= 0).sum(1).cumsum(0)]), chosen)


def test_few_or_no_items_left():
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (3,))
    everything = torch.stack([torch.arange(100), torch.arange(100).clamp(max=98), torch.full((100,), -1)])
    _, items = check(hidden, 3, weights, everything)
    assert items[:2].tolist() == [[-1, -1, -1], [99, -1, -1]]
    check(hidden, 3, weights, candidates=torch.tensor([], dtype=torch.int64))
    check(hidden, 3, weights, candidates=torch.tensor([70, 70, 71]))


@pytest.mark.parametrize("partition", [SMALL, LARGE], ids=["small", "overflowing"])
def test_ties_go_to_the_smaller_id(partition):
    """On the large partition every item of a level reaches its thresholds, which is more than a row has room for."""
    hidden = make_hidden(partition, (2,))
    exclude = torch.tensor([[0, 3, 1], [2, -1, 502 % partition.num_items]])
    scores = truth(hidden, flat(partition)).float()
    expected = scores.scatter(1, exclude.clamp(min=0), -math.inf)
    expected[1, 0] = scores[1, 0]
    order = expected.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 12):
        assert torch.equal(search(hidden, k, flat(partition), exclude)[1], order[:, :k])


# What is skipped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrowed", [False, True], ids=["all", "narrowed"])
def test_rows_without_room_are_searched_exhaustively(dtype, narrowed, monkeypatch, poison):
    launched = []
    inner = clustered_topk_select.launch

    def watched(kernel, programs, anchor, *args, **options):
        if kernel is clustered_topk_select.clustered_topk_select_kernel:
            names = dict(zip(kernel.arg_names, args, strict=False))
            launched.append((names["p_count"][: names["num_rows"]] > names["capacity"]).any())
        inner(kernel, programs, anchor, *args, **options)

    monkeypatch.setattr(clustered_topk_select, "launch", watched)
    monkeypatch.setattr(clustered_topk, "capacity_for", lambda num_items, expected: min(num_items, 6))
    weights, hidden = make_softmax(SMALL, dtype), make_hidden(SMALL, (7,), dtype)
    exclude = truth(hidden, weights).argsort(1, descending=True)[:, :4] if narrowed else None
    check(hidden, 6, weights, exclude, candidates=torch.arange(0, 100, 2) if narrowed else None)
    assert any(launched)


def test_no_tail_is_read_where_none_can_help(counted):
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (19,))
    weights.head_bias[-2:] = -50.0
    check(hidden, 5, weights)
    assert counted == [19, 0, 0]


def test_every_tail_is_read_where_all_are_needed(counted):
    check(make_hidden(SMALL, (19,)), 90, make_softmax(SMALL))
    assert counted == [19, 19, 19]


def test_bounds_spare_rows_that_the_parent_does_not(counted):
    """A likely tail of many like items: its parent beats the best item of the head, none of its items does."""
    weights, hidden = make_softmax(SMALL, logit_std=0.1), make_hidden(SMALL, (19,))
    weights.head_bias[:] = 0.0
    weights.head_bias[-2:] = 2.0
    weights.tail_biases[0][:] = 0.0
    weights.tail_biases[1][:] = 0.0
    check(hidden, 5, weights)
    assert counted == [19, 0, 0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0, 1e4])
@pytest.mark.parametrize("candidates", [False, True], ids=["all", "candidates"])
def test_the_bound_is_one(scale, candidates, monkeypatch, poison):
    """Exact maxima, a log-sum-exp never above the true one, and equal to it where all logits are equal."""
    monkeypatch.setattr(clustered_topk_scan, "GROUP", 3)
    partition = Partition.single(1003, 8)
    weights, z = make_softmax(partition), make_hidden(partition, (16,)) * scale
    weights.head_bias[:] *= scale
    weights.head_bias[7::50] = -math.inf if scale == 1.0 else 0.0
    (level,) = levels_of(*weights)
    allowed = (torch.arange(1003) % 40 == 39).to(torch.int8) if candidates else None
    rows = Rows(torch.arange(16, dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32))
    bounds = clustered_topk_scan.bound(level, z, rows, allowed, 100)
    parts = max(bounds.cut.min_parts, min(bounds.cut.target_units, -(-1003 // 16)))
    top, reference, total = (x.reshape(-1, 16)[:parts].double() for x in (bounds.top, bounds.reference, bounds.total))
    least = ((reference + total.log2()) * math.log(2)).logsumexp(0)
    logits = z.double() @ level.weight.double().T + level.bias.double()
    slack = clustered_topk_rows.SLACK * max(1.0, float(logits[logits.isfinite()].abs().max()))
    assert (least <= logits.logsumexp(1) + slack).all()
    if scale == 0.0:
        torch.testing.assert_close(least, logits.logsumexp(1), rtol=0, atol=1e-5)
    # Summed in fp32 in any order, a logit errs by at most so much (Higham, Accuracy and Stability, section 3.1): its terms
    # may be large and cancel.
    terms = z.abs().double() @ level.weight.abs().double().T + level.bias.abs().double().nan_to_num(posinf=0.0)
    rounding = 10 * 2.0**-24 * float(terms.max())
    shown = logits if allowed is None else logits[:, allowed > 0]
    torch.testing.assert_close(top.amax(0), shown.amax(1), rtol=0, atol=rounding)
    peaks = bounds.peaks.reshape(-1, 16, 16)[:parts].double()  # part, row, column
    chunk = (torch.arange(1003) // 16 % parts) * 16 + torch.arange(1003) % 16
    logits = logits if allowed is None else logits.masked_fill(allowed == 0, -math.inf)
    expected = torch.full((16, parts * 16), -math.inf, dtype=torch.float64)
    expected.scatter_reduce_(1, chunk.expand(16, -1), logits, "amax")
    torch.testing.assert_close(peaks.transpose(0, 1).reshape(16, -1), expected, rtol=0, atol=rounding)


# Edges


def test_nothing_to_do(case):
    weights, width = make_softmax(case.partition), case.partition.embedding_dim
    for rows, k in ((0, 5), (3, 0)):
        scores, items = search(torch.ones(rows, width), k, weights)
        assert scores.shape == items.shape == (rows, k)
        assert items.dtype == torch.int64


def test_items_without_a_score_are_not_found():
    """A NaN spoils its own row, or the cluster that it is in, as in the reference on a device."""
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (4,))
    weights.weights[2][7] = math.nan
    expected = truth(hidden, weights).nan_to_num(nan=-math.inf)
    scores, items = search(hidden, 60, weights)
    assert_same_items(items, scores, expected, BAND)
    clean = search(hidden, 5, make_softmax(SMALL))
    hidden[1, 2] = math.nan
    scores, items = search(hidden, 5, make_softmax(SMALL))
    assert (items[1] == -1).all()
    assert torch.equal(items[[0, 2, 3]], clean[1][[0, 2, 3]])


# Repeatable


def test_bits_depend_on_no_grid_and_no_order_of_programs(monkeypatch, poison):
    """One program after another hides a program that needs another's result; another order, or other owners, shows it."""
    weights, hidden = make_softmax(LARGE), make_hidden(LARGE, (17,))
    exclude = torch.randint(-1, LARGE.num_items, (17, 4))
    expected = search(hidden, 4, weights, exclude)
    for programs, order in ((1, None), (3, [2, 0, 1]), (7, None), (7, [6, 2, 4, 0, 5, 1, 3])):

        def launch(kernel, _programs, anchor, *args, programs=programs, order=order, **options):
            kernel = kernel if order is None else interpreter.shuffle_programs(kernel, order)
            common.launch(kernel, programs, anchor, *args, **options)

        for module in MODULES:
            monkeypatch.setattr(module, "launch", launch)
        for a, b in zip(search(hidden, 4, weights, exclude), expected, strict=True):
            assert torch.equal(a, b)


# The host


def test_nothing_is_read_by_the_host(monkeypatch):
    """Fake tensors have no values: .item(), nonzero() and x[mask] raise on them."""
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setattr(clustered_topk, "MAX_BYTES", 20_000)
    with FakeTensorMode():
        weights, hidden = copy_weights(make_softmax(LARGE)), torch.randn(41, 8)
        padded, flat_items = torch.zeros(41, 7, dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
        offsets, candidates = torch.zeros(42, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
        for exclude, starts, chosen in ((None, None, None), (padded, None, candidates), (flat_items, offsets, None)):
            for k in (5, LARGE.num_items):
                scores, items = search(hidden, k, weights, exclude, starts, chosen)
                assert scores.shape == items.shape == (41, k)


def test_cuda_tensors_are_searched_by_triton():
    for dtype in DTYPES:
        assert _backend.choose("clustered_topk", "cuda", dtype).implementation.backend == "triton"
    assert _backend.choose("clustered_topk", "cuda", torch.float64).implementation.backend == "reference"
    assert _backend.choose("clustered_topk", "cpu", torch.float32).implementation.backend != "triton"


def test_ranks_beyond_the_kernels_go_to_the_reference_unless_triton_was_asked_for():
    partition = Partition.single(5, 600)
    weights, hidden = make_softmax(partition), make_hidden(partition, (3,))
    args = (hidden, 2, *weights.args(), None, None, None)
    call = _backend.choose("clustered_topk", "cuda", torch.float32).implementation.call
    assert torch.equal(call(*args)[1], ref.clustered_topk(*args)[1])
    with use_backend("triton"), pytest.raises(_backend.BackendError, match="rank 600 is above 512"):
        call(*args)


def test_tables_have_a_tile_for_every_rank_dtype_and_architecture():
    for rank in (1, 16, 17, 100, common.MAX_RANK):
        for dtype in DTYPES:
            for arch in (*configs.ARCHITECTURES, 86, 89, 103, 120):
                for kernel in SEARCH:
                    assert configs.tile_for(kernel, rank, dtype, arch).block_t >= 16
