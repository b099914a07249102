"""TiedBlocks: one set of blocks for the input and the softmax."""

from __future__ import annotations

import copy

import pytest
import torch

from cprec_kernels import Partition, functional
from cprec_kernels.functional import Weights
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks
from cprec_kernels.reference import block_embedding as embedding_ref
from cprec_kernels.reference import clustered_softmax as softmax_ref
from cprec_kernels.testing import assert_accurate, assert_all_accurate, make_hidden, make_ids, make_targets

PARTITION = Partition(200, [20, 90], [32, 8, 4], 32)


def test_an_items_logit_is_its_embedding_times_the_input(case):
    blocks = TiedBlocks(case.partition, padding=True, dtype=torch.float64)
    hidden = make_hidden(case.partition, (9,), torch.float64)
    dense = blocks.embedding(torch.arange(case.partition.num_items))
    log_prob = blocks.log_prob(hidden)
    for lo, hi in zip(case.partition.offsets, case.partition.offsets[1:], strict=False):
        # within a cluster, log-probabilities differ as logits do
        difference = log_prob[:, lo:hi] - hidden @ dense[lo:hi].T
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("tie_projections", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_gradients_are_the_sum_of_both_uses(case, tie_head, tie_projections, padding):
    partition = case.partition
    options = {"padding": padding, "tie_projections": tie_projections, "head_bias": True, "tail_bias": True}
    blocks = TiedBlocks(partition, tie_head=tie_head, **options)
    with torch.no_grad():  # large weights: a tail of one item has no gradient from the softmax but rounding
        for parameter in blocks.parameters():
            parameter.normal_(std=0.5)
        if padding:
            blocks.embedding.embeddings[-1][-1].zero_()
    ids, target = make_ids(partition), make_targets(partition)
    if padding:
        ids[0, :3] = partition.num_items

    def loss_by_definition(module):
        """The references, differentiated by autograd through one set of leaves."""
        tables, projections = list(module.embedding.embeddings), list(module.embedding.projections)
        hidden = embedding_ref.block_embedding(ids, tables, projections)
        if padding:
            hidden = hidden * (ids != partition.num_items)[..., None]
        items = [*tables[:-1], tables[-1][: partition.sizes[-1]]]
        if module.head is not None:
            items[0] = module.head
        elif module.parents is not None:
            items[0] = torch.cat([items[0], module.parents])
        q = projections if tie_projections else list(module.projections)
        weights = Weights(items, q, module.head_bias, list(module.tail_biases))
        log_prob, *_ = softmax_ref.clustered_softmax(hidden.flatten(0, 1), target.flatten(), *weights, -100)
        return -log_prob.sum() / (target != -100).sum()

    wide, truth, base = copy.deepcopy(blocks).double(), copy.deepcopy(blocks).double(), copy.deepcopy(blocks)
    wide(wide.embedding(ids), target).loss.backward()
    loss_by_definition(truth).backward()
    loss_by_definition(base).backward()
    blocks(blocks.embedding(ids), target).loss.backward()
    names = [name for name, _ in blocks.named_parameters()]
    assert len(names) == len(set(names))
    for (name, ours), expected in zip(wide.named_parameters(), truth.parameters(), strict=True):
        assert_accurate(ours.grad, expected.grad, expected.grad, torch.float64, name)
    kinds = {name: name.rstrip(".0123456789") for name in names}
    for kind in dict.fromkeys(kinds.values()):
        ours, plain, expected = (
            [parameter.grad for name, parameter in module.named_parameters() if kinds[name] == kind]
            for module in (blocks, base, truth)
        )
        assert_all_accurate(ours, plain, expected, torch.float32, kind)


def test_padding_embeds_to_zero_stays_there_and_is_no_class():
    blocks = TiedBlocks(PARTITION, padding=True)
    pad = torch.tensor([200, 200, 5])
    hidden = blocks.embedding(pad)
    assert torch.count_nonzero(hidden[:2]) == 0
    assert blocks.log_prob(hidden).shape == (3, 200)
    blocks(hidden, torch.tensor([0, 3, 199])).loss.backward()
    assert torch.count_nonzero(blocks.embedding.embeddings[-1].grad[-1]) == 0
    assert torch.count_nonzero(blocks.embedding.embeddings[-1].grad[-2]) > 0
    with pytest.raises(IndexError, match="target\\[0\\] = 200"):
        blocks(hidden[:1], torch.tensor([200]))


def test_it_has_the_parameters_of_one_table_and_a_state_dict_without_doubles():
    blocks = TiedBlocks(PARTITION, padding=True)
    count = sum(parameter.numel() for parameter in blocks.parameters())
    assert count == PARTITION.with_padding().embedding_parameters + 2 * PARTITION.ranks[0]
    assert list(blocks.state_dict()) == [
        "parents", *(f"embedding.embeddings.{j}" for j in range(3)), "embedding.projections.0", "embedding.projections.1"
    ]  # fmt: skip
    other = TiedBlocks(PARTITION, padding=True)
    other.load_state_dict(blocks.state_dict())
    hidden = torch.randn(5, 32)
    assert torch.equal(other.log_prob(hidden), blocks.log_prob(hidden))


def test_without_a_tied_head_the_tails_alone_are_shared():
    blocks = TiedBlocks(PARTITION, padding=True, tie_projections=False, tie_head=False)
    apart = BlockEmbedding(PARTITION.with_padding()), ClusteredSoftmaxWithLoss(32, PARTITION)
    count = sum(parameter.numel() for module in apart for parameter in module.parameters())
    shared = 70 * 8 + 110 * 4
    assert sum(parameter.numel() for parameter in blocks.parameters()) == count - shared
    assert blocks.parents is None
    assert not blocks.tie_head
    weights = blocks.packed_weights().weights
    assert weights[0] is blocks.head
    assert weights[1] is blocks.embedding.embeddings[1]
    assert weights[2].data_ptr() == blocks.embedding.embeddings[2].data_ptr()
    assert weights[2].shape == (110, 4)
    # every level starts with logits of standard deviation 0.1
    hidden = torch.randn(4000, 32)
    q = blocks.packed_weights().projections
    for weight, z in zip(weights, (hidden, hidden @ q[0].T, hidden @ q[1].T), strict=True):
        assert 0.05 < float((z @ weight.T).detach().std()) < 0.2
    assert "tie_head=False" in repr(blocks)
    alone = TiedBlocks(Partition.single(50, 8), tie_head=False)
    assert alone.head.shape == (50, 8)


def test_parent_labels_start_small():
    blocks = TiedBlocks(Partition(600, [10, 30, 100, 200, 300, 400, 500], [256] + [4] * 7, 256))
    assert float(blocks.parents.detach().std()) == pytest.approx(0.1 * 256**-0.5, rel=0.15)


@pytest.mark.parametrize("tie_head", [True, False])
def test_everything_a_softmax_does_is_there(tie_head):
    blocks = TiedBlocks(PARTITION, padding=True, tie_head=tie_head, head_bias=True)
    hidden, target = torch.randn(6, 32), torch.tensor([0, 19, 20, 89, 90, 199])
    scores, items = blocks.topk(hidden, 5)
    assert torch.equal(blocks.predict(hidden), items[:, 0])
    torch.testing.assert_close(blocks.score(hidden, items), scores)
    assert torch.equal(blocks.rank(hidden, items[:, 2]), torch.full((6,), 2))
    assert torch.equal(blocks.topk(hidden, 5, storage="float16")[1], items)
    plain = ClusteredSoftmaxWithLoss(32, PARTITION, head_bias=True)
    weights = blocks.packed_weights()
    with torch.no_grad():
        for mine, theirs in zip(plain.weights, weights.weights, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(plain.projections, weights.projections, strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(tuple(plain(hidden, target)), tuple(blocks(hidden, target)))
    assert "tie_projections=True" in repr(blocks)
    assert functional.clustered_log_prob(hidden, weights).shape == (6, 200)


def test_an_index_goes_stale_when_the_shared_table_is_trained_on():
    blocks = TiedBlocks(PARTITION)
    index = blocks.build_index()
    with torch.no_grad():
        blocks.embedding.embeddings[1].add_(1.0)
    assert index.is_stale


def test_it_compiles_and_exports_whole():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = TiedBlocks(PARTITION, padding=True)

        def forward(self, ids, target):
            hidden = self.blocks.embedding(ids)
            return *self.blocks(hidden, target), self.blocks.topk(hidden[:, -1], 3)[1]

    model, ids, target = Model(), make_ids(PARTITION), make_targets(PARTITION)
    expected = model(ids, target)
    exported = torch.export.export(model, (ids, target)).module()
    for run in (torch.compile(model, fullgraph=True), exported):
        for value, wanted in zip(run(ids, target), expected, strict=True):
            torch.testing.assert_close(value, wanted)


def test_training_lowers_the_loss_and_moves_the_one_table():
    blocks = TiedBlocks(PARTITION, padding=True, head_bias=True)
    before = blocks.embedding.embeddings[0].detach().clone()
    optimizer = torch.optim.Adam(blocks.parameters(), lr=0.05)
    ids, target = make_ids(PARTITION, (100,)), make_ids(PARTITION, (100,), seed=3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = blocks(blocks.embedding(ids) * 4, target).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(blocks.embedding.embeddings[0], before)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"must be a cprec_kernels\.Partition, got int"):
        TiedBlocks(5000)
    with pytest.raises(ValueError, match="z_loss must be at least 0"):
        TiedBlocks(PARTITION, z_loss=-1.0)
    assert isinstance(TiedBlocks(PARTITION).embedding, BlockEmbedding)
