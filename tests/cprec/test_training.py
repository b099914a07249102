"""Training runs on a small catalogue: what they leave, what they learn, how they fail and go on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cprec import checkpoint, training
from cprec.data import PreparedData, prepare
from cprec.model import NextItNet, NextItNetConfig
from cprec.run_folder import RunConfig
from cprec.training import (
    EpochRecord,
    NonFiniteLossError,
    RunResult,
    TrainingConfig,
    TrainingStateError,
    is_finished,
    train,
)

NUM_ITEMS = 200
CONFIG = TrainingConfig(
    length=10, batch_size=32, epochs=3, learning_rate=5e-3, warmup_steps=3, checkpoint_every=4, accelerator="cpu"
)
STEPS_PER_EPOCH = 10


def write_sequences(path, seed=0, sequences=300):
    """Chains in which most items have one successor; the starts are skewed, so popularity alone knows something."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(NUM_ITEMS)
    lines = []
    for index in range(sequences):
        item = index % NUM_ITEMS
        chain = [item]
        for _ in range(10):
            item = int(successor[item]) if rng.random() < 0.95 else min(int(rng.zipf(1.5)), NUM_ITEMS) - 1
            chain.append(item)
        lines.append(" ".join(f"item{number}" for number in chain))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(write_sequences(folder / "chains.txt"), folder / "prepared", format="sequences")


def model_config(data, **options):
    options = {"dilations": (1, 2), "dropout": 0.2, **options}
    return NextItNetConfig.from_plan(data.num_items, 16, [20, 60], [16, 8, 4], **options)


def run(data, out, config=CONFIG, **options):
    return train(data, model_config(data), config, out, progress=False, **options)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run nobody interrupted."""
    return run(data, tmp_path_factory.mktemp("runs") / "whole")


def final_state(folder):
    return torch.load(Path(folder) / "last" / "state.ckpt", weights_only=True)


def assert_same_run(result, expected):
    """Same figures epoch by epoch and bit-equal weights, optimiser and all."""
    assert [(r.epoch, r.steps, r.train_loss, r.validation) for r in result.history] == [
        (r.epoch, r.steps, r.train_loss, r.validation) for r in expected.history
    ]
    one, other = final_state(result.folder), final_state(expected.folder)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    assert one["lr_schedulers"] == other["lr_schedulers"]
    weights = [
        checkpoint.read_tensors(folder / "weights.safetensors")[0] for folder in (result.folder, expected.folder)
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert result.test == expected.test


def interrupt(monkeypatch, call, action):
    """Let ``action`` happen at the given call (from 1) of the model's loss."""
    calls = 0
    loss = NextItNet.loss

    def interrupted(self, windows):
        nonlocal calls
        calls += 1
        return action() if calls == call else loss(self, windows)

    monkeypatch.setattr(NextItNet, "loss", interrupted)


def fail():
    raise RuntimeError("pulled the plug")


def test_a_run_learns_more_than_popularity(data, tmp_path):
    result = run(data, tmp_path / "run", dataclasses.replace(CONFIG, epochs=5, learning_rate=0.02, weight_decay=0.0))
    assert result.history[-1].train_loss < 0.8 * result.history[0].train_loss
    for report in (result.validation, result.test):
        assert report.model.ndcg[10] > 2 * report.popularity.ndcg[10]


def test_a_finished_run_folder(data, finished):
    folder = finished.folder
    assert {entry.name for entry in folder.iterdir()} == {
        "config.json", "weights.safetensors", "last", "metrics.json", "curve.png", "logs",
    }  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert list((folder / "last").iterdir()) == [folder / "last" / "state.ckpt"]
    rows = list(folder.glob("logs/csv/*/metrics.csv"))
    assert len(rows) == 1
    assert "ndcg@10" in rows[0].read_text().splitlines()[0].split(",")
    assert len(list(folder.glob("logs/tensorboard/*/events*"))) == 1

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["parameters"] == finished.parameters == model_config(data).num_parameters
    assert metrics["epochs"] == len(finished.history) == 3
    assert metrics["epoch_seconds"] > 0
    assert metrics["tokens_per_second"] > 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["test"]["model"]["ndcg@10"] == finished.test.model.ndcg[10]
    assert RunResult.read(folder) == finished

    config = RunConfig.read(folder)
    assert (config.model, config.training) == (model_config(data), CONFIG)
    assert config.data_fingerprint == data.fingerprint
    config.check_data(PreparedData.open(data.folder))


def test_the_weights_are_those_of_the_best_epoch(finished):
    best = finished.history[finished.best_epoch].validation
    assert best["ndcg@10"] == max(record.validation["ndcg@10"] for record in finished.history)
    assert finished.validation.model.to_dict() == pytest.approx(best, abs=1e-12)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data, finished, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert_same_run(run(data, tmp_path / "again"), finished)
    assert torch.equal(torch.get_rng_state(), before)
    other = run(data, tmp_path / "other", dataclasses.replace(CONFIG, seed=1))
    assert other.history[-1].train_loss != finished.history[-1].train_loss


# With 10 steps per epoch and a state every 4: within the first epoch, right after a state, on the first step of the
# second epoch, before the validation of the second, and within the third.
@pytest.mark.parametrize("call", [6, 9, 11, 20, 27])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(data, finished, tmp_path, monkeypatch, call):
    with monkeypatch.context() as patched:
        interrupt(patched, call, fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run(data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert_same_run(run(data, tmp_path / "run", resume=True), finished)


KILLED = """
import json, os, signal, sys
from cprec.data import PreparedData
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train

data, out, call, model, training = json.loads(sys.argv[1])
loss, calls = NextItNet.loss, 0

def killed(self, windows):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, windows)

NextItNet.loss = killed
train(PreparedData.open(data), NextItNetConfig.from_dict(model), TrainingConfig.from_dict(training), out)
"""


def test_a_killed_run_with_sparse_embeddings_goes_on_as_if_nothing_had_happened(data, tmp_path):
    model = model_config(data, sparse_embedding=True)
    whole = train(data, model, CONFIG, tmp_path / "whole", progress=False)
    out = tmp_path / "killed"
    arguments = [str(data.folder), str(out), 16, model.to_dict(), CONFIG.to_dict()]
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -9, process.stderr
    assert final_state(out)["global_step"] == 12
    result = train(data, model, CONFIG, out, resume=True, progress=False)
    assert_same_run(result, whole)
    for one, other in zip(
        final_state(out)["optimizer_states"], final_state(whole.folder)["optimizer_states"], strict=True
    ):
        assert str(one) == str(other)


def test_a_finished_run_is_not_trained_again_and_can_be_extended(data, finished, tmp_path):
    short = run(data, tmp_path / "run", dataclasses.replace(CONFIG, epochs=2))
    changed = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    again = run(data, tmp_path / "run", dataclasses.replace(CONFIG, epochs=2), resume=True)
    assert again == short
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == changed
    assert_same_run(run(data, tmp_path / "run", resume=True), finished)
    assert RunConfig.read(tmp_path / "run").training.epochs == 3


def test_a_run_killed_before_its_figures_were_written_gets_them_on_resume(data, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("cprec.training.evaluate", lambda *_, **__: fail())
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run(data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    interrupt(monkeypatch, 1, fail)  # no further training step
    assert_same_run(run(data, tmp_path / "run", resume=True), finished)


def test_a_run_that_failed_before_its_first_state_leaves_nothing(data, tmp_path, monkeypatch):
    interrupt(monkeypatch, 3, fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_unless_overwritten(data, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="resume it, overwrite it"):
        run(data, finished.folder)
    assert {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()} == before

    one_epoch = dataclasses.replace(CONFIG, epochs=1)
    run(data, tmp_path / "run", one_epoch)
    assert run(data, tmp_path / "run", dataclasses.replace(one_epoch, seed=3), overwrite=True).history[0].epoch == 0
    assert RunConfig.read(tmp_path / "run").training.seed == 3
    assert len(list((tmp_path / "run").glob("logs/csv/*"))) == 1  # nothing of the first run is left


def test_a_folder_that_is_not_a_run_is_never_overwritten(data, finished, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a run and is not overwritten"):
        run(data, foreign, overwrite=True)
    (foreign / "config.json").write_bytes((finished.folder / "config.json").read_bytes())
    with pytest.raises(FileExistsError, match=r"chapter1\.txt"):
        run(data, foreign, overwrite=True)
    assert (foreign / "chapter1.txt").read_text() == "precious"


def test_resuming_something_else_is_reported(data, finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(data, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    before = (finished.folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"training\.learning_rate: 0\.005 in the run, 0\.1 now"):
        run(data, finished.folder, dataclasses.replace(CONFIG, learning_rate=0.1), resume=True)
    with pytest.raises(ValueError, match=r"model\.dropout: 0\.2 in the run, 0\.0 now"):
        train(data, model_config(data, dropout=0.0), CONFIG, finished.folder, resume=True)
    other = prepare(write_sequences(tmp_path / "other.txt", seed=1), tmp_path / "prepared", format="sequences")
    with pytest.raises(ValueError, match=f"fingerprint {other.fingerprint}.*{data.fingerprint}"):
        train(other, model_config(data), CONFIG, finished.folder, resume=True)
    with pytest.raises(ValueError, match="is not the data of this run"):
        RunConfig.read(finished.folder).open_data(other.folder)
    assert (finished.folder / "config.json").read_bytes() == before


def test_a_model_for_another_catalogue_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=f"for 30 items but .* holds {data.num_items}"):
        train(data, NextItNetConfig.from_plan(30, 8), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [3, 15])
def test_a_loss_that_is_not_finite_stops_the_run_with_advice(data, tmp_path, monkeypatch, call):
    interrupt(monkeypatch, call, lambda: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(NonFiniteLossError, match=f"step {call - 1} .*learning rate 0.005.*Try a lower") as caught:
        run(data, tmp_path / "run")
    assert caught.value.step == call - 1
    if call == 3:
        assert not (tmp_path / "run").exists()
    else:
        assert final_state(tmp_path / "run")["global_step"] == 12
        model = checkpoint.load(tmp_path / "run")
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert not (tmp_path / "run" / "metrics.json").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_state_with_code_in_it_is_refused_and_not_run(data, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    run(data, tmp_path / "run", config)
    (tmp_path / "run" / "metrics.json").unlink()
    state = tmp_path / "run" / "last" / "state.ckpt"
    torch.save({**final_state(tmp_path / "run"), "extra": Payload(str(tmp_path / "owned"))}, state)
    with pytest.raises(TrainingStateError, match=r"state\.ckpt is not a training state"):
        run(data, tmp_path / "run", config, resume=True)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingStateError, match="damaged"):
        run(data, tmp_path / "run", config, resume=True)
    assert not (tmp_path / "owned").exists()


def test_patience_ends_a_run_that_stands_still(data, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=9, patience=2, learning_rate=1e-12)
    result = run(data, tmp_path / "run", config)
    assert len(result.history) == 3
    assert result.best_epoch == 0
    assert run(data, tmp_path / "run", config, resume=True) == result
    longer = run(data, tmp_path / "run", dataclasses.replace(config, patience=4), resume=True)
    assert len(longer.history) == 5


def test_patience_counts_what_was_run_without_any(data, tmp_path):
    still = dataclasses.replace(CONFIG, epochs=4, patience=0, learning_rate=1e-12)
    run(data, tmp_path / "run", still)
    longer = run(data, tmp_path / "run", dataclasses.replace(still, epochs=9, patience=5), resume=True)
    assert len(longer.history) == 6


def test_other_processes_of_a_new_run_do_not_read_the_one_it_replaces(data, finished, tmp_path, monkeypatch):
    """Those of torchrun come here before the main one has moved a finished run away."""
    shutil.copytree(finished.folder, tmp_path / "run")
    states = []

    def fit(*arguments):
        states.append(arguments[-2:])
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_fit", fit)
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run", CONFIG, overwrite=True)
    assert states == [(False, False)]  # neither the main one nor from a state
    with pytest.raises(SystemExit):
        run(data, tmp_path / "run", CONFIG, resume=True)
    assert len(states) == 1


def test_when_a_run_is_finished():
    def history(*scores):
        return [EpochRecord(i, i, 1.0, {"ndcg@10": score}, 1.0, 1.0) for i, score in enumerate(scores)]

    config = dataclasses.replace(CONFIG, epochs=5, patience=2)
    assert not is_finished([], config)
    assert not is_finished(history(0.3, 0.2), config)
    assert is_finished(history(0.3, 0.2, 0.3), config)
    assert not is_finished(history(0.1, 0.2, 0.2), config)
    assert is_finished(history(0.1, 0.2, 0.3, 0.4, 0.5), config)
    assert not is_finished(history(0.3, 0.2, 0.1, 0.1), dataclasses.replace(config, patience=0))


def test_bf16_autocast_trains_fp32_weights(data, finished, tmp_path):
    result = run(data, tmp_path / "run", dataclasses.replace(CONFIG, precision="bf16-mixed"))
    assert {tensor.dtype for tensor in final_state(tmp_path / "run")["state_dict"].values()} == {torch.float32}
    losses = [record.train_loss for record in result.history]
    assert losses != [record.train_loss for record in finished.history]
    np.testing.assert_allclose(losses, [record.train_loss for record in finished.history], rtol=0.05)


def test_progress_goes_to_standard_error_without_advertising(data, tmp_path, capfd):
    train(data, model_config(data), dataclasses.replace(CONFIG, epochs=1), tmp_path / "run", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("epoch 1/1: loss ")
    assert "tokens/s" in lines[0]
    assert "ndcg@10" in lines[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length", 0), ("batch_size", 2.5), ("epochs", True), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("weight_decay", -1.0), ("patience", -1), ("gradient_clip", "1"), ("precision", "16"), ("strategy", "fsdp"),
        ("checkpoint_every", -4), ("workers", None),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_settings_survive_json():
    assert TrainingConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match="learning_rat"):
        TrainingConfig.from_dict({"learning_rat": 1.0})


def test_importing_the_module_does_not_import_lightning_or_polars():
    heavy = "{'lightning', 'polars', 'matplotlib', 'rich'}"
    code = f"import sys, cprec.training, cprec.serving; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
