"""cprec::clustered_topk and clustered_rank: the ten checks (2 and 3 do not apply: neither has a derivative)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_kernels import Partition, available_cpu_isas, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
from cprec_kernels.reference import clustered_topk as ref
from cprec_kernels.testing import CASES, assert_same_items, make_softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BAND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def widened(weights):
    tables, projections, head_bias, tail_biases = weights
    return Weights(
        [w.double() for w in tables],
        [p.double() for p in projections],
        None if head_bias is None else head_bias.double(),
        [b.double() for b in tail_biases],
    )


def truth(hidden, weights):
    """All log-probabilities in fp64 from the given (already rounded) values."""
    return functional.clustered_log_prob(hidden.double(), widened(weights))


def hidden_rows(partition, rows=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(rows, partition.embedding_dim, generator=generator, dtype=torch.float64).to(dtype)


# 1 forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_std", [0.1, 1.0, 10.0])
def test_topk_is_the_sorted_log_prob(case, dtype, logit_std, cpu_backend, poison):
    weights = make_softmax(case.partition, dtype, logit_std=logit_std)
    hidden = hidden_rows(case.partition, dtype=dtype)
    expected = truth(hidden, weights)
    for k in (1, 10, case.partition.sizes[0] + 1, case.partition.num_items):
        k = min(k, case.partition.num_items)
        scores, items = functional.clustered_topk(hidden, k, weights)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_items(items, scores, expected, BAND[dtype] * max(1.0, logit_std))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_is_the_place_in_the_sorted_log_prob(case, dtype, cpu_backend):
    weights = make_softmax(case.partition, dtype)
    hidden = hidden_rows(case.partition, dtype=dtype)
    _, items = functional.clustered_topk(hidden, case.partition.num_items, weights)
    for place in (0, 1, case.partition.num_items // 2, case.partition.num_items - 1):
        rank = functional.clustered_rank(hidden, items[:, place], weights)
        assert torch.equal(rank, torch.full_like(rank, place))


def test_ties_go_to_the_smaller_id(case, cpu_backend):
    """All items of a cluster score the same: the order must be that of the ids."""
    weights = make_softmax(case.partition)
    flat = Weights([torch.zeros_like(w) for w in weights.weights], weights.projections)
    hidden = hidden_rows(case.partition)
    k = case.partition.num_items
    _, items = functional.clustered_topk(hidden, k, flat)
    expected = truth(hidden, flat).float().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(items, expected)
    for cut in (1, 2, k // 2):
        assert torch.equal(functional.clustered_topk(hidden, cut, flat)[1], expected[:, :cut])
    for place in (0, k // 2, k - 1):
        assert (functional.clustered_rank(hidden, items[:, place], flat) == place).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exclusions_and_candidates(data):
    partition = data.draw(st.sampled_from(CASES)).partition
    num_items = partition.num_items
    weights = make_softmax(partition, logit_std=data.draw(st.sampled_from([0.1, 1.0, 5.0])))
    hidden = hidden_rows(partition, rows=3)
    k = data.draw(st.integers(0, num_items))
    lists = [data.draw(st.lists(st.integers(0, num_items - 1), max_size=20)) for _ in range(3)]
    candidates = data.draw(st.none() | st.lists(st.integers(0, num_items - 1), max_size=30))
    expected = truth(hidden, weights)
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
    for exclude in (padded, csr):
        scores, items = functional.clustered_topk(hidden, k, weights, exclude=exclude, candidates=whitelist)
        assert_same_items(items, scores, expected, 1e-4)


def test_exclusions_go_with_their_rows_in_batches_of_many(cpu_backend):
    """More rows than a chunk of them holds."""
    weights = make_softmax(Partition(300, [60, 150], [16, 8, 4], 16), logit_std=2.0)
    hidden = torch.randn(1_100, 16)
    best = functional.clustered_topk(hidden, 2, weights)[1]
    for exclude in (best[:, :1].contiguous(), (torch.arange(1_101), best[:, 0].contiguous())):
        assert torch.equal(functional.clustered_topk(hidden, 1, weights, exclude=exclude)[1][:, 0], best[:, 1])


def test_everything_excluded_leaves_nothing():
    partition = Partition(20, [5], [4, 2], 4)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition, rows=2)
    exclude = torch.stack([torch.arange(20), torch.arange(20).clamp(max=18)])
    scores, items = functional.clustered_topk(hidden, 3, weights, exclude=exclude)
    assert items[0].tolist() == [-1, -1, -1]
    assert items[1].tolist() == [19, -1, -1]
    assert scores[1].isfinite().tolist() == [True, False, False]


# 4 opcheck


def test_opcheck(case):
    args = make_softmax(case.partition).args()
    hidden = hidden_rows(case.partition)
    padded = torch.randint(-1, case.partition.num_items, (11, 4))
    offsets, flat = torch.arange(0, 12), torch.randint(case.partition.num_items, (11,))
    candidates = torch.arange(0, case.partition.num_items, 2)
    for extra in ((None, None, None), (padded, None, candidates), (flat, offsets, None)):
        torch.library.opcheck(torch.ops.cprec.clustered_topk.default, (hidden, 5, *args, *extra))
    target = torch.randint(case.partition.num_items, (11,))
    torch.library.opcheck(torch.ops.cprec.clustered_rank.default, (hidden, target, *args))


# 5 compile and export


def test_compile_and_export():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition)
    seen = torch.randint(100, (11, 4))

    class Search(torch.nn.Module):
        def forward(self, h, exclude):
            scores, items = functional.clustered_topk(h, 5, weights, exclude=exclude)
            return scores, items, functional.clustered_rank(h, items[:, 0].clamp(min=0), weights)

    expected = Search()(hidden, seen)
    for a, b in zip(torch.compile(Search(), fullgraph=True)(hidden, seen), expected, strict=True):
        assert torch.equal(a, b)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Search(), (hidden, seen), dynamic_shapes=({0: rows}, {0: rows}))
    for a, b in zip(program.module()(hidden[:4], seen[:4]), expected, strict=True):
        torch.testing.assert_close(a, b[:4])


# 6 autocast


def test_autocast_keeps_scores_in_fp32():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition)
    with torch.autocast("cpu", torch.bfloat16):
        scores, items = functional.clustered_topk(hidden, 5, weights)
        rank = functional.clustered_rank(hidden, items[:, 2], weights)
    assert scores.dtype == torch.float32
    assert (rank == 2).all()


# 7 strided and N-D inputs


def test_strided_and_n_dimensional_inputs():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition, 24).reshape(4, 6, 8)
    seen = torch.randint(100, (4, 6, 3))
    scores, items = functional.clustered_topk(hidden[:, ::2], 5, weights, exclude=seen[:, ::2])
    assert items.shape == (4, 3, 5)
    flat_scores, flat_items = functional.clustered_topk(
        hidden[:, ::2].reshape(12, 8), 5, weights, exclude=seen[:, ::2].reshape(12, 3)
    )
    assert torch.equal(items.reshape(12, 5), flat_items)
    assert torch.equal(scores.reshape(12, 5), flat_scores)
    assert functional.clustered_rank(hidden, seen[..., 0], weights).shape == (4, 6)


# 8 edges


def test_empty_batches_and_k_of_zero(case):
    weights = make_softmax(case.partition)
    width = case.partition.embedding_dim
    scores, items = functional.clustered_topk(torch.zeros(0, width), 5, weights)
    assert scores.shape == items.shape == (0, 5)
    scores, items = functional.clustered_topk(torch.zeros(3, width), 0, weights)
    assert scores.shape == items.shape == (3, 0)
    nobody = torch.zeros(3, 0, dtype=torch.int64)
    excluded = functional.clustered_topk(torch.ones(3, width), 1, weights, exclude=nobody)
    assert torch.equal(excluded[1], functional.clustered_topk(torch.ones(3, width), 1, weights)[1])
    assert functional.clustered_score(torch.ones(3, width), nobody, weights).shape == (3, 0)
    nothing = functional.clustered_topk(torch.ones(3, width), 1, weights, candidates=nobody[0])
    assert nothing[1].tolist() == [[-1]] * 3
    assert functional.clustered_rank(torch.zeros(0, width), torch.zeros(0, dtype=torch.int64), weights).shape == (0,)


def test_wrong_arguments_are_named():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition, 2)
    topk = functional.clustered_topk
    with pytest.raises(ValueError, match=r"k = 101 is outside 0..100"):
        topk(hidden, 101, weights)
    with pytest.raises(TypeError, match=r"k must be an int, got 3.0"):
        topk(hidden, 3.0, weights)
    with pytest.raises(TypeError, match=r"exclude must be an int64 tensor \(..., m\)"):
        topk(hidden, 1, weights, exclude=[[1], [2]])
    with pytest.raises(ValueError, match="k = -1"):
        topk(hidden, -1, weights)
    with pytest.raises(IndexError, match=r"candidates\[1\] = 100"):
        topk(hidden, 1, weights, candidates=torch.tensor([0, 100]))
    with pytest.raises(IndexError, match=r"exclude\[1, 0\] = 100"):
        topk(hidden, 1, weights, exclude=torch.tensor([[0], [100]]))
    with pytest.raises(ValueError, match="exclude must be"):
        topk(hidden, 1, weights, exclude=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="one offset more"):
        topk(hidden, 1, weights, exclude=(torch.tensor([0, 1]), torch.tensor([3])))
    with pytest.raises(ValueError, match="must ascend from 0"):
        topk(hidden, 1, weights, exclude=(torch.tensor([0, 2, 1]), torch.tensor([3])))
    with pytest.raises(ValueError, match="must ascend from 0"):
        topk(hidden, 1, weights, exclude=(torch.tensor([0, 1, 2]), torch.tensor([3])))
    with pytest.raises(TypeError, match="candidates must be int64"):
        topk(hidden, 1, weights, candidates=torch.tensor([1.0]))
    with pytest.raises(IndexError, match=r"target\[1\] = -1"):
        functional.clustered_rank(hidden, torch.tensor([0, -1]), weights)


def test_offsets_that_descend_within_their_range_are_refused(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    exclude = torch.tensor([0, 3, 2, 4]), torch.arange(4)
    with pytest.raises(ValueError, match=r"must ascend from 0 to the number of items 4, got 0\.\.4, not ascending"):
        functional.clustered_topk(hidden_rows(partition, 3), 1, make_softmax(partition), exclude=exclude)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_reported(value):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    weights = make_softmax(partition)
    hidden = hidden_rows(partition, 3)
    hidden[1, 2] = value
    with pytest.raises(ValueError, match="input row 1 holds NaN or inf"):
        functional.clustered_topk(hidden, 1, weights)
    with pytest.raises(ValueError, match="input row 1 holds NaN or inf"):
        functional.clustered_rank(hidden, torch.tensor([0, 1, 2]), weights)
    weights.weights[2][7] = math.nan
    with pytest.raises(ValueError, match="scores of row 0 are NaN"):
        functional.clustered_topk(hidden[:1], 100, weights)  # as many as there are: no tail is skipped


# 9 determinism and independence of the batch


def test_chunks_do_not_change_the_result(case, monkeypatch):
    weights = make_softmax(case.partition, torch.float64)
    hidden = hidden_rows(case.partition, dtype=torch.float64)
    seen = torch.randint(-1, case.partition.num_items, (11, 6))
    csr = torch.arange(0, 12) * 6, seen.flatten()
    whole = functional.clustered_topk(hidden, 7, weights, exclude=seen)
    rank = functional.clustered_rank(hidden, seen[:, 0].clamp(min=0), weights)
    monkeypatch.setattr("cprec_kernels.reference.common.MAX_LOGITS", 1)
    for exclude in (seen, csr):
        chunked = functional.clustered_topk(hidden, 7, weights, exclude=exclude)
        assert torch.equal(chunked[1], whole[1])
        torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(functional.clustered_rank(hidden, seen[:, 0].clamp(min=0), weights), rank)


def test_memory_is_bounded_whatever_the_number_of_rows(monkeypatch):
    """No (rows, num_items) tensor: the largest block of scores stays within the budget."""
    partition = Partition(500, [30, 120], [32, 8, 4], 32)
    weights = make_softmax(partition)
    largest = []
    inner = ref.clustered_log_prob

    def watched(*args):
        out = inner(*args)
        largest.append(out.numel())
        return out

    monkeypatch.setattr("cprec_kernels.reference.common.MAX_LOGITS", 5000)
    monkeypatch.setattr(ref, "clustered_log_prob", watched)
    with use_backend("reference"):
        functional.clustered_rank(torch.randn(200, 32), torch.zeros(200, dtype=torch.int64), weights)
        functional.clustered_topk(torch.randn(200, 32), 3, weights)
    assert max(largest) <= 5000
    assert sum(largest) == 2 * 200 * 500


def test_where_nobody_waits_a_nan_score_is_never_found():
    """The meaning of NaN on devices, which cannot raise: such items are not found, and nothing is read out of bounds."""
    scores = torch.tensor([[-1.0, math.nan, -2.0]], device="meta")
    assert ref.without_nan(scores, slice(0, 1)).device.type == "meta"  # not asked for its values
    values, items = ref._largest(torch.tensor([[-1.0, -math.inf, -2.0]]), 3)
    assert items.tolist() == [[0, 2, -1]]
    assert values[0, 2] == -math.inf


def test_what_narrows_a_search_must_be_where_the_input_is():
    """Otherwise the dispatcher takes the meta kernel, whose result is whatever memory held."""
    head = ClusteredSoftmaxWithLoss(8, Partition(60, [20], [8, 4], 8))
    x, meta = torch.randn(2, 8), torch.arange(10, device="meta")
    offsets = torch.tensor([0, 5, 10])
    for options in (
        {"candidates": meta}, {"exclude": (offsets, meta)}, {"exclude": (offsets.to("meta"), torch.arange(10))},
        {"exclude": meta[None].expand(2, 10)},
    ):  # fmt: skip
        for storage in (None, "float32") if available_cpu_isas() else (None,):
            with pytest.raises(ValueError, match=r"must be on (the CPU|cpu)|meta"):
                head.topk(x, 3, storage=storage, **options)
