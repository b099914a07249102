"""``python -m benchmarks.paper``: the tiny preset end to end, going on after a stop, and the page it writes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.paper import by_length, speed, tables
from benchmarks.paper.cli import main
from benchmarks.paper.page import at_the_edge, cell, page, verdict, write_page
from benchmarks.paper.presets import PRESETS, TINY
from benchmarks.paper.store import Kept, Store
from benchmarks.paper.table import T_QUANTILES, TITLES, Row, Table, compare, read_table, read_tables
from benchmarks.run import Provenance
from benchmarks.table import number
from cprec.data import PreparedData, prepare_synthetic
from cprec.evaluation import evaluate


def call(capfd, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    out, err = capfd.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """Dozens of runs whose curves nobody looks at: to draw them takes as long as to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.plots.plot_curve", lambda history, path, monitor="": path.touch())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "data"
    prepare_synthetic(folder, 300, 120, seed=0)
    return folder


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """All tables of the tiny preset."""
    out = tmp_path_factory.mktemp("paper") / "results"
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "tiny", "--data", str(data), "--out", str(out)])
    assert not stop.value.code
    return out


def never(*arguments, **options):
    raise AssertionError("this run is there already")


# The tables


def test_every_table_is_there_with_its_baselines(results, data):
    found = {table.number: table for table in read_tables(results)}
    assert found.keys() == TITLES.keys()
    assert all(table.complete for table in found.values())
    rows = {number: {(row.group, row.label): row for row in table.rows} for number, table in found.items()}
    assert set(rows[1]) == {
        ("L = 4", label) for label in ("popularity", "RecBole NextItNet", "twin", "compressed", by_length.SHARED)
    }
    assert set(rows[2]) == {(f"{kind} tables", name) for kind in ("twin", "compressed") for name in TINY.sharings}
    assert {label for _, label in rows[3]} >= {"twin", "planned", "at most 1, by loss", "cut at 5% and 20%"}
    assert {label for _, label in rows[4]} == {"neither", "embedding", "softmax", "both"}
    assert [row.figures["items"] for row in found[5].rows] == list(TINY.sizes)
    assert set(rows[6]) == {("L = 4", label) for label in ("twin", "twin, d = 8", by_length.SHARED)}
    for which, table in found.items():
        preset = TINY.wide() if which in (tables.WIDE, tables.FACTORS) else TINY
        assert table.preset == json.loads(json.dumps(preset.to_dict()))
        for row in table.rows:
            if row.metrics and row.label not in ("popularity", "RecBole NextItNet"):
                assert row.seeds == len(TINY.seeds) == len(row.metrics["ndcg@10"])
    twin, compressed, shared = (rows[1]["L = 4", label] for label in ("twin", "compressed", by_length.SHARED))
    assert shared.figures["middle_parameters"] <= compressed.figures["middle_parameters"]
    assert twin.figures["compression"] == 1.0
    assert compressed.figures["compression"] >= TINY.compression
    assert twin.metrics == rows[4]["L = 4", "neither"].metrics
    for row in (twin, compressed, shared):
        assert row.figures["epoch_s"] > 0
        assert row.figures["topk_ms"] > 0
    assert rows[3]["L = 4", "at most 1, by loss"].settings["cutoffs"] == []
    wide, shared = rows[6]["L = 4", "twin"], rows[6]["L = 4", by_length.SHARED]
    assert wide.parameters > twin.parameters == rows[6]["L = 4", "twin, d = 8"].parameters
    assert rows[6]["L = 4", "twin, d = 8"].metrics == twin.metrics
    assert shared.figures["compression"] == wide.parameters / shared.parameters >= TINY.compression
    assert {name: shared.settings[name] for name in TINY.grid} == {name: wide.settings[name] for name in TINY.grid}
    assert shared.figures["step_ms"] > 0
    too = "L = 4, the twin from factors, too"
    started, twins = by_length.STARTED, {"L = 4": "twin", too: by_length.STARTED_TWIN}
    assert set(rows[7]) == {(group, label) for group, twin in twins.items() for label in (twin, started)}
    assert rows[7]["L = 4", "twin"].metrics == wide.metrics != rows[7][too, by_length.STARTED_TWIN].metrics
    assert rows[7]["L = 4", started].metrics == rows[7][too, started].metrics != shared.metrics
    for group, twin in twins.items():
        assert rows[7][group, started].baseline == twin
        assert rows[7][group, started].settings["init"] == "als"
        assert rows[7][group, started].settings["label_smoothing"] == TINY.factor_smoothing
        assert rows[7][group, started].figures["compression"] == shared.figures["compression"]
        assert rows[7][group, twin].figures["step_ms"] == rows[7]["L = 4", "twin"].figures["step_ms"]
    assert rows[7][too, by_length.STARTED_TWIN].settings["init"] == "als"
    assert "init" not in rows[7]["L = 4", "twin"].settings
    embedding = rows[4]["L = 4", "embedding"].settings
    assert embedding["cutoffs"]
    assert embedding["softmax_cutoffs"] == []


def test_metrics_are_those_of_the_trained_models(results, data):
    """What a row says of a seed is what evaluating the weights that are there says."""
    prepared = PreparedData.open(data)
    bench = tables.Bench(Store(results), TINY, prepared, lambda doing: None)
    bench_train = bench.train(bench.planned(), 4, 1, **bench.tune(bench.planned()))
    report = evaluate(bench.load(bench_train), prepared, "test", length=4)
    row = next(row for row in read_tables(results)[0].rows if row.label == "compressed")
    assert row.metrics["ndcg@10"][1] == report.model.ndcg[10]
    popular = next(row for row in read_tables(results)[0].rows if row.label == "popularity")
    assert popular.metrics["hr@5"] == [report.popularity.hr[5]]


def test_compression_counts_against_the_twin_without_shared_layers(data, tmp_path):
    preset = dataclasses.replace(TINY, repeats=4)
    bench = tables.Bench(Store(tmp_path), preset, PreparedData.open(data), lambda doing: None)
    plain, shared = bench.model().num_parameters, bench.planned(sharing="adjacent-block")
    assert shared.sharing == "adjacent-block"
    assert plain / shared.num_parameters >= TINY.compression
    assert shared.num_parameters > dataclasses.replace(bench.planned(), sharing="adjacent-block").num_parameters


def test_tuning_takes_the_best_validation_metric(results, data, monkeypatch):
    monkeypatch.setattr(tables, "train", never)
    bench = tables.Bench(Store(results), TINY, PreparedData.open(data), lambda doing: None)
    for model in (bench.model(), bench.planned()):
        scores = {
            dropout: bench.train(model, 4, 0, dropout=dropout, learning_rate=1e-3, weight_decay=0.01).validation
            for dropout in TINY.grid["dropout"]
        }
        chosen = bench.tune(model)
        assert scores[chosen["dropout"]] == max(scores.values())
        assert set(chosen) == set(TINY.grid)


def test_finished_runs_are_not_made_again(results, data, monkeypatch, capfd):
    for name in ("train", "measure_models", "measure_search"):
        monkeypatch.setattr(tables, name, never)
    before = {path.name: path.read_bytes() for path in (results / "finished").iterdir()}
    out, _ = call(capfd, "--preset", "tiny", "--data", data, "--out", results)
    assert "7 tables" in out
    assert {path.name: path.read_bytes() for path in (results / "finished").iterdir()} == before


def test_a_command_that_was_stopped_goes_on(data, tmp_path, monkeypatch, capfd):
    trained = []
    train = tables.train

    def two_then_stop(*arguments, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arguments[3])
        return train(*arguments, **options)

    arguments = ("--preset", "tiny", "--table", "4", "--data", data, "--out", tmp_path / "out")
    monkeypatch.setattr(tables, "train", two_then_stop)
    call(capfd, *arguments, expect=130)
    finished = {path.name for path in (tmp_path / "out" / "finished").iterdir()}
    assert len(finished) == 2
    seen = []
    monkeypatch.setattr(tables, "train", lambda *args, **options: (seen.append(args[3]), train(*args, **options))[1])
    out, _ = call(capfd, *arguments)
    assert "1 tables, 4 rows" in out
    assert not set(seen) & set(trained)


def test_a_damaged_or_foreign_result_is_named_and_kept(tmp_path):
    store = Store(tmp_path)
    assert store.get("train", {"a": 1}) is None
    assert store.get_or_run("train", {"a": 1}, lambda: {"x": 2}) == {"x": 2}
    assert store.get_or_run("train", {"a": 1}, never) == {"x": 2}
    path = store.path("train", {"a": 1})
    assert json.loads(path.read_bytes())["provenance"]["machine"]
    path.rename(store.path("train", {"a": 2}))
    with pytest.raises(BenchmarkError, match="holds other settings than its name says: delete it"):
        store.get("train", {"a": 2})
    store.path("train", {"a": 2}).write_text("{")
    with pytest.raises(BenchmarkError, match=r"not a result of benchmarks\.paper: delete it"):
        store.get("train", {"a": 2})


def test_weights_that_are_gone_are_asked_for(results, data):
    bench = tables.Bench(Store(results), TINY, PreparedData.open(data), lambda doing: None)
    run = tables.Trained({"never": "trained"}, {})
    with pytest.raises(BenchmarkError, match=r"the weights of a finished run cannot be read .* to train again"):
        bench.load(run)
    with pytest.raises(BenchmarkError, match="this table needs prepared data: pass --data FOLDER"):
        _ = tables.Bench(Store(results), TINY, None, lambda doing: None).data


def test_the_factorisation_counts_as_training(data, tmp_path, monkeypatch):
    """Time to a metric: what the start takes, for models that had one, and the epochs."""
    bench = tables.Bench(Store(tmp_path), TINY, PreparedData.open(data), lambda doing: None)
    start = Kept({"median_ms": 1e6}, {"machine": Provenance.here().machine})
    monkeypatch.setattr(bench.__class__, "start", lambda *arguments: [start])
    rows = {}
    by_length.from_factors(bench, lambda row: rows.setdefault((row.group, row.label), row))
    for row in rows.values():
        assert row.figures["epoch_s"] < 100
        if "to_metric_epochs" in row.figures:
            began = 1000.0 if "init" in row.settings else 0.0
            assert row.figures["to_metric_s"] == began + row.figures["to_metric_epochs"] * row.figures["epoch_s"]
    assert all("to_metric_s" in row.figures for row in rows.values() if not row.baseline)


def test_dense_catalogues_have_no_table_of_factors(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, factor_items=300))
    monkeypatch.setattr(tables, "train", never)
    arguments = ("--preset", "tiny", "--table", "7", "--data", data, "--out", tmp_path)
    _, err = call(capfd, *arguments, expect=2)
    assert "table 7: left out for 300 items, synthetic: it is for more than 300" in err
    assert "there is no table in" in err


# Speed


def test_sizes_beyond_the_memory_are_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.memory, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(tables, "measure_search", never)
    table = tables.run_table(5, Store(tmp_path), TINY, None, lambda doing: None)
    assert all("GB of memory" in row.settings["skipped"] for row in table.rows)
    assert "GB of memory" in page([table], tmp_path / "p.md", tmp_path)


# What differences are worth


def test_compare_knows_noise_from_difference():
    assert compare([0.5], [0.1, 0.2]) == "one seed"
    assert compare([0.2, 0.2], [0.2, 0.2]) == "the same"
    assert compare([0.3, 0.3], [0.2, 0.2]) == "better"
    assert compare([0.10, 0.11, 0.12], [0.105, 0.115, 0.118]) == "within the noise"
    assert compare([0.20, 0.21, 0.22], [0.10, 0.11, 0.12]) == "better"
    assert compare([0.10, 0.11, 0.12], [0.20, 0.21, 0.22]) == "worse"


def test_compare_is_wrong_about_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((2000, 2, 3))
    wrong = np.mean([compare(ours, theirs) != "within the noise" for ours, theirs in draws])
    assert 0.015 < wrong < 0.06
    assert list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)


def test_cells_have_mean_and_deviation():
    assert cell([0.1, 0.2, 0.3]) == "0.2000 ± 0.1000"
    assert cell([0.25]) == "0.2500"
    assert cell([]) == cell(None) == ""
    base, ours = (Row("g", label, "twin", metrics={"ndcg@10": [value]}) for label, value in (("twin", 0.2), ("x", 0.1)))
    assert verdict(ours, [base, ours]) == "50.0%: one seed"
    base.metrics["ndcg@10"] = [0.0]
    assert verdict(ours, [base, ours]) == "baseline is 0: one seed"


def test_times_of_several_machines_stand_side_by_side(results, data, tmp_path, monkeypatch, capfd):
    """Files of another machine are taken as they are; this one's come beside them when asked for, once."""
    out = shutil.copytree(results, tmp_path / "out")
    for path in (out / "finished").glob("speed-*.json"):
        values = json.loads(path.read_bytes())
        values["provenance"] |= {"machine": "another machine", "date": "2026-01-02"}
        for times in values["result"].values():
            if isinstance(times, dict) and speed.TWIN in times:
                times[speed.TWIN]["median_ms"] = 1000.0
        path.write_text(json.dumps(values))
    arguments = ("--preset", "tiny", "--table", "1", "--data", data, "--out", out)
    measured = []
    measure = tables.measure_models
    monkeypatch.setattr(tables, "measure_models", lambda *args: (measured.append(args), measure(*args))[1])
    call(capfd, *arguments)
    assert measured == []
    text = (out / "paper.md").read_text(encoding="utf-8")
    assert "Timed on: another machine; " in text
    assert "by machine" not in text
    for _ in range(2):
        call(capfd, *arguments, "--times-here")
    kept = {path.name: json.loads(path.read_bytes()) for path in (out / "finished").glob("speed-*.json")}
    here = Provenance.here().machine
    assert len(measured) == sum(values["provenance"]["machine"] == here for values in kept.values()) > 0
    found = next(table for table in read_tables(out) if table.number == 1)
    timed = [row for row in found.rows if row.times]
    assert {tuple(times["machine"] for times in row.times) for row in timed} == {("another machine", here)}
    assert all(row.figures["step_ms"] == row.times[0]["step_ms"] != row.times[1]["step_ms"] for row in timed)
    text = (out / "paper.md").read_text(encoding="utf-8")
    lines = text[text.index("**Times as fast as the baseline, by machine**") :].splitlines()
    ours = next(row for row in timed if row.baseline)
    step = ours.times[0]["step_ms"]
    assert any(
        line.startswith(
            f"| {ours.group} | {ours.label} | another machine; 2026-01-02 | {number(1000.0 / step)}x (1,000 / "
        )
        for line in lines
    )
    assert any(f"| {here}; {Provenance.here().date} |" in line for line in lines)
    assert "; on another machine: a training step " in text
    assert f"; on {here}: a training step " in text


# The page


def test_the_page_is_written_from_the_tables_alone(results, tmp_path, capfd):
    for table in read_tables(results):
        table.write(tmp_path)
    out, _ = call(capfd, "--report", "--out", tmp_path, "--page", tmp_path / "p.md")
    assert "7 tables" in out
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert text == (results / "paper.md").read_text(encoding="utf-8")
    for word in ("popularity", "±", "seeds", "within the noise", "times fewer parameters", "Timed on: ", "Preset tiny"):
        assert word in text
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert len(images) == 7
    assert all(f"images/{name}" in text for name in images)
    assert str(tmp_path) not in text


def test_values_at_the_edge_of_the_grid_are_named(results):
    grid = {"learning_rate": [1e-3, 3e-3, 6e-3], "dropout": [0.2, 0.5], "weight_decay": [0.01]}
    rows = [
        Row("g", "a", settings={"learning_rate": 3e-3, "dropout": 0.5, "weight_decay": 0.01}),
        Row("g", "popularity"),
    ]
    table = dataclasses.replace(read_tables(results)[0], preset=TINY.to_dict() | {"grid": grid}, rows=rows)
    assert at_the_edge(table) == ["dropout 0.5 (of 0.2, 0.5)"]
    table.rows.append(Row("g", "b", settings={"learning_rate": 6e-3, "dropout": 0.2}))
    assert at_the_edge(table) == [
        "learning rate 0.006 (of 0.001, 0.003, 0.006)", "dropout 0.5 (of 0.2, 0.5)", "dropout 0.2 (of 0.2, 0.5)"
    ]  # fmt: skip
    assert "Chosen at the edge of the grid: dropout" in (results / "paper.md").read_text(encoding="utf-8")


def test_what_is_absent_is_said_to_be(results, tmp_path, capfd):
    _, err = call(capfd, "--report", "--out", tmp_path / "nowhere", expect=2)
    assert "there is no table in" in err
    table = read_tables(results)[1]
    table.complete = False
    table.rows = table.rows[:1]
    table.write(tmp_path)
    write_page(tmp_path, tmp_path / "paper.md")
    text = (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert text.count("Not run yet: `python -m benchmarks.paper --preset full --table") == 6
    assert "**Not complete**" in text
    assert "In short" not in text


def test_other_files_are_refused(results, tmp_path):
    (tmp_path / "table-1-x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"is not a table of benchmarks\.paper"):
        read_tables(tmp_path)
    (tmp_path / "table-1-x.json").write_text('{"schema": 0}', encoding="utf-8")
    with pytest.raises(BenchmarkError, match="has another schema"):
        read_tables(tmp_path)
    table = read_table(results / "table-1-synthetic.json")
    assert dataclasses.asdict(table) == dataclasses.asdict(read_tables(results)[0])
    assert Table(1, {"name": "Ab c/d"}, {}, {}).file_name == "table-1-ab-c-d.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "unknown preset 'huge'; there are quick, core, full, tiny"),
        (["--table", "8"], "unknown table '8'; there are 1, 2, 3, 4, 5, 6, 7, all"),
        (["--table", "6"], "preset quick does not run table 6, whose models take hours: use one of core, full, tiny"),
        (["--table", "7,1"], "preset quick does not run table 7, whose models take hours: use one of core, full, tiny"),
        (["--table", ","], "--table is empty"),
        ([], "give --data FOLDER"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "{data}", "--data", "{data}"], "two folders of --data have the same name"),
        (["--data", "{data}", "--page", "nowhere/p.md"], "no such directory to write p.md in"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(data, tmp_path, capfd, arguments, message):
    _, err = call(capfd, "--out", tmp_path / "out", *(word.format(data=data) for word in arguments), expect=2)
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_presets_ask_what_the_claims_need():
    full = PRESETS["full"]
    assert len(full.seeds) == 3
    assert full.lengths == (10, 20, 50, 100)
    assert full.sizes[-1] == 10_000_000
    assert full.sharings == ("none", "cross-layer", "cross-block", "adjacent-layer", "adjacent-block")
    for preset in PRESETS.values():
        assert preset.grid.keys() == {"dropout", "learning_rate", "weight_decay"}
        assert preset.main_length in preset.lengths
