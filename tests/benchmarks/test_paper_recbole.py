"""RecBole's NextItNet as a baseline of benchmarks.paper, and runs that were trained elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.paper import recbole, tables
from benchmarks.paper.page import findings, markdown
from benchmarks.paper.presets import TINY
from benchmarks.paper.store import Store
from benchmarks.paper.table import Row, Table
from cprec.data import PreparedData, Sequences, prepare_synthetic
from cprec.evaluation import metrics_of_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "data"
    prepare_synthetic(folder, 60, 200, seed=0)
    return PreparedData.open(folder)


def test_every_prefix_is_an_example_in_recboles_layout():
    sequences = Sequences(np.array([7, 8, 9, 3, 4, 5]), [0, 3, 3, 4, 6])
    prefixes = recbole._Prefixes(sequences, 2)
    given, target = prefixes.batch(np.arange(len(prefixes)))
    assert given.tolist() == [[8, 0], [8, 9], [5, 0]]  # ids from 1 on, padded on the right
    assert target.tolist() == [9, 10, 6]
    longer = recbole._Prefixes(Sequences(np.arange(5), [0, 5]), 2).batch(np.array([3]))
    assert [part.tolist() for part in longer] == [[[3, 4]], [5]]


def test_targets_are_ranked_among_the_whole_catalogue(data):
    torch.manual_seed(0)
    model = recbole.build(data.num_items, 8, torch.device("cpu"))
    split = data.evaluation("test")
    ranks = []
    for number in range(len(split)):
        history = split.histories.items[split.histories.starts[number] : split.histories.ends[number]][-8:]
        given = torch.zeros(1, 8, dtype=torch.int64)
        given[0, : len(history)] = torch.from_numpy(history.astype(np.int64)) + 1
        with torch.no_grad():
            scores = model.eval().full_sort_predict({"item_list": given})[0, 1:]
        ranks.append(int((scores > scores[int(split.targets[number])]).sum()))
    ours = recbole.evaluate(model, split, 8, torch.device("cpu"))
    assert ours == pytest.approx(metrics_of_ranks(np.array(ranks)).to_dict(), abs=1e-3)


def test_it_learns_and_stops(tmp_path, monkeypatch):
    data = prepare_synthetic(tmp_path / "data", 40, 50, seed=0)
    faster = recbole.defaults() | {"learning_rate": 0.01, "batch_size": 256}
    monkeypatch.setattr(recbole, "defaults", lambda: faster)
    first = recbole.train(data, 8, 0, epochs=1, patience=2, device="cpu")
    last = recbole.train(data, 8, 0, epochs=40, patience=2, device="cpu")
    assert first["epochs"] == 1
    assert last["epochs"] < 40
    assert last["best_epoch"] == last["epochs"] - 3
    assert last["validation"]["ndcg@10"] > 2 * first["validation"]["ndcg@10"]
    # the weights of the best epoch, as a run of so many epochs leaves them
    again = recbole.train(data, 8, 0, epochs=last["best_epoch"] + 1, patience=2, device="cpu")
    assert again["test"] == last["test"]


def test_a_loss_that_is_not_finite_is_reported(data, monkeypatch):
    build = recbole.build

    def broken(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            model.final_layer.weight[0, 0] = torch.nan
        return model

    monkeypatch.setattr(recbole, "build", broken)
    with pytest.raises(BenchmarkError, match="the loss of RecBole's NextItNet is not finite in epoch 1"):
        recbole.train(data, 8, 0, epochs=2, patience=1, device="cpu")


def test_scores_that_are_not_finite_are_no_rank(data):
    model = recbole.build(data.num_items, 8, torch.device("cpu"))
    with torch.no_grad():
        model.final_layer.weight.fill_(torch.nan)
    with pytest.raises(BenchmarkError, match="scores of RecBole's NextItNet are not finite"):
        recbole.evaluate(model, data.evaluation("test"), 8, torch.device("cpu"))


def test_what_is_said_in_short_is_said_of_our_models():
    times = {"machine": "this one", "step_ms": 4.0, "topk_ms": 2.0, "search_ms": 1.0}
    twin = Row("L = 4", "twin", "", 800, 1, {"ndcg@10": [0.2]}, {"to_metric_epochs": 3.0}, {}, [times])
    planned = {"cutoffs": [10, 20]}
    ours = Row("L = 4", "compressed", "twin", 100, 1, {"ndcg@10": [0.1]}, {}, planned, [times | {"step_ms": 2.0}])
    theirs = Row("L = 4", "RecBole NextItNet", "twin", 900, 1, {"ndcg@10": [0.1]}, {"epochs": 3.0})
    narrower = Row("L = 4", "twin, d = 8", "twin", 400, 1, {"ndcg@10": [0.1]}, {"epochs": 3.0}, {"cutoffs": []})
    found = findings(Table(1, {"name": "goods"}, {}, {}, [twin, theirs, narrower, ours]))
    assert found == [
        "- goods, L = 4, compressed: 8.00 times fewer parameters; NDCG@10 50.0%: one seed; a training step 2.00 times, "
        "top 10 of a history 1.00 times, its search alone 1.00 times as fast; the twin's best validation NDCG@10 is "
        "not reached."
    ]
    untimed = dataclasses.replace(ours, figures={"to_metric_epochs": 4.0}, times=[])
    found = findings(
        Table(
            6,
            {"name": "goods"},
            {"dim": 16},
            {},
            [dataclasses.replace(twin, figures={"to_metric_epochs": 3.0}), untimed],
        )
    )
    assert found == [
        "- goods, L = 4, d = 16, compressed: 8.00 times fewer parameters; NDCG@10 50.0%: one seed; the twin's best validation "
        "NDCG@10 after 4.0 epochs, the twin's own after 3.0."
    ]


def test_without_a_device_nothing_is_trained_on_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchmarkError, match=r"no CUDA device here .* --accelerator cpu"):
        tables.Bench(Store(tmp_path), TINY, data, lambda doing: None, "gpu")


def test_importing_it_leaves_torchs_switches():
    assert recbole.missing() is None
    assert not torch.is_anomaly_enabled()


def test_without_the_package_the_row_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench = tables.Bench(Store(tmp_path), TINY, data, lambda doing: None)
    row = bench.recbole("L = 4", 4)
    assert row.settings == {"skipped": "RecBole is not installed"}
    assert "RecBole is not installed" in markdown(Table(1, {}, {}, {}, [row]))
    with pytest.raises(BenchmarkError, match="RecBole is not installed: pip install --no-deps recbole"):
        recbole.train(data, 8, 0, epochs=1, patience=1, device="cpu")


def test_a_run_counts_wherever_it_was_trained(data, tmp_path, monkeypatch):
    bench = tables.Bench(Store(tmp_path), dataclasses.replace(TINY, seeds=(0,)), data, lambda doing: None)
    here = bench.train(bench.model(), 4, 0, dropout=0.0, learning_rate=1e-3, weight_decay=0.01)
    assert here.result["trained_on"] == "CPU"
    settings = bench.settings(
        bench.model(), 4, 1, "gpu", {"dropout": 0.0, "learning_rate": 1e-3, "weight_decay": 0.01}
    )[2]
    bench.store.get_or_run("train", settings, lambda: here.result | {"trained_on": "Some GPU"})

    def never(*arguments, **options):
        raise AssertionError("this run is there already")

    monkeypatch.setattr(tables, "train", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    chosen = {"dropout": 0.0, "learning_rate": 1e-3, "weight_decay": 0.01}
    for accelerator in tables.ACCELERATORS:
        asked = tables.Bench(
            bench.store, dataclasses.replace(TINY, seeds=(0, 1)), data, lambda doing: None, accelerator
        )
        row, _ = asked.row("L = 4", "twin", asked.model(), 4, chosen)
        assert row.settings["trained_on"] == ["CPU", "Some GPU"]
        assert row.seeds == 2
