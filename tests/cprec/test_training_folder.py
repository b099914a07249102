"""What a run folder may delete, what overwriting leaves, and how a run that is stopped or cannot start says so."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cprec import checkpoint
from cprec.data import prepare
from cprec.model import NextItNet, NextItNetConfig
from cprec.run_folder import RunConfig, RunFolder
from cprec.training import NonFiniteLossError, RunResult, TrainingConfig, TrainingStateError, train

CONFIG = TrainingConfig(length=6, batch_size=32, epochs=1, checkpoint_every=2, accelerator="cpu")
LEFTOVERS = (".config.json.ab12cd_9", ".curve.png.00000000", "last/.state.ckpt.abcdefgh")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [" ".join(f"i{item}" for item in rng.zipf(1.3, size=9) % 40) for _ in range(120)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return prepare(folder / "log.txt", folder / "prepared", format="sequences")


@pytest.fixture(scope="module")
def model(data):
    return NextItNetConfig.from_plan(data.num_items, 8, dilations=(1,))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def earlier(data, model, tmp_path):
    """A folder as a finished run leaves it."""
    run = RunConfig.of(data, model, CONFIG)
    folder = RunFolder(tmp_path / "run")
    folder.begin(run, resume=False, overwrite=False)
    folder.save_weights(run, NextItNet(model))
    folder.state.parent.mkdir()
    folder.state.write_bytes(b"state")
    folder.metrics.write_text("{}")
    return folder


@pytest.fixture
def again(data, model):
    """Another run, which takes the folder over."""
    return RunConfig.of(data, model, dataclasses.replace(CONFIG, seed=1))


def plant(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")


@pytest.mark.parametrize("name", [".env.local", ".notes.txt", ".git/config.lock", ".config.json.bak", ".x.y.tmp"])
def test_hidden_files_of_others_stop_an_overwrite_and_outlive_a_resume(earlier, again, name):
    plant(earlier.path, [name])
    before = files(earlier.path)
    with pytest.raises(FileExistsError, match=f"not of a run \\({Path(name).parts[0]}"):
        RunFolder(earlier.path).begin(again, resume=False, overwrite=True)
    assert files(earlier.path) == before
    RunFolder(earlier.path).begin(RunConfig.read(earlier.path), resume=True, overwrite=False)
    assert files(earlier.path).keys() == before.keys()


@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_temporaries_of_killed_writes_are_removed(earlier, again, way):
    stage = earlier.path / f".run.{'0' * 32}.tmp"  # of a save of the weights
    stage.mkdir()
    plant(earlier.path, [*LEFTOVERS, f"{stage.name}/weights.safetensors"])
    run = again if way == "overwrite" else RunConfig.read(earlier.path)
    RunFolder(earlier.path).begin(run, resume=way == "resume", overwrite=way == "overwrite")
    assert not [name for name in files(earlier.path) if "/." in f"/{name}" and not name.startswith(".replaced-run/")]
    assert not stage.exists()


def test_a_failed_start_removes_only_what_it_wrote(data, model, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(RunConfig.of(data, model, CONFIG), resume=False, overwrite=False)
    plant(folder.path, ["logs/csv.csv", "notes.txt"])  # somebody saves a file there while it is training
    folder.drop_if_empty()
    assert files(folder.path) == {"notes.txt": b"precious"}


def test_an_overwritten_run_goes_with_the_first_state_and_not_before(earlier, again):
    before = files(earlier.path)
    folder = RunFolder(earlier.path)
    folder.begin(again, resume=False, overwrite=True)
    assert folder.history() == []
    assert RunConfig.read(earlier.path).training.seed == 1
    folder.drop_if_empty()
    assert files(earlier.path) == before

    folder.begin(again, resume=False, overwrite=True)
    plant(folder.path, ["last/state.ckpt"])
    folder.forget_replaced()
    folder.drop_if_empty()
    assert files(earlier.path).keys() == {"config.json", "last/state.ckpt"}


def test_a_run_folder_behind_a_link_or_as_working_directory_is_replaced_in_place(earlier, again, tmp_path, monkeypatch):
    before = files(earlier.path)
    (tmp_path / "link").symlink_to(earlier.path)
    for path in (tmp_path / "link", Path()):
        monkeypatch.chdir(earlier.path)
        folder = RunFolder(path)
        folder.begin(again, resume=False, overwrite=True)
        assert RunConfig.read(earlier.path).training.seed == 1
        folder.drop_if_empty()
        assert files(earlier.path) == before
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("moves", range(8))
@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_a_kill_between_the_moves_of_an_overwrite_loses_nothing(earlier, again, monkeypatch, moves, way):
    class KilledError(BaseException):
        pass

    before = files(earlier.path)
    original = RunConfig.read(earlier.path)
    rename, done = Path.rename, 0

    def counted(self, target):
        nonlocal done
        if done == moves:
            raise KilledError
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted)
        try:  # four files go away and come back
            RunFolder(earlier.path).begin(again, resume=False, overwrite=True)
            RunFolder(earlier.path).drop_if_empty()
        except KilledError:
            pass
    folder = RunFolder(earlier.path)
    folder.begin(original if way == "resume" else again, resume=way == "resume", overwrite=way == "overwrite")
    if way == "overwrite":
        folder.drop_if_empty()
    assert files(earlier.path) == before


def test_an_earlier_run_outlives_a_successor_that_was_killed_before_its_first_state(earlier, again):
    before = files(earlier.path)
    RunFolder(earlier.path).begin(again, resume=False, overwrite=True)
    resumed = RunFolder(earlier.path)
    resumed.begin(again, resume=True, overwrite=False)
    resumed.drop_if_empty()
    assert RunConfig.read(earlier.path).training.seed == 1
    folder = RunFolder(earlier.path)
    folder.begin(again, resume=False, overwrite=True)
    folder.drop_if_empty()
    assert files(earlier.path) == before


@pytest.mark.parametrize(
    "options",
    [{"accelerator": "gpu"}, {"accelerator": "abacus"}, {"devices": 0}, {"devices": "many"}, {"strategy": "hope"}],
)
def test_devices_that_are_not_there_are_one_sentence_and_cost_nothing(data, model, tmp_path, earlier, options):
    if options.get("accelerator") == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = files(earlier.path)
    config = dataclasses.replace(CONFIG, **options)
    with pytest.raises(ValueError, match=r"accelerator '\w+' with devices .* cannot be used here: .*Choose others"):
        train(data, model, config, earlier.path, overwrite=True, progress=False)
    assert files(earlier.path) == before
    with pytest.raises(ValueError, match="cannot be used here"):
        train(data, model, config, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_overwriting_leaves_nothing_of_the_earlier_run(data, model, earlier):
    result = train(data, model, CONFIG, earlier.path, overwrite=True, progress=False)
    assert len(result.history) == 1
    assert {entry.name for entry in earlier.path.iterdir()} == {
        "config.json", "weights.safetensors", "last", "metrics.json", "curve.png", "logs",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "at", "every"),
    [
        (float("nan"), 3, 0),  # the epoch's last step: validation is what comes next
        (1e30, 3, 0),  # finite, but overflows on the way through the model
        (float("nan"), 2, 2),  # a state would be saved next
    ],
)
def test_a_step_that_ruins_the_model_is_a_loss_that_is_not_finite(data, model, tmp_path, monkeypatch, value, at, every):
    steps = 0
    step = torch.optim.AdamW.step

    def ruinous(self, *arguments, **options):
        nonlocal steps
        result = step(self, *arguments, **options)
        steps += 1
        if steps == at:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(value)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", ruinous)
    config = dataclasses.replace(CONFIG, checkpoint_every=every, batch_size=40)
    with pytest.raises(NonFiniteLossError, match=r"not finite after step \d .*Try a lower learning rate") as caught:
        train(data, model, config, tmp_path / "run", progress=False)
    assert caught.value.step == steps - 1 == at - 1
    assert not (tmp_path / "run").exists()


STOPPED = """
import json, os, signal, sys
from cprec.data import PreparedData
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train

data, out, call, number, model, training = json.loads(sys.argv[1])
loss, calls = NextItNet.loss, 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored

def stopped(self, windows):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), number)
    return loss(self, windows)

NextItNet.loss = stopped
try:
    train(PreparedData.open(data), NextItNetConfig.from_dict(model), TrainingConfig.from_dict(training), out,
          progress=False)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "call", "code", "message"),
    [
        (signal.SIGTERM, 3, 143, "stopped; go on with --resume"),
        (signal.SIGTERM, 1, 143, "stopped before a state was saved"),
        (signal.SIGINT, 3, 130, "stopped; go on with --resume"),
    ],
)
def test_a_run_stopped_by_a_signal_says_so_and_goes_on(data, model, tmp_path, number, call, code, message):
    config = dataclasses.replace(CONFIG, batch_size=16)
    root = Path(__file__).parents[2]
    arguments = [str(data.folder), str(tmp_path / "run"), call, number, model.to_dict(), config.to_dict()]
    process = subprocess.run(
        [sys.executable, "-c", STOPPED, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, process.stderr
    assert process.stderr.splitlines()[-1] == message
    assert "Traceback" not in process.stderr
    assert (tmp_path / "run").exists() == (call == 3)
    if call == 3:
        train(data, model, config, tmp_path / "run", resume=True, progress=False)
        assert all(parameter.isfinite().all() for parameter in checkpoint.load(tmp_path / "run").parameters())


def test_a_stop_that_a_destructor_drops_is_raised_again(tmp_path):
    """Workers are joined in one; and one that torch's writer turns into a RuntimeError is a stop all the same."""
    from types import SimpleNamespace

    from cprec.training import _stopped_by_signals

    class Joins:
        def __del__(self):
            raise KeyboardInterrupt

    def dropped():
        Joins()
        time.sleep(10)  # which the stop ends
        raise AssertionError("nothing stopped it")

    def turned():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    folder = SimpleNamespace(state=tmp_path / "state.ckpt")
    trainer = SimpleNamespace(is_global_zero=True)
    before = sys.unraisablehook
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    try:
        for stop in (dropped, turned):
            with pytest.raises(KeyboardInterrupt), _stopped_by_signals(folder, trainer):
                stop()
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="of its own"), _stopped_by_signals(folder, trainer):
        raise RuntimeError("of its own")
    assert sys.unraisablehook is before


@pytest.mark.parametrize("text", ["{}", "[]", '{"history": [{"epoch": 0}]}'])
def test_metrics_that_are_damaged_are_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is not that of a finished run"):
        RunResult.read(tmp_path)


def test_the_defaults_are_those_of_the_command():
    import inspect

    from cprec import cli

    command = {name: parameter.default for name, parameter in inspect.signature(cli.train).parameters.items()}
    for field in dataclasses.fields(TrainingConfig):
        if field.name in command:
            assert command[field.name] == field.default, field.name


def test_weights_without_a_state_are_not_trained_over(data, model, tmp_path):
    """A run that was going on, and whose state someone deleted."""
    out = tmp_path / "run"
    run = RunConfig.of(data, model, CONFIG)
    folder = RunFolder(out)
    folder.begin(run, resume=False, overwrite=False)
    folder.save_weights(run, NextItNet(model))
    before = files(out)
    with pytest.raises(FileNotFoundError, match=r"state\.ckpt: no such file, and without it the run .*overwrite"):
        train(data, model, CONFIG, out, resume=True, progress=False)
    assert files(out) == before


def test_a_finished_run_needs_no_state(data, model, tmp_path):
    out = tmp_path / "run"
    finished = train(data, model, CONFIG, out, progress=False)
    (out / "last" / "state.ckpt").unlink()
    before = files(out)
    again = train(data, model, CONFIG, out, resume=True, progress=False)
    assert again.to_dict() == finished.to_dict()
    assert files(out) == before
    with pytest.raises(FileNotFoundError, match="cannot go on"):
        train(data, model, dataclasses.replace(CONFIG, epochs=2), out, resume=True, progress=False)
    assert files(out) == before


def test_a_damaged_state_of_the_right_length_is_noticed(data, model, tmp_path):
    out = tmp_path / "run"
    train(data, model, CONFIG, out, progress=False)
    state = out / "last" / "state.ckpt"
    whole = bytearray(state.read_bytes())
    with zipfile.ZipFile(state) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    whole[largest.header_offset + 128 + largest.file_size // 2] ^= 4  # behind the name and the padding
    state.write_bytes(whole)
    with pytest.raises(TrainingStateError, match="damaged"):
        train(data, model, dataclasses.replace(CONFIG, epochs=2), out, resume=True, progress=False)
    assert state.read_bytes() == whole


def test_seeds_end_where_torchs_do():
    assert dataclasses.replace(CONFIG, seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(ValueError, match=r"seed must be below 2\^64, got 99999999999999999999"):
        dataclasses.replace(CONFIG, seed=99999999999999999999)


def test_a_second_run_in_a_folder_waits_and_gives_up(data, model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = train(data, model, CONFIG, out, progress=False)
    before = files(out)
    monkeypatch.setattr("cprec.run_folder.KILLED_WORKERS", 0.0)
    longer = dataclasses.replace(CONFIG, epochs=2)
    with RunFolder(out).held():
        for how in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(BlockingIOError, match=r"run: another run is going on in there: wait for it, stop it"):
                train(data, model, longer, out, progress=False, **how)
    assert files(out) == before
    assert len(train(data, model, longer, out, progress=False, resume=True).history) == len(first.history) + 1


def test_workers_that_outlive_a_killed_run_are_waited_for(data, model, tmp_path):
    lock = RunFolder(tmp_path / "run").held()
    lock.__enter__()
    (tmp_path / "run" / "config.json").touch()  # or the folder goes with its lock
    threading.Timer(0.5, lock.__exit__, (None, None, None)).start()
    with pytest.raises(FileExistsError, match="resume it, overwrite it, or choose another folder"):
        train(data, model, CONFIG, tmp_path / "run", progress=False)


@pytest.mark.parametrize("options", [{"resume": True}, {"resume": True, "overwrite": True}], ids=str)
def test_a_run_that_cannot_begin_leaves_no_folder(data, model, tmp_path, options):
    with pytest.raises((FileNotFoundError, ValueError)):
        train(data, model, CONFIG, tmp_path / "run", progress=False, **options)
    assert not list(tmp_path.iterdir())
