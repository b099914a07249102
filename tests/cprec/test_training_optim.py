"""Optimisers, clipping, warm-up and the order of batches."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cprec.batches import EpochBatches, ResumableBatches, ordered_batches
from cprec.lightning_module import TrainingModule
from cprec.model import NextItNet, NextItNetConfig
from cprec.optim import (
    build_optimizer,
    clip_gradients,
    finish_steps,
    parameter_groups,
    prepare_step,
    warmup_factor,
)
from cprec_kernels.optim import RowwiseAdamW


def tiny_model(sparse=False, **options):
    torch.manual_seed(0)
    config = NextItNetConfig.from_plan(
        30, 8, [5, 12], [8, 4, 2], dilations=(1,), head_bias=True, tail_bias=True, sparse_embedding=sparse, **options
    )
    return NextItNet(config)


def windows(seed=0):
    return torch.randint(0, 30, (6, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharing", ["none", "cross-layer"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(sharing):
    model = tiny_model(sparse=True, sharing=sharing)
    decayed, plain, sparse = parameter_groups(model)
    grouped = [id(parameter) for parameter in (*decayed, *plain, *sparse)]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in sparse} == {id(table) for table in model.embedding.embeddings}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" not in names[id(parameter)] and "bias" not in names[id(parameter)] for parameter in decayed)
    assert {id(model.softmax.head_bias), *map(id, model.softmax.tail_biases)} <= {id(parameter) for parameter in plain}
    assert any("norm" in names[id(parameter)] for parameter in plain)


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_frozen_or_normalises_is_not_decayed(sparse):
    model = tiny_model(sparse=sparse)
    model.extra = torch.nn.LayerNorm((3, 4))  # its weights have two dimensions
    frozen = [model.softmax.weights[1], model.embedding.embeddings[0]]
    for parameter in frozen:
        parameter.requires_grad_(False)
    decayed, plain, tables = ({id(parameter) for parameter in group} for group in parameter_groups(model))
    assert {id(model.extra.weight), id(model.extra.bias)} <= plain
    assert not (decayed | plain | tables) & set(map(id, frozen))


def test_decay_moves_matrices_alone():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {id(parameter) for parameter in parameter_groups(model)[0]}
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.95 if id(parameter) in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def steps(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        prepare_step(optimizer, model.embedding, windows(seed)[:, :-1])
        model.loss(windows(seed)).backward()
        optimizer.step()


def test_sparse_tables_train_on_one_device(monkeypatch):
    monkeypatch.setattr(TrainingModule, "trainer", SimpleNamespace(world_size=2))
    TrainingModule(tiny_model(), None, None).setup("fit")
    with pytest.raises(ValueError, match="sparse_embedding trains on one device, not 2"):
        TrainingModule(tiny_model(sparse=True), None, None).setup("fit")


def test_sparse_tables_move_in_the_rows_of_the_batch_and_decay_in_all():
    model = tiny_model(sparse=True)
    before = [table.detach().clone() for table in model.embedding.embeddings]
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
    assert isinstance(optimizer, RowwiseAdamW)
    model.loss(torch.tensor([[1, 7, 20, 2]])).backward()
    optimizer.step()
    own = ([1], [7 - 5], [20 - 12])  # item 2 is a target only
    moved = [
        (table.detach() != old).any(1).nonzero().flatten().tolist()
        for table, old in zip(model.embedding.embeddings, before, strict=True)
    ]
    assert tuple(moved) == own
    finish_steps(optimizer)
    for table, old, rows in zip(model.embedding.embeddings, before, own, strict=True):
        others = torch.ones(len(table), dtype=torch.bool).index_fill(0, torch.tensor(rows), False)
        torch.testing.assert_close(table.detach()[others], old[others] * 0.99)


def test_a_dense_model_is_prepared_and_finished_by_doing_nothing():
    model = tiny_model()
    optimizer = build_optimizer(model, 0.01, 0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    steps(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    finish_steps(optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sparse_and_dense_training_see_the_same_parameters_while_every_item_is_in_the_batch():
    """Then no row ever waits, and SparseAdam's moments are Adam's."""
    batch = torch.arange(30).repeat(2, 2)  # every item is read
    models = [tiny_model(), tiny_model(sparse=True)]
    for model in models:
        optimizer = build_optimizer(model, 0.01, 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            prepare_step(optimizer, model.embedding, batch[:, :-1])
            model.loss(batch).backward()
            optimizer.step()
        finish_steps(optimizer)
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        padding = int(name == "embedding.embeddings.2")  # decays from zero to zero
        torch.testing.assert_close(
            one[: len(one) - padding], other[: len(one) - padding], rtol=1e-4, atol=1e-5, msg=name
        )


def test_a_saved_state_continues_exactly_with_decay_still_waiting():
    whole = tiny_model(sparse=True)
    optimizer = build_optimizer(whole, 0.01, 0.1)
    steps(whole, optimizer, range(3))
    half = copy.deepcopy(whole)
    resumed = build_optimizer(half, 0.01, 0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, range(3, 6))
    steps(half, resumed, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name]), name


def test_a_schedule_reaches_all_groups_also_after_loading():
    model = tiny_model(sparse=True)
    optimizer = build_optimizer(model, 0.01, 0.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005] * 3
    assert scheduler.get_last_lr() == [0.005] * 3


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_sparse_gradients_equals_clipping_dense_ones(max_norm):
    dense, sparse = tiny_model(), tiny_model(sparse=True)
    batch = torch.tensor([[1, 7, 1, 20, 1], [7, 7, 3, 2, 29]])  # repeated rows have to be added before squaring
    for model in (dense, sparse):
        model.loss(batch).backward()
    expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    torch.testing.assert_close(clip_gradients(sparse.parameters(), max_norm), expected)
    assert any(parameter.grad.is_sparse for parameter in sparse.parameters())
    for (name, one), (_, other) in zip(dense.named_parameters(), sparse.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad.to_dense(), one.grad, msg=name)


def test_warm_up_is_linear_and_none_means_none():
    assert [warmup_factor(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_factor(step, 0) for step in range(2)] == [1.0, 1.0]
    assert warmup_factor(0, 1) == 1.0


class Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return torch.tensor(indices)


def epoch(loader, number):
    loader.set_epoch(number)
    return [batch.tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_alone():
    one, other = ResumableBatches(Numbers(10), 4, seed=3), ResumableBatches(Numbers(10), 4, seed=3)
    epoch(other, 0)
    torch.manual_seed(99)
    assert epoch(one, 1) == epoch(other, 1)
    assert epoch(one, 0) != epoch(one, 1)
    assert epoch(one, 0) != epoch(ResumableBatches(Numbers(10), 4, seed=4), 0)
    assert sorted(index for batch in epoch(one, 5) for index in batch) == list(range(10))
    assert [len(batch) for batch in epoch(one, 5)] == [4, 4, 2]


def test_a_loader_goes_on_in_the_middle_of_an_epoch_and_leaves_the_random_state_alone():
    loader = ResumableBatches(Numbers(10), 3, seed=0)
    whole = epoch(loader, 2)
    loader.set_epoch(2)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    resumed = ResumableBatches(Numbers(10), 3, seed=0)
    resumed.load_state_dict(state)
    random_state = torch.get_rng_state()
    assert [batch.tolist() for batch in resumed] == whole[2:]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert epoch(resumed, 3) == epoch(loader, 3)  # the next epoch is whole
    assert len(resumed) == 4


@pytest.mark.parametrize(("size", "world"), [(10, 2), (11, 3), (3, 4)])
def test_processes_share_an_epoch(size, world):
    parts = [list(EpochBatches(size, 2, seed=0, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == len(EpochBatches(size, 2, seed=0, world_size=world))
    drawn = [index for part in parts for batch in part for index in batch]
    assert set(drawn) == set(range(size))
    assert len(drawn) == -(-size // world) * world


def test_workers_give_the_same_batches():
    expected = epoch(ResumableBatches(Numbers(7), 2, seed=1), 4)
    assert epoch(ResumableBatches(Numbers(7), 2, seed=1, workers=1), 4) == expected


def test_ordered_batches_cover_everything_once():
    parts = [ordered_batches(Numbers(7), 2, rank=rank, world_size=2) for rank in range(2)]
    assert np.concatenate([batch for part in parts for batch in part]).tolist() == [0, 2, 4, 6, 1, 3, 5]
    assert [len(part) for part in parts] == [2, 2]
