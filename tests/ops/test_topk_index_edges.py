"""cprec::topk_index: checks 8 and 9 of the ten, edges, wrong arguments, determinism."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition
from cprec_kernels.nn.index_packing import STORAGES, pack
from cprec_kernels.ops.topk_index import topk_index
from cprec_kernels.testing import make_hidden, make_softmax
from tests.ops.index_checks import BAND, LARGE, SMALL, assert_best, truth

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


def test_rows_too_long_for_a_leafs_basis_are_scanned(cpu_backend):
    """Finite in the tail and beyond fp32 in the basis of its leaves, which the head's single direction makes long."""
    weights = make_softmax(LARGE, bias=False)
    weights.weights[0][:, 1:] *= 1e-3
    weights.weights[0][:] *= 1e-34
    for j in range(1, len(weights.weights)):
        weights.weights[j][:] *= 1e-34
    hidden = make_hidden(LARGE, (9,)) * 1e37
    arrays = pack(weights, "float32", True, "kd")
    found, whole = (topk_index(hidden, 20, arrays, early_termination=early) for early in (True, False))
    assert hidden.isfinite().all()
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[0], whole[0])


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


def test_whether_logits_are_kept_changes_no_bit(cpu_backend):
    """Logits of a head are kept up to 2^20 of them: those of 30,000 items are for some batches, not for the others."""
    partition = Partition(40_000, [30_000, 34_000], [40, 9, 4], 40)  # too large to be split by rows
    weights, hidden = make_softmax(partition), make_hidden(partition, (40,))
    for storage, exact in (("float32", True), ("float16", True), ("int8", False)):
        arrays = pack(weights, storage, exact, "kd")
        found = topk_index(hidden, 10, arrays)
        parts = [topk_index(rows, 10, arrays) for rows in (*hidden[:8].split(1), hidden[8:13], hidden[13:])]
        whole = topk_index(hidden, 10, arrays, early_termination=False)
        scores, items, _ = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(found[1], items)
        assert torch.equal(found[1], whole[1])
        if cpu_backend == "reference":  # the library's bits depend on the number of rows
            torch.testing.assert_close(found[0], scores, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found[0], scores)
