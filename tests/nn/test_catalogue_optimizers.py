"""A catalogue that changes: optimizers follow their parameters, and training goes on."""

from __future__ import annotations

import copy

import pytest
import torch

from cprec_kernels import Partition, optim
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss
from tests.nn.catalogue_modules import IDS, PARTITION, make_embedding, make_head

OPTIMIZERS = {
    "Adam": lambda p: [torch.optim.Adam(p, lr=0.01)],
    "AdamW": lambda p: [torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True)],
    "SGD": lambda p: [torch.optim.SGD(p, lr=0.01, momentum=0.9)],
    "Adagrad": lambda p: [torch.optim.Adagrad(p, lr=0.01)],
    "RowwiseAdamW": lambda p: [optim.RowwiseAdamW(p, lr=0.01, weight_decay=0.1)],
    "RowwiseAdagrad": lambda p: [optim.RowwiseAdagrad(p, lr=0.01)],
    "two": lambda p: [torch.optim.Adam(p[::2], lr=0.01), torch.optim.AdamW(p[1::2], lr=0.02)],
}


def step(modules, optimizers, ids):
    """One training step through both modules."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    embedding, head = modules
    head(embedding(ids), ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


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


def test_clusters_that_come_of_one_count_their_steps_each():
    head = make_head()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    hidden, target = torch.randn(8, 16, dtype=torch.float64), torch.arange(8) + 30
    head(hidden, target).loss.backward()
    optimizer.step()
    head.repartition(partition=Partition(60, [10, 30, 45], [16, 6, 3, 3], 16), optimizer=optimizer)
    optimizer.zero_grad()
    head(hidden, target).loss.backward()
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in head.parameters()] == [2.0] * 11


def test_names_of_parameters_that_an_optimizer_was_given_go_along():
    embedding = make_embedding()
    optimizer = torch.optim.Adam(embedding.named_parameters(), lr=0.01)
    embedding.repartition(partition=Partition(60, [5, 20, 40], [16, 8, 4, 2], 16), optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"]) == 7
    assert len(set(group["param_names"])) == 7
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_table_that_was_shared_is_not_lost_unnoticed():
    """Changing one of two modules that share tables parts them: the other one's would learn nowhere."""
    partition = Partition(100, [10, 40], [16, 8, 4], 16)
    embedding, head = BlockEmbedding(partition), ClusteredSoftmaxWithLoss(16, partition)
    for j in (1, 2):
        head.weights[j] = embedding.embeddings[j]
    every = {id(p): p for p in [*embedding.parameters(), *head.parameters()]}
    optimizer = torch.optim.Adam(every.values())
    embedding.extend(1, optimizer=optimizer)
    before = [parameter.shape for parameter in head.parameters()]
    with pytest.raises(ValueError, match=r"a parameter of shape \(60, 4\) is in none of the optimizers"):
        head.extend(1, optimizer=optimizer)
    assert [parameter.shape for parameter in head.parameters()] == before
    with pytest.raises(ValueError, match="pass all optimizers that train this module"):
        embedding.extend(1, optimizer=torch.optim.Adam(embedding.projections.parameters()))


def test_sparse_momentum_is_refused_before_anything_changes():
    embedding = BlockEmbedding(PARTITION, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        embedding(IDS).sum().backward()
        optimizer.step()
    before = list(embedding.parameters())
    states = len(optimizer.state)
    with pytest.raises(ValueError, match=r"SGD keeps 'momentum_buffer' as torch\.sparse_coo.*to_dense"):
        embedding.extend(5, optimizer=optimizer)
    assert embedding.partition == PARTITION
    assert all(one is other for one, other in zip(before, embedding.parameters(), strict=True))
    assert len(optimizer.state) == states
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to_dense()
    embedding.extend(5, optimizer=optimizer)
    assert embedding.partition.num_items == PARTITION.num_items + 5


def test_new_rows_start_with_no_first_moment_and_the_mean_second_one():
    embedding = make_embedding()
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.01)
    embedding(torch.randint(60, (40,))).square().sum().backward()
    optimizer.step()
    mean = optimizer.state[embedding.embeddings[2]]["exp_avg_sq"].mean()
    assert mean > 0
    embedding.extend(3, optimizer=optimizer)
    state = optimizer.state[embedding.embeddings[2]]
    torch.testing.assert_close(state["exp_avg_sq"][-3:], mean.expand(3, 3))
    assert torch.count_nonzero(state["exp_avg"][-3:]) == 0


def test_moments_of_equal_biases_go_along_with_their_items():
    """Biases that stand still, as in a warm-up from zero, are equal: their items are told apart by the moments alone."""
    head = ClusteredSoftmaxWithLoss(8, Partition(4, [2], [8, 4], 8), head_bias=True, tail_bias=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9)
    head(torch.randn(16, 8), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3] * 2)).loss.backward()
    optimizer.step()
    before = optimizer.state[head.head_bias]["momentum_buffer"].clone()
    change = head.repartition([1.0, 9.0, 1.0, 1.0], head.partition, optimizer=optimizer)
    assert change.old_ids.tolist()[:2] == [1, 0]
    assert not head.head_bias[:2].any()
    after = optimizer.state[head.head_bias]["momentum_buffer"]
    assert torch.equal(after[:2], before[[1, 0]])
