"""The block embedding kernels at sizes where tiles, slabs and groups end raggedly, and their determinism."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels import Partition, functional
from cprec_kernels.reference import block_embedding as ref
from cprec_kernels.testing import assert_accurate, make_embedding, make_ids, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Projected clusters whose ranks end tiles of every height and width, an unprojected one, one that no token visits.
PARTITION = Partition(30_011, [301, 2_003, 8_003, 30_001], [57, 33, 19, 6, 3], 57)
NATIVE = torch.ops.cprec_native


def some_ids(kind: str, count: int, partition: Partition = PARTITION) -> torch.Tensor:
    """Ids with many duplicates and the edges of every cluster, with hardly any, or all the same."""
    visited = partition.offsets[-2]
    if kind == "skewed":
        return make_ids(partition, (count,)).clamp(max=visited - 1)
    if kind == "uniform":
        return torch.randint(visited, (count,))
    return torch.full((count,), {"same": 5, "same-projected": 2_500}[kind])


def with_threads(counts, function):
    """What ``function`` returns under each number of threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    return results


def dense_of(rows, values, tables):
    """Sparse gradients as dense ones; the rows must be ascending and unique."""
    for row in rows:
        assert torch.equal(row, row.unique())
    return [torch.zeros_like(t).index_put_((r,), v) for r, v, t in zip(rows, values, tables, strict=True)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Accuracy


@pytest.mark.parametrize("kind", ["skewed", "uniform", "same", "same-projected"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens(kind, dtype, cpu_isa, poison):
    """Slabs that end by groups and by tokens, several per partial sum, and tiles that end raggedly."""
    tables, projections = make_embedding(PARTITION, dtype)
    count = 9_001 if kind == "uniform" else 3_001
    ids, grad = some_ids(kind, count), torch.randn(count, 57).to(dtype)
    padding_idx = int(ids[100]) if kind in ("skewed", "uniform") else None
    args = (padding_idx, [True, True])
    truth = ref.block_embedding_backward(
        grad.double(), ids, [t.double() for t in tables], [p.double() for p in projections], *args
    )
    base = ref.block_embedding_backward(grad, ids, tables, projections, *args)
    dense = NATIVE.block_embedding_backward(grad, ids, tables, projections, *args)
    rows, values, d_projections = NATIVE.block_embedding_backward_sparse(grad, ids, tables, projections, *args)
    for name, group, base_group, truth_group in zip("EP", dense, base, truth, strict=True):
        for j, gradient in enumerate(group):
            assert gradient.dtype == dtype
            assert_accurate(gradient, base_group[j], truth_group[j], dtype, f"d{name}[{j}]")
    assert same(dense_of(rows, values, tables), dense[0])
    assert same(d_projections, dense[1])


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 64, 65, 129, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail_of_a_vector(width, dtype, cpu_isa, poison):
    partition = Partition(40, [11, 25], [width, max(1, width // 2), max(1, width // 9)], width)
    tables, projections = make_embedding(partition, dtype)
    wide = [t.double() for t in tables], [p.double() for p in projections]
    for count in (1, 2, 5, 97):
        ids, grad = make_ids(partition, (count,)), torch.randn(count, width).to(dtype)
        args = (None, [True, True])
        truth = ref.block_embedding_backward(grad.double(), ids, *wide, *args)
        base = ref.block_embedding_backward(grad, ids, tables, projections, *args)
        ours = NATIVE.block_embedding_backward(grad, ids, tables, projections, *args)
        for group, base_group, truth_group in zip(ours, base, truth, strict=True):
            for a, b, t in zip(group, base_group, truth_group, strict=True):
                assert_accurate(a, b, t, dtype)


def test_long_sums_keep_their_digits(cpu_isa):
    """300,000 tokens of one sign: one chain of additions in fp32 would be off by 1e-5 and more."""
    partition = Partition(50_000, [10], [8, 4], 8)
    tables, projections = make_embedding(partition)
    tables = [t.abs() for t in tables]
    grad = torch.rand(300_000, 8)
    for ids in (torch.full((300_000,), 3), torch.full((300_000,), 77), torch.randint(10, 50_000, (300_000,))):
        args = (ids, tables, projections, None, [True, True])
        wide = (ids, [t.double() for t in tables], [p.double() for p in projections], None, [True, True])
        truth = ref.block_embedding_backward(grad.double(), *wide)
        ours = NATIVE.block_embedding_backward(grad, *args)
        for group, truth_group in zip(ours, truth, strict=True):
            for a, t in zip(group, truth_group, strict=True):
                assert relative_error(a, t) < 3e-7


# The forward groups equal ids of large batches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["skewed", "uniform", "same", "same-projected"])
def test_grouping_changes_no_bit_of_the_forward(kind, dtype, cpu_isa, poison):
    partition = Partition(6_000, [301, 2_003], [63, 60, 35], 130)  # 35 * 130 multiplications: all can be grouped
    tables, projections = make_embedding(partition, dtype)
    ids = some_ids(kind, 40_003, partition)
    out = functional.block_embedding(ids, tables, projections)
    small = torch.cat([functional.block_embedding(part, tables, projections) for part in ids.split(101)])
    assert torch.equal(out, small)


def test_clusters_are_grouped_beside_those_that_are_not(cpu_isa, poison):
    """A cluster worth grouping between one without projection and one of too few multiplications."""
    partition = Partition(6_000, [301, 2_003], [96, 48, 3], 96)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition, (9_001,))
    out = functional.block_embedding(ids, tables, projections)
    small = torch.cat([functional.block_embedding(part, tables, projections) for part in ids.split(101)])
    assert torch.equal(out, small)
    assert_accurate(
        out,
        ref.block_embedding(ids, tables, projections),
        ref.block_embedding(ids, [t.double() for t in tables], [p.double() for p in projections]),
        torch.float32,
    )


# Determinism


@pytest.mark.parametrize("kind", ["skewed", "uniform", "same-projected"])
def test_results_do_not_depend_on_the_number_of_threads(kind, cpu_isa):
    tables, projections = make_embedding(PARTITION)
    ids, grad = some_ids(kind, 20_001), torch.randn(20_001, 57)

    def run():
        dense = NATIVE.block_embedding_backward(grad, ids, tables, projections, 7, [True, True])
        sparse = NATIVE.block_embedding_backward_sparse(grad, ids, tables, projections, 7, [True, True])
        return [functional.block_embedding(ids, tables, projections), *sum((*dense, *sparse), [])]

    first, *others = with_threads((1, 2, 3), run)
    assert all(same(first, other) for other in others)


def test_a_smaller_batch_after_a_larger_one_sees_nothing_of_it(cpu_isa):
    """Memory is kept between calls: what an earlier one left there must not show."""
    tables, projections = make_embedding(PARTITION)
    ids, grad = some_ids("skewed", 300), torch.randn(300, 57)
    args = (grad, ids, tables, projections, None, [True, True])
    first = sum(NATIVE.block_embedding_backward(*args), [])
    nan = torch.full((9_000, 57), torch.nan)
    NATIVE.block_embedding_backward(nan, some_ids("uniform", 9_000), tables, projections, None, [True, True])
    assert same(sum(NATIVE.block_embedding_backward(*args), []), first)


# What is asked for


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted_is_computed(mask, cpu_isa, poison):
    tables, projections = make_embedding(PARTITION)
    ids, grad = some_ids("skewed", 700), torch.randn(700, 57)
    args = (grad, ids, tables, projections, None)
    all_dense = NATIVE.block_embedding_backward(*args, [True, True])
    all_sparse = NATIVE.block_embedding_backward_sparse(*args, [True, True])
    for got, want, wanted in zip(NATIVE.block_embedding_backward(*args, mask), all_dense, mask, strict=True):
        assert same(got, want if wanted else [])
    sparse_mask = (mask[0], mask[0], mask[1])
    sparse = NATIVE.block_embedding_backward_sparse(*args, mask)
    for got, want, wanted in zip(sparse, all_sparse, sparse_mask, strict=True):
        assert same(got, want if wanted else [])


def test_padding_gives_no_gradient_even_where_it_is_nan(cpu_isa):
    tables, projections = make_embedding(PARTITION)
    ids, grad = some_ids("skewed", 700), torch.randn(700, 57)
    for padding_idx in (0, 301, 302, 30_000, 30_010):
        ids[::3] = padding_idx
        grad[::3] = torch.nan
        kept = ids != padding_idx
        got = NATIVE.block_embedding_backward(grad, ids, tables, projections, padding_idx, [True, True])
        want = NATIVE.block_embedding_backward(grad[kept], ids[kept], tables, projections, None, [True, True])
        assert same(sum(got, []), sum(want, []))


def test_gradients_in_any_layout(cpu_isa):
    tables, projections = make_embedding(PARTITION)
    ids = some_ids("skewed", 600).reshape(20, 30)
    layouts = {
        "sliced": torch.randn(20, 30, 61)[..., 2:59],
        "transposed": torch.randn(30, 20, 57).transpose(0, 1),
        "by columns": torch.randn(57, 20, 30).permute(1, 2, 0),
        "of a sum": torch.ones(()).expand(20, 30, 57),
        "of a sum over tokens": torch.randn(57).expand(20, 30, 57),
        "of a sum over the first axis": torch.randn(30, 57).expand(20, 30, 57),
    }
    for name, grad in layouts.items():
        want = NATIVE.block_embedding_backward(grad.contiguous(), ids, tables, projections, None, [True, True])
        got = NATIVE.block_embedding_backward(grad, ids, tables, projections, None, [True, True])
        assert same(sum(got, []), sum(want, [])), name


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_batches_and_a_single_id(shape, cpu_isa, poison):
    tables, projections = make_embedding(PARTITION)
    ids, grad = torch.full(shape, 400), torch.ones(*shape, 57)
    dense = NATIVE.block_embedding_backward(grad, ids, tables, projections, None, [True, True])
    rows, values, _ = NATIVE.block_embedding_backward_sparse(grad, ids, tables, projections, None, [True, True])
    assert [r.tolist() for r in rows] == [[], [99] if shape == () else [], [], [], []]
    assert [v.shape[1] for v in values] == list(PARTITION.ranks)
    assert all(gradient.isfinite().all() for gradient in sum(dense, []))
    assert sum(int(gradient.any()) for gradient in sum(dense, [])) == (2 if shape == () else 0)  # dE[1] and dP[0]


# Accumulation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_adds_the_dense_gradients(dtype, cpu_isa, poison):
    tables, projections = make_embedding(PARTITION, dtype)
    ids, grad = some_ids("skewed", 2_001), torch.randn(2_001, 57).to(dtype)
    inputs = (grad, ids, tables, projections, 7)
    wanted = NATIVE.block_embedding_backward(*inputs, [True, True])

    zeros = [[torch.zeros_like(t) for t in group] for group in (tables, projections)]
    NATIVE.block_embedding_backward_accumulate(*inputs, *zeros)
    assert all(same(got, want) for got, want in zip(zeros, wanted, strict=True))

    before = [[torch.randn(t.shape).to(dtype) for t in group] for group in (tables, projections)]
    held = [[t.clone() for t in group] for group in before]
    NATIVE.block_embedding_backward_accumulate(*inputs, *held)
    for old_group, group, gradient_group in zip(before, held, wanted, strict=True):
        for old, new, gradient in zip(old_group, group, gradient_group, strict=True):
            truth = old.double() + gradient.double()
            assert_accurate(new, old + gradient, truth, dtype)
            untouched = gradient == 0
            assert torch.equal(new[untouched], old[untouched])

    only = [torch.zeros_like(p) for p in projections]
    NATIVE.block_embedding_backward_accumulate(*inputs, [], only)
    assert same(only, zeros[1])


# Raw calls


def test_the_raw_backward_refuses_what_the_op_would_have(cpu_isa):
    """torch.ops.cprec_native is reachable without our checks: it must still neither read nor write out of bounds."""
    partition = Partition(20, [5], [4, 2], 4)
    tables, projections = make_embedding(partition)
    ids, grad = torch.tensor([0, 19]), torch.randn(2, 4)

    for op in (NATIVE.block_embedding_backward, NATIVE.block_embedding_backward_sparse):

        def call(grad=grad, ids=ids, tables=tables, projections=projections, op=op):
            return op(grad, ids, tables, projections, None, [True, True])

        assert len(call()) >= 2
        with pytest.raises(IndexError, match=r"ids\[1\] \(flattened\) = 20 is outside 0..19"):
            call(ids=torch.tensor([0, 20]))
        with pytest.raises(IndexError, match=r"ids\[0\] \(flattened\) = -1 is outside"):
            call(ids=torch.tensor([-1, 2]))
        for bad in (2**63 - 1, -(2**63), 2**32):
            with pytest.raises(IndexError, match=r"is outside 0..19"):
                call(ids=torch.tensor([0, bad]))
        with pytest.raises(TypeError, match="ids must be int64"):
            call(ids=ids.int())
        with pytest.raises(ValueError, match=r"grad must be \[2, 4\], got \[3, 4\]"):
            call(grad=torch.randn(3, 4))
        with pytest.raises(ValueError, match=r"grad must be \[2, 4\], got \[2, 3\]"):
            call(grad=torch.randn(2, 3))
        with pytest.raises(TypeError, match="grad is BFloat16, the tables are Float"):
            call(grad=grad.bfloat16())
        with pytest.raises(ValueError, match="needs a projection"):
            call(projections=[])
        with pytest.raises(TypeError, match="no kernel for Double"):
            call(grad.double(), ids, [t.double() for t in tables], [p.double() for p in projections])


def test_accumulation_refuses_tensors_that_do_not_fit(cpu_isa):
    partition = Partition(20, [5], [4, 2], 4)
    tables, projections = make_embedding(partition)
    held = [torch.zeros_like(t) for t in tables]

    def call(d_embeddings, ids=torch.tensor([0, 19]), d_projections=()):  # noqa: B008
        NATIVE.block_embedding_backward_accumulate(
            torch.ones(2, 4), ids, tables, projections, None, d_embeddings, list(d_projections)
        )

    with pytest.raises(IndexError, match=r"= 20 is outside 0..19"):
        call(held, torch.tensor([0, 20]))
    assert not any(t.any() for t in held), "nothing may be written before the ids are checked"
    with pytest.raises(ValueError, match="d_embeddings must hold 2 tensors or none, got 1"):
        call(held[:1])
    with pytest.raises(ValueError, match=r"d_embeddings\[1\] must be contiguous and \[15, 2\]"):
        call([held[0], torch.zeros(14, 2)])
    with pytest.raises(ValueError, match=r"d_embeddings\[1\] must be contiguous and \[15, 2\]"):
        call([held[0], torch.zeros(2, 15).T])
    with pytest.raises(TypeError, match=r"d_embeddings\[0\] is BFloat16"):
        call([held[0].bfloat16(), held[1]])
    with pytest.raises(ValueError, match=r"d_projections\[0\] must be contiguous and \[2, 4\]"):
        call([], d_projections=[torch.zeros(2, 3)])
