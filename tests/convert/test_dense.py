"""cprec_kernels.compress: dense recommenders with other people's ids, padding and classifiers."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

import cprec_kernels
from cprec_kernels import Partition, fitting
from cprec_kernels.convert import CompressionPlan, _partition
from cprec_kernels.nn import BlockEmbedding, ReindexedEmbedding, ReindexedSoftmax, TiedBlocks

ITEMS, WIDTH = 90, 16
PARTITION = Partition(ITEMS, [10, 30], [WIDTH, 6, 3], WIDTH)
FULL = Partition(ITEMS, [10, 30], [WIDTH] * 3, WIDTH)


class SASRecLike(nn.Module):
    """One attention layer; id 0 pads; scores by the item table itself."""

    def __init__(self):
        super().__init__()
        self.item_emb = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.item_emb(ids)
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.item_emb.weight.T


class GRULike(nn.Module):
    """A GRU and a linear layer of one output per id, or per item."""

    def __init__(self, outputs=ITEMS + 1, padding=0, bias=True, tied=False, width=WIDTH):
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(ITEMS + (padding is not None), WIDTH, padding_idx=padding))
        self.gru = nn.GRU(WIDTH, width, batch_first=True)
        self.out = nn.Linear(width, outputs, bias=bias)
        if tied:
            self.out.weight = self.embed[0].weight
        if bias:
            nn.init.normal_(self.out.bias, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(ids))[0])


@pytest.fixture
def counts():
    """Zipf counts in no order, with ties; id 0 is padding."""
    zipf = (1000 / torch.arange(1, ITEMS + 1)).long()
    return torch.cat([torch.tensor([12345]), zipf[torch.randperm(ITEMS)]])


@pytest.fixture
def ids():
    return torch.cat([torch.zeros(4, 2, dtype=torch.int64), torch.randint(1, ITEMS + 1, (4, 6))], 1)


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


def test_a_compression_is_kept_and_used(counts):
    model = GRULike(width=24)
    report = cprec_kernels.compress(model, counts, compression=3)
    for partition, width in ((report.plan.partition, WIDTH), (report.plan.output_partition, 24)):
        dense = ITEMS * width
        assert partition.embedding_dim == width
        assert 0.7 * dense < 3 * partition.embedding_parameters <= dense
    assert report.table_before >= 3 * report.table_after
    tighter = cprec_kernels.compress(GRULike(width=24), counts, compression=6).plan.partition
    assert tighter.embedding_parameters < report.plan.partition.embedding_parameters
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="compression must be a number of at least 1"):
            cprec_kernels.compress(GRULike(), counts, compression=wrong)
    with pytest.raises(ValueError, match="compression = 1000 is out of reach: rank 1 for all items gives"):
        cprec_kernels.compress(GRULike(), counts, compression=1000)


@pytest.mark.parametrize("options", [{"compression": 3}, {"partition": PARTITION}], ids=str)
def test_weights_that_are_not_finite_are_named(counts, options):
    for name, row, place in (("embed.0.weight", (5, 3), "[5, 3]"), ("out.bias", 7, "[7]")):
        model = GRULike()
        with torch.no_grad():
            model.get_parameter(name)[row] = torch.nan
        with pytest.raises(ValueError, match=re.escape(f"{name}{place} = nan: only finite weights")):
            cprec_kernels.compress(model, counts, **options)


def test_no_clusters_within_the_budget_lose_less(monkeypatch):
    """Against every path over a few places, with the losses of truncated_svd itself."""
    monkeypatch.setattr(_partition, "PLACES", 5)
    monkeypatch.setattr(_partition, "FIRST_PLACE", 0.05)
    monkeypatch.setattr(_partition, "MAX_CLUSTERS", 3)
    scale = torch.linspace(3, 0.3, 60)[:, None] * torch.linspace(1, 0.1, 6)
    tables, weights = [torch.randn(60, 6) * scale, torch.randn(60, 6) * scale], torch.linspace(9, 1, 60).double()
    places, ranks = _partition._places(60).tolist(), _partition._ranks(6)

    def lost(partition):
        total = 0.0
        for table in tables:
            whole = float((weights[:, None] * table.double().square()).sum())
            for (lo, hi), rank in zip(itertools.pairwise(partition.offsets), partition.ranks, strict=True):
                if rank < 6:
                    rows = table[lo:hi].double()
                    factors = fitting.truncated_svd(rows, rank, weights[lo:hi])
                    gap = rows - factors.left @ factors.right
                    total += float((weights[lo:hi, None] * gap.square()).sum()) / whole
        return total

    candidates = [
        Partition(60, list(cuts), list(chosen), 6)
        for n in (1, 2, 3)
        for cuts in itertools.combinations(places[1:-1], n - 1)
        for chosen in itertools.combinations_with_replacement(ranks, n)
    ]
    for compression in (1.0, 1.5, 3.0):
        budget = 2 * 60 * 6 / compression
        found = _partition.fitted_partition(tables, weights, compression)
        within = [p for p in candidates if 2 * p.embedding_parameters <= budget]
        assert found in within
        assert math.isclose(lost(found), min(map(lost, within)), rel_tol=1e-6, abs_tol=1e-9)


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


def test_what_does_not_fit_is_named_and_changes_nothing(counts):
    model = GRULike()
    partition = {"partition": PARTITION}
    cases = [
        (counts, {}, "either compression= or partition="),
        (counts[1:], partition, r"0 embeddings have 90 rows, as many as counts; there are embed\.0 \(91\)"),
        (counts, {"partition": Partition.single(91, WIDTH)}, "is of 91 items and width 16, the model has 90 items"),
        (counts, {**partition, "classifier": "gru"}, "must be an nn.Linear, it is a GRU"),
        (counts, {**partition, "table": "out"}, "must be an nn.Embedding, it is a Linear"),
        (counts, {**partition, "padding_idx": 3}, "padding_idx = 3, but the item table declares 0"),
        (counts, {**partition, "padding_idx": 91}, "padding_idx = 91 is outside 0..90"),
        (counts, {**partition, "inputs": torch.randn(9, 15)}, r"inputs must be \(N, 16\) with N > 0, got shape \(9, 15\)"),
        (counts, {**partition, "inputs": torch.full((9, 16), torch.nan)}, "NaN or inf"),
        (counts * 0, partition, "all zero"),
        (counts - 20, partition, r"counts\[\d+\] = -\d+\.0 is not a count"),
        (counts[:, None], partition, "must be 1-D"),
    ]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            cprec_kernels.compress(model, given, **options)
    assert isinstance(model.embed[0], nn.Embedding)
    assert isinstance(model.out, nn.Linear)
    model.second = nn.Linear(WIDTH, ITEMS)
    with pytest.raises(ValueError, match="several linear layers have one output per item: out, second"):
        cprec_kernels.compress(model, counts, **partition)
    model.embed[0].max_norm = 1.0
    with pytest.raises(ValueError, match="uses max_norm"):
        cprec_kernels.compress(model, counts, **partition)


def test_a_third_module_that_shares_the_table_is_not_left_behind(counts):
    model = GRULike()
    model.decoder = nn.Module()
    model.decoder.register_parameter("table", model.embed[0].weight)
    with pytest.raises(ValueError, match=r"decoder\.table is the same parameter as the item table's"):
        cprec_kernels.compress(model, counts, partition=PARTITION)
    assert isinstance(model.embed[0], nn.Embedding)


def test_ids_out_of_range_are_refused(counts):
    model = GRULike()
    cprec_kernels.compress(model, counts, partition=PARTITION)
    for bad in (-1, ITEMS + 1):
        with pytest.raises(IndexError):
            model.embed(torch.tensor([[bad]]))
        with pytest.raises(IndexError):
            model.out.loss(torch.randn(1, WIDTH), torch.tensor([bad]))
