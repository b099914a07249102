"""Runs that start from the weights of an earlier run or export, in Python and by the command."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from cprec import checkpoint
from cprec.data import prepare
from cprec.exported import export
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train
from cprec.warm_start import grown, read_former

D = 8


def walks(folder, name, seed, first, last, prefix="item"):
    """Users who walk on a circle of the items first..last - 1, most of the time."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(300):
        item, walk = int(rng.integers(first, last)), []
        for _ in range(8):
            walk.append(f"{prefix}{item}")
            item = item + 1 if rng.random() < 0.9 and item + 1 < last else int(rng.integers(first, last))
        lines.append(" ".join(walk))
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return prepare(folder / f"{name}.txt", folder / name, format="sequences")


CONFIG = TrainingConfig(length=6, batch_size=32, epochs=6, patience=0, seed=1, accelerator="cpu")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Data of items 0..49 and a run on it, its export, and later data of items 5..59."""
    folder = tmp_path_factory.mktemp("earlier")
    data = walks(folder, "old", 0, 0, 50)
    config = NextItNetConfig.from_plan(50, D, [20, 35], [8, 6, 4], dilations=(1,), tie_tails=True)
    train(data, config, CONFIG, folder / "run", progress=False)
    export(folder / "run", folder / "model")
    walks(folder, "new", 1, 5, 60)
    return folder


@pytest.mark.parametrize("kind", ["run", "model"])
def test_training_goes_on_where_the_earlier_model_was(earlier, tmp_path, kind, monkeypatch, capfd):
    from cprec.data import PreparedData

    data = PreparedData.open(earlier / "new")
    config = grown(checkpoint.read_config(earlier / kind)[0], data.num_items)
    anew = train(data, config, CONFIG, tmp_path / "anew", progress=False)
    warm = dataclasses.replace(CONFIG, epochs=1, start_from=str(earlier / kind))
    first = train(data, config, warm, tmp_path / "warm", progress=True)
    assert "45 items known (" in capfd.readouterr().err
    assert first.history[0].train_loss < anew.history[2].train_loss
    assert first.validation.model.ndcg[10] > anew.history[0].validation["ndcg@10"]
    monkeypatch.setattr("cprec.warm_start.read_former", lambda *_: pytest.fail("started again"))
    on = dataclasses.replace(warm, epochs=2)
    whole = train(data, config, on, tmp_path / "warm", resume=True, progress=False)
    assert len(whole.history) == 2
    with pytest.raises(ValueError, match="start_from"):
        train(data, config, dataclasses.replace(CONFIG, epochs=9), tmp_path / "warm", resume=True, progress=False)


def test_the_same_catalogue_gives_the_same_model(earlier):
    from cprec.data import PreparedData
    from cprec.warm_start import initialise

    data = PreparedData.open(earlier / "old")
    former = read_former(earlier / "run")
    model = NextItNet(former.model.config)
    assert initialise(model, data, earlier / "model", length=6) == (50, 0, 0, 0)
    assert all(value.equal(former.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_start_that_does_not_come_about_leaves_nothing(earlier, tmp_path):
    from cprec.data import PreparedData

    data = PreparedData.open(earlier / "new")
    config = grown(checkpoint.read_config(earlier / "run")[0], data.num_items)
    warm = dataclasses.replace(CONFIG, epochs=1, start_from=str(earlier / "run"))
    with pytest.raises(ValueError, match="these differ: sharing 'none' there, 'cross-layer' here"):
        train(data, dataclasses.replace(config, sharing="cross-layer"), warm, tmp_path / "run", progress=False)
    with pytest.raises(checkpoint.CheckpointError, match="nothing-there"):
        train(
            data, config, dataclasses.replace(warm, start_from=str(tmp_path / "nothing-there")), tmp_path / "run",
            progress=False,
        )  # fmt: skip
    strangers = walks(tmp_path, "strangers", 2, 0, 50, prefix="product")
    with pytest.raises(ValueError, match=r"none of the 50 items of .* written alike"):
        train(strangers, dataclasses.replace(grown(config, 50)), warm, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    # An earlier run that was to be overwritten is there again.
    kept = TrainingConfig(length=6, batch_size=32, epochs=1, accelerator="cpu")
    train(data, config, kept, tmp_path / "kept", progress=False)
    contents = {path: path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*")) if path.is_file()}
    shutil.copytree(earlier / "run", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "weights.safetensors").unlink()
    unfinished = dataclasses.replace(warm, start_from=str(tmp_path / "unfinished"))
    with pytest.raises(FileNotFoundError, match=r"unfinished has no weights\.safetensors yet: no epoch"):
        train(data, config, unfinished, tmp_path / "kept", overwrite=True, progress=False)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*")) if path.is_file()} == contents
    before = (earlier / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="is the run to start from, and would be replaced"):
        train(data, config, warm, earlier / "run", overwrite=True, progress=False)
    assert (earlier / "run" / "config.json").read_bytes() == before


def test_a_run_whose_data_is_gone_asks_for_an_export(earlier, tmp_path):
    shutil.copytree(earlier / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["folder"] = str(tmp_path / "gone")
    path.write_text(json.dumps(config))
    with pytest.raises(
        FileNotFoundError,
        match=r"does not say which item is which without its data: .*gone.* start from an export: cprec export .*run --data FOLDER",
    ):
        read_former(tmp_path / "run")
    config["data"] = {**config["data"], "folder": str(earlier / "new")}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="start from an export"):
        read_former(tmp_path / "run")


def test_settings_that_exclude_each_other():
    assert "start_from" not in TrainingConfig().to_dict()
    assert TrainingConfig.from_dict(TrainingConfig(start_from="run").to_dict()).start_from == "run"
    with pytest.raises(ValueError, match="both say where item vectors start"):
        TrainingConfig(init="als", start_from="run")
    with pytest.raises(ValueError, match="start_from must be a folder's name or None, got 3"):
        TrainingConfig(start_from=3)


def test_the_command_takes_shape_and_length_from_the_model(run, earlier, tmp_path, monkeypatch):
    new, fast = earlier / "new", ("--epochs", 1, "--batch-size", 32, "--accelerator", "cpu")
    _, err = run("train", new, "-o", tmp_path / "run", "--from", earlier / "model", "--dropout", 0.3, *fast)
    assert "started from" in err
    assert "10 new, 5 gone" in err
    model, sections = checkpoint.read_config(tmp_path / "run")
    assert (model.embedding_dim, model.tie_tails, model.dropout, model.dilations) == (D, True, 0.3, (1,))
    assert sections["training"]["length"] == 6
    assert sections["training"]["start_from"] == str((earlier / "model").resolve())
    # A stopped run goes on by its own configuration, from another folder and when the former model is gone.
    shutil.copytree(earlier / "model", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run("train", new, "-o", "again", "--from", "moved", *fast)
    shutil.rmtree(tmp_path / "moved")
    run("train", new, "-o", "again", "--from", "moved", "--resume", "--epochs", 2, *fast[2:])
    monkeypatch.chdir(earlier)
    run("train", new, "-o", tmp_path / "again", "--from", tmp_path / "moved", "--resume", "--epochs", 3, *fast[2:])
    assert len(json.loads((tmp_path / "again" / "metrics.json").read_text())["history"]) == 3
    _, err = run("train", new, "-o", tmp_path / "b", "--from", earlier / "run", "--dim", 16, "--twin", *fast, expect=1)
    assert "which --dim, --twin cannot change" in err.replace("\n", " ")
    _, err = run("train", new, "-o", tmp_path / "b", "--from", tmp_path / "none", *fast, expect=1)
    assert "none" in err
    _, err = run("train", new, "-o", tmp_path / "b", "--from", earlier / "run", "--init", "als", *fast, expect=1)
    assert "--init, --from" in err.replace("\n", " ")
    (tmp_path / "other").mkdir()
    for section in ({"export": None}, {"training": [1]}, {}):
        config = json.loads((earlier / "model" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(
            json.dumps({**{k: config[k] for k in config if k != "export"}, **section})
        )
        _, err = run("train", new, "-o", tmp_path / "b", "--from", tmp_path / "other", *fast, expect=1)
        assert "is that of neither a run nor an export" in err.replace("\n", " ")
    assert not (tmp_path / "b").exists()


def test_the_command_says_that_drawn_users_may_be_known(run, earlier, tmp_path):
    note = "may have been trained on what is held out now"
    prepare(earlier / "new.txt", tmp_path / "drawn", format="sequences", split="user")
    fast = ("--epochs", 1, "--batch-size", 32, "--accelerator", "cpu", "--from", earlier / "model")
    assert note in run("train", tmp_path / "drawn", "-o", tmp_path / "run", *fast)[0].replace("\n", " ")
    assert note not in run("train", earlier / "new", "-o", tmp_path / "other", *fast)[0].replace("\n", " ")
