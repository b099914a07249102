"""cprec_kernels.compress: the ids, classes and padding of the model stay those that it had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cprec_kernels
from cprec_kernels import Partition
from tests.convert.dense_models import FULL, ITEMS, PARTITION, WIDTH, GRULike, SASRecLike


@pytest.mark.parametrize(("outputs", "padding"), [(ITEMS, 0), (ITEMS + 1, 0), (ITEMS, ITEMS), (ITEMS, None)])
def test_classes_are_those_of_the_old_classifier(counts, outputs, padding):
    """The class of a frequent item, whose bias is made large, is the best: by the softmax and in the old order."""
    ids = torch.tensor([i for i in range(ITEMS + (padding is not None)) if i != padding])
    given = torch.ones(ITEMS + (padding is not None))
    given[ids] = counts[1:].float()
    order = torch.argsort(given[ids], descending=True, stable=True)
    for item in (int(order[0]), int(order[4]), int(order[9])):
        model = GRULike(outputs=outputs, padding=padding)
        cls = item if outputs == ITEMS else int(ids[item])
        with torch.no_grad():
            model.out.bias[cls] += 100
        cprec_kernels.compress(model, given, partition=PARTITION)
        hidden = torch.randn(3, WIDTH)
        scores, best = model.out.topk(hidden, 1)
        assert (best == cls).all()
        log_prob = model.out(hidden).detach()
        assert log_prob.shape == (3, outputs)
        assert (log_prob.argmax(-1) == cls).all()
        torch.testing.assert_close(log_prob.gather(1, best), scores)
        assert (model.out.rank(hidden, best[:, 0]) == 0).all()
        torch.testing.assert_close(model.out.loss(hidden, best[:, 0]), -scores.mean())


def test_searches_speak_the_models_ids(counts, ids):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    hidden = torch.randn(4, WIDTH)
    log_prob = model.out(hidden).detach()
    scores, classes = model.out.topk(hidden, 7)
    expected = log_prob.topk(7)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(classes, expected.indices)
    # a padded history: the padding is skipped, its items are left out
    scores, classes = model.out.topk(hidden, ITEMS, exclude=ids)
    for row in range(4):
        seen = set(ids[row].tolist()) - {0}
        kept = [c for c in classes[row].tolist() if c >= 0]
        assert set(kept) == set(range(1, ITEMS + 1)) - seen
        assert classes[row].tolist()[len(kept) :] == [-1] * (ITEMS - len(kept))
    target = torch.tensor([1, 90, 45, 7])
    torch.testing.assert_close(model.out.rank(hidden, target), (log_prob > log_prob.gather(1, target[:, None])).sum(1))


def test_padding_is_ignored_and_embeds_as_it_did(counts, ids):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    assert torch.count_nonzero(model.embed(torch.zeros(2, 3, dtype=torch.int64))) == 0
    hidden, target = torch.randn(6, WIDTH), torch.tensor([0, 5, 0, 9, -100, 1])
    kept = torch.tensor([1, 3, 5])
    torch.testing.assert_close(model.out.loss(hidden, target), model.out.loss(hidden[kept], target[kept]))
    model.embed(ids).sum().backward()
    assert torch.count_nonzero(model.embed[0].embedding.embeddings[-1].grad[-1]) == 0
    # a padding row that an initialisation has overwritten, as some code does
    model = GRULike()
    nn.init.normal_(model.embed[0].weight)
    row = model.embed[0].weight[0].detach().clone()
    cprec_kernels.compress(model, counts, partition=FULL)
    torch.testing.assert_close(model.embed(torch.tensor([[0]]))[0, 0], row)


def test_undeclared_padding_is_pointed_out(counts):
    model = SASRecLike()
    model.item_emb.padding_idx = None
    counts[0] = 0
    counts[5] = 1
    partition = Partition(ITEMS + 1, [10, 30], [WIDTH, 6, 3], WIDTH)
    with pytest.warns(UserWarning, match="id 0 alone never occurs.*pass padding_idx=0"):
        cprec_kernels.compress(model, counts, partition=partition)
    model = SASRecLike()
    model.item_emb.padding_idx = None
    cprec_kernels.compress(model, counts, partition=PARTITION, padding_idx=0)
    assert model.item_emb.padding_idx == 0
    assert torch.count_nonzero(model.item_emb(torch.tensor([0]))) == 0


def test_ids_out_of_range_are_refused(counts):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    for bad in (-1, ITEMS + 1):
        with pytest.raises(IndexError):
            model.embed(torch.tensor([[bad]]))
        with pytest.raises(IndexError):
            model.out.loss(torch.randn(1, WIDTH), torch.tensor([bad]))
