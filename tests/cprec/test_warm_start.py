"""A model goes on where an earlier one was, on items that came, went and changed clusters."""

from __future__ import annotations

import itertools
import json
import types

import numpy as np
import pytest
import torch

from cprec import warm_start
from cprec.data import prepare
from cprec.exported import export
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train
from cprec.warm_start import grown, start_from

K, D = 40, 8
MODELS = {
    "plain": {"cutoffs": [], "ranks": [8]},
    "apart": {"cutoffs": [10, 25], "ranks": [8, 4, 2]},
    "tied": {"cutoffs": [10, 25], "ranks": [8, 6, 4], "tie_tails": True},
    "tied with biases": {
        "cutoffs": [10, 25],
        "ranks": [8, 6, 4],
        "tie_tails": True,
        "head_bias": True,
        "tail_bias": True,
    },
    "narrow head": {"cutoffs": [10, 25], "ranks": [6, 4, 2], "head_bias": True, "tail_bias": True},
    "full rank": {"cutoffs": [10, 25], "ranks": [8, 8, 8], "head_bias": True, "tail_bias": True},
    "two partitions": {"cutoffs": [10, 25], "ranks": [8, 4, 2], "output_cutoffs": [15], "output_ranks": [8, 3]},
}


def config_of(name, num_items=K, **changes):
    options = {**MODELS[name], **changes}
    return NextItNetConfig.from_plan(
        num_items, D, options.pop("cutoffs"), options.pop("ranks"), dilations=(1, 2), **options
    )


def make(config, seed):
    """Weights as of a trained model: large enough that tails' log-sum-exps move."""
    torch.manual_seed(seed)
    model = NextItNet(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("softmax", "embedding")):
                parameter.normal_(std=0.6)
        for table in model.embedding.embeddings:
            table.mul_(0.9)
        model.embedding.embeddings[-1][-1] = 0.0  # padding
    return model


def within_clusters(config):
    """An order of the items that keeps everyone in every cluster of both partitions."""
    bounds = sorted({0, K, *config.input_partition.cutoffs, *config.output_partition.cutoffs})
    generator = torch.Generator().manual_seed(5)
    pairs = itertools.pairwise(bounds)
    return torch.cat([lo + torch.randperm(hi - lo, generator=generator) for lo, hi in pairs])


def histories_of(num_items, rows=24):
    items = torch.randint(num_items, (rows, 5), generator=torch.Generator().manual_seed(7))
    items[0, :3] = num_items
    return items


@pytest.mark.parametrize("name", MODELS)
def test_items_that_keep_their_clusters_keep_everything(name):
    former, model = make(config_of(name), 0), make(config_of(name), 1)
    old_ids = within_clusters(former.config)
    carried = start_from(model, former, old_ids, histories_of(K))
    assert carried == (K, 0, 0, 0)
    items = histories_of(K)
    before = torch.cat([old_ids, torch.tensor([K])])[items]
    assert model(items).equal(former(before))
    hidden = former(before)[:, -1]
    torch.testing.assert_close(
        model.softmax.log_prob(hidden), former.softmax.log_prob(hidden)[:, old_ids], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_new_items_are_the_mean_of_their_cluster_and_others_stay(name):
    former, model = make(config_of(name), 0), make(config_of(name, K + 6), 1)
    gone = [3, 12, 30, 31]
    cutoffs = [0, *former.config.input_partition.cutoffs, K]
    if name == "two partitions":
        cutoffs = [0, 10, 15, 25, K]
    old_ids = torch.arange(K)
    # A new item takes the place of each that is gone, so that the others stay where they were; the rest come at the end.
    old_ids[gone] = -1
    old_ids = torch.cat([old_ids, torch.full((6,), -1)])
    carried = start_from(model, former, old_ids, histories_of(K))
    assert carried == (K - 4, 0, 10, 4)
    known = (old_ids >= 0).nonzero()[:, 0]
    assert model.embedding(known).equal(former.embedding(known))
    own = model.embedding(torch.arange(K + 6)).detach()
    last = [item for item in range(cutoffs[-2], K) if item not in gone]
    torch.testing.assert_close(own[K:], own[last].mean(0).expand(6, D), rtol=1e-5, atol=1e-6)
    assert not model.embedding(torch.tensor([K + 6])).any()
    hidden = former(histories_of(K))[:, -1]
    ours, theirs = model.softmax.log_prob(hidden), former.softmax.log_prob(hidden)
    head = former.config.output_partition.sizes[0]
    kept = [item for item in range(head) if item not in gone]
    differences = (ours - theirs[:, :1] - (ours[:, :1] - theirs[:, :1]))[:, kept]  # of logits in the head
    torch.testing.assert_close(differences, (theirs - theirs[:, :1])[:, kept], rtol=1e-4, atol=1e-4)


def swapped(*pairs):
    old_ids = torch.arange(K)
    for one, other in pairs:
        old_ids[[one, other]] = old_ids[[other, one]]
    return old_ids


def overall(former, hidden, item, folded=False):
    """An item's log-probability, without the head's log-sum-exp, as a vector (d,) and a constant nearest to it, in numpy.

    ``folded``: the constant is 0, and the vector nearest to it is in the vector, as where there is no bias.
    """
    weights, partition = former.softmax.packed_weights(), former.config.output_partition
    tables = [table.detach().double().numpy() for table in weights.weights]
    projections = [own.detach().double().numpy() for own in weights.projections]
    dense = [
        table @ projections[partition.projected.index(j)] if j in partition.projected else table
        for j, table in enumerate(tables)
    ]
    level = partition.cluster_of(item)
    row = item - partition.offsets[level]
    biases = [weights.head_bias, *(weights.tail_biases or [None] * (partition.num_clusters - 1))]
    biases = [
        np.zeros(len(table)) if bias is None else bias.detach().double().numpy()
        for bias, table in zip(biases, tables, strict=True)
    ]
    vector, constant = dense[level][row], biases[level][row]
    ones = np.ones((len(hidden), 1))
    if level:
        size, parent = partition.sizes[level], partition.sizes[0] + level - 1
        lse = np.log(np.exp(hidden @ dense[level][:size].T + biases[level][:size]).sum(1))
        fitted = np.linalg.lstsq(np.concatenate([hidden, ones], 1), lse, rcond=None)[0]
        vector = vector + dense[0][parent] - fitted[:-1]
        constant = constant + biases[0][parent] - fitted[-1]
    if folded:
        return vector + constant * np.linalg.lstsq(hidden, ones[:, 0], rcond=None)[0], 0.0
    return vector, constant


@pytest.mark.parametrize("name", ["apart", "full rank", "tied", "tied with biases"])
def test_an_item_of_a_tail_enters_the_head_with_its_probability(name):
    former, model = make(config_of(name), 0), make(config_of(name), 1)
    old_ids = swapped((2, 33), (4, 12))
    carried = start_from(model, former, old_ids, histories_of(K, 60))
    assert carried.moved == 4
    hidden = former(histories_of(K, 60))[:, -1].detach().double().numpy()
    head = model.softmax.packed_weights()
    for place, item in ((2, 33), (4, 12)):
        vector, constant = overall(former, hidden, item, folded=head.head_bias is None)
        np.testing.assert_allclose(head.weights[0][place].detach().numpy(), vector, rtol=1e-3, atol=1e-3)
        if head.head_bias is not None:
            assert head.head_bias[place].item() == pytest.approx(constant, abs=1e-4)
        torch.testing.assert_close(model.embedding(torch.tensor(place)), former.embedding(torch.tensor(item)))


def test_full_ranks_hold_an_item_in_every_cluster():
    former, model = make(config_of("full rank"), 0), make(config_of("full rank"), 1)
    old_ids = swapped((2, 33), (11, 34), (5, 14))
    start_from(model, former, old_ids, histories_of(K, 60))
    items = torch.arange(K)
    torch.testing.assert_close(model.embedding(items), former.embedding(old_ids))
    hidden = former(histories_of(K, 60))[:, -1].detach().double().numpy()
    weights, partition = model.softmax.packed_weights(), model.config.output_partition
    for place in (33, 11, 34, 14):  # tails: a vector is that of the overall form less what its new tail has in common
        level = partition.cluster_of(place)
        row = place - partition.offsets[level]
        vector, constant = overall(former, hidden, int(old_ids[place]))
        other = next(item for item in range(*partition.offsets[level : level + 2]) if old_ids[item] == item)
        common, shared = overall(former, hidden, other)
        own = former.softmax.packed_weights().weights[level][other - partition.offsets[level]].detach().double().numpy()
        bias = former.softmax.packed_weights().tail_biases[level - 1][other - partition.offsets[level]].item()
        np.testing.assert_allclose(
            weights.weights[level][row].detach().numpy(), vector - (common - own), rtol=1e-3, atol=1e-3
        )
        assert weights.tail_biases[level - 1][row].item() == pytest.approx(constant - (shared - bias), abs=1e-4)


@pytest.mark.parametrize("biases", [{"head_bias": True}, {"tail_bias": True}])
def test_a_bias_that_has_no_place_goes_into_the_row(biases):
    config = config_of("full rank", **{"head_bias": False, "tail_bias": False, **biases})
    former, model = make(config, 0), make(config, 1)
    with torch.no_grad():
        (former.softmax.head_bias if "head_bias" in biases else former.softmax.tail_biases[1])[2] = (
            4.0  # items 2 and 27
        )
    start_from(model, former, swapped((2, 27)), histories_of(K, 60))
    hidden = former(histories_of(K, 60))[:, -1].detach().double().numpy()
    ours = model.softmax.packed_weights()
    if "head_bias" in biases:  # item 2 is in the last tail now, which has none
        other = former.softmax.packed_weights().weights[2][3].detach().double().numpy()  # item 28, which stays
        vector, constant = overall(former, hidden, 2)
        common, shared = overall(former, hidden, 28)
        one = np.linalg.lstsq(hidden, np.ones(len(hidden)), rcond=None)[0]
        expected, row = vector - (common - other) + (constant - shared) * one, ours.weights[2][2]
    else:  # item 27 is in the head, which has none
        (expected, _), row = overall(former, hidden, 27, folded=True), ours.weights[0][2]
    np.testing.assert_allclose(row.detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_movers_are_those_between_levels_of_the_softmax():
    for pair, moved in (
        ((12, 17), 2),
        ((5, 12), 0),
        ((3, 30), 2),
    ):  # the embedding is cut at 10 and 25, the softmax at 15
        former, model = make(config_of("two partitions"), 0), make(config_of("two partitions"), 1)
        assert start_from(model, former, swapped(pair), histories_of(K)).moved == moved
    # Item 12 embeds with 4 columns instead of 8 no more.
    former, model = make(config_of("two partitions"), 0), make(config_of("two partitions"), 1)
    start_from(model, former, swapped((5, 12)), histories_of(K))
    torch.testing.assert_close(model.embedding(torch.tensor(5)), former.embedding(torch.tensor(12)))


def test_a_new_item_is_the_mean_of_all_that_are_known_in_its_cluster():
    former, model = make(config_of("full rank"), 0), make(config_of("full rank"), 1)
    old_ids = swapped((2, 33))
    old_ids[[4, 12, 34]] = -1
    start_from(model, former, old_ids, histories_of(K, 60))
    weights = model.softmax.packed_weights()
    for level, (lo, hi, new) in enumerate(((0, 10, 4), (10, 25, 12), (25, 40, 34))):
        known = [item - lo for item in range(lo, hi) if item != new]
        bias = weights.head_bias if level == 0 else weights.tail_biases[level - 1]
        for own in (weights.weights[level], bias, model.embedding.embeddings[level]):
            torch.testing.assert_close(own[new - lo], own[known].mean(0))


def test_the_former_model_is_read_as_it_predicts_and_left_as_it_was():
    results = []
    for training in (False, True):
        former = make(config_of("apart", dropout=0.5), 0).train(training)
        model = make(config_of("apart", dropout=0.5), 1)
        start_from(model, former, swapped((2, 33)), histories_of(K, 60))
        assert former.training == training
        results.append(model.state_dict())
    assert all(value.equal(results[1][name]) for name, value in results[0].items())


def test_histories_are_the_newest_known_items_by_their_former_numbers(monkeypatch):
    class Catalogue:
        def encode(self, ids):
            return np.array([{"a": 2, "b": 0, "c": 3}.get(item, -1) for item in ids])

    class Train:
        def __len__(self):
            return 50_000_000

        def __getitem__(self, index):
            assert 0 <= index < len(self)
            return np.array([2, 1, 0, 2, 3] if index else [1, 1], dtype=np.int32)

    given = []
    former = make(config_of("apart"), 0)
    monkeypatch.setattr(warm_start, "read_former", lambda folder: warm_start.Former(former, ["a", "b", "gone", "c"]))
    monkeypatch.setattr(warm_start, "start_from", lambda *arguments: given.append(arguments))
    data = types.SimpleNamespace(catalogue=Catalogue(), num_items=5, train=Train(), folder="data")
    warm_start.initialise(make(config_of("apart"), 1), data, "run", length=3)
    _, _, old_ids, histories = given[0]
    assert old_ids.tolist() == [1, -1, 0, 3, -1]
    assert histories.shape == (4 * D, 3)
    assert histories[0].tolist() == [K, K, K]
    assert histories[1:].unique(dim=0).tolist() == [[1, 0, 3]]


def test_a_tied_row_is_the_nearest_for_both_of_its_uses():
    former, model = make(config_of("tied"), 0), make(config_of("tied"), 1)
    start_from(model, former, swapped((2, 33)), histories_of(K, 60))
    hidden = former(histories_of(K, 60))[:, -1].detach().double().numpy()
    level, place = 2, 33
    row = model.embedding.embeddings[level][place - 25].detach().double().numpy()
    inputs = model.embedding.projections[1].detach().double().numpy()
    outputs = model.softmax.projections[1].detach().double().numpy()
    embedded = former.embedding(torch.tensor(2)).detach().double().numpy()
    common, constant = overall(former, hidden, 30)  # of the tail, as the row's own bias is 0
    own = former.softmax.packed_weights().weights[level][5].detach().double().numpy() @ outputs
    one = np.linalg.lstsq(hidden, np.ones(len(hidden)), rcond=None)[0]
    logit = overall(former, hidden, 2)[0] - (common - own) - constant * one
    scales = np.linalg.norm(inputs), np.linalg.norm(outputs)
    rest = np.concatenate([(row @ inputs - embedded) / scales[0], (row @ outputs - logit) / scales[1]])
    basis = np.concatenate([inputs / scales[0], outputs / scales[1]], 1)
    assert np.abs(basis @ rest).max() < 1e-3 * np.linalg.norm(rest)  # nothing is left that a row could still give


def test_what_does_not_fit_is_named_and_nothing_is_changed():
    former = make(config_of("apart"), 0)
    others = {
        "output ranks": config_of("apart", ranks=[8, 4, 1]),
        "sharing 'none' there, 'cross-layer' here": config_of("apart", sharing="cross-layer"),
        "tie_tails": config_of("tied"),
        "head_bias": config_of("apart", head_bias=True),
        "input ranks": config_of("plain"),
    }
    for message, config in others.items():
        model = make(config, 1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"these differ: .*{message}"):
            start_from(model, former, torch.arange(K), histories_of(K))
        assert all(before[name].equal(value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="cannot start from itself"):
        start_from(former, former, torch.arange(K), histories_of(K))
    model = make(config_of("apart"), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(IndexError):
        start_from(model, former, swapped((2, 33)), histories_of(K) + K)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    for old_ids, message in (
        (torch.arange(K - 1), r"must be \(40,\) int64, got torch.int64 of shape \(39,\)"),
        (torch.arange(K).float(), "got torch.float32"),
        (torch.arange(K) + 1, "holds item 40, outside 0..39"),
        (torch.arange(K).clamp(max=20), "holds item 20 more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            start_from(model, former, old_ids, histories_of(K))


def test_a_catalogue_grows_in_its_last_cluster():
    config = config_of("two partitions", dropout=0.2)
    more = grown(config, 100, dropout=0.4)
    assert (more.num_items, more.dropout) == (100, 0.4)
    assert more.input_partition.sizes == (10, 15, 75)
    assert more.output_partition.sizes == (15, 85)
    assert grown(config, 26).input_partition.sizes == (10, 15, 1)
    with pytest.raises(ValueError, match="the last cluster starts at item 25, of which 25 items leave none"):
        grown(config, 25)


@pytest.mark.parametrize(
    ("former", "own", "doubtful"),
    [
        ("leave-one-out", "leave-one-out", False), ("time", "time", False), ("leave-one-out", "time", True),
        ("time", "leave-one-out", True), ("user", "user", True), ("user", "time", True), ("time", "user", True),
    ],
)  # fmt: skip
def test_only_the_same_split_twice_hides_what_is_held_out(former, own, doubtful, tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"u{user},i{(user * 7 + step) % 30},{1_000 * step + user}" for user in range(60) for step in range(6)]
    log.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    folders = {}
    for name, split in (("before", former), ("now", own)):
        folders[name] = prepare(log, tmp_path / name, split=split)
    model = NextItNetConfig.from_plan(folders["before"].num_items, D, dilations=(1,))
    train(folders["before"], model, TrainingConfig(epochs=1, accelerator="cpu"), tmp_path / "run", progress=False)
    export(tmp_path / "run", tmp_path / "model")
    for source in (tmp_path / "run", tmp_path / "model"):
        found = warm_start.doubtful_split(source, folders["now"])
        assert (found is not None) == doubtful
        if doubtful:
            assert f"is of data split by {former}, this data is split by {own}: it may have been trained on" in found
    (tmp_path / "before").rename(tmp_path / "elsewhere")
    assert "does not say how its data was split" in warm_start.doubtful_split(tmp_path / "run", folders["now"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["data"]["split"]  # an export from before it was written
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "does not say how its data was split" in warm_start.doubtful_split(tmp_path / "model", folders["now"])
