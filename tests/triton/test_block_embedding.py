"""The Triton block embedding against fp64, interpreted on CPU tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from cprec_kernels import Partition, _backend, accumulate_in_place, functional
from cprec_kernels._triton import block_embedding as forward
from cprec_kernels._triton import block_embedding_backward as backward
from cprec_kernels._triton import block_embedding_projection as projection
from cprec_kernels._triton import common
from cprec_kernels.reference import block_embedding as ref
from cprec_kernels.testing import assert_accurate, assert_all_accurate, make_embedding, make_ids

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = (
    "block_embedding",
    "block_embedding_backward",
    "block_embedding_backward_sparse",
    "block_embedding_backward_into",
)
SMALL = Partition(100, [10, 50], [8, 4, 2], 8)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Runs cross several chunks, walks take several steps, and every loop repeats, with few tokens."""
    small = forward.Blocks(tokens=16, columns=16, rank=16, k=16)
    monkeypatch.setattr(forward, "BLOCKS", small)
    monkeypatch.setattr(forward, "FP32_BLOCKS", small)
    monkeypatch.setattr(backward, "RUNS", backward.RunBlocks(chunk=4, columns=16, walk=2))
    monkeypatch.setattr(projection, "SPLIT_TOKENS", 16)


def wide(group):
    return [tensor.double() for tensor in group]


def check_gradients(partition, ids, dtype, padding_idx=None, spread=1.0):
    """Dense, added and sparse gradients of one batch by the tolerance rule; returns the dense ones."""
    factors = make_embedding(partition, dtype)
    upstream = (torch.randn(*ids.shape, partition.embedding_dim) * spread).to(dtype)
    truth = ref.block_embedding_backward(
        upstream.double(), ids, *(wide(group) for group in factors), padding_idx, (True, True)
    )
    base = ref.block_embedding_backward(upstream, ids, *factors, padding_idx, (True, True))
    arguments = (upstream, ids, *factors, padding_idx)
    ours = backward.block_embedding_backward(*arguments, (True, True))
    for name, group, base_group, true_group in zip("EP", ours, base, truth, strict=True):
        for gradient in group:
            assert gradient.dtype == dtype
            assert gradient.is_contiguous()
        assert_all_accurate(group, base_group, true_group, dtype, f"d{name}")
    rows, values, d_projections = backward.block_embedding_backward_sparse(*arguments, (True, True))
    true_rows = ref.block_embedding_backward_sparse(
        upstream.double(), ids, *map(wide, factors), padding_idx, (True, True)
    )[0]
    for row, value, dense, true_row in zip(rows, values, ours[0], true_rows, strict=True):
        assert torch.equal(row, true_row)
        assert torch.equal(value, dense[row]), "sparse and dense gradients are sums of the same order"
    assert all(torch.equal(a, b) for a, b in zip(d_projections, ours[1], strict=True))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(case, dtype, poison):
    tables, projections = make_embedding(case.partition, dtype)
    ids = make_ids(case.partition)
    truth = ref.block_embedding(ids, wide(tables), wide(projections))
    out = forward.block_embedding(ids, tables, projections, None, False)
    assert out.dtype == dtype
    assert_accurate(out, ref.block_embedding(ids, tables, projections), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(case, dtype, poison):
    check_gradients(case.partition, make_ids(case.partition), dtype, padding_idx=case.partition.num_items - 1)


@pytest.mark.parametrize("padding_idx", [None, 0, 10, 49, 99])
def test_the_padding_id_gives_no_gradient(padding_idx, poison):
    ids = torch.tensor([0, 0, 10, 10, 49, 99, 99, 99, 99, 99, 3])
    d_embeddings, _ = check_gradients(SMALL, ids, torch.float32, padding_idx)
    if padding_idx is not None:
        assert not torch.cat([g.flatten(1).sum(1) for g in d_embeddings])[padding_idx].any()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize("item", [0, 9, 10, 49, 50, 99])
def test_one_id_many_times(count, item, poison):
    """Runs that end in, at and far beyond the chunk of 4 they begin in."""
    check_gradients(SMALL, torch.full((count,), item), torch.float32)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 1, 4), (5, 3, 8), (1, 9, 2), (2, 4, 2, 12), (1, 2, 3, 4, 5, 6)])
def test_runs_that_meet_the_edges_of_chunks(lengths, poison):
    items = [9, 10, 11, 49, 50, 99]
    ids = torch.cat([torch.full((length,), item) for item, length in zip(items, lengths, strict=False)])
    check_gradients(SMALL, ids[torch.randperm(len(ids))], torch.float32)


def test_padding_between_and_behind_chunks(poison):
    """The padding id's tokens end the last run, wherever they fall."""
    for padding in range(6):
        ids = torch.cat([torch.full((6,), 99), torch.full((padding,), 3), torch.full((5,), 60)])
        check_gradients(SMALL, ids, torch.float32, padding_idx=3)
    grads, projections = check_gradients(SMALL, torch.full((7,), 3), torch.float32, padding_idx=3)
    assert not any(g.any() for g in (*grads, *projections))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2), ()])
@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True), (False, False)])
def test_empty_and_scalar_ids(shape, mask, poison):
    tables, projections = make_embedding(SMALL)
    ids = torch.zeros(shape, dtype=torch.int64)
    assert forward.block_embedding(ids, tables, projections, None, False).shape == (*shape, 8)
    arguments = (torch.ones(*shape, 8), ids, tables, projections, None, mask)
    ours = backward.block_embedding_backward(*arguments)
    expected = ref.block_embedding_backward(*arguments)
    assert [len(group) for group in ours] == [3 * mask[0], 2 * mask[1]]
    for a, b in zip(sum(ours, []), sum(expected, []), strict=True):
        torch.testing.assert_close(a, b)
    sparse, true_sparse = (module.block_embedding_backward_sparse(*arguments) for module in (backward, ref))
    for a, b in zip(sum(sparse, []), sum(true_sparse, []), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 31, 33, 65])
def test_odd_widths_and_ranks(width, poison):
    partition = Partition(40, [11, 12], [width, max(1, width // 2), max(1, width // 5)], width)
    for dtype in DTYPES:
        tables, projections = make_embedding(partition, dtype)
        ids = make_ids(partition, (9,))
        truth = ref.block_embedding(ids, wide(tables), wide(projections))
        out = forward.block_embedding(ids, tables, projections, None, False)
        assert_accurate(out, ref.block_embedding(ids, tables, projections), truth, dtype)
        check_gradients(partition, ids, dtype)


def test_frozen_blocks_compute_the_same(monkeypatch, poison):
    """The sizes that run on a device, not those that tests can afford many of."""
    monkeypatch.undo()
    partition = Partition(300, [40, 120], [80, 33, 5], 80)
    ids = make_ids(partition, (150,))
    for dtype in DTYPES:
        tables, projections = make_embedding(partition, dtype)
        truth = ref.block_embedding(ids, wide(tables), wide(projections))
        out = forward.block_embedding(ids, tables, projections, None, False)
        assert_accurate(out, ref.block_embedding(ids, tables, projections), truth, dtype)
        check_gradients(partition, ids, dtype, padding_idx=5)


def test_gradients_are_added_to_what_is_there(poison):
    tables, projections = make_embedding(SMALL)
    ids = make_ids(SMALL)
    upstream = torch.randn(*ids.shape, 8)
    fresh, d_projections = backward.block_embedding_backward(upstream, ids, tables, projections, 3, (True, True))
    there = [torch.randn_like(table) for table in tables]
    for want in (False, True):
        target = [tensor.clone() for tensor in there]
        own = backward.block_embedding_backward_into(upstream, ids, tables, projections, 3, target, want)
        assert len(own) == 2 * want
        assert all(torch.equal(a, b) for a, b in zip(own, d_projections, strict=False))
        for a, b, c in zip(target, there, fresh, strict=True):
            assert torch.equal(a, b + c)


def test_strided_inputs(poison):
    tables, projections = make_embedding(SMALL)
    ids = make_ids(SMALL, (6, 10))
    strided = [torch.stack([t, t.new_full(t.shape, math.nan)], -1)[..., 0] for t in tables]
    turned = [p.T.contiguous().T for p in projections]
    expected = forward.block_embedding(ids[:, ::2], tables, projections, None, False)
    out = forward.block_embedding(ids.T.contiguous().T[:, ::2], strided, turned, None, False)
    assert torch.equal(out, expected)
    for upstream in (torch.randn(10, 6, 8).transpose(0, 1), torch.ones(()).expand(6, 10, 8)):
        ours = backward.block_embedding_backward(upstream, ids, strided, turned, None, (True, True))
        plain = backward.block_embedding_backward(upstream.contiguous(), ids, tables, projections, None, (True, True))
        assert all(torch.equal(a, b) for a, b in zip(sum(ours, []), sum(plain, []), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy, in the interpreter
def test_infinities_stay_where_they_belong(poison):
    """A tile holds tokens of several clusters and rows: none may be touched by another's infinity."""
    tables, projections = make_embedding(SMALL)
    projections[1][:] = math.inf
    tables[1][3, 0] = math.nan
    ids = torch.tensor([1, 13, 60, 14, 2, 10])
    with torch.no_grad():
        expected = ref.block_embedding(ids, tables, projections)
    out = forward.block_embedding(ids, tables, projections, None, False)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out[[0, 3, 4, 5]].isfinite().all()
    upstream = torch.ones(6, 8)
    upstream[1] = math.inf
    upstream[0, 3] = math.nan
    (d_embeddings, _) = backward.block_embedding_backward(upstream, ids, tables, projections, None, (True, False))
    finite = torch.cat([g.isfinite().all(1) for g in d_embeddings])
    assert finite.logical_not().nonzero().flatten().tolist() == [1, 13, 60]


def test_the_order_of_programs_does_not_matter(monkeypatch, poison):
    """Programs run one after another here and at once on a device: run backwards, they must give the same bits."""
    from triton.runtime import interpreter

    partition = Partition(60, [7, 30], [20, 18, 3], 20)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition, (70,))
    upstream = torch.randn(70, 20)

    def run():
        out = forward.block_embedding(ids, tables, projections, None, False)
        return [out, *sum(backward.block_embedding_backward(upstream, ids, tables, projections, 3, (True, True)), [])]

    expected, builder = run(), interpreter.interpreter_builder
    place, set_dim = builder.set_grid_idx, builder.set_grid_dim
    dims = []
    monkeypatch.setattr(builder, "set_grid_dim", lambda *grid: (dims.append(grid), set_dim(*grid))[1])
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda *at: place(*(n - 1 - i for n, i in zip(dims[-1], at, strict=True)))
    )
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert max(math.prod(grid) for grid in dims) > 20


def test_bits_depend_on_the_token_alone():
    """A token's embedding is the same in any batch, and so is a row's gradient under tokens of other rows."""
    tables, projections = make_embedding(SMALL)
    ids = make_ids(SMALL, (40,))
    out = forward.block_embedding(ids, tables, projections, None, False)
    assert torch.equal(out[13:17], forward.block_embedding(ids[13:17], tables, projections, None, False))
    upstream = torch.randn(40, 8)
    mask = (True, True)
    whole, _ = backward.block_embedding_backward(upstream, ids, tables, projections, None, mask)
    own = (ids == ids[13]).nonzero().squeeze(1)
    alone, _ = backward.block_embedding_backward(upstream[own], ids[own], tables, projections, None, mask)
    cluster = SMALL.cluster_of(int(ids[13]))
    row = int(ids[13]) - SMALL.offsets[cluster]
    assert alone[cluster][row].any()
    assert torch.equal(alone[cluster][row], whole[cluster][row])


# Through the ops


def test_order_of_preference_on_a_device():
    for op in OPS:
        names = [i.backend for i in _backend._OPS[op] if i.device_types is None or "cuda" in i.device_types]
        assert names == [*(["native"] if op == "block_embedding" else []), "triton", "reference"]


@pytest.mark.parametrize("sparse", [False, True])
def test_autograd_through_the_ops(through_triton, sparse, poison):
    ids = make_ids(SMALL)
    upstream = torch.randn(*ids.shape, 8)
    leaves = [[t.requires_grad_() for t in group] for group in make_embedding(SMALL)]
    functional.block_embedding(ids, *leaves, sparse=sparse, padding_idx=3).backward(upstream)
    factors = make_embedding(SMALL)
    expected = ref.block_embedding_backward(upstream, ids, *factors, 3, (True, True))
    for group, expected_group in zip(leaves, expected, strict=True):
        for leaf, gradient in zip(group, expected_group, strict=True):
            own = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
            torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-5)


def test_only_needed_gradients_are_computed(through_triton, monkeypatch):
    ids = make_ids(SMALL)
    called = []
    for name in ("sum_runs", "d_projections"):
        method = getattr(backward.SortedBatch, name)
        monkeypatch.setattr(
            backward.SortedBatch, name, lambda *args, _n=name, _m=method: (called.append(_n), _m(*args))[1]
        )
    for group, expected in ((0, ["sum_runs"]), (1, ["d_projections"])):
        factors = make_embedding(SMALL)
        factors[group][0].requires_grad_()
        functional.block_embedding(ids, *factors).sum().backward()
        assert called == expected
        assert factors[group][0].grad is not None
        called.clear()


def test_in_place_accumulation_through_the_ops(through_triton):
    ids = make_ids(SMALL)
    tables, projections = make_embedding(SMALL)
    leaves = [tensor.requires_grad_() for tensor in (*tables, *projections)]
    accumulate_in_place(leaves)
    for _ in range(2):
        functional.block_embedding(ids, tables, projections).sum().backward()
    expected = ref.block_embedding_backward(torch.ones(*ids.shape, 8), ids, *make_embedding(SMALL), None, (True, True))
    for leaf, gradient in zip(leaves, sum(expected, []), strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=1e-5, atol=1e-5)


def test_nothing_is_read_by_the_host_in_the_dense_path():
    """Plan and launches follow from shapes: under fake tensors a read of a value would raise. Launches do nothing."""
    with common.rehearse() as launches, FakeTensorMode():
        factors = make_embedding_like(SMALL)
        ids, upstream = torch.zeros(30, dtype=torch.int64), torch.ones(30, 8)
        forward.block_embedding(ids, *factors, None, False)
        backward.block_embedding_backward(upstream, ids, *factors, 3, (True, True))
        backward.block_embedding_backward_into(
            upstream, ids, *factors, 3, [torch.ones_like(t) for t in factors[0]], True
        )
    assert len({launch.kernel for launch in launches}) == 6


def make_embedding_like(partition):
    width = partition.embedding_dim
    tables = [torch.ones(k, r) for k, r in zip(partition.sizes, partition.ranks, strict=True)]
    return tables, [torch.ones(partition.ranks[j], width) for j in partition.projected]
