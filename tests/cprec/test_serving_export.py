"""Exported folders: what is in them, and that torch alone serves them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cprec import checkpoint
from cprec.data import PreparedData, prepare
from cprec.exported import _BATCH, export, load
from cprec.files import atomic_write
from cprec.model import NextItNet, NextItNetConfig
from cprec.run_folder import RunConfig, RunFolder
from cprec.serving import recommend
from cprec.training import TrainingConfig
from cprec.warm_start import read_former

LENGTH = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    names = [f'i{item} "ü"' for item in range(40)]  # ids that have to be quoted
    lines = [", ".join(names[item] for item in rng.zipf(1.3, size=8) % 40) for _ in range(90)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return prepare(folder / "log.txt", folder / "prepared", format="sequences")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run folder as training leaves it, with random weights."""
    torch.manual_seed(0)
    size = data.num_items
    config = NextItNetConfig.from_plan(size, 8, [size // 6, size // 2], [8, 4, 2], dilations=(1, 2), dropout=0.3)
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    run_config = RunConfig.of(data, config, TrainingConfig(length=LENGTH))
    folder.begin(run_config, resume=False, overwrite=False)
    folder.save_weights(run_config, NextItNet(config))
    return folder.path


@pytest.fixture
def exported(run, tmp_path):
    return export(run, tmp_path / "model")


def test_an_export_gives_the_recommendations_of_the_run(data, run, exported):
    catalogue = data.catalogue
    histories = [catalogue.decode([1, 5, 2]), [], catalogue.decode([0, 1, 2, 3, 4, 6]), ["nobody knows me"]]
    expected = [[] for _ in histories]
    rows = recommend(checkpoint.load(run), catalogue, histories, k=4, length=LENGTH, warn_unknown=False)
    for row in rows:
        expected[int(row.user) - 1].append((row.item, row.score))
    model = load(exported)
    assert model.recommend(histories, k=4) == expected
    assert not model.model.softmax._indexes
    indexed = model.recommend(histories, k=4, storage="float16")
    assert [[item for item, _ in row] for row in indexed] == [[item for item, _ in row] for row in expected]
    assert list(model.model.softmax._indexes) == ["float16"]
    assert model.length == LENGTH
    allowed = catalogue.decode([7, 9])
    assert {item for item, _ in model.recommend(histories[:1], candidates=allowed)[0]} == set(allowed)
    assert model.recommend(histories[:1], k=99, exclude_seen=False)[0][0][1] > -20


def test_the_folder_is_plain_files(data, exported):
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "weights.safetensors", "items.jsonl", "README.txt",
    }  # fmt: skip
    lines = (exported / "items.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row[0] for row in rows] == data.catalogue.decode(list(range(data.num_items)))
    assert [row[1] for row in rows] == np.asarray(data.counts).tolist()
    assert "cprec.load" in (exported / "README.txt").read_text()
    assert str(data.folder) not in (exported / "config.json").read_text()


def test_topk_takes_item_numbers(exported):
    model = load(exported)
    histories = torch.tensor([[len(model.items), 1, 5, 2], [3, 3, 0, 4]])
    scores, items = model.topk(histories, 3, exclude=histories)
    wanted_scores, wanted_items = model.model.topk(histories, 3, exclude=histories)
    assert torch.equal(items, wanted_items)
    assert torch.equal(scores, wanted_scores)
    assert not scores.requires_grad
    for storage in ("float32", "float16", "int8"):
        assert torch.equal(model.topk(histories, 3, exclude=histories, storage=storage)[1], items)


def test_more_histories_than_a_batch_are_all_answered(exported):
    model = load(exported)
    count = _BATCH + 3
    assert len(model.recommend([[model.items[index % 5]] for index in range(count)], k=1)) == count


SERVE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"polars", "lightning", "rich", "safetensors", "matplotlib", "typer"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocked())
import json
from cprec.exported import load
print(json.dumps(load(sys.argv[1]).recommend(json.loads(sys.argv[2]), k=3)))
"""


def test_torch_alone_serves_it(data, exported):
    histories = [data.catalogue.decode([1, 5, 2]), []]
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", SERVE, str(exported), json.dumps(histories)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    for rows, wanted in zip(found, load(exported).recommend(histories, k=3), strict=True):
        assert [item for item, _ in rows] == [item for item, _ in wanted]
        np.testing.assert_allclose([score for _, score in rows], [score for _, score in wanted], rtol=1e-5)


def test_misuse_of_a_loaded_model_is_explained(exported):
    model = load(exported)
    with pytest.raises(TypeError, match="wrap it"):
        model.recommend(["item"])
    with pytest.raises(TypeError, match="a whitelist is a list of item ids, got the string 'item'"):
        model.recommend([[]], candidates="item")
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.recommend([[]], k=0)
    with pytest.raises(ValueError, match="none of the candidates"):
        model.recommend([[]], candidates=["nowhere"])


def test_damaged_exports_are_named(run, exported):
    items = exported / "items.jsonl"
    lines = items.read_text(encoding="utf-8").splitlines(keepends=True)
    for broken, message in (
        ([*lines[:2], "[1, 2]\n", *lines[3:]], r"items\.jsonl:3: expected"),
        ([*lines[:4], '["a", 1\n', *lines[5:]], r"items\.jsonl:5: expected"),
        ([*lines[:5], lines[4], *lines[6:]], r"items\.jsonl:6: item '.*' is that of line 5, too"),
        (lines[:-1], f"holds {len(lines) - 1} items, the model has {len(lines)}"),
    ):
        items.write_text("".join(broken), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load(exported)
    with pytest.raises(FileNotFoundError, match="cprec export"):
        load(run)


def test_existing_folders_are_replaced_only_when_they_are_exports(run, exported, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite it"):
        export(run, exported)
    before = (exported / "items.jsonl").stat().st_ino
    export(run, exported, overwrite=True)
    assert (exported / "items.jsonl").stat().st_ino != before
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an earlier export"):
        export(run, exported, overwrite=True)
    assert (exported / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="not an earlier export"):
        export(run, run, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_earlier_export_comes_back_when_the_new_one_cannot_take_its_place(run, exported, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    rename = Path.rename

    def failing(self, target):
        if self.suffix == ".tmp" and Path(target) == exported:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        export(run, exported, overwrite=True)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_behind_a_link_is_replaced_where_it_is(run, exported, tmp_path):
    (tmp_path / "link").symlink_to(exported)
    assert export(run, tmp_path / "link", overwrite=True) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]
    load(tmp_path / "link")


def test_moved_and_foreign_data(data, run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data.folder, moved)
    export(run, tmp_path / "from-copy", data=moved)
    assert PreparedData.open(moved).fingerprint == data.fingerprint
    (tmp_path / "log.txt").write_text("a b c d\nb c d a\nd c b a\n" * 5)
    other = prepare(tmp_path / "log.txt", tmp_path / "other", format="sequences")
    with pytest.raises(ValueError, match="is not the data of this run"):
        export(run, tmp_path / "wrong", data=other.folder)
    with pytest.raises(FileNotFoundError, match="pass the folder where it is now"):
        export(run, tmp_path / "wrong", data=tmp_path / "gone")
    assert not (tmp_path / "wrong").exists()


def test_a_run_without_weights_cannot_be_exported(data, tmp_path):
    config = NextItNetConfig.from_plan(data.num_items, 8)
    folder = RunFolder(tmp_path / "run")
    folder.begin(RunConfig.of(data, config, TrainingConfig()), resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        export(folder.path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert RunConfig.read(folder.path).training == TrainingConfig()


def test_a_place_that_cannot_be_written_to_is_named_and_not_its_temporary(run, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as failed, atomic_write(tmp_path / "nowhere" / "top.json"):
        pass
    assert failed.value.filename == str(tmp_path / "nowhere" / "top.json")
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name.startswith("."):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError) as failed:
        export(run, tmp_path / "model")
    assert failed.value.filename == str(tmp_path / "model")
    (tmp_path / "log.txt").write_text("a b c d e\nb c a\nc a b d\n")
    with pytest.raises(PermissionError) as failed:
        prepare(tmp_path / "log.txt", tmp_path / "data")
    assert failed.value.filename == str(tmp_path / "data")
    assert {entry.name for entry in tmp_path.iterdir()} == {"log.txt"}


def test_items_of_another_export_are_refused(exported):
    path = exported / "items.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    load(exported)  # an editor's mark changes nothing
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"items\.jsonl is not what was exported with this config\.json"):
        load(exported)
    with pytest.raises(ValueError, match=r"items\.jsonl is not what was exported with this config\.json"):
        read_former(exported)


@pytest.mark.parametrize("item", [1.0, b"i1", None, True, torch.tensor(1)], ids=repr)
def test_ids_of_other_types_are_refused(exported, item):
    model = load(exported)
    for call in (lambda: model.recommend([[item]], 2), lambda: model.recommend([[]], 2, candidates=[item])):
        with pytest.raises(TypeError, match="item ids are strings or integers, got"):
            call()
    assert model.recommend([[np.int64(7)]], 2) == model.recommend([["7"]], 2)
