"""``python -m benchmarks trained``: rows over a trained model's test histories, and what is said when there is none."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import cprec
from benchmarks.cli import main
from benchmarks.results import read_run
from cprec import checkpoint
from cprec.data import prepare
from cprec.model import NextItNet, NextItNetConfig
from cprec.run_folder import RunConfig, RunFolder
from cprec.training import TrainingConfig
from cprec_kernels import available_cpu_isas

pytestmark = pytest.mark.skipif(not available_cpu_isas(), reason="this package was built without native kernels")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with random weights; some users have no history."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    lines = [" ".join(str(item) for item in rng.zipf(1.2, size=size) % 400) for size in [8] * 150 + [1] * 5]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    data = prepare(folder / "log.txt", folder / "data", format="sequences")
    torch.manual_seed(0)
    size = data.num_items
    model = NextItNetConfig.from_plan(size, 16, [size // 6, size // 2], [16, 8, 4], dilations=(1, 2))
    config = RunConfig.of(data, model, TrainingConfig(length=4))
    run = RunFolder(folder / "run")
    run.begin(config, resume=False, overwrite=False)
    network = NextItNet(model)
    for parameter in network.softmax.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # trained weights tell items apart: so do these
    run.save_weights(config, network)
    return run.path


def call(capfd, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main(["trained", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


def test_a_trained_model_is_searched_in_every_way(run, plain_index, tmp_path, capfd):
    path = tmp_path / "trained.json"
    out, err = call(capfd, "--run", run, "--rows", "3,64", "--k", 5, "--rounds", 4, "--json", path)
    assert "log-d16-b3" in out
    assert "speed-up over cprec-weights" in out
    assert "building indexes" in err
    found = read_run(path)
    names = ["cprec-weights"]
    names += [f"cprec-index-{storage}{full}" for storage in ("float32", "float16") for full in ("", "-full")]
    names += [f"cprec-index-{storage}-approx" for storage in ("float16", "bfloat16", "int8")]
    assert [(row.case, row.provider) for row in found.rows] == [
        (case, name) for case in ("log-d16-b3", "log-d16-b64") for name in names
    ]
    for row in found.rows:
        assert row.correct is True, f"{row.provider}: {row.error}"
        # The baseline takes part in the turn of each of the five indexes.
        turns = 5 if row.provider == "cprec-weights" else 1
        assert (row.mode, row.targets, row.rounds) == ("trained", "histories", 4 * turns)
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.ratio_to_baseline > 0
        assert row.figures["agreement"] == 1.0 or row.provider.endswith("-approx")
    half, full = (row.figures for row in found.rows[1:3])
    assert full["levels"] == full["all_levels"] == 3
    assert half["items"] == full["items"] // 2
    assert half["all_items"] == full["all_items"]
    assert half["index_mb"] == 1.0
    assert f"of {full['items']:,.0f} items per row" in found.rows[1].note
    assert "% of ids agree, " not in found.rows[-1].note
    assert "% of ids agree; 1.0 of 3 levels" in found.rows[-1].note


def planted(monkeypatch, index, change, early=(True,)):
    """Results of some searches go through ``change`` (index, items)."""
    right = index.topk

    def wrong(self, input, k, *, early_termination=True):
        found = right(self, input, k, early_termination=early_termination)
        if early_termination not in early:
            return found
        changed = type(found)((found[0], change(self, found[1])))
        changed.counters = found.counters
        return changed

    monkeypatch.setattr(index, "topk", wrong)


def test_ids_that_early_termination_changes_are_an_error(run, plain_index, monkeypatch, capfd):
    planted(monkeypatch, plain_index, lambda index, items: items.flip(1) if index.exact else items)
    out, _ = call(capfd, "--run", run, "--rows", "8", "--rounds", 2, expect=1)
    assert out.count("WRONG") == 2
    assert "early termination changes the ids of 16 of 16 rows" in " ".join(out.split())


def test_ids_that_are_not_the_best_are_an_error(run, plain_index, monkeypatch, tmp_path, capfd):
    planted(monkeypatch, plain_index, lambda index, items: (items + 1) % index.partition.num_items, early=(True, False))
    call(capfd, "--run", run, "--rows", "8", "--rounds", 2, "--json", tmp_path / "x.json", expect=1)
    rows = read_run(tmp_path / "x.json").rows
    assert [row.correct for row in rows] == [True] + [False] * 7
    for row in rows[1:]:
        assert row.median_ms is None
        expected = "fewer than 90%" if row.provider.endswith("-approx") else "scores differ from those of cprec-weights"
        assert expected in row.error


def test_without_an_index_or_a_run_it_says_what_to_do(run, plain_index, monkeypatch, tmp_path, capfd):
    def refused(*arguments):
        _, err = call(capfd, *arguments, expect=2)
        (line,) = [line for line in err.splitlines() if line.startswith("benchmarks: ")]
        return line

    how = "`cprec prepare LOG -o DATA` and `cprec train DATA -o RUN` make one"
    line = refused("--run", tmp_path / "nowhere")
    assert "nowhere is no training run, it has no config.json" in line
    assert how in line
    (tmp_path / "config.json").write_text("[]")
    assert how in refused("--run", tmp_path)
    cprec.export(run, tmp_path / "model")
    assert "an exported model's does not: pass the run that it came from" in refused("--run", tmp_path / "model")

    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / checkpoint.WEIGHTS_NAME).unlink()
    assert "the model of" in (line := refused("--run", unfinished))
    assert checkpoint.WEIGHTS_NAME in line
    moved = shutil.copytree(run, tmp_path / "moved")
    values = json.loads((moved / "config.json").read_text())
    place, values["data"]["folder"] = values["data"]["folder"], str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(values))
    assert "gone" in refused("--run", moved)
    call(capfd, "--run", moved, "--data", place, "--rows", "2", "--rounds", 1)

    assert "--rows 0 is not a whole number" in refused("--run", run, "--rows", "4,0")
    assert "--rows is empty" in refused("--run", run, "--rows", ",")
    assert "--k 4000 is outside 1.." in refused("--run", run, "--k", 4000)
    assert "no such directory" in refused("--run", run, "--json", tmp_path / "no" / "x.json")
    monkeypatch.setattr("benchmarks.ops.bench_clustered_topk.missing_kernels", lambda op: f"{op} has no native kernel")
    assert "there is no index to measure: topk_index has no native kernel" in refused("--run", run)
