"""A catalogue that changes: extend and remove on BlockEmbedding and ClusteredSoftmaxWithLoss, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cprec_kernels import Partition, accumulate_in_place
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, ReindexedEmbedding, ReindexedSoftmax, TiedBlocks
from cprec_kernels.ops._library import asked_in_place
from tests.nn.catalogue_modules import IDS, PARTITION, assert_same, logits, make_embedding, make_head

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


def test_frozen_tables_stay_frozen():
    embedding = make_embedding()
    embedding.embeddings[2].requires_grad_(False)
    embedding.extend(3)
    assert [table.requires_grad for table in embedding.embeddings] == [True, True, False]


@pytest.mark.parametrize("make", [make_embedding, make_head])
def test_tables_still_ask_for_gradients_in_place(make):
    module = make()
    accumulate_in_place(module.parameters())
    module.extend(2)
    assert all(asked_in_place([parameter]) for parameter in module.parameters())
    assert not any(asked_in_place([parameter]) for parameter in make().parameters())


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


# both, in every case of clusters


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
            (lambda m=module: m.extend(True), TypeError, "must be an int, got True"),
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
