"""A catalogue that changes: extend, remove and repartition on BlockEmbedding and ClusteredSoftmaxWithLoss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cprec_kernels import Partition, optim
from cprec_kernels.nn import (
    BlockEmbedding,
    ClusteredSoftmaxWithLoss,
    ReindexedEmbedding,
    ReindexedSoftmax,
    TiedBlocks,
)

PARTITION = Partition(60, [10, 30], [16, 6, 3], 16)
IDS = torch.arange(60)


def make_embedding(padding=False, **options):
    partition = PARTITION.with_padding() if padding else PARTITION
    return BlockEmbedding(partition, padding_idx=-1 if padding else None, dtype=torch.float64, **options)


def make_head(bias=True, partition=PARTITION):
    head = ClusteredSoftmaxWithLoss(16, partition, head_bias=bias, tail_bias=bias, dtype=torch.float64)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def logits(head, hidden):
    """Every item's logit in its level, and the parents' (N, n - 1)."""
    parts, parents, left = [], None, iter(head.projections)
    for j, weight in enumerate(head.weights):
        z = hidden if weight.shape[1] == head.in_features else hidden @ next(left).T
        part = z @ weight.T
        bias = head.head_bias if j == 0 else head.tail_biases[j - 1] if len(head.tail_biases) else None
        part = part if bias is None else part + bias
        if j == 0:
            size = head.partition.sizes[0]
            part, parents = part[:, :size], part[:, size:]
        parts.append(part)
    return torch.cat(parts, 1).detach(), parents.detach()


def assert_same(ours, theirs):
    """Equal up to the order of a product's sums, which its shape decides."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def step(modules, optimizers, ids):
    """One training step through both modules."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    embedding, head = modules
    head(embedding(ids), ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


# extend


@pytest.mark.parametrize("padding", [True, False])
def test_extending_keeps_what_is_there(padding):
    embedding, head = make_embedding(padding), make_head()
    before, hidden = embedding(IDS), torch.randn(5, 16, dtype=torch.float64)
    scores, parents = logits(head, hidden)
    untouched = [
        *embedding.embeddings[:-1],
        *embedding.projections,
        *head.weights[:-1],
        *head.projections,
        head.head_bias,
    ]
    changes = [embedding.extend(7), head.extend(7)]
    for change in changes:
        assert change.partition == Partition(67, [10, 30], [16, 6, 3], 16)
        assert change.old_ids.tolist() == [*range(60), *[-1] * 7]
        assert change.new_ids.tolist() == list(range(60))
        assert change.errors == (0.0, 0.0, 0.0)
    assert changes[1].parent_errors == (0.0, 0.0)
    assert torch.equal(embedding(IDS), before)
    torch.testing.assert_close(embedding(torch.arange(60, 67)), before[30:].mean(0).expand(7, -1))
    after, new_parents = logits(head, hidden)
    assert_same(after[:, :60], scores)
    assert_same(new_parents, parents)
    assert head(hidden, torch.tensor([66] * 5)).output.isfinite().all()
    now = [*embedding.embeddings[:-1], *embedding.projections, *head.weights[:-1], *head.projections, head.head_bias]
    assert all(a is b for a, b in zip(now, untouched, strict=True))
    if padding:
        assert embedding.padding_idx == 67
        assert torch.count_nonzero(embedding(torch.tensor([67]))) == 0
        embedding(torch.tensor([66, 67])).sum().backward()
        assert torch.count_nonzero(embedding.embeddings[-1].grad[-1]) == 0


def test_extending_a_plain_table_and_softmax():
    single = Partition.single(20, 16)
    embedding, head = BlockEmbedding(single), make_head(partition=single)
    hidden = torch.randn(5, 16, dtype=torch.float64)
    before = logits(head, hidden)[0]
    embedding.extend(3)
    head.extend(3)
    assert embedding(torch.tensor([22])).shape == (1, 16)
    assert torch.equal(logits(head, hidden)[0][:, :20], before)
    assert head.extend(0).partition.num_items == 23


# remove


@pytest.mark.parametrize("padding", [True, False])
def test_removing_keeps_the_others(padding):
    embedding, head = make_embedding(padding), make_head()
    gone = [0, 9, 10, 31, 59, 59]
    left = torch.tensor([i for i in range(60) if i not in gone])
    before, hidden = embedding(left), torch.randn(5, 16, dtype=torch.float64)
    scores, parents = logits(head, hidden)
    for module in (embedding, head):
        change = module.remove(gone)
        assert change.partition == Partition(55, [8, 27], [16, 6, 3], 16)
        assert torch.equal(change.old_ids, left)
        assert change.new_ids[gone[:5]].tolist() == [-1] * 5
        assert torch.equal(change.new_ids[left], torch.arange(55))
    assert torch.equal(embedding(torch.arange(55)), before)
    after, new_parents = logits(head, hidden)
    assert_same(after, scores[:, left])
    assert_same(new_parents, parents)
    if padding:
        assert torch.count_nonzero(embedding(torch.tensor([55]))) == 0


def test_removing_from_the_head_renormalises_and_changes_nothing_else():
    """p(x) becomes p(x) / (1 - p(removed)): the head's log-sum-exp is all that changes."""
    head, hidden = make_head(), torch.randn(5, 16, dtype=torch.float64)
    log_prob = head.log_prob(hidden).detach()
    left = [i for i in range(60) if i not in (3, 4)]
    head.remove(torch.tensor([4, 3]))
    torch.testing.assert_close(head.log_prob(hidden), log_prob[:, left].log_softmax(1))


def test_a_tail_without_items_goes():
    embedding, head = make_embedding(), make_head()
    hidden = torch.randn(5, 16, dtype=torch.float64)
    left = torch.tensor([*range(10), *range(30, 60)])
    before, (scores, parents) = embedding(left), logits(head, hidden)
    for module in (embedding, head):
        assert module.remove(list(range(10, 30))).partition == Partition(40, [10], [16, 3], 16)
    assert torch.equal(embedding(torch.arange(40)), before)
    after, new_parents = logits(head, hidden)
    assert_same(after, scores[:, left])
    assert_same(new_parents, parents[:, 1:])
    torch.testing.assert_close(head.log_prob(hidden).exp().sum(1), torch.ones(5, dtype=torch.float64))


def test_padding_goes_along_when_its_cluster_goes():
    embedding = make_embedding(padding=True)
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.01)
    embedding(IDS).square().sum().backward()
    optimizer.step()
    before, moments = embedding(IDS[:30]).detach(), optimizer.state[embedding.embeddings[1]]["exp_avg"].clone()
    change = embedding.remove(list(range(30, 60)), optimizer=optimizer)
    assert change.errors == (0.0, 0.0)
    assert torch.equal(embedding(IDS[:30]), before)
    assert torch.count_nonzero(embedding(torch.tensor([30]))) == 0
    assert torch.equal(optimizer.state[embedding.embeddings[1]]["exp_avg"][:20], moments)


# repartition


@pytest.mark.parametrize("padding", [True, False])
def test_items_that_stay_in_their_cluster_are_kept_bit_for_bit(padding):
    """New counts that reorder within clusters alone."""
    embedding, head = make_embedding(padding), make_head()
    counts = torch.cat([torch.randperm(size) + offset for size, offset in ((10, 200), (20, 100), (30, 0))])
    order = torch.argsort(counts, descending=True)
    before, hidden = embedding(order), torch.randn(5, 16, dtype=torch.float64)
    log_prob = head.log_prob(hidden).detach()
    for module in (embedding, head):
        change = module.repartition(counts)
        assert torch.equal(change.old_ids, order)
        assert change.errors == (0.0, 0.0, 0.0)
    assert change.parent_errors == (0.0, 0.0)
    assert torch.equal(embedding(IDS), before)
    torch.testing.assert_close(head.log_prob(hidden), log_prob[:, order], rtol=1e-13, atol=1e-13)


def test_embeddings_are_exact_where_the_rank_allows_it():
    """Every new cluster is wide enough for what its items span: 6 + 3 columns of two clusters fit into 9."""
    embedding = make_embedding(padding=True)
    before = embedding(IDS).detach()
    change = embedding.repartition(partition=Partition(60, [25], [16, 9], 16))
    assert max(change.errors) < 1e-14
    torch.testing.assert_close(embedding(IDS), before, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(embedding(torch.tensor([60]))) == 0
    wider = make_embedding()
    before = wider(IDS).detach()
    wider.repartition(partition=Partition(60, [10, 30], [16, 12, 5], 16))
    torch.testing.assert_close(wider(IDS), before, rtol=1e-12, atol=1e-12)


def test_embeddings_are_the_best_there_are_otherwise_and_the_error_says_so():
    embedding = make_embedding()
    counts = torch.randperm(60).double() + 1
    order = torch.argsort(counts, descending=True)
    before = embedding(order).detach()
    change = embedding.repartition(counts, Partition(60, [10, 30], [16, 4, 2], 16))
    after = embedding(IDS).detach()
    torch.testing.assert_close(after[:10], before[:10])
    for (lo, hi), rank, error in zip(((10, 30), (30, 60)), (4, 2), change.errors[1:], strict=True):
        weights = counts[order[lo:hi]].sqrt()[:, None]
        left = (weights * (after[lo:hi] - before[lo:hi])).norm()
        values = torch.linalg.svdvals(weights * before[lo:hi])
        torch.testing.assert_close(left, values[rank:].norm())
        assert math.isclose(error, values[rank:].norm() / values.norm(), rel_tol=1e-9)


def test_a_softmax_moves_items_between_levels_as_well_as_a_linear_function_can():
    torch.manual_seed(2)
    hidden = torch.randn(4000, 16, dtype=torch.float64)
    counts = torch.randperm(60).double() + 1
    order = torch.argsort(counts, descending=True)
    errors = {}
    for given in (False, True):
        torch.manual_seed(5)
        head = make_head()
        expected = head.log_prob(hidden).detach()[:, order]
        full = Partition(60, [10, 30], [16, 16, 16], 16)
        change = head.repartition(counts, full, inputs=hidden[:2000] if given else None)
        assert max(change.errors) < 1e-12
        errors[given] = (head.log_prob(hidden[2000:]) - expected[2000:]).square().mean().sqrt()
        assert [math.isnan(error) for error in change.parent_errors] == [not given] * 2
    untouched = expected.std()
    assert errors[True] < errors[False] < untouched / 2
    assert errors[True] < untouched / 4


def test_splitting_and_merging_tails():
    hidden = torch.randn(3000, 16, dtype=torch.float64)
    head = make_head()
    expected, (scores, _) = head.log_prob(hidden).detach(), logits(head, hidden)
    change = head.repartition(partition=Partition(60, [10, 30, 45], [16, 6, 3, 3], 16), inputs=hidden)
    assert change.errors == (0.0,) * 4  # rows are kept
    assert change.parent_errors[0] == 0.0
    assert 0 < change.parent_errors[1] < 0.15
    assert_same(logits(head, hidden)[0], scores)
    assert (head.log_prob(hidden) - expected).abs().max() < 0.5
    assert (head.log_prob(hidden) - expected).square().mean().sqrt() < 0.1
    merged = head.repartition(partition=Partition(60, [10, 30], [16, 6, 3], 16), inputs=hidden)
    assert merged.errors[2] < 1.0
    assert (head.log_prob(hidden) - expected).square().mean().sqrt() < 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_every_case_of_clusters_gives_a_softmax(case, bias):
    head = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, case.partition, head_bias=bias, tail_bias=bias)
    embedding = BlockEmbedding(case.partition.with_padding(), padding_idx=-1)
    counts = torch.rand(case.partition.num_items)
    hidden = torch.randn(20, case.partition.embedding_dim)
    for module in (head, embedding):
        module.repartition(counts)
        module.extend(3)
        module.remove([0] if case.partition.sizes[0] > 1 else [case.partition.num_items - 1])
    assert head.partition.num_items == case.partition.num_items + 2
    assert embedding.partition == head.partition.with_padding()
    torch.testing.assert_close(head.log_prob(hidden).exp().sum(1), torch.ones(20))
    head(hidden, torch.randint(head.n_classes, (20,))).loss.backward()
    fresh = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, head.partition, head_bias=bias, tail_bias=bias)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.log_prob(hidden), head.log_prob(hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_extending_and_removing_keep_the_rest_in_every_case_of_clusters(case, bias):
    partition, width = case.partition, case.partition.embedding_dim
    head = ClusteredSoftmaxWithLoss(width, partition, head_bias=bias, tail_bias=bias, dtype=torch.float64)
    embedding = BlockEmbedding(partition.with_padding(), padding_idx=-1, dtype=torch.float64)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(7, width, dtype=torch.float64)
    ids = torch.arange(partition.num_items)
    (scores, parents), before = logits(head, hidden), embedding(ids).detach()
    # the last item of every cluster of more than one
    gone = [hi - 1 for lo, hi in zip(partition.offsets, partition.offsets[1:], strict=False) if hi - lo > 1]
    left = torch.tensor([i for i in ids.tolist() if i not in gone])
    for module in (head, embedding):
        module.extend(2)
        change = module.remove(gone)
        assert set(change.errors) == {0.0}
    after, new_parents = logits(head, hidden)
    assert_same(after[:, : len(left)], scores[:, left])
    assert_same(new_parents, parents)
    assert_same(embedding(torch.arange(len(left))).detach(), before[left])
    assert torch.count_nonzero(embedding(torch.tensor([len(left) + 2]))) == 0


# Optimizers

OPTIMIZERS = {
    "Adam": lambda p: [torch.optim.Adam(p, lr=0.01)],
    "AdamW": lambda p: [torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True)],
    "SGD": lambda p: [torch.optim.SGD(p, lr=0.01, momentum=0.9)],
    "Adagrad": lambda p: [torch.optim.Adagrad(p, lr=0.01)],
    "RowwiseAdamW": lambda p: [optim.RowwiseAdamW(p, lr=0.01, weight_decay=0.1)],
    "RowwiseAdagrad": lambda p: [optim.RowwiseAdagrad(p, lr=0.01)],
    "two": lambda p: [torch.optim.Adam(p[::2], lr=0.01), torch.optim.AdamW(p[1::2], lr=0.02)],
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_if_removed_items_had_never_been(kind):
    """Items that never occur as inputs and targets of the rows that are compared: dense Adam's state follows every row."""
    embedding, head = make_embedding(padding=True), make_head()
    optimizers = OPTIMIZERS[kind]([*embedding.parameters(), *head.parameters()])
    for seed in range(3):
        torch.manual_seed(seed)
        step((embedding, head), optimizers, torch.randint(60, (40,)))
    old = {id(p): copy.deepcopy(dict(o.state[p])) for o in optimizers for g in o.param_groups for p in g["params"]}
    table, weight, label = embedding.embeddings[1], head.weights[1], head.head_bias
    settings = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    gone = [2, 12, 40]
    embedding.remove(gone, optimizer=optimizers)
    head.remove(gone, optimizer=optimizers)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in [*embedding.parameters(), *head.parameters()]}
    assert settings == [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    left = torch.tensor([i for i in range(20) if i != 2])
    for before, now, rows in (
        (table, embedding.embeddings[1], left),
        (weight, head.weights[1], left),
        (label, head.head_bias, torch.tensor([i for i in range(12) if i != 2])),
    ):
        state = next(o.state[now] for o in optimizers if now in o.state)
        assert set(state) == set(old[id(before)])
        for name, value in state.items():
            was = old[id(before)][name]
            if name != "row_log_decay" and name != "log_decay":
                assert torch.equal(value, was[rows] if value.dim() else was), name
    for _ in range(3):
        step((embedding, head), optimizers, torch.randint(57, (40,)))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_new_rows_start_gently(kind):
    embedding, head = make_embedding(), make_head()
    optimizers = OPTIMIZERS[kind]([*embedding.parameters(), *head.parameters()])
    for seed in range(5):
        torch.manual_seed(seed)
        step((embedding, head), optimizers, torch.randint(60, (40,)))
    for module in (embedding, head):
        module.extend(4, optimizer=optimizers)
    before = head.weights[2].detach().clone()
    step((embedding, head), optimizers, torch.tensor([*range(60, 64), *range(30, 60)]))
    moved = (head.weights[2].detach() - before).norm(dim=1)
    assert (moved[-4:] > 0).all()
    assert moved[-4:].max() < 6 * moved[:-4].max()
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_sparse_gradients_and_their_optimizers():
    for make in (
        lambda p: torch.optim.SparseAdam(p, lr=0.01),
        lambda p: optim.RowwiseAdamW(p, lr=0.01, weight_decay=0.1),
    ):
        embedding = make_embedding(sparse=True)
        optimizer, rest = make(list(embedding.embeddings)), torch.optim.Adam(list(embedding.projections), lr=0.01)
        for _ in range(3):
            embedding(torch.randint(60, (9,))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        twin, twin_state = copy.deepcopy(embedding), copy.deepcopy(optimizer.state_dict())
        other = make(list(twin.embeddings))
        other.load_state_dict(twin_state)
        if hasattr(other, "apply_pending_decay"):
            other.apply_pending_decay()
        change = embedding.remove([3, 33], optimizer=[optimizer, rest])
        ids = torch.tensor([1, 4, 12, 40, 59])
        for table, steps, where in ((embedding, optimizer, change.new_ids[ids]), (twin, other, ids)):
            table(where).square().sum().backward()
            steps.step()
        assert torch.equal(embedding(change.new_ids[ids]), twin(ids))


def test_clusters_that_come_and_go_take_their_parameters_along():
    embedding, head = make_embedding(), make_head()
    params = [*embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.01)
    step((embedding, head), [optimizer], IDS)
    for partition in (Partition(60, [5, 20, 40], [16, 8, 4, 2], 16), Partition(60, [30], [12, 3], 16), PARTITION):
        for module in (embedding, head):
            module.repartition(torch.rand(60), partition, optimizer=optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held})
        assert {id(p) for p in held} == {id(p) for p in [*embedding.parameters(), *head.parameters()]}
        assert set(optimizer.state) <= set(held)
        step((embedding, head), [optimizer], IDS)


def test_names_of_parameters_that_an_optimizer_was_given_go_along():
    embedding = make_embedding()
    optimizer = torch.optim.Adam(embedding.named_parameters(), lr=0.01)
    embedding.repartition(partition=Partition(60, [5, 20, 40], [16, 8, 4, 2], 16), optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"]) == 7
    assert len(set(group["param_names"])) == 7
    optimizer.load_state_dict(optimizer.state_dict())


# Refusals


def test_what_cannot_be_done_is_named_and_changes_nothing():
    embedding, head = make_embedding(), make_head()
    before = [p.clone() for p in [*embedding.parameters(), *head.parameters()]]
    for module in (embedding, head):
        cases = [
            (lambda m=module: m.remove(list(range(10))), ValueError, "all 10 items of cluster 0 would go"),
            (lambda m=module: m.remove([60]), IndexError, "item 60 is outside 0..59"),
            (lambda m=module: m.remove([0.5]), TypeError, "items must be integers"),
            (lambda m=module: m.extend(-1), ValueError, "at least 0, got -1"),
            (lambda m=module: m.extend(1.5), TypeError, "must be an int, got 1.5"),
            (lambda m=module: m.repartition(), ValueError, "give new counts, a new partition, or both"),
            (lambda m=module: m.repartition(torch.ones(59)), ValueError, r"counts must be \(60,\), one per item, got shape \(59,\)"),
            (lambda m=module: m.repartition(-torch.ones(60)), ValueError, "finite and not negative"),
            (lambda m=module: m.repartition(partition=Partition.single(61, 16)), ValueError, "num_items = 61, the module 60"),
            (lambda m=module: m.extend(1, optimizer="adam"), TypeError, "must be a torch.optim.Optimizer, got str"),
        ]  # fmt: skip
        for call, error, message in cases:
            with pytest.raises(error, match=message):
                call()
    with pytest.raises(ValueError, match=r"inputs must be \(N, 16\)"):
        head.repartition(torch.ones(60), inputs=torch.randn(3, 15))
    optimizer = torch.optim.Rprop(head.parameters())
    head(torch.randn(3, 16, dtype=torch.float64), torch.tensor([0, 15, 50])).loss.backward()
    optimizer.step()
    before[5:] = [p.clone() for p in head.parameters()]
    with pytest.raises(ValueError, match="Rprop keeps 'prev'"):
        head.extend(3, optimizer=optimizer)
    after = [*embedding.parameters(), *head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(ValueError, match="the padding id is 0 among 60"):
        BlockEmbedding(PARTITION, padding_idx=0).extend(1)


def test_a_part_of_a_larger_module_is_not_changed_behind_its_back():
    embedding, head, tied = make_embedding(), make_head(), TiedBlocks(PARTITION)
    ReindexedEmbedding(embedding, IDS)
    ReindexedSoftmax(head, IDS)
    for module, owner in ((embedding, "Embedding"), (head, "Softmax"), (tied.embedding, "TiedBlocks")):
        with pytest.raises(RuntimeError, match=f"part of a .*{owner}"):
            module.extend(1)
