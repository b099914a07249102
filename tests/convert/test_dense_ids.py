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


def test_candidates_and_ragged_exclusions_are_classes(counts):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    hidden = torch.randn(3, WIDTH)
    log_prob = model.out(hidden).detach()
    candidates = torch.tensor([3, 7, 50, 0])  # 0 pads: no item
    scores, classes = model.out.topk(hidden, 4, candidates=candidates)
    expected = log_prob[:, candidates[:3]].topk(3)
    torch.testing.assert_close(scores[:, :3], expected.values)
    assert torch.equal(classes[:, :3], candidates[expected.indices])
    assert (classes[:, 3] == -1).all()
    best = log_prob.topk(6).indices
    offsets, listed = torch.tensor([0, 2, 2, 3]), torch.cat([best[0, :2], best[2, :1]])
    _, classes = model.out.topk(hidden, 3, exclude=(offsets, listed))
    assert torch.equal(classes, torch.stack([best[0, 2:5], best[1, :3], best[2, 1:4]]))


def test_errors_speak_of_the_models_ids(counts):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    embed, out, hidden = model.embed[0], model.out, torch.randn(2, WIDTH)
    outside = f"is outside 0..{ITEMS}"
    with pytest.raises(IndexError, match=rf"ids\[0, 1\] = {ITEMS + 1} {outside}"):
        embed(torch.tensor([[1, ITEMS + 1]]))
    with pytest.raises(TypeError, match=r"ids must be int64, got torch\.float32"):
        embed(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="ids is on meta, the module on cpu"):
        embed(torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(IndexError, match=rf"target\[1\] = {ITEMS + 9} {outside}"):
        out.loss(hidden, torch.tensor([1, ITEMS + 9]))
    with pytest.raises(IndexError, match=r"target\[1\] = 0 is a class that no item stands for"):
        out.rank(hidden, torch.tensor([1, 0]))
    for name in ("candidates", "exclude"):
        bad = torch.tensor([1, 999]) if name == "candidates" else torch.tensor([[1, 2], [2, 999]])
        with pytest.raises(IndexError, match=rf"{name}\[.*1\] = 999 {outside}"):
            out.topk(hidden, 2, **{name: bad})
    with pytest.raises(TypeError, match="partition must be a Partition, got dict"):
        cprec_kernels.compress(GRULike(), counts, partition=PARTITION.to_dict())
    with pytest.raises(TypeError, match=r"padding_idx must be an integer, got 1\.5"):
        cprec_kernels.compress(GRULike(), counts, partition=PARTITION, padding_idx=1.5)


@pytest.mark.parametrize("frozen", ["embed.0", "out"])
def test_a_frozen_half_stays_frozen(frozen, counts):
    model = GRULike()
    model.get_submodule(frozen).requires_grad_(False)
    cprec_kernels.compress(model, counts, partition=PARTITION)
    for name in ("embed.0", "out"):
        assert {p.requires_grad for p in model.get_submodule(name).parameters()} == {name != frozen}
