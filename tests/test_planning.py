"""Planning: the search finds the optimum of its model, budgets are kept, and the model says what was measured."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_kernels import Partition
from cprec_kernels.planning import (
    BudgetError,
    Machine,
    Objective,
    Planner,
    Prediction,
    QualityModel,
    counts,
    default_ranks,
    plan,
)

ROOT = Path(__file__).parents[1]
WIDTH = 8
RANKS = (8, 4, 2)


def falling(values) -> np.ndarray:
    return np.sort(np.asarray(values))[::-1]


def zipf(items: int, interactions: int, exponent: float = 1.0) -> np.ndarray:
    weights = np.arange(1, items + 1.0) ** -exponent
    return np.floor(weights / weights.sum() * interactions).astype(np.int64)


catalogues = st.lists(st.integers(0, 40), min_size=1, max_size=9).map(falling)
budgets = st.one_of(
    st.tuples(st.just("max_parameters"), st.floats(20, 400)),
    st.tuples(st.just("compression"), st.floats(0.5, 6)),
    st.tuples(st.just("max_train_ms"), st.floats(0.1, 1.5)),
    st.tuples(st.just("max_topk_ms"), st.floats(0.1, 0.6)),
)


def every_partition(num_items: int, max_clusters: int):
    for clusters in range(1, min(max_clusters, num_items) + 1):
        for cutoffs in itertools.combinations(range(1, num_items), clusters - 1):
            for ranks in itertools.combinations_with_replacement(RANKS, clusters):
                yield Partition(num_items, cutoffs, ranks, WIDTH)


def score_of(planner: Planner, predicted: Prediction) -> float:
    plain = planner.plain
    train, topk = planner.objective
    return predicted.loss + train * predicted.train_ms / plain.train_ms + topk * predicted.topk_ms / plain.topk_ms


def spent_of(name: str, predicted: Prediction) -> float:
    if name == "compression":
        return predicted.parameters
    return {"max_parameters": predicted.parameters, "max_train_ms": predicted.train_ms}.get(name, predicted.topk_ms)


# The search


@settings(max_examples=60, deadline=None)
@given(catalogues, budgets, st.sampled_from(["balanced", "quality", "speed"]), st.integers(1, 4))
def test_the_plan_is_the_best_of_all_partitions(counted, budget, objective, max_clusters):
    name, amount = budget
    planner = Planner(counted, WIDTH, ranks=RANKS, objective=objective, max_clusters=max_clusters, tokens=50)
    limit = planner.plain.parameters / amount if name == "compression" else amount
    predictions = (planner.predict(partition) for partition in every_partition(len(counted), max_clusters))
    fitting = [predicted for predicted in predictions if spent_of(name, predicted) <= limit]
    if not fitting:
        with pytest.raises(BudgetError, match=r"more than there is|the smallest possible is"):
            planner.plan(**{name: amount})
        return
    best = min(score_of(planner, predicted) for predicted in fitting)
    found = planner.plan(**{name: amount})
    assert found.score == pytest.approx(best, rel=1e-9)
    predicted = planner.predict(found.partition)
    assert found.prediction == predicted
    assert score_of(planner, predicted) == pytest.approx(best, rel=1e-9)
    assert spent_of(name, predicted) <= limit * (1 + 1e-12)
    assert found.partition.num_clusters <= max_clusters


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4000), st.floats(0, 2), st.integers(0, 10**6), st.sampled_from([1, 5, 16, 48]),
    st.lists(st.floats(1, 40), min_size=2, max_size=5, unique=True),
)  # fmt: skip
def test_budgets_are_kept_and_a_larger_one_is_never_worse(items, exponent, interactions, width, factors):
    planner = Planner(zipf(items, interactions, exponent), width)
    scores = []
    for factor in sorted(factors):
        limit = planner.plain.parameters / factor
        smallest = planner.smallest("parameters")
        if smallest > limit:
            with pytest.raises(BudgetError) as caught:
                planner.plan(compression=factor)
            assert caught.value.smallest == smallest
            assert planner.plan(max_parameters=smallest).prediction.parameters == smallest
            break
        found = planner.plan(compression=factor)
        assert found.prediction.parameters <= limit
        partition = found.partition
        assert found.prediction.parameters == partition.embedding_parameters + partition.softmax_parameters()
        scores.append(found.score)
    assert scores == sorted(scores)


def test_many_candidates_are_searched_exactly():
    """Beyond what brute force reaches: three clusters over all candidate cuts of a larger catalogue, by plain loops."""
    planner = Planner(zipf(5000, 60_000), 32, ranks=(32, 16, 4), max_clusters=3, objective="quality")
    places = planner._places
    assert 60 < len(places) <= counts.MAX_CUTS + 2
    edges, loss = planner._edges["parameters"], planner._edges["loss"]
    for compression in (2.0, 3.7, 5.5):
        limit = planner.plain.parameters / compression
        best = math.inf
        middle = range(1, len(places) - 1)
        for i, j, k in itertools.combinations_with_replacement(range(3), 3):
            for first in middle:
                used = edges.heads[2, i, first] + edges.tails[j, first] + edges.tails[k, :, -1]
                value = loss.heads[2, i, first] + loss.tails[j, first] + loss.tails[k, :, -1]
                best = min(best, value[used <= limit].min(initial=math.inf))
        for i, j in itertools.combinations_with_replacement(range(3), 2):
            used = edges.heads[1, i] + edges.tails[j, :, -1]
            best = min(best, (loss.heads[1, i] + loss.tails[j, :, -1])[used <= limit].min(initial=math.inf))
        for i in range(3):
            if edges.heads[0, i, -1] <= limit:
                best = min(best, loss.heads[0, i, -1])
        assert planner.plan(compression=compression).score == pytest.approx(best, rel=1e-9)


def test_the_same_counts_give_the_same_plan():
    numbers = zipf(20_000, 100_000)
    first = plan(numbers, 64, compression=5)
    assert plan(numbers, 64, compression=5) == first
    assert plan(torch.from_numpy(numbers), 64, compression=5) == first
    assert plan(numbers.astype(np.float64), 64, compression=5) == first
    assert Partition.from_counts(numbers, 64, compression=5) == first.partition
    assert Partition.from_counts(numbers, 64, compression=5, max_clusters=1).num_clusters == 1


# Edges


def test_one_item_has_one_cluster():
    found = plan([7], 4, compression=0.5)
    assert found.partition == Partition.single(1, 4)
    assert found.advice == "A plain softmax is the best there is within the budget: do not cluster."


@pytest.mark.parametrize("value", [0, 1, 3.5])
def test_equal_counts_are_not_cut_for_quality(value):
    # With every rank to choose from: a coarser choice leaves a budget over, which a cut would spend.
    found = plan([value] * 500, 32, compression=4, objective="quality", ranks=range(1, 33))
    assert found.partition.num_clusters == 1
    assert found.compression >= 4


def test_items_that_nobody_saw_get_few_columns():
    numbers = np.concatenate([np.full(50, 1000), np.zeros(950)])
    found = plan(numbers, 32, compression=3)
    assert found.partition.ranks[0] == 32
    assert found.partition.ranks[-1] == 4
    assert found.partition.cutoffs[-1] >= 50


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "counts is empty"),
        ([[3, 2]], ValueError, r"counts must be a vector, one count per item, got shape \(1, 2\)"),
        (3, ValueError, r"got shape \(\)"),
        ([3, 2, 5], ValueError, r"counts must not increase, but counts\[2\] = 5 follows 2"),
        ([3, 2, -1], ValueError, r"counts\[2\] = -1 is negative"),
        ([0.5, 0.3, 0.2], ValueError, r"counts\[0\] = 0.5 is the largest and below 1, so these are shares"),
        ([3.0, math.nan, 1.0], ValueError, r"counts\[1\] = nan is not a finite number"),
        ([math.inf, 1.0], ValueError, r"counts\[0\] = inf is not a finite number"),
        ([1e308, 1e308], ValueError, "add up to more than a float holds"),
        ([True, False], TypeError, "counts must be integers or floats, got dtype bool"),
        (["3", "2"], TypeError, "counts must be integers or floats, got dtype <U1"),
        ([3 + 1j], TypeError, "got dtype complex128"),
    ],
)
def test_bad_counts_are_named(given, error, message):
    with pytest.raises(error, match=message):
        plan(given, 4, compression=2)


def test_a_mistake_beyond_the_first_chunk_is_found_at_its_place(monkeypatch):
    monkeypatch.setattr(counts, "CHUNK", 4)
    numbers = np.arange(20, 0, -1)
    whole = counts.Popularity.of(numbers)
    assert list(whole.starts) == list(range(21))
    for item, value, message in ((4, 30, r"counts\[4\] = 30 follows 17"), (9, -2, r"counts\[9\] = -2 is negative")):
        wrong = numbers.copy()
        wrong[item] = value
        with pytest.raises(ValueError, match=message):
            counts.Popularity.of(wrong)
    assert list(counts.Popularity.of([5, 5, 5, 5, 5, 5, 2, 2, 2]).starts) == [0, 6, 9]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one budget of max_parameters, compression, max_train_ms, max_topk_ms; got none"),
        ({"compression": 2, "max_parameters": 9}, ValueError, "got max_parameters and compression"),
        ({"compression": 0}, ValueError, "compression must be a finite number above 0, got 0"),
        ({"max_topk_ms": math.nan}, ValueError, "max_topk_ms must be a finite number above 0, got nan"),
        ({"compression": 2, "objective": "best"}, ValueError, "objective must be one of balanced, quality, speed"),
        ({"compression": 2, "objective": Objective(-1, 0)}, ValueError, "weights of the objective must be finite"),
        ({"compression": 2, "machine": "tpu"}, ValueError, "machine must be one of cpu, gpu or a Machine, got 'tpu'"),
        ({"compression": 2, "max_clusters": 9}, ValueError, "max_clusters = 9: at most 8"),
        ({"compression": 2, "max_clusters": 0}, ValueError, "max_clusters must be at least 1, got 0"),
        ({"compression": 2, "ranks": [16]}, ValueError, r"at least one rank in 1..8 \(embedding_dim\), got \[16\]"),
        ({"compression": 2, "ranks": []}, ValueError, "at least one rank in 1..8"),
        ({"compression": 2, "ranks": [4.0]}, TypeError, r"ranks\[0\] must be an integer, got 4.0"),
        ({"compression": 2, "tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"compression": 2, "rows": True}, TypeError, "rows must be an integer, got the bool True"),
        ({"max_parameters": 10}, BudgetError, "max_parameters = 10 is too small for 4 items: the smallest possible is 24"),
        ({"max_train_ms": 1e-6}, BudgetError, "max_train_ms = 1e-06 is too small for 4 items: the smallest possible is"),
        ({"compression": 9}, BudgetError, "compression = 9 is more than there is: the smallest tables have 24 parameters"),
    ],
)  # fmt: skip
def test_bad_budgets_and_options_are_named(options, error, message):
    arguments = {"ranks": (8, 1)} | options
    with pytest.raises(error, match=message):
        plan([4, 3, 2, 1], 8, **arguments)


@pytest.mark.parametrize("name", ["max_parameters", "compression", "max_train_ms", "max_topk_ms"])
@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_budget_in_a_message_is_one_that_works(name, seed):
    random = np.random.default_rng(seed)
    planner = Planner(zipf(int(random.integers(20, 5000)), int(random.integers(0, 10**6)), random.random()), 32)
    with pytest.raises(BudgetError) as caught:
        planner.plan(**{name: 1e6 if name == "compression" else 1e-6})
    words = str(caught.value).replace(",", "")
    number = words.split(" times fewer")[0].split()[-1] if name == "compression" else words.split(" is ")[-1]
    planner.plan(**{name: float(number)})
    quantity = {"max_train_ms": "train_ms", "max_topk_ms": "topk_ms"}.get(name, "parameters")
    if name != "compression":
        planner.plan(**{name: planner.smallest(quantity)})
    assert caught.value.smallest == planner.smallest(quantity)


def test_bad_models_and_machines_are_named():
    with pytest.raises(ValueError, match="noise must be a finite number of at least 0, got -1"):
        QualityModel(noise=-1)
    with pytest.raises(ValueError, match="flops of the machine must be a finite number above 0, got 0"):
        Machine("none", 0, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="level_ms of the machine"):
        Machine("none", 1, 1, 1, 1, -1)
    with pytest.raises(ValueError, match="the partition is for 5 items of width 8, the planner for 4 of width 8"):
        Planner([4, 3, 2, 1], 8).predict(Partition.single(5, 8))


def test_default_ranks():
    assert default_ranks(64) == (64, 48, 32, 24, 16, 8, 4)
    assert default_ranks(100)[:2] == (100, 96)
    assert default_ranks(3) == (3,)
    assert default_ranks(1) == (1,)


def test_the_frontier_falls_and_ends_where_nothing_fits():
    plans = Planner(zipf(50_000, 3_000_000), 64).frontier()
    assert len(plans) > 3
    sizes = [found.prediction.parameters for found in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert [found.score for found in plans] == sorted(found.score for found in plans)
    for found in plans:
        assert found.compression >= found.budget["compression"]
        assert json.loads(json.dumps(found.to_dict()))["prediction"]["bytes"] == 4 * found.prediction.parameters


# Large catalogues


def test_cut_candidates_are_few_and_reach_both_ends():
    numbers = zipf(200_000, 2_000_000, 0.9)
    popularity = counts.Popularity.of(numbers)
    cuts = popularity.cut_candidates()
    assert len(cuts) <= counts.MAX_CUTS
    assert (np.diff(cuts) > 0).all()
    assert 0 < cuts[0] < 100
    assert cuts[-1] < 200_000
    last_change = np.flatnonzero(np.diff(numbers))[-1] + 1
    assert last_change in cuts
    reached = popularity.shares(cuts)
    assert np.diff(np.concatenate([[0], reached, [1]])).max() < 0.05


def test_sums_of_runs_are_sums_of_items():
    numbers = falling(np.random.default_rng(0).integers(0, 30, 500))
    popularity = counts.Popularity.of(numbers)
    places = np.arange(501)
    expected = np.concatenate([[0], np.cumsum(numbers)])
    np.testing.assert_allclose(popularity.prefix(popularity.values, places), expected)
    np.testing.assert_allclose(popularity.shares(places), expected / numbers.sum())


def test_shares_of_a_catalogue_that_nobody_has_seen_are_those_of_items():
    assert counts.Popularity.of([0, 0, 0, 0]).shares(np.array([0, 1, 4])).tolist() == [0.0, 0.25, 1.0]


def test_distinct_counts_beyond_what_is_kept_are_joined(monkeypatch):
    numbers = falling(np.random.default_rng(0).random(5000) * 1_000)
    exact = Planner(numbers, 16)
    monkeypatch.setattr(counts, "MAX_RUNS", 1000)
    joined = Planner(numbers, 16)
    assert len(joined.popularity.values) <= 1000
    assert joined.popularity.total == pytest.approx(exact.popularity.total)
    partition = Partition(5000, [700, 2500], [16, 8, 4], 16)
    assert joined.predict(partition).loss == pytest.approx(exact.predict(partition).loss, rel=1e-5)
    monkeypatch.setattr(counts, "MAX_RUNS", 4)
    few = counts.Popularity.of([9, 9, 9, 8, 7, 7, 6, 5, 4, 4, 4, 4, 3])
    assert len(few.values) <= 4
    assert few.values @ np.diff(few.starts) == pytest.approx(79)
    assert few.starts[-1] == 13
