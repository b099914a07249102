"""Every option of the command line reaches the function that it is for."""

from __future__ import annotations

import inspect

import pytest

import cprec.data
from cprec import evaluation, planning, serving, serving_io, training
from cprec.data import DATASETS, prepare_synthetic
from cprec.model import NextItNetConfig
from cprec.training import TrainingConfig

CONFIG = TrainingConfig(length=6, batch_size=16, epochs=1, accelerator="cpu", devices=1)


class CalledError(Exception):
    """Instead of the work: what a function was called with, by the names of its parameters."""

    def __init__(self, given):
        super().__init__()
        self.given = given


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    data = prepare_synthetic(folder / "data", 60, 40, seed=0)
    training.train(data, NextItNetConfig.from_plan(60, 8, dilations=(1,)), CONFIG, folder / "run", progress=False)
    return folder


@pytest.fixture
def given(run, monkeypatch):
    """What ``module.name`` is called with by a command."""

    def call(module, name, *command):
        original = getattr(module, name)

        def called(*arguments, **options):
            raise CalledError(inspect.signature(original).bind(*arguments, **options).arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, called)
            with pytest.raises(CalledError) as caught:
                run(*command)
        return caught.value.given

    return call


def test_train(given, trained, tmp_path):
    model = (
        "--dim", 16, "--cutoffs", "10,30", "--ranks", "16,4,2", "--softmax-cutoffs", "12", "--softmax-ranks", "16,8",
        "--dilations", "1,2", "--repeats", 3, "--kernel-size", 5, "--block", "bottleneck", "--sharing", "cross-layer",
        "--dropout", 0.3, "--label-smoothing", 0.1, "--head-bias", "--tail-bias", "--sparse-embedding",
    )  # fmt: skip
    options = (
        "--length", 9, "--batch-size", 7, "--epochs", 4, "--lr", 0.5, "--weight-decay", 0.25, "--warmup-steps", 11,
        "--gradient-clip", 0.75, "--patience", 6, "--bf16", "--seed", 13, "--init", "als", "--accelerator", "cpu",
        "--devices", 2, "--strategy", "ddp", "--workers", 1, "--checkpoint-every", 17, "--overwrite", "--quiet",
    )  # fmt: skip
    found = given(training, "train", "train", trained / "data", "--out", tmp_path / "run", *model, *options)
    assert found["data"].folder == trained / "data"
    assert found["out"] == tmp_path / "run"
    assert (found["resume"], found["overwrite"], found["progress"]) == (False, True, False)
    config = found["model_config"]
    assert (config.input_partition.cutoffs, config.input_partition.ranks) == ((10, 30), (16, 4, 2))
    assert (config.output_partition.cutoffs, config.output_partition.ranks) == ((12,), (16, 8))
    assert (config.embedding_dim, config.dilations, config.repeats, config.kernel_size) == (16, (1, 2), 3, 5)
    assert (config.block, config.sharing, config.dropout) == ("bottleneck", "cross-layer", 0.3)
    assert (config.label_smoothing, config.head_bias, config.tail_bias) == (0.1, True, True)
    assert config.sparse_embedding
    assert found["config"] == TrainingConfig(
        length=9, batch_size=7, epochs=4, learning_rate=0.5, weight_decay=0.25, warmup_steps=11, gradient_clip=0.75,
        patience=6, precision="bf16-mixed", seed=13, init="als", accelerator="cpu", devices=2, strategy="ddp", workers=1,
        checkpoint_every=17,
    )  # fmt: skip
    tied = given(
        training, "train", "train", trained / "data", "--out", tmp_path / "run", "--cutoffs", "10", "--tie-tails"
    )
    assert tied["model_config"].tie_tails
    assert tied["progress"]


def test_prepare(given, run, trained, tmp_path):
    columns = ("--user-column", "u", "--item-column", "i", "--time-column", "t", "--format", "csv", "--ids", "text")
    parts = ("--split", "time", "--valid-fraction", 0.2, "--test-fraction", 0.3, "--seed", 5)
    least = ("--min-item-count", 2, "--min-sequence-length", 4, "--overwrite", "-q")
    found = given(cprec.data, "prepare", "prepare", "log.csv", "-o", tmp_path / "d", *columns, *parts, *least)
    named = dict(found)
    assert str(named.pop("source")) == "log.csv"
    assert named.pop("out") == tmp_path / "d"
    named.pop("progress")
    assert named == {
        "user_column": "u", "item_column": "i", "time_column": "t", "format": "csv", "ids": "text", "split": "time",
        "valid_fraction": 0.2, "test_fraction": 0.3, "seed": 5, "min_item_count": 2, "min_sequence_length": 4,
        "overwrite": True,
    }  # fmt: skip
    found = given(
        cprec.data, "prepare_dataset", "prepare", "--dataset", "ml-1m", "-o", tmp_path / "d", "--cache", tmp_path
    )
    assert (found["name"], found["cache"]) == ("ml-1m", tmp_path)
    listed = run("prepare", "--dataset", "list")[0]
    assert [line.split()[0] for line in listed.splitlines()] == [*DATASETS]


def test_evaluate(given, trained):
    options = ("--data", trained / "data", "--split", "valid", "--topn", "1,3", "--batch-size", 5, "--quiet")
    found = given(evaluation, "evaluate", "evaluate", trained / "run", *options)
    assert found["split"] == "valid"
    assert (list(found["topn"]), found["batch_size"], found["length"]) == ([1, 3], 5, CONFIG.length)
    assert (found["device"], found["progress"]) == (None, False)


def test_recommend(given, trained, tmp_path):
    (tmp_path / "allowed.txt").write_text("1\n 2 \n\n", encoding="utf-8")
    command = ("recommend", trained / "run", tmp_path / "h", "--data", trained / "data", "--device", "cpu")
    options = ("-k", 3, "--include-seen", "--candidates", tmp_path / "allowed.txt", "--batch-size", 5)
    formats = ("--history-format", "users", "--output-format", "jsonl")
    found = given(serving, "recommend", *command, *options, "--quiet")
    assert (found["k"], found["length"], found["batch_size"], found["device"]) == (3, CONFIG.length, 5, "cpu")
    assert (found["exclude_seen"], found["candidates"], found["progress"]) == (False, ["1", "2"], False)
    assert given(serving, "recommend", *command)["exclude_seen"]
    found = given(serving_io, "read_histories", *command, *formats)
    assert (str(found["source"]), found["format"]) == (str(tmp_path / "h"), "users")
    (tmp_path / "h").write_text("u\t1 2\n", encoding="utf-8")
    assert given(serving_io, "write_recommendations", *command, *formats)["format"] == "jsonl"


def test_plan(given, trained):
    options = (
        "--dim",
        16,
        "--compressions",
        "1.5,2",
        "--max-clusters",
        3,
        "--ranks",
        "2,8,16",
        "--objective",
        "quality",
    )
    work = ("--machine", "gpu", "--tokens", 77, "--rows", 5)
    model = ("--dilations", "1,2,4", "--repeats", 3, "--kernel-size", 5, "--block", "bottleneck", "--no-tie-tails")
    found = given(
        planning, "plan_frontier", "plan", trained / "data", *options, *work, *model, "--sharing", "cross-block"
    )
    assert found["compressions"] == [1.5, 2.0]
    assert found["options"] == {
        "max_clusters": 3, "objective": "quality", "machine": "gpu", "ranks": [2, 8, 16], "tokens": 77, "rows": 5
    }  # fmt: skip
    config = found["model"]
    assert (config.embedding_dim, config.dilations, config.repeats, config.kernel_size) == (16, (1, 2, 4), 3, 5)
    assert (config.block, config.sharing, config.tie_tails) == ("bottleneck", "cross-block", False)
