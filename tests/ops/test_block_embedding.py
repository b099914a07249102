"""cprec::block_embedding: the ten checks, in the order of every op's test file."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import Partition, accumulate_in_place, functional, use_backend
from cprec_kernels.reference import block_embedding as ref
from cprec_kernels.testing import assert_accurate, make_embedding, make_ids
from tests.called_ops import CalledOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense_table(partition, tables, projections):
    """The (K, d) table that the blocks stand for, built without the op."""
    remaining = iter(projections)
    full = [t if t.shape[1] == partition.embedding_dim else t @ next(remaining) for t in tables]
    return torch.cat(full)


def gradients(tables, projections, ids, upstream, **options):
    leaves = [[t.clone().requires_grad_() for t in group] for group in (tables, projections)]
    out = functional.block_embedding(ids, *leaves, **options)
    out.backward(upstream)
    return [[leaf.grad for leaf in group] for group in leaves]


# 1 forward


def test_forward_is_a_lookup_in_the_dense_table(case):
    tables, projections = make_embedding(case.partition, torch.float64)
    ids = make_ids(case.partition)
    out = functional.block_embedding(ids, tables, projections)
    expected = torch.nn.functional.embedding(ids, dense_table(case.partition, tables, projections))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_accuracy(case, dtype, cpu_backend, poison):
    tables, projections = make_embedding(case.partition, dtype)
    ids = make_ids(case.partition)
    truth = ref.block_embedding(ids, [t.double() for t in tables], [p.double() for p in projections])
    base = ref.block_embedding(ids, tables, projections)
    out = functional.block_embedding(ids, tables, projections)
    assert out.dtype == dtype
    assert_accurate(out, base, truth, dtype)


# 2 gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(case, dtype, sparse, cpu_backend, poison):
    tables, projections = make_embedding(case.partition, dtype)
    ids = make_ids(case.partition)
    upstream = torch.randn(*ids.shape, case.partition.embedding_dim).to(dtype)
    padding_idx = case.partition.num_items - 1

    wide = [[t.to(torch.float64, copy=True).requires_grad_() for t in group] for group in (tables, projections)]
    kept = (ids != padding_idx)[..., None]
    ref.block_embedding(ids, *wide).backward(upstream.double() * kept)
    base = ref.block_embedding_backward(upstream, ids, tables, projections, padding_idx, (True, True))
    ours = gradients(tables, projections, ids, upstream, sparse=sparse, padding_idx=padding_idx)
    for name, group, base_group, ours_group in zip(("E", "P"), wide, base, ours, strict=True):
        for j, leaf in enumerate(group):
            gradient = ours_group[j]
            if sparse and name == "E":
                rows = gradient._indices()[0]
                assert torch.equal(rows, rows.unique()), "rows must be ascending and unique"
                gradient = gradient.to_dense()
            truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            assert_accurate(gradient, base_group[j], truth, dtype, f"d{name}[{j}]")


def test_only_needed_gradients_are_computed(case, cpu_backend):
    tables, projections = make_embedding(case.partition)
    ids = make_ids(case.partition)
    tables[0].requires_grad_()
    functional.block_embedding(ids, tables, projections).sum().backward()
    assert tables[0].grad is not None
    assert all(t.grad is None for t in [*tables[1:], *projections])


def test_untouched_clusters_have_zero_gradients_not_none(cpu_backend, poison):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    (grad_tables, grad_projections) = gradients(tables, projections, torch.tensor([1, 2]), torch.ones(2, 8))
    assert grad_tables[0].abs().sum() > 0
    assert all(torch.count_nonzero(g) == 0 for g in [*grad_tables[1:], *grad_projections])


# 3 gradcheck


def test_gradcheck():
    partition = Partition(12, [2, 5], [4, 3, 1], 4)
    tables, projections = make_embedding(partition, torch.float64)
    ids = torch.tensor([[0, 2, 11], [11, 4, 1]])
    leaves = [t.requires_grad_() for t in [*tables, *projections]]
    assert torch.autograd.gradcheck(lambda *args: functional.block_embedding(ids, args[:3], args[3:]), leaves)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_second_derivative_is_refused_clearly(sparse):
    partition = Partition(12, [2, 5], [4, 3, 1], 4)
    tables, projections = make_embedding(partition)
    projections[0].requires_grad_()
    out = functional.block_embedding(torch.tensor([3, 11]), tables, projections, sparse=sparse)
    upstream = torch.ones_like(out, requires_grad=True)
    (first,) = torch.autograd.grad(out, projections[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="block_embedding is not twice differentiable"):
        first.sum().backward()


# 4 opcheck


def test_opcheck(case):
    tables, projections = make_embedding(case.partition)
    leaves = [[t.requires_grad_() for t in group] for group in (tables, projections)]
    ids = make_ids(case.partition)
    torch.library.opcheck(torch.ops.cprec.block_embedding.default, (ids, *leaves, None, False))
    grad = torch.randn(*ids.shape, case.partition.embedding_dim)
    plain = [[t.detach() for t in group] for group in leaves]
    args = (grad, ids, *plain, 3, [True, True])
    torch.library.opcheck(torch.ops.cprec.block_embedding_backward.default, args)
    # The sparse form's sizes depend on the data: documented as eager only, so not traced.
    torch.library.opcheck(
        torch.ops.cprec.block_embedding_backward_sparse.default, args, test_utils=("test_schema", "test_faketensor")
    )


# 5 compile and export


def test_compile_fullgraph_with_gradients():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition)
    leaves = [[t.requires_grad_() for t in group] for group in (tables, projections)]

    def step(ids):
        return functional.block_embedding(ids, *leaves, padding_idx=3).square().sum()

    eager = torch.autograd.grad(step(ids), leaves[0])
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(ids), leaves[0])
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


# 6 autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_and_fp32_gradients(dtype):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition)
    leaves = [[t.requires_grad_() for t in group] for group in (tables, projections)]
    with torch.autocast("cpu", dtype):
        out = functional.block_embedding(ids, *leaves)
    assert out.dtype == dtype
    assert torch.equal(out, functional.block_embedding(ids, *leaves).to(dtype))
    out.float().sum().backward()
    assert leaves[0][0].grad.dtype == torch.float32


# 7 strided and sliced inputs


def test_strided_inputs(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition, (6, 10))
    expected = functional.block_embedding(ids[:, ::2], tables, projections)
    wide = [torch.stack([t, t.new_full(t.shape, math.nan)], -1)[..., 0] for t in tables]
    transposed = [p.T.contiguous().T for p in projections]
    assert not wide[0].is_contiguous()
    assert not transposed[0].is_contiguous()
    out = functional.block_embedding(ids.T.contiguous().T[:, ::2], wide, transposed)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_gradients_that_are_not_contiguous(cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition, (6, 10))
    upstreams = (
        torch.randn(10, 6, 8).transpose(0, 1),
        torch.randn(8).expand(6, 10, 8),
        torch.ones(()).expand(6, 10, 8),
    )
    for upstream in upstreams:
        assert not upstream.is_contiguous()
        expected = gradients(tables, projections, ids, upstream.contiguous())
        for group, expected_group in zip(gradients(tables, projections, ids, upstream), expected, strict=True):
            for a, b in zip(group, expected_group, strict=True):
                assert torch.equal(a, b)


# 8 edges


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2), ()])
def test_empty_and_scalar_ids(shape, cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    leaves = [t.requires_grad_() for t in tables]
    out = functional.block_embedding(torch.zeros(shape, dtype=torch.int64), leaves, projections)
    assert out.shape == (*shape, 8)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tail_of_a_vector(width, dtype, cpu_backend, poison):
    partition = Partition(40, [11], [width, max(1, width // 3)], width)
    tables, projections = make_embedding(partition, dtype)
    for count in (1, 2, 3, 4, 5, 9):
        ids = make_ids(partition, (count,))
        truth = ref.block_embedding(ids, [t.double() for t in tables], [p.double() for p in projections])
        out = functional.block_embedding(ids, tables, projections)
        assert_accurate(out, ref.block_embedding(ids, tables, projections), truth, dtype)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=str)
def test_products_are_rounded_to_the_nearest_and_ties_to_even(dtype, bits, cpu_backend):
    """Bit for bit, of every significand with many others: products of two are exact in fp32."""
    significands = (1 + torch.arange(2**bits) / 2**bits).to(dtype)
    table, projection = significands[:, None], significands[None, :: 2**bits // 128][:, :37]
    out = functional.block_embedding(torch.arange(2**bits), [table], [projection])
    assert torch.equal(out, (table.float() @ projection.float()).to(dtype))


@pytest.mark.parametrize(("bad", "place"), [(-1, "[0, 1]"), (100, "[0, 1]"), (2**40, "[0, 1]")])
def test_an_id_out_of_range_is_named(bad, place, cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    with pytest.raises(IndexError, match=rf"ids\{place[:-1]}\] = {bad} is outside 0..99"):
        functional.block_embedding(torch.tensor([[0, bad]]), tables, projections)


@pytest.mark.parametrize("name", ["block_embedding_backward", "block_embedding_backward_sparse"])
def test_the_backward_checks_its_arguments(name, cpu_backend):
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    factors = make_embedding(partition)
    backward = getattr(torch.ops.cprec, name)
    with pytest.raises(IndexError, match=r"ids\[1\] = 100 is outside 0..99"):
        backward(torch.ones(2, 8), torch.tensor([0, 100]), *factors, None, [True, True])
    with pytest.raises(ValueError, match=r"grad is \(3, 8\) for ids of shape \(2,\)"):
        backward(torch.ones(3, 8), torch.tensor([0, 1]), *factors, None, [True, True])
    with pytest.raises(TypeError, match=r"grad is torch.bfloat16, embeddings are torch.float32"):
        backward(torch.ones(2, 8).bfloat16(), torch.tensor([0, 1]), *factors, None, [True, True])


def test_wrong_arguments_are_named():
    partition = Partition(100, [10, 50], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    ids = torch.tensor([1])
    with pytest.raises(TypeError, match="ids must be int64"):
        functional.block_embedding(ids.int(), tables, projections)
    with pytest.raises(ValueError, match=r"embeddings\[2\] has rank 2 below the width 8 and needs a projection"):
        functional.block_embedding(ids, tables, projections[:1])
    with pytest.raises(ValueError, match=r"projections\[0\] belongs to embeddings\[1\] and must be \(4, 8\)"):
        functional.block_embedding(ids, tables, projections[::-1])
    with pytest.raises(ValueError, match="3 projections were given and 2 are needed"):
        functional.block_embedding(ids, tables, [*projections, projections[0]])
    with pytest.raises(TypeError, match="must share one dtype"):
        functional.block_embedding(ids, [tables[0].double(), *tables[1:]], projections)
    with pytest.raises(ValueError, match="at least one table"):
        functional.block_embedding(ids, [], [])
    with pytest.raises(ValueError, match="padding_idx = 100"):
        functional.block_embedding(ids, tables, projections, padding_idx=100)
    with pytest.raises(TypeError, match="floating point"):
        functional.block_embedding(ids, [torch.ones(3, 3, dtype=torch.int32)])


# 9 determinism


def test_results_repeat_bit_for_bit(case, cpu_backend):
    tables, projections = make_embedding(case.partition)
    ids = make_ids(case.partition, (50, 40))
    upstream = torch.randn(*ids.shape, case.partition.embedding_dim)
    first = functional.block_embedding(ids, tables, projections)
    assert torch.equal(first, functional.block_embedding(ids, tables, projections))
    # A token's result does not depend on its neighbours; the reference's products, the BLAS library's, promise nothing.
    if cpu_backend != "reference":
        assert torch.equal(first[3:5], functional.block_embedding(ids[3:5], tables, projections))
    once, again = (gradients(tables, projections, ids, upstream) for _ in range(2))
    for a, b in zip(sum(once, []), sum(again, []), strict=True):
        assert torch.equal(a, b)


# 10 backends


def test_the_result_does_not_depend_on_the_number_of_threads(cpu_backend):
    partition = Partition(5000, [100, 1000], [64, 16, 4], 64)
    tables, projections = make_embedding(partition)
    ids = make_ids(partition, (2000,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(functional.block_embedding(ids, tables, projections))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_backends_agree_on_special_values(cpu_backend):
    """inf, NaN, subnormal and overflowing values convert alike everywhere."""
    partition = Partition(6, [2], [4, 2], 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tables, projections = make_embedding(partition, dtype)
        tables[1][0] = torch.tensor([math.inf, 1.0])
        tables[1][1] = torch.tensor([math.nan, 1.0])
        tables[1][2] = torch.tensor([6e-8, 0.0])
        tables[1][3] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).max])
        ids = torch.arange(6)
        with use_backend("reference"):
            expected = functional.block_embedding(ids, tables, projections)
        torch.testing.assert_close(functional.block_embedding(ids, tables, projections), expected, equal_nan=True)


def test_gradients_are_added_in_place(case, cpu_backend, poison):
    """As two backward passes add up in .grad by autograd; here without a gradient of their own."""
    ids = make_ids(case.partition)
    upstream = torch.randn(*ids.shape, case.partition.embedding_dim)

    def twice(in_place):
        tables, projections = make_embedding(case.partition)
        leaves = [tensor.requires_grad_() for tensor in (*tables, *projections)]
        accumulate_in_place(leaves, in_place)
        places = []
        with CalledOps() as called:
            for rows in (slice(0, 3), slice(3, None)):
                functional.block_embedding(ids[rows], tables, projections).backward(upstream[rows])
                places.append([table.grad.data_ptr() for table in tables])
        assert places[0] == places[1]
        # The first gradients make room for the second ones.
        assert called.count("block_embedding_backward_into") == in_place
        assert called.count("block_embedding_backward") == 2 - in_place
        return leaves

    for ours, expected in zip(twice(True), twice(False), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_see_gradients_of_tables_that_are_added_to_in_place(register, cpu_backend):
    partition = Partition(40, [10, 20], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    accumulate_in_place([tensor.requires_grad_() for tensor in tables])
    seen = []
    getattr(tables[1], register)(lambda given: seen.append(given if register == "register_hook" else given.grad))
    for _ in range(2):
        functional.block_embedding(torch.arange(40), tables, projections).sum().backward()
    assert len(seen) == 2
    assert all(gradient is not None for gradient in seen)


def test_gradients_in_place_are_left_alone_when_others_are_asked_for(cpu_backend):
    """backward(inputs=...) and autograd.grad, as adversarial training uses them."""
    partition = Partition(40, [10, 20], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    leaves = [tensor.requires_grad_() for tensor in (*tables, *projections)]
    accumulate_in_place(leaves)
    ids = torch.arange(40)

    def loss():
        return functional.block_embedding(ids, tables, projections).square().sum()

    loss().backward()
    before = [leaf.grad.clone() for leaf in leaves]
    loss().backward(inputs=[projections[0]])
    for leaf, grad in zip(leaves, before, strict=True):
        assert torch.equal(leaf.grad, grad * 2 if leaf is projections[0] else grad)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(grad, leaf.grad / (2 if leaf is projections[0] else 1))
    loss().backward(inputs=leaves)
    for leaf, grad in zip(leaves, before, strict=True):
        torch.testing.assert_close(leaf.grad, grad * (3 if leaf is projections[0] else 2))


def test_a_gradient_with_a_graph_is_never_added_in_place(cpu_backend):
    """It would carry no graph: a penalty on gradients would be left out without a word."""
    partition = Partition(40, [10, 20], [8, 4, 2], 8)
    tables, projections = make_embedding(partition)
    leaves = [tensor.requires_grad_() for tensor in (*tables, *projections)]
    accumulate_in_place(leaves)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    loss = functional.block_embedding(torch.arange(40), tables, projections).square().sum()
    loss.backward(create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        sum(leaf.grad.square().sum() for leaf in leaves).backward()


def test_gradients_add_up_after_one_that_has_a_graph(cpu_backend):
    tables, projections = make_embedding(Partition(40, [10, 20], [8, 4, 2], 8))
    leaves = [tensor.requires_grad_() for tensor in (*tables, *projections)]
    accumulate_in_place(leaves)
    functional.block_embedding(torch.arange(40), tables, projections).square().sum().backward(create_graph=True)
    once = [leaf.grad.detach().clone() for leaf in leaves]
    with CalledOps() as called:
        functional.block_embedding(torch.arange(40), tables, projections).square().sum().backward()
    assert "block_embedding_backward_into" not in called.names  # it writes behind the graph's back
    for leaf, before in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * before)
