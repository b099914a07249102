"""The Triton kernels of ranks and scores in the interpreter, against fp64; tiles are tiny, so that every loop turns."""

from __future__ import annotations

import math

import interpreter
import pytest
import torch
from test_clustered_topk import BAND, DTYPES, LARGE, SMALL, TINY, flat, search, truth
from test_clustered_topk import MODULES as SEARCH_MODULES
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec_kernels import _backend
from cprec_kernels._triton import clustered_rank, clustered_topk_prune, common, configs
from cprec_kernels.testing import copy_weights, make_hidden, make_ids, make_softmax

MODULES = (clustered_rank, *SEARCH_MODULES)


@pytest.fixture(autouse=True)
def _tiny_tiles(monkeypatch):
    monkeypatch.setattr(clustered_topk_prune, "THRESHOLD_BITS", 12)
    with configs.override(**TINY):
        yield


def rank(hidden, target, weights):
    return clustered_rank.clustered_rank(hidden, target, *weights.args())


def score(hidden, items, weights):
    return clustered_rank.clustered_score(hidden, items, *weights.args())


def check_rank(hidden, target, weights, band=BAND):
    """Between the number of items that are clearly better and of those that are not clearly worse."""
    log_prob = truth(hidden, weights)
    own = log_prob.gather(1, target[:, None])
    found = rank(hidden, target, weights)
    assert found.dtype == torch.int64
    assert ((log_prob > own + band).sum(1) <= found).all()
    assert (found < (log_prob >= own - band).sum(1)).all()
    return found


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places_and_scores(case, dtype, poison):
    partition = case.partition
    weights = make_softmax(partition, dtype, bias=dtype != torch.float16)
    hidden = make_hidden(partition, (23,), dtype)
    check_rank(hidden, make_ids(partition, (23,)), weights)
    items = make_ids(partition, (23, 5))
    found = score(hidden, items, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth(hidden, weights).gather(1, items), rtol=1e-5, atol=BAND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_places_are_those_of_the_search(dtype, poison):
    weights, hidden = make_softmax(LARGE, dtype), make_hidden(LARGE, (19,), dtype)
    _, items = search(hidden, 20, weights)
    for place in (0, 7, 19):
        assert (rank(hidden, items[:, place], weights) == place).all()


def test_every_place_there_is(poison):
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (1,)).expand(100, 8)
    found = rank(hidden, torch.arange(100), weights)
    assert torch.equal(found.sort().values, torch.arange(100))
    assert torch.equal(found[search(hidden[:1], 100, weights)[1][0]], torch.arange(100))


def test_ties_count_for_the_smaller_id(poison):
    hidden, weights = make_hidden(SMALL, (100,)), flat(SMALL)
    log_prob = truth(hidden, weights).float()
    own = log_prob.diagonal()[:, None]
    smaller = torch.arange(100)[None, :] < torch.arange(100)[:, None]
    expected = ((log_prob > own) | ((log_prob == own) & smaller)).sum(1)
    assert torch.equal(rank(hidden, torch.arange(100), weights), expected)


@pytest.mark.parametrize("target", [0, 9, 10, 49, 50, 99])
def test_all_rows_with_one_target(target, poison):
    check_rank(make_hidden(SMALL, (17,)), torch.full((17,), target), make_softmax(SMALL))


def test_large_logits(poison):
    weights, hidden = make_softmax(SMALL, logit_std=3.0), make_hidden(SMALL, (19,)) * 1e3
    target = make_ids(SMALL, (19,))
    check_rank(hidden, target, weights, band=0.02)
    expected = truth(hidden, weights).gather(1, target[:, None])
    torch.testing.assert_close(score(hidden, target[:, None], weights).double(), expected, rtol=1e-5, atol=0.02)


def test_tails_that_cannot_matter_are_not_read(monkeypatch):
    counts = []
    inner = clustered_rank.log_sum_exp

    def watched(level, z, rows, *out):
        counts.append(int(rows.offsets[rows.last] - rows.offsets[rows.first]))
        inner(level, z, rows, *out)

    monkeypatch.setattr(clustered_rank, "log_sum_exp", watched)
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (19,))
    weights.head_bias[-2:] = -50.0
    target = torch.arange(19) % 10
    target[5] = 99
    check_rank(hidden, target, weights)
    # Head; tails of the targets; tails of others: the row whose target is in tail 2 may be beaten by all of tail 1.
    assert counts == [19, 0, 1, 1, 0]
    counts.clear()
    items = target[:, None].expand(19, 3).clone()
    items[7, 2] = 12
    score(hidden, items, weights)
    assert counts == [19, 1, 1]


# Edges


def test_nothing_to_do(case):
    weights, width = make_softmax(case.partition), case.partition.embedding_dim
    nobody = torch.zeros(0, dtype=torch.int64)
    assert rank(torch.zeros(0, width), nobody, weights).shape == (0,)
    assert score(torch.zeros(0, width), nobody.reshape(0, 4), weights).shape == (0, 4)
    assert score(torch.zeros(3, width), nobody.reshape(3, 0), weights).shape == (3, 0)


def test_a_score_that_is_nan_comes_last():
    weights, hidden = make_softmax(SMALL), make_hidden(SMALL, (100,))
    weights.weights[2][7] = math.nan
    target = torch.arange(100)
    scores = truth(hidden, weights).nan_to_num(nan=-math.inf)
    own = scores.diagonal()[:, None]
    smaller = target[None, :] < target[:, None]
    assert torch.equal(rank(hidden, target, weights), ((scores > own) | ((scores == own) & smaller)).sum(1))
    assert score(hidden[:1], torch.tensor([[99, 3]]), weights).isnan().tolist() == [[True, False]]


def test_strided_inputs():
    weights, hidden, target = make_softmax(SMALL), make_hidden(SMALL, (20,)), make_ids(SMALL, (20, 2))
    assert torch.equal(
        rank(hidden[::2], target[::2, 0], weights),
        rank(hidden[::2].contiguous(), target[::2, 0].contiguous(), weights),
    )
    assert torch.equal(score(hidden, target.T.contiguous().T, weights), score(hidden, target, weights))


# Repeatable


def test_bits_depend_on_no_grid_and_no_order_of_programs(monkeypatch, poison):
    """One program after another hides a program that needs another's result; another order, or other owners, shows it."""
    weights, hidden, items = make_softmax(LARGE), make_hidden(LARGE, (19,)), make_ids(LARGE, (19, 3))
    expected = rank(hidden, items[:, 0], weights), score(hidden, items, weights)
    for programs, order in ((1, None), (3, [2, 0, 1]), (7, None), (7, [6, 2, 4, 0, 5, 1, 3])):

        def launch(kernel, _programs, anchor, *args, programs=programs, order=order, **options):
            kernel = kernel if order is None else interpreter.shuffle_programs(kernel, order)
            common.launch(kernel, programs, anchor, *args, **options)

        for module in MODULES:
            monkeypatch.setattr(module, "launch", launch)
        assert torch.equal(rank(hidden, items[:, 0], weights), expected[0])
        assert torch.equal(score(hidden, items, weights), expected[1])


# The host


def test_nothing_is_read_by_the_host(monkeypatch):
    """Fake tensors have no values: .item(), nonzero() and x[mask] raise on them."""
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    with FakeTensorMode():
        weights, hidden = copy_weights(make_softmax(LARGE)), torch.randn(41, 8)
        items = torch.zeros(41, 3, dtype=torch.int64)
        assert rank(hidden, items[:, 0], weights).shape == (41,)
        assert score(hidden, items, weights).shape == (41, 3)


def test_cuda_tensors_are_ranked_by_triton():
    for op in ("clustered_rank", "clustered_score"):
        for dtype in DTYPES:
            assert _backend.choose(op, "cuda", dtype).implementation.backend == "triton"
        assert _backend.choose(op, "cuda", torch.float64).implementation.backend == "reference"
        assert _backend.choose(op, "cpu", torch.float32).implementation.backend != "triton"
