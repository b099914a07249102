"""Modules that speak other ids than their blocks: what cannot be one is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, ReindexedEmbedding, ReindexedSoftmax

PARTITION = Partition(6, [2], [4, 2], 4)


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (ids(0, 1, 2, 3, 4, 5, dtype=torch.int32), TypeError, "items must be int64, got torch.int32"),
        (ids(0, 1, 2, 3, 4, 5)[None], ValueError, r"items must be 1-D, got shape \(1, 6\)"),
        (ids(0, 1, 2, 3, 4, 6), ValueError, "items must be in 0..5, got 0..6"),
        (ids(0, 1, 2, 3, 4, 4), ValueError, "items names a row twice"),
    ],
)
def test_items_that_are_none(items, error, message):
    with pytest.raises(error, match=message):
        ReindexedEmbedding(BlockEmbedding(PARTITION), items)


def test_an_embedding_leaves_items_out_and_a_softmax_none():
    embedding = ReindexedEmbedding(BlockEmbedding(PARTITION), ids(5, 0))
    assert torch.equal(embedding(ids(0, 1)), embedding.embedding(ids(5, 0)))
    softmax = ClusteredSoftmaxWithLoss(4, PARTITION)
    with pytest.raises(ValueError, match="items names 2 of the softmax's 6 items: all are needed"):
        ReindexedSoftmax(softmax, ids(5, -1, 0))
    with pytest.raises(TypeError, match="embedding must be a BlockEmbedding, got Linear"):
        ReindexedEmbedding(nn.Linear(2, 2), ids(0))
    with pytest.raises(TypeError, match="softmax must be a ClusteredSoftmaxWithLoss or TiedBlocks, got Linear"):
        ReindexedSoftmax(nn.Linear(2, 2), ids(0))


def reindexed():
    items = torch.randperm(2_000)
    partition = Partition(2_000, [100], [8, 4], 8)
    softmax = ReindexedSoftmax(ClusteredSoftmaxWithLoss(8, partition), items)
    return nn.Sequential(ReindexedEmbedding(BlockEmbedding(partition), items.clone()), softmax)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_of_weights_leave_the_ids_alone(decay):
    model = reindexed()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    for own, averaged in zip(model, average.module, strict=True):
        assert torch.equal(own.items, averaged.items)
    assert torch.equal(model[1].classes, average.module[1].classes)


def test_ids_travel_with_the_state_and_with_the_module():
    model, other = reindexed(), reindexed()
    state = model.state_dict()
    assert [name for name in state if name.endswith(("items", "classes"))] == ["0.items", "1.items", "1.classes"]
    ids = torch.arange(2_000)
    assert not torch.equal(other(ids), model(ids))
    other.load_state_dict(state)
    assert torch.equal(other(ids), model(ids))
    assert other[0].items.data_ptr() != model[0].items.data_ptr()
    skeleton = reindexed().to("meta")
    assert skeleton[0].items.is_meta
    assert skeleton[1].classes.is_meta
    skeleton.load_state_dict(state, assign=True)
    assert torch.equal(skeleton(ids), model(ids))
    assert model.double()[0].items.dtype == torch.int64


def test_a_state_without_the_ids_or_with_others_is_refused():
    model = reindexed()
    state = model.state_dict()
    without = {name: value for name, value in state.items() if name != "1.classes"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"1.classes"'):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"0.items: torch.int64 \(2000,\) is needed, got torch.int64 \(7,\)"):
        model.load_state_dict({**state, "0.items": torch.arange(7)})
    with pytest.raises(RuntimeError, match=r"0.items: torch.int64 \(2000,\) is needed, got torch.float32 \(2000,\)"):
        model.load_state_dict({**state, "0.items": torch.zeros(2_000)})


def test_scores_are_those_of_the_dense_output():
    items = ids(3, -1, 5, 0, 2, 1, 4)
    module = ReindexedSoftmax(ClusteredSoftmaxWithLoss(4, PARTITION, head_bias=True), items)
    with torch.no_grad():
        module.softmax.head_bias.normal_()
    hidden, classes = torch.randn(2, 3, 4), torch.randint(0, 7, (2, 3, 5))
    classes[0, 0, 0] = 1  # which is none
    expected = module(hidden).gather(-1, classes)
    assert expected[0, 0, 0] == -1e4
    torch.testing.assert_close(module.score(hidden, classes), expected)
    with pytest.raises(IndexError, match=r"classes\[0, 0, 1\] = 7"):
        module.score(hidden, torch.tensor([[[0, 7]] * 3] * 2))
    with pytest.raises(TypeError, match="classes must be a tensor, got list"):
        module.score(hidden, [[[0]]])
    with pytest.raises(ValueError, match=r"classes must be \(2, 3, 'c'\) to go with input"):
        module.score(hidden, classes[0])
    with pytest.raises(TypeError, match="exclude must be a tensor, got list"):
        module.topk(hidden, 2, exclude=(torch.arange(7), [1] * 6))
    with pytest.raises(TypeError, match="exclude must be an int64 tensor"):
        module.topk(hidden, 2, exclude=[[1], [2]])


@pytest.mark.parametrize("name", ["items", "classes"])
def test_a_state_whose_ids_are_no_permutation_is_refused(name):
    module = ReindexedSoftmax(ClusteredSoftmaxWithLoss(4, PARTITION), ids(5, 4, 3, -1, 2, 1, 0))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict(state)
    state[name][:2] = 1
    with pytest.raises(RuntimeError, match=f"{name}: items names a row twice"):
        module.load_state_dict(state)
    state[name][:2] = ids(0, 9)
    with pytest.raises(RuntimeError, match=f"{name}: items must be in 0"):
        module.load_state_dict(state)


def test_negative_entries_and_padding_exclude_nothing():
    softmax = ReindexedSoftmax(ClusteredSoftmaxWithLoss(4, PARTITION), ids(5, -1, 0, 1, 2, 3, 4))
    hidden = torch.randn(3, 4)
    for exclude in (torch.full((3, 2), -1), torch.full((3, 1), 1), (ids(0, 1, 2, 3), ids(-1, -1, 1))):
        assert softmax.topk(hidden, 6, exclude=exclude)[1].sort().values.tolist() == [[0, 2, 3, 4, 5, 6]] * 3


@pytest.mark.parametrize("bad", [-1, -2_000, 2_000])
def test_ids_that_are_none_are_refused_when_compiled(bad):
    """Inductor takes a lookup apart into indexing, which counts -1 from the end."""
    table, softmax = reindexed()
    hidden, target = torch.randn(1, 8), ids(bad)
    calls = [(table, (target,)), (softmax.loss, (hidden, target)), (softmax.score, (hidden, target[None]))]
    for call, arguments in calls:
        with pytest.raises(IndexError):
            call(*arguments)
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of"):
            torch.compile(call, backend="aot_eager_decomp_partition")(*arguments)


def test_a_module_that_awaits_its_ids_refuses_to_compute():
    model, loaded = reindexed(), reindexed()
    table, softmax = model
    for module in model:
        module.await_state()
    hidden, target = torch.randn(1, 8), ids(1)
    calls = [
        lambda: table(target), lambda: table.weight, lambda: softmax(hidden), lambda: softmax.loss(hidden, target),
        lambda: softmax.topk(hidden, 3), lambda: softmax.rank(hidden, target), lambda: softmax.score(hidden, target[None]),
    ]  # fmt: skip
    state = loaded.state_dict()
    del state["1.classes"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    table.await_state()  # whose ids came, while the softmax still waits
    for call in calls:
        with pytest.raises(
            RuntimeError, match="waits for the ids of a compressed model: load its state_dict, in every"
        ):
            call()
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(table(target), loaded[0](target))
    assert torch.equal(softmax(hidden), loaded[1](hidden))
    for call in calls:
        call()


def test_ids_without_values_are_looked_up():
    table, softmax = reindexed()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        target = mode.from_tensor(ids(1, 5))
        hidden = table(target)
        assert hidden.shape == (2, 8)
        assert softmax.loss(hidden, target).shape == ()
        assert softmax.rank(hidden, target).shape == (2,)
