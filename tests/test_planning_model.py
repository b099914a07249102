"""What the planner predicts: the documented formula, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cprec_kernels import Partition
from cprec_kernels.planning import CPU, GPU, Planner, QualityModel, costs, counts, plan

ROOT = Path(__file__).parents[1]


def zipf(items: int, interactions: int, exponent: float = 1.0) -> np.ndarray:
    weights = np.arange(1, items + 1.0) ** -exponent
    return np.floor(weights / weights.sum() * interactions).astype(np.int64)


def loss_by_the_formula(numbers, partition: Partition, model: QualityModel, tied: bool) -> float:
    """docs/planning.md item by item."""
    width, items, total = partition.embedding_dim, partition.num_items, float(sum(numbers))
    spectrum = [k**-model.spectrum for k in range(1, width + 1)]
    loss = 0.0
    for item, seen in enumerate(numbers):
        j = partition.cluster_of(item)
        rank = partition.ranks[j]
        is_tied = tied and j > 0
        lost = sum(spectrum[rank:]) / sum(spectrum) + model.noise * (2 - is_tied) * rank / (seen + 1)
        lost += model.tree * (j > 0) + model.tied * is_tied
        loss += min(1.0, lost) * (seen + 1) / (total + items)
    shared = sum(2 * partition.ranks[j] * width for j in partition.projected)
    shared += (partition.num_clusters - 1) * partition.ranks[0]
    return loss + model.noise * shared / (total + items)


@pytest.mark.parametrize(("cutoffs", "ranks"), [([], [8]), ([], [2]), ([3], [8, 2]), ([1, 2, 30], [6, 4, 4, 1])])
@pytest.mark.parametrize("model", [QualityModel(), QualityModel(1.7, 0.4, 0.0, 0.3)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_one_documented(cutoffs, ranks, model, tied):
    numbers = zipf(60, 400)
    partition = Partition(60, cutoffs, ranks, 8)
    predicted = Planner(numbers, 8, quality=model, tie_tails=tied).predict(partition)
    assert predicted.loss == pytest.approx(loss_by_the_formula(numbers.tolist(), partition, model, tied), rel=1e-12)
    shared = sum(size * rank for size, rank in zip(partition.sizes[1:], partition.ranks[1:], strict=True))
    apart = partition.embedding_parameters + partition.softmax_parameters()
    assert predicted.parameters == apart - (shared if tied else 0)


def test_tied_tails_buy_more_columns_and_never_full_rank():
    apart, tied = (Planner(SPARSE, 64, tie_tails=tied) for tied in (False, True))
    for compression in (3, 4, 6, 8):
        ours, theirs = tied.plan(compression=compression), apart.plan(compression=compression)
        assert ours.compression >= compression
        assert max(ours.partition.ranks[1:]) < 64
        assert ours.partition.ranks[-1] >= theirs.partition.ranks[-1]
        assert ours.prediction.loss < theirs.prediction.loss


def test_the_surrogate_orders_what_was_seen_of_tied_tails():
    # Validation NDCG@10, all near a sixth of the twin's parameters: 0.0326, 0.0300; tails apart 0.0312.
    planner = Planner(SPARSE, 64, tie_tails=True)

    def loss(*cut):
        return planner.predict(Partition(len(SPARSE), *cut, 64)).loss

    best, low_head = loss([3368, 13_036], [64, 32, 8]), loss([2500], [64, 14])
    apart = Planner(SPARSE, 64).predict(Partition(len(SPARSE), [3368, 13_036], [64, 16, 4], 64)).loss
    assert best < apart < low_head


def power_law(items: int, interactions: int, quantiles: dict[float, int]) -> np.ndarray:
    """Counts that decrease through given values at given places, linearly in log-log between them, scaled to a total."""
    places = np.log([max(1.0, place * items) for place in quantiles])
    values = np.log([value + 0.5 for value in quantiles.values()])
    shape = np.exp(np.interp(np.log(np.arange(1, items + 1)), places, values)) - 0.5
    return np.floor(shape * interactions / shape.sum() + 0.5)


# What the two data sets of docs/planning.md look like: count at places of the catalogue, items, training interactions.
DENSE = power_law(
    3416, 974_939,
    {0: 3355, 0.002: 2600, 0.01: 1779, 0.05: 1061, 0.1: 746, 0.2: 450, 0.45: 172, 0.6: 93, 0.75: 45, 0.9: 17, 1: 4},
)  # fmt: skip
SPARSE = power_law(
    54_542, 273_510, {0: 422, 0.002: 112, 0.01: 57, 0.02: 36, 0.05: 18, 0.1: 10, 0.2: 5, 0.45: 2, 0.75: 1, 0.9: 1, 1: 0}
)  # fmt: skip


def test_the_surrogate_reproduces_what_was_seen_on_a_dense_and_a_sparse_catalogue():
    def losses(numbers, *partitions):
        planner = Planner(numbers, 64)
        return [planner.predict(Partition(len(numbers), *cut, 64)).loss for cut in partitions]

    blind, wider, widest, plain = losses(
        DENSE, ([171, 683], [64, 16, 4]), ([854, 2050], [64, 16, 4]), ([683, 2050], [64, 32, 16]), ([], [64])
    )
    assert blind > wider > widest > plain  # HR@10 0.131, 0.180, 0.184, 0.211
    assert (1 - blind) / (1 - plain) == pytest.approx(0.131 / 0.211, abs=0.06)
    assert (1 - widest) / (1 - plain) == pytest.approx(0.184 / 0.211, abs=0.06)
    # Validation NDCG@10 0.0232, 0.0261, 0.0302, 0.0298, 0.0334; the last is the cuts alone, at full rank.
    low, lower_tail, head, three, plain = losses(
        SPARSE, ([], [10]), ([6518], [24, 8]), ([5365], [64, 4]), ([2000, 15_000], [64, 16, 4]), ([], [64])
    )
    assert low > lower_tail > max(head, three) > plain
    for loss, seen in ((low, 0.0232), (lower_tail, 0.0261), (head, 0.0302), (three, 0.0298)):
        assert (1 - loss) / (1 - plain) == pytest.approx(seen / 0.0334, abs=0.06)


def test_the_planner_says_when_clustering_is_worse_or_slower():
    dense = plan(DENSE, 64, compression=3)
    assert dense.is_worse
    assert "worse than a plain softmax by the surrogate" in dense.advice
    sparse = plan(SPARSE, 64, compression=3)
    assert not sparse.is_worse
    assert not sparse.is_slower_to_train
    assert "no worse than" in sparse.advice
    tiny = Planner(zipf(60, 5000), 16, max_clusters=3, ranks=(16, 4))
    partition = Partition(60, [20], [16, 4], 16)
    assert tiny.predict(partition).topk_ms > tiny.plain.topk_ms
    forced = tiny.plan(compression=1.5)
    assert forced.is_slower_to_search == ("times slower" in forced.advice.split("search")[1].split(",")[0])


def measured(name: str, provider: str) -> list[dict]:
    rows = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [
        row for row in rows if row["provider"] == provider and row["threads"] == 2 and row["dtype"] == "float32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "items", "width", "tokens"),
    [
        ("loss-100k-d128-t512", 100_000, 128, 512),
        ("loss-1m-d128-t512", 1_000_000, 128, 512),
        ("loss-1m-d64-t512", 1_000_000, 64, 512),
        ("loss-1m-d128-t4096", 1_000_000, 128, 4096),
        ("loss-10m-d128-t512", 10_000_000, 128, 512),
    ],
)
def test_the_cost_of_a_loss_is_near_what_was_measured(name, items, width, tokens):
    popularity = counts.Popularity.of(1 / np.arange(1, items + 1))  # the benchmark's Zipf(1)
    partition = Partition(items, [items // 50, items // 5], [width, width // 4, width // 16], width)
    shares = np.diff(popularity.shares(np.array(partition.offsets)))
    entries = [partition.head_size, *partition.sizes[1:]]
    served = [float(tokens), *(tokens * shares[1:])]
    predicted = sum(
        float(costs.softmax_step_ms(CPU, *map(np.array, map(float, level)), width)[()])
        for level in zip(entries, partition.ranks, served, strict=True)
    )
    (row,) = measured(name, "cprec-avx512_bf16")
    assert 0.6 < predicted / row["median_ms"] < 1.6


@pytest.mark.parametrize("name", ["100k", "1m", "10m"])
def test_the_cost_of_a_search_is_near_that_of_a_scan(name):
    items = {"100k": 100_000, "1m": 1_000_000, "10m": 10_000_000}[name]
    partition = Partition(items, [items // 50, items // 5], [128, 32, 8], 128)
    rows_of_case = measured(f"topk-{name}-d128", "cprec-index-float32-full")
    assert rows_of_case
    for row in rows_of_case:
        rows = int(row["case"].rpartition("b")[2])
        predicted = sum(
            float(costs.search_ms(CPU, np.array(float(entries)), np.array(float(rank)), rows, 128))
            for entries, rank in zip([partition.head_size, *partition.sizes[1:]], partition.ranks, strict=True)
        )
        assert 0.5 < predicted / row["median_ms"] < 2.0


def test_a_gpu_pads_ranks_and_overlaps_exponentials():
    entries, tokens = np.array(1e6), np.array(1e4)
    times = [float(costs.softmax_step_ms(GPU, entries, np.array(float(rank)), tokens, 256)) for rank in (4, 16, 64)]
    assert times[0] == pytest.approx(times[1], rel=0.02)
    assert times[2] > times[1]
    assert plan(zipf(10**6, 10**7), 128, compression=8, machine="gpu").prediction.train_ms < 20
