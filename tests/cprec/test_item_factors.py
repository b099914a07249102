"""Item vectors from transitions: counted, factorised, scaled, and put into a model."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from cprec import item_factors
from cprec.data import Sequences, prepare
from cprec.item_factors import Transitions, _System, as_initial_vectors, factorise, initialise, transitions
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train

K = 40


def sequences(seed=0, count=50):
    rng = np.random.default_rng(seed)
    rows = [rng.zipf(1.4, rng.integers(0, 9)) % K for _ in range(count)]
    return Sequences(np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])]))


# Transitions


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("backward", [0.0, 0.5])
def test_transitions_are_those_that_one_counts_by_hand(window, backward):
    expected = Counter()
    for row in sequences():
        for place, item in enumerate(row.tolist()):
            for lag, other in enumerate(row.tolist()[place + 1 : place + 1 + window]):
                if item != other:
                    expected[item, other] += 0.7**lag
                    expected[other, item] += backward * 0.7**lag
    found = transitions(sequences(), K, window=window, decay=0.7, backward=backward)
    pairs = list(zip(found.previous.tolist(), found.following.tolist(), strict=True))
    assert pairs == sorted(pair for pair, weight in expected.items() if weight)
    np.testing.assert_allclose(found.weights, [expected[pair] for pair in pairs], rtol=1e-6)
    back = found.reversed()
    assert sorted(zip(back.following.tolist(), back.previous.tolist(), back.weights.tolist(), strict=True)) == sorted(
        zip(*(column.tolist() for column in found), strict=True)
    )
    assert back.previous.equal(back.previous.sort().values)


@pytest.mark.parametrize("rows", [[], [[3]], [[3], [4]], [[3, 3, 3]]])
def test_no_transition(rows):
    flat = np.array([item for row in rows for item in row], dtype=np.int32)
    found = transitions(Sequences(flat, np.cumsum([0, *map(len, rows)])), K)
    assert [len(column) for column in found] == [0, 0, 0]
    before, after = factorise(found, K, 4)
    assert not before.any()
    assert not after.any()


# Factors


def objective(p, q, pairs, unobserved, regularisation):
    """As written in the docstring, over all pairs, fp64."""
    weights = torch.zeros(K, K, dtype=torch.float64)
    weights[pairs.previous, pairs.following] = pairs.weights.double()
    scores = p @ q.T
    unobserved = unobserved * float(weights.mean())
    mass = unobserved * K
    return (
        (weights * (1 - scores).square()).sum()
        + unobserved * scores.square().sum()
        + regularisation
        * ((weights.sum(1) + mass).sqrt() @ p.square().sum(1) + (weights.sum(0) + mass).sqrt() @ q.square().sum(1))
    )


def exact_rows(q, pairs, unobserved, regularisation):
    weights = torch.zeros(K, K, dtype=torch.float64)
    weights[pairs.previous, pairs.following] = pairs.weights.double()
    unobserved = unobserved * float(weights.mean())
    eye = torch.eye(q.shape[1], dtype=torch.float64)
    rows = []
    for own in weights:
        penalty = regularisation * (own.sum() + unobserved * K).sqrt()
        rows.append(torch.linalg.solve((q.T * (own + unobserved)) @ q + penalty * eye, q.T @ own))
    return torch.stack(rows)


@pytest.mark.parametrize("settings", [(12.0, 0.4), (2.0, 1.0)])
def test_many_sweeps_reach_a_stationary_point(settings):
    pairs = transitions(sequences(), K)
    p, q = factorise(pairs, K, 6, sweeps=200, unobserved=settings[0], regularisation=settings[1])
    p, q = p.double().requires_grad_(), q.double().requires_grad_()
    loss = objective(p, q, pairs, *settings)
    gradients = torch.autograd.grad(loss, (p, q))
    for gradient, factors in zip(gradients, (p, q), strict=True):
        assert float(gradient.norm().detach()) < 2e-3 * float(factors.norm().detach())
    assert float(loss.detach()) < 0.9 * float(pairs.weights.sum())  # that of vectors that are 0 throughout


def test_few_sweeps_go_most_of_the_way_that_exact_steps_go():
    pairs = transitions(sequences(), K)
    settings = (12.0, 0.4)
    p, q = factorise(pairs, K, 6, sweeps=5)
    exact = torch.randn(K, 6, generator=torch.Generator().manual_seed(0)).double() * 0.1 * 6**-0.5
    for _ in range(5):
        rows = exact_rows(exact, pairs, *settings)
        exact = exact_rows(rows, pairs.reversed(), *settings)
    least = float(objective(rows, exact, pairs, *settings))
    assert float(objective(p.double(), q.double(), pairs, *settings)) < least + 0.1 * (
        float(pairs.weights.sum()) - least
    )


def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_it_has_unknowns():
    near, weights = torch.randn(5, 9, 4), torch.rand(5, 9)
    gram, penalties = torch.eye(4) * 0.3, torch.rand(5, 1) + 0.1
    matrix = (near.mT * weights[:, None]) @ near + gram + penalties[:, :, None] * torch.eye(4)
    expected = torch.linalg.solve(matrix.double(), (weights[:, None] @ near)[:, 0].double())
    found = _System(near, weights, gram, penalties).conjugate_gradients(torch.randn(5, 4), 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_batches_do_not_change_the_result(monkeypatch):
    pairs = transitions(sequences(count=300), K)
    whole = factorise(pairs, K, 4)
    monkeypatch.setattr("cprec.item_factors.MAX_ENTRIES", 40)
    for ours, theirs in zip(factorise(pairs, K, 4), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_items_in_no_pair_have_no_vector():
    pairs = Transitions(torch.tensor([1, 2]), torch.tensor([2, 7]), torch.ones(2))
    p, q = factorise(pairs, K, 4)
    assert p.any(1).nonzero()[:, 0].tolist() == [1, 2]
    assert q.any(1).nonzero()[:, 0].tolist() == [2, 7]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1, got 0.0"),
        ({"decay": float("nan")}, "decay must be above 0"),
        ({"backward": -1.0}, "backward must be at least 0, got -1.0"),
        ({"num_items": 5}, r"sequences holds item \d+, outside 0..4"),
    ],
)
def test_transitions_refuse(options, words):
    with pytest.raises(ValueError, match=words):
        transitions(sequences(), **({"num_items": K} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"sweeps": 0}, "sweeps must be at least 1"),
        ({"unobserved": 0.0}, "unobserved must be above 0 and finite, got 0.0"),
        ({"regularisation": float("inf")}, "regularisation must be above 0 and finite"),
        ({"num_items": 5}, r"pairs.previous holds item \d+, outside 0..4"),
    ],
)
def test_factorising_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        factorise(transitions(sequences(), K), **({"num_items": K, "width": 4} | options))


# Scale


def test_scale_is_that_of_a_model():
    p, q = torch.randn(K, 6) * 7, torch.randn(K, 6) + 1
    counts = torch.arange(K, 0, -1)
    before, after = as_initial_vectors(p, q, counts)
    shares = counts / counts.sum()
    assert float(shares @ before.square().sum(1)) == pytest.approx(1, rel=1e-5)
    logits = before @ after.T
    mean = float(shares @ logits.mean(1))
    assert float(shares @ (logits - mean).square().mean(1)) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(before / before.norm(), p / p.norm())
    torch.testing.assert_close(after / after.norm(), q / q.norm())


def test_the_scale_does_not_depend_on_how_many_rows_are_widened_at_a_time(monkeypatch):
    p, q, counts = torch.randn(K, 6) * 7, torch.randn(K, 6) + 1, torch.arange(K, 0, -1)
    whole = as_initial_vectors(p, q, counts)
    monkeypatch.setattr(item_factors, "ROWS_IN_FP64", 7)
    for found, expected in zip(as_initial_vectors(p, q, counts), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_nothing_to_scale():
    zeros = torch.zeros(K, 6)
    assert all(not vectors.any() for vectors in as_initial_vectors(zeros, zeros, torch.ones(K)))


# In a model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A walk on a circle of items, most of the time."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for _ in range(300):
        item, walk = int(rng.integers(K)), []
        for _ in range(8):
            walk.append(f"item{item}")
            item = (item + 1) % K if rng.random() < 0.9 else int(rng.integers(K))
        lines.append(" ".join(walk))
    (folder / "walks.txt").write_text("\n".join(lines) + "\n")
    return prepare(folder / "walks.txt", folder / "prepared", format="sequences")


MODELS = {
    "plain": {"cutoffs": [], "ranks": [8]},
    "apart": {"cutoffs": [10, 25], "ranks": [8, 4, 2]},
    "tied": {"cutoffs": [10, 25], "ranks": [8, 6, 4], "tie_tails": True},
    "narrow head": {"cutoffs": [10, 25], "ranks": [6, 4, 2], "head_bias": True, "tail_bias": True},
}


def config_of(name):
    options = dict(MODELS[name])
    return NextItNetConfig.from_plan(K, 8, options.pop("cutoffs"), options.pop("ranks"), dilations=(1,), **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_knows_the_next_item_before_it_is_trained(data, name):
    ranks = {}
    for start in ("random", "als"):
        torch.manual_seed(0)
        model = NextItNet(config_of(name)).eval()
        if start == "als":
            initialise(model, data)
        for norm in model.backbone.norms:  # without the noise of untrained blocks
            torch.nn.init.zeros_(norm.weight)
        split = data.evaluation("valid")
        last = torch.tensor([[int(row[-1])] for row in split.histories])
        ranks[start] = model.rank(last, torch.from_numpy(split.targets)).double().mean()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert not model.embedding(torch.tensor([K])).any()
    assert ranks["als"] < 0.6 * ranks["random"]


def test_a_plain_model_gets_the_factors_as_they_are(data):
    model = NextItNet(config_of("plain"))
    initialise(model, data, seed=3)
    before, after = as_initial_vectors(
        *factorise(transitions(data.train, K), K, 8, seed=3), torch.from_numpy(np.array(data.counts))
    )
    assert model.embedding(torch.arange(K)).detach().equal(before)
    assert model.softmax.weights[0].detach().equal(after)


CONFIG = TrainingConfig(length=6, batch_size=32, epochs=2, seed=1, init="als", accelerator="cpu")


def test_training_starts_there_and_a_resumed_run_does_not_start_again(data, tmp_path, monkeypatch):
    whole = train(data, config_of("tied"), CONFIG, tmp_path / "whole", progress=False)
    plain = dataclasses.replace(CONFIG, init="random")
    assert (
        whole.history[0].train_loss
        < train(data, config_of("tied"), plain, tmp_path / "p", progress=False).history[0].train_loss
    )
    train(data, config_of("tied"), dataclasses.replace(CONFIG, epochs=1), tmp_path / "parts", progress=False)
    monkeypatch.setattr("cprec.item_factors.factorise", lambda *_, **__: pytest.fail("started again"))
    parts = train(data, config_of("tied"), CONFIG, tmp_path / "parts", resume=True, progress=False)
    assert [record.train_loss for record in parts.history] == [record.train_loss for record in whole.history]
    assert parts.test.to_dict() == whole.test.to_dict()
    with pytest.raises(ValueError, match="init"):
        train(
            data,
            config_of("tied"),
            dataclasses.replace(plain, epochs=3),
            tmp_path / "parts",
            resume=True,
            progress=False,
        )


def test_configurations_from_before_it_existed_keep_their_form():
    assert "init" not in TrainingConfig().to_dict()
    assert TrainingConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert TrainingConfig.from_dict(TrainingConfig().to_dict()) == TrainingConfig()
    with pytest.raises(ValueError, match="init must be one of random, als, got 'svd'"):
        TrainingConfig(init="svd")
