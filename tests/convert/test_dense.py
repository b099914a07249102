"""cprec_kernels.compress: what dense recommenders keep, and how they run, train and load afterwards."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import cprec_kernels
from cprec_kernels import Partition
from cprec_kernels.convert import CompressionPlan
from cprec_kernels.nn import BlockEmbedding, ReindexedEmbedding, ReindexedSoftmax, TiedBlocks
from tests.convert.dense_models import FULL, ITEMS, PARTITION, WIDTH, GRULike, SASRecLike


def relabelled(log_prob: Tensor, padding: int = 0) -> Tensor:
    """Log-probabilities of the items alone: the padding's column left out, the rest normalised again."""
    keep = [i for i in range(log_prob.shape[-1]) if i != padding]
    return log_prob[..., keep].log_softmax(-1)


def test_one_cluster_of_full_rank_changes_nothing(counts, ids):
    model = GRULike()
    with torch.no_grad():
        model.out.bias[0] = -50  # trained models give their padding next to no probability
    expected = model(ids).log_softmax(-1).detach()
    report = cprec_kernels.compress(model, counts, partition=Partition.single(ITEMS, WIDTH))
    ours = model(ids).detach()
    assert isinstance(model.embed[0], ReindexedEmbedding)
    assert isinstance(model.out, ReindexedSoftmax)
    torch.testing.assert_close(ours[..., 1:], expected[..., 1:])
    assert (ours[..., 0] == -1e4).all()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    assert report.table_errors == report.softmax_errors == (0.0,)


def test_full_rank_clusters_keep_embeddings_and_logits_within_clusters(counts, ids):
    model = GRULike()
    dense, logits = model.embed(ids).detach(), model(ids).detach()
    cprec_kernels.compress(model, counts, partition=FULL)
    torch.testing.assert_close(model.embed(ids), dense)
    order = 1 + torch.argsort(counts[1:], descending=True, stable=True)
    ours = model(ids)
    for lo, hi in ((0, 10), (10, 30), (30, 90)):
        cluster = order[lo:hi]
        torch.testing.assert_close(
            ours[..., cluster].log_softmax(-1), logits[..., cluster].log_softmax(-1), rtol=1e-4, atol=1e-4
        )


def test_rows_of_low_rank_are_kept_to_rounding(counts, ids):
    """What the SVD should find, it finds: clusters whose rows are of the ranks that the partition gives them."""
    model = GRULike(bias=False)
    order = 1 + torch.argsort(counts[1:], descending=True, stable=True)
    with torch.no_grad():
        for weight in (model.embed[0].weight, model.out.weight):
            for lo, hi, rank in ((10, 30, 6), (30, 90, 3)):
                weight[order[lo:hi]] = torch.randn(hi - lo, rank) @ torch.randn(rank, WIDTH)
        model.out.weight[order[10:30]] += torch.randn(WIDTH)  # a common row, which no softmax sees
    dense, logits = model.embed(ids).detach(), model(ids).detach()
    report = cprec_kernels.compress(model, counts, partition=PARTITION)
    assert max(*report.table_errors, *report.softmax_errors) < 1e-6
    torch.testing.assert_close(model.embed(ids), dense, rtol=1e-4, atol=1e-5)
    for cluster in (order[10:30], order[30:]):
        ours, wanted = model(ids)[..., cluster].log_softmax(-1), logits[..., cluster].log_softmax(-1)
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cutoffs", [[], [10, 30]])
def test_a_projected_head_keeps_what_its_rank_allows(counts, ids, tied, cutoffs):
    """All rows lie in 6 dimensions, parent labels therefore too."""
    model = GRULike(tied=tied, bias=not tied)
    with torch.no_grad():
        for weight in (model.embed[0].weight, model.out.weight):
            weight.copy_(torch.randn(ITEMS + 1, 6) @ torch.randn(6, WIDTH) / 6)
            weight[0] = 0
    dense, logits = model.embed(ids).detach(), model(ids).detach()
    hidden = model.gru(model.embed(ids))[0].flatten(0, 1).detach()
    cluster_ranks = [6] * (len(cutoffs) + 1)
    report = cprec_kernels.compress(
        model, counts, partition=Partition(ITEMS, cutoffs, cluster_ranks, WIDTH), inputs=hidden.repeat(9, 1)
    )
    assert max(*report.table_errors, 0) < 1e-6
    torch.testing.assert_close(model.embed(ids), dense, rtol=1e-4, atol=1e-5)
    order = 1 + torch.argsort(counts[1:], descending=True, stable=True)
    first = order[: cutoffs[0] if cutoffs else ITEMS]
    ours, truth = model(ids)[..., first].log_softmax(-1), logits[..., first].log_softmax(-1)
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-2 if not tied else 1e-4)
    wanted, found = relabelled(logits.log_softmax(-1)), relabelled(model(ids))
    assert (found - wanted).square().mean().sqrt() < 0.1 * wanted.std()


def test_frequent_items_are_fitted_best(counts):
    model = GRULike()
    before = model.embed[0].weight.detach().clone()
    cprec_kernels.compress(model, counts, partition=Partition(ITEMS, [], [6], WIDTH))
    error = (model.embed[0].weight.detach() - before).square().sum(1) / before.square().sum(1)
    order = 1 + torch.argsort(counts[1:], descending=True, stable=True)
    assert error[order[:5]].max() < error[order[45:]].mean() / 2


def test_parent_labels_stand_for_their_tails(counts, ids):
    """With inputs, the mass of every tail is near that of its items in the dense model; without, still a bound of it."""
    torch.manual_seed(3)
    dense = GRULike()
    hidden = torch.randn(2000, WIDTH)
    logits = dense.out(hidden).detach()
    order = 1 + torch.argsort(counts[1:], descending=True, stable=True)
    errors = {}
    for given in (None, hidden):
        model = GRULike()
        model.load_state_dict(dense.state_dict())
        report = cprec_kernels.compress(model, counts, partition=FULL, inputs=given)
        truth = logits[:, order[30:]].logsumexp(1) - logits[:, order].logsumexp(1)
        mass = model.out(hidden).detach()[:, order[30:]].logsumexp(1)
        errors[given is not None] = (mass - truth).square().mean().sqrt()
        assert len(report.parent_errors) == (0 if given is None else 2)
    assert errors[True] < errors[False] < 1.0
    assert errors[True] < 0.1


def test_a_model_that_scores_by_its_table_runs_unchanged_and_has_a_softmax(counts, ids):
    model = SASRecLike()
    expected = model(ids).detach()
    report = cprec_kernels.compress(model, counts, partition=FULL, classifier="tied")
    torch.testing.assert_close(model(ids)[..., 1:], expected[..., 1:], rtol=1e-4, atol=1e-5)
    assert report.softmax is model.item_emb.softmax
    hidden, target = model.hidden(ids), torch.randint(1, ITEMS + 1, (4, 8))
    loss = report.softmax.loss(hidden, target)
    loss.backward()
    torch.testing.assert_close(
        loss, nn.functional.cross_entropy(report.softmax(hidden).flatten(0, 1), target.flatten())
    )
    blocks = model.item_emb.softmax.softmax
    assert isinstance(blocks, TiedBlocks)
    assert model.item_emb.embedding is blocks.embedding
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_classifier_stays_tied(counts, ids, bias):
    model = GRULike(tied=True, bias=bias)
    logits = model(ids).detach()
    report = cprec_kernels.compress(model, counts, partition=FULL)
    assert report.plan.tied
    blocks = model.out.softmax
    assert model.embed[0].embedding is blocks.embedding
    names = dict(model.named_parameters())
    assert len({id(parameter) for parameter in names.values()}) == len(names)
    cluster = 1 + torch.argsort(counts[1:], descending=True, stable=True)[30:]
    torch.testing.assert_close(
        model(ids)[..., cluster].log_softmax(-1), logits[..., cluster].log_softmax(-1), rtol=1e-4, atol=1e-4
    )


def test_a_compressed_checkpoint_loads_into_a_fresh_model(counts, ids, tmp_path):
    for make, options in ((GRULike, {}), (SASRecLike, {"classifier": "tied"}), (lambda: GRULike(tied=True), {})):
        model = make()
        report = cprec_kernels.compress(model, counts, partition=PARTITION, **options)
        (tmp_path / "plan.json").write_text(json.dumps(report.plan.to_dict()))
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        fresh = make()
        CompressionPlan.from_dict(json.loads((tmp_path / "plan.json").read_text())).apply(fresh)
        fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        torch.testing.assert_close(fresh(ids), model(ids), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        CompressionPlan.from_dict({**report.plan.to_dict(), "colour": 1})


def test_a_checkpoint_is_assigned_to_a_model_without_values(counts, ids):
    model = GRULike()
    plan = cprec_kernels.compress(model, counts, partition=PARTITION).plan
    with torch.device("meta"):
        skeleton = GRULike()
    plan.apply(skeleton)
    with pytest.raises(RuntimeError, match="waits for the ids"):
        skeleton(ids)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(ids), model(ids))


def test_table_and_classifier_have_ids_of_their_own(counts, tmp_path):
    """Tensors that share memory are refused by safetensors, and a state of one module would rewrite the other's."""
    dense = nn.ModuleDict({"table": nn.Embedding(30, 8), "classifier": nn.Linear(8, 30)})
    cprec_kernels.compress(dense, counts[1:31], partition=Partition(30, [10], [8, 2], 8))
    assert dense["table"].items.data_ptr() != dense["classifier"].items.data_ptr()
    safetensors.torch.save_file(dense.state_dict(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_and_biases_are_frozen_as_they_were(counts, weight, bias):
    model = GRULike()
    name, linear = next((name, own) for name, own in model.named_modules() if isinstance(own, nn.Linear))
    linear.weight.requires_grad_(weight)
    linear.bias.requires_grad_(bias)
    cprec_kernels.compress(model, counts, partition=PARTITION)
    for key, parameter in model.get_submodule(name).named_parameters():
        assert parameter.requires_grad == (bias if "bias" in key else weight), key


def test_the_report_adds_up(counts):
    model = GRULike()
    before = sum(parameter.numel() for parameter in model.parameters())
    report = cprec_kernels.compress(model, counts, partition=PARTITION)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert report.table_before == 2 * 91 * WIDTH + 91
    assert report.table_after == PARTITION.with_padding().embedding_parameters + PARTITION.softmax_parameters(
        True, True
    )
    assert report.table_before - report.table_after == before - after
    assert f"{report.compression:.2f} times smaller" in str(report)
    assert "cluster 2: 60 items in 3 columns" in str(report)


def test_a_step_of_a_loop_written_for_logits_still_trains(counts, ids):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_what_takes_a_place_is_in_the_mode_of_what_was_there(counts):
    model = GRULike().eval()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    assert not any(module.training for module in model.modules())


def test_only_a_table_and_sparse_gradients(counts):
    model = nn.ModuleDict({"table": nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0, sparse=True)})
    model["alias"] = model["table"]
    report = cprec_kernels.compress(model, counts, partition=PARTITION)
    assert model["alias"] is model["table"]
    assert isinstance(model["table"].embedding, BlockEmbedding)
    assert model["table"].embedding.sparse
    assert report.softmax is None
    assert report.softmax_errors == ()


def test_a_classifier_of_another_width(counts, ids):
    model = GRULike(width=24)
    with pytest.raises(ValueError, match="the classifier is 24 wide and the table 16: give output_partition="):
        cprec_kernels.compress(model, counts, partition=PARTITION)
    assert isinstance(model.out, nn.Linear)
    cprec_kernels.compress(model, counts, partition=PARTITION, output_partition=Partition(ITEMS, [20], [20, 4], 24))
    assert model(ids).shape == (4, 8, ITEMS + 1)
