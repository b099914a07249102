"""Weight decay that waits for its row: exact whatever the learning rates, gaps, restarts and order of calls."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding
from cprec_kernels.optim import RowwiseAdagrad, RowwiseAdamW
from cprec_kernels.testing import assert_accurate

ROWS, WIDTH, STEPS = 23, 5, 60
BETAS, EPS, DECAY = (0.8, 0.95), 1e-4, 0.7


def learning_rate(step):
    """Warm-up, waves, and a step of zero: nothing that a constant could stand for."""
    return 0.0 if step == 17 else 0.2 * min(1.0, (step + 1) / 10) * (1 + math.cos(step)) / 2


def batch(step):
    """Ids of a step, some twice. Row 22 comes in the first step and in the last only, row 21 never."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(6 if step % 3 else 20, (8,), generator=generator)
    return torch.cat([ids, torch.tensor([22])]) if step in (0, STEPS - 1) else ids


def loss_of(table, ids, targets):
    """Its gradient depends on the rows it reads: reading stale ones shows."""
    return (functional.embedding(ids, table) - targets).square().sum() / 2


def targets_of(step, dtype):
    return torch.randn(batch(step).numel(), WIDTH, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def initial_table():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))


def dense_loop(dtype):
    """Dense decay and SparseAdam's moments, spelled out row by row."""
    table = initial_table().to(dtype)
    m, v = torch.zeros_like(table), torch.zeros_like(table)
    for step in range(STEPS):
        ids, targets, lr = batch(step), targets_of(step, dtype), learning_rate(step)
        grad = torch.zeros_like(table).index_add_(0, ids, table[ids] - targets)
        table = table - lr * DECAY * table  # every row
        for row in ids.unique().tolist():
            m[row] += (1 - BETAS[0]) * (grad[row] - m[row])
            v[row] = BETAS[1] * v[row] + (1 - BETAS[1]) * grad[row] ** 2
            m_hat, v_hat = m[row] / (1 - BETAS[0] ** (step + 1)), v[row] / (1 - BETAS[1] ** (step + 1))
            table[row] -= lr * m_hat / (v_hat.sqrt() + EPS)
    return table


def train_rows(*, catch_up=True, dtype=torch.float32, before_step=lambda *_: None):
    table = initial_table().to(dtype).requires_grad_()
    optimizer = RowwiseAdamW([table], lr=1.0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    for step in range(STEPS):
        ids = batch(step)
        if catch_up:
            optimizer.catch_up(table, ids)
        optimizer.zero_grad()
        leaf = table.detach().requires_grad_()
        loss_of(leaf, ids, targets_of(step, dtype)).backward()
        rows = ids.unique()
        table.grad = torch.sparse_coo_tensor(rows[None], leaf.grad[rows], table.shape)
        before_step(optimizer, table, step)
        optimizer.step()
        scheduler.step()
    optimizer.apply_pending_decay()
    return table.detach()


def test_with_rows_caught_up_it_is_dense_decay(cpu_backend):
    truth, base = dense_loop(torch.float64), dense_loop(torch.float32)
    assert_accurate(train_rows(), base, truth, torch.float32)


def test_the_test_above_sees_rows_that_were_not_caught_up():
    truth, base = dense_loop(torch.float64), dense_loop(torch.float32)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(train_rows(catch_up=False), base, truth, torch.float32)


def test_bringing_everything_up_to_date_in_between_changes_nothing_but_roundings(cpu_backend):
    truth, base = dense_loop(torch.float64), dense_loop(torch.float32)

    def flush(optimizer, table, step):
        if step % 7 == 3:
            optimizer.apply_pending_decay()
            assert float(optimizer.state[table]["log_decay"]) == 0

    assert_accurate(train_rows(before_step=flush), base, truth, torch.float32)


def test_a_dense_gradient_among_sparse_ones(cpu_backend):
    """It takes the pending decay along, and leaves none."""
    expected, table = torch.ones(6, 2, dtype=torch.float64), torch.ones(6, 2).requires_grad_()
    optimizer = RowwiseAdamW([table], lr=0.1, weight_decay=0.5)
    for kind in ("rows", "rows", "dense", "rows"):
        table.grad = torch.zeros(6, 2)
        if kind == "rows":
            table.grad = torch.sparse_coo_tensor([[1]], torch.zeros(1, 2), (6, 2))
        optimizer.step()
        expected *= 0.95
        if kind == "dense":
            torch.testing.assert_close(table.detach().double(), expected, rtol=1e-6, atol=0)
    optimizer.apply_pending_decay()
    torch.testing.assert_close(table.detach().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [RowwiseAdamW, RowwiseAdagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_gives_the_same_bits_whether_its_rows_were_caught_up_or_not(kind, dtype, cpu_backend):
    tables = [initial_table().to(dtype).requires_grad_() for _ in range(2)]
    optimizers = [kind([table], lr=0.1, weight_decay=1.0) for table in tables]
    for step in range(STEPS):
        ids = batch(step)
        optimizers[0].catch_up(tables[0], ids)
        rows = ids.unique()
        values = torch.randn(rows.numel(), WIDTH).to(dtype)
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape)
            optimizer.step()
    assert torch.equal(*tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_absence_loses_no_digit(dtype, cpu_backend):
    """200,000 steps of 1e-5: applied one by one in fp32 they would be off in the fifth digit, in bf16 have no effect."""
    table = torch.full((3, 4), 2.0, dtype=dtype).requires_grad_()
    optimizer = RowwiseAdamW([table], lr=1e-3, weight_decay=1e-2)
    table.grad = torch.sparse_coo_tensor([[0]], torch.zeros(1, 4, dtype=dtype), table.shape)
    optimizer.step()
    state = optimizer.state[table]
    for _ in range(199_999):  # what a step adds up for rows that it does not name
        state["log_decay"] += math.log1p(-1e-3 * 1e-2)
    optimizer.catch_up(table, torch.tensor([2]))
    expected = 2.0 * (1 - 1e-5) ** 200_000
    assert abs(table[2, 0].item() / expected - 1) < (2e-7 if dtype == torch.float32 else 4e-3)
    assert table[1, 0].item() == 2.0  # nobody asked for it


def test_a_tiny_decay_is_not_lost_in_the_factor(cpu_backend):
    """1 - 1e-6 is 0.3 % wrong in fp32, 1e-6 is not."""
    table = torch.ones(4000, 4).mul_(torch.rand(4000, 1) + 1).requires_grad_()
    before = table.detach().double()
    optimizer = RowwiseAdamW([table], lr=1e-3, weight_decay=1e-3)
    table.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 4), table.shape)
    optimizer.step()
    optimizer.apply_pending_decay()
    lost = float((1 - table.detach().double() / before).mean())
    assert abs(lost / 1e-6 - 1) < 1e-2


def test_decay_that_begins_later_starts_then(cpu_backend):
    table = torch.ones(4, 2).requires_grad_()
    optimizer = RowwiseAdamW([table], lr=0.1, weight_decay=0.0)
    for weight_decay in (0.0, 0.5, 0.0, 0.25):
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        table.grad = torch.sparse_coo_tensor([[1]], torch.zeros(1, 2), (4, 2))
        optimizer.step()
    optimizer.apply_pending_decay()
    torch.testing.assert_close(table.detach(), torch.full((4, 2), 0.95 * 0.975))


def test_catch_up_costs_nothing_and_still_checks_where_nothing_is_pending():
    table = torch.ones(4, 2).requires_grad_()
    optimizer = RowwiseAdamW([table])
    optimizer.catch_up(table, torch.tensor([[0, 3], [3, 3]]))
    for _ in range(2):
        with pytest.raises(IndexError, match=r"rows\[1\] = 4 is outside 0..3"):
            optimizer.catch_up(table, torch.tensor([0, 4]))
        with pytest.raises(TypeError, match="rows must be int64"):
            optimizer.catch_up(table, torch.tensor([0], dtype=torch.int32))
        table.grad = torch.sparse_coo_tensor([[1]], torch.zeros(1, 2), (4, 2))
        optimizer.step()
    with pytest.raises(ValueError, match=r"shape \(4, 2\) is not one of this optimizer's"):
        optimizer.catch_up(torch.ones(4, 2), torch.tensor([0]))


# Block embeddings


def test_prepare_brings_exactly_the_rows_up_to_date_that_are_read(cpu_backend):
    embedding = BlockEmbedding(Partition(20, [4, 10], [6, 3, 2], 6), sparse=True)
    optimizer = RowwiseAdamW(embedding.parameters(), lr=0.1, weight_decay=0.5)
    embedding(torch.tensor([0, 5, 12])).sum().backward()
    optimizer.step()
    before = [table.detach().clone() for table in embedding.embeddings]
    optimizer.prepare(embedding, torch.tensor([[3, 3, 19], [0, 4, 12]]))
    moved = [
        (table.detach() != old).any(1).nonzero().flatten().tolist()
        for table, old in zip(embedding.embeddings, before, strict=True)
    ]
    assert moved == [[3], [0], [9]]  # 0, 5 and 12 were up to date
    torch.testing.assert_close(embedding.embeddings[0][3], before[0][3] * 0.95)
    with pytest.raises(TypeError, match="prepare takes a BlockEmbedding, got Embedding"):
        optimizer.prepare(torch.nn.Embedding(3, 2), torch.tensor([0]))
    with pytest.raises(TypeError, match="ids must be int64"):
        optimizer.prepare(embedding, torch.tensor([0.0]))


def test_sparse_and_dense_training_of_a_block_embedding_agree_without_momentum(cpu_backend):
    """With betas of 0 the moments of an untouched row cannot matter: AdamW on dense gradients is the same algorithm."""
    tables = {}
    for sparse in (False, True):
        torch.manual_seed(3)
        embedding = BlockEmbedding(Partition(20, [4, 10], [6, 3, 2], 6), sparse=sparse)
        options = {"lr": 0.05, "betas": (0.0, 0.0), "eps": 0.5, "weight_decay": 0.5}
        optimizer = (RowwiseAdamW if sparse else torch.optim.AdamW)(embedding.parameters(), **options)
        for step in range(20):
            ids = torch.randint(20, (6,), generator=torch.Generator().manual_seed(step))
            if sparse:
                optimizer.prepare(embedding, ids)
            optimizer.zero_grad()
            embedding(ids).square().sum().backward()
            optimizer.step()
        if sparse:
            optimizer.apply_pending_decay()
        tables[sparse] = [p.detach() for p in embedding.parameters()]
    for ours, theirs in zip(tables[True], tables[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
