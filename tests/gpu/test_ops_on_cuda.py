"""Every op on CUDA tensors against fp64 on the CPU. Deselected unless asked for: ``pytest -m gpu`` on a machine with one."""

from __future__ import annotations

import copy

import pytest
import torch

from cprec_kernels import Partition, accumulate_in_place, functional, use_backend
from cprec_kernels.functional import Weights
from cprec_kernels.nn import BlockEmbedding
from cprec_kernels.optim import RowwiseAdagrad, RowwiseAdamW
from cprec_kernels.reference import block_embedding as ref_embedding
from cprec_kernels.testing import (
    assert_accurate,
    assert_all_accurate,
    assert_same_items,
    copy_weights,
    make_embedding,
    make_ids,
    make_softmax,
    make_targets,
    weight_tensors,
)

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_embedding(case, dtype):
    tables, projections = make_embedding(case.partition, dtype)
    ids = make_ids(case.partition)
    truth = ref_embedding.block_embedding(ids, [t.double() for t in tables], [p.double() for p in projections])
    base = ref_embedding.block_embedding(ids, tables, projections)
    leaves = [[t.cuda().requires_grad_() for t in group] for group in (tables, projections)]
    out = functional.block_embedding(ids.cuda(), *leaves)
    assert out.dtype == dtype
    assert_accurate(out, base, truth, dtype)
    out.backward(torch.ones_like(out))
    expected = ref_embedding.block_embedding_backward(
        torch.ones_like(truth), ids, [t.double() for t in tables], [p.double() for p in projections], None, (True, True)
    )
    base_gradients = ref_embedding.block_embedding_backward(
        torch.ones_like(base), ids, tables, projections, None, (True, True)
    )
    for group, base_group, true_group in zip(leaves, base_gradients, expected, strict=True):
        for leaf, b, t in zip(group, base_group, true_group, strict=True):
            assert_accurate(leaf.grad, b, t, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clustered_softmax(case, dtype):
    weights = make_softmax(case.partition, dtype)
    target = make_targets(case.partition, (63,))
    hidden = torch.randn(63, case.partition.embedding_dim).to(dtype)
    upstream = torch.randn(2, 63)

    def outputs_and_gradients(device, dtype):
        leaves = copy_weights(weights, dtype, device, requires_grad=True)
        states = hidden.to(device, dtype, copy=True).requires_grad_()
        found = functional.clustered_target_log_prob(states, target.to(device), leaves, smooth=True)
        sum((out * up.to(out)).sum() for out, up in zip(found, upstream, strict=True)).backward()
        return [*found, states.grad, *(leaf.grad for leaf in weight_tensors(leaves))]

    with use_backend("reference"):
        truth, base = (outputs_and_gradients("cpu", kind) for kind in (torch.float64, dtype))
    assert_all_accurate([value.cpu() for value in outputs_and_gradients("cuda", dtype)], base, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gradients_of_an_embedding_with_padding(sparse, dtype):
    """And added in place, where they are dense."""
    partition = Partition(3_000, [200, 900], [64, 16, 4], 64)
    here = BlockEmbedding(partition, padding_idx=2_999, sparse=sparse, dtype=dtype)
    ids = make_ids(partition, (40, 25))
    ids[:, 20:] = 2_999
    upstream = torch.randn(40, 25, 64).to(dtype)

    def gradients(device, dtype, times=1):
        block = copy.deepcopy(here).to(device, dtype)
        accumulate_in_place(block.parameters(), times > 1)
        for _ in range(times):
            block(ids.to(device)).backward(upstream.to(device, dtype))
        return [parameter.grad.to_dense().cpu() for parameter in block.parameters()]

    with use_backend("reference"):
        truth, base = (gradients("cpu", kind) for kind in (torch.float64, dtype))
    ours = gradients("cuda", dtype)
    assert_all_accurate(ours, base, truth, dtype)
    assert not ours[2][-1].any()
    if not sparse:
        twice = [value * 2 for value in truth]
        assert_all_accurate(gradients("cuda", dtype, 2), [value * 2 for value in base], twice, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_rank_and_score(case, dtype):
    weights = make_softmax(case.partition, dtype)
    hidden = torch.randn(9, case.partition.embedding_dim).to(dtype)
    log_prob = functional.clustered_log_prob(hidden.double(), copy_weights(weights, torch.float64))
    there = copy_weights(weights, device="cuda")
    # Products of fp32 are split or rounded, and projected hidden states are rounded to 16 bits.
    band = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for k in {1, min(10, case.partition.num_items), case.partition.num_items}:
        scores, items = functional.clustered_topk(hidden.cuda(), k, there)
        assert_same_items(items.cpu(), scores.cpu(), log_prob, band)
        own = log_prob.gather(1, items[:, k - 1 :].cpu())
        rank = functional.clustered_rank(hidden.cuda(), items[:, k - 1], there).cpu()
        assert ((log_prob > own + band).sum(1) <= rank).all()
        assert (rank < (log_prob >= own - band).sum(1)).all()
        given = functional.clustered_score(hidden.cuda(), items, there)
        torch.testing.assert_close(given.cpu().double(), log_prob.gather(1, items.cpu()), rtol=0, atol=band)


@pytest.mark.parametrize("shape", ["padded", "csr"])
def test_topk_narrowed(case, shape):
    weights, num_items = make_softmax(case.partition, logit_std=2.0), case.partition.num_items
    hidden = torch.randn(300, case.partition.embedding_dim)
    log_prob = functional.clustered_log_prob(hidden.double(), copy_weights(weights, torch.float64))
    exclude = log_prob.argsort(1, descending=True)[:, : min(7, num_items)]
    candidates = torch.arange(0, num_items, 2)
    log_prob.scatter_(1, exclude, -torch.inf)
    log_prob[:, 1::2] = -torch.inf
    given = exclude.cuda()
    if shape == "csr":
        given = torch.arange(301).cuda() * exclude.shape[1], exclude.flatten().cuda()
    scores, items = functional.clustered_topk(
        hidden.cuda(),
        min(5, num_items),
        copy_weights(weights, device="cuda"),
        exclude=given,
        candidates=candidates.cuda(),
    )
    assert_same_items(items.cpu(), scores.cpu(), log_prob, 1e-4)


def test_rows_that_tie_beyond_their_room_are_searched_all_the_same():
    partition = Partition(5000, [1000], [32, 16], 32)
    zero = Weights(*(group and [torch.zeros_like(t) for t in group] for group in make_softmax(partition, bias=False)))
    _, items = functional.clustered_topk(torch.randn(70, 32).cuda(), 12, copy_weights(zero, device="cuda"))
    assert (items.cpu() == torch.arange(12)).all()


def test_a_search_gives_the_same_bits_and_never_waits_for_the_device(case):
    weights = copy_weights(make_softmax(case.partition), device="cuda")
    hidden, seen = torch.randn(70, case.partition.embedding_dim).cuda(), make_ids(case.partition, (70, 3)).cuda()

    def results():
        found = functional.clustered_topk(hidden, min(5, case.partition.num_items), weights, exclude=seen)
        ranks = functional.clustered_rank(hidden, seen[:, 0], weights)
        return *found, ranks, functional.clustered_score(hidden, seen, weights)

    expected = results()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [results() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found in again:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [RowwiseAdamW, RowwiseAdagrad])
def test_row_optimizers(kind, dtype):
    """Sparse and dense gradients in turn, with decay that waits: as on the CPU."""
    results = {}
    for name, device, wide in (("truth", "cpu", torch.float64), ("base", "cpu", dtype), ("ours", "cuda", dtype)):
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(50, 7, generator=generator).to(dtype).to(device, wide).requires_grad_()
        optimizer = kind([table], lr=0.1, weight_decay=0.5)
        for step in range(12):
            rows = torch.randperm(50, generator=generator)[:9].sort().values
            values = torch.randn(9, 7, generator=generator).to(dtype).to(device, wide)
            grad = torch.sparse_coo_tensor(rows[None].to(device), values, table.shape)
            optimizer.catch_up(table, rows.to(device).repeat(2))
            table.grad = grad.to_dense() if step == 6 else grad
            optimizer.step()
        optimizer.apply_pending_decay()
        results[name] = table
    assert_accurate(results["ours"], results["base"], results["truth"], dtype)


def test_a_training_step_never_waits_for_the_device(case):
    weights = copy_weights(make_softmax(case.partition), device="cuda", requires_grad=True)
    embedding = [[t.cuda().requires_grad_() for t in group] for group in make_embedding(case.partition)]
    ids, target = make_ids(case.partition).cuda(), make_targets(case.partition).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = functional.block_embedding(ids, *embedding)
        functional.clustered_cross_entropy(hidden, target, weights, label_smoothing=0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(w.grad is not None for w in (*weights.weights, *embedding[0]))
