"""How a prepared folder takes its place: whole, in the place of its own kind alone, and of a source that stood still."""

import os

import numpy as np
import pytest

from cprec.data import Catalogue, DataError, PreparedData, prepare
from cprec.data import files as data_files

LOG = "2 c 5\n1 a 1\n1 b 3\n2 a 1\n1 c 2\n3 d 9\n2 b 2\n1 d 2\n2 e 7\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    return path


def test_a_link_to_a_prepared_folder_stays_one(log, tmp_path):
    prepare(log, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    log.write_text(LOG + "3 a 10\n")
    made = prepare(log, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert PreparedData.open(tmp_path / "real").fingerprint == made.fingerprint


def test_a_file_that_appears_in_the_folder_meanwhile_is_not_deleted(log, tmp_path, monkeypatch):
    before = prepare(log, tmp_path / "out").fingerprint
    notes = tmp_path / "out" / "notes.txt"
    save = Catalogue.save

    def save_beside_notes(*args):
        notes.write_text("mine")
        return save(*args)

    monkeypatch.setattr(Catalogue, "save", save_beside_notes)
    with pytest.raises(DataError, match=r"files that prepare did not write \(notes.txt\)"):
        prepare(log, tmp_path / "out", overwrite=True)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert PreparedData.open(tmp_path / "out").fingerprint == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.txt", "out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(log, tmp_path, monkeypatch):
    before = prepare(log, tmp_path / "out").fingerprint
    rename = data_files.Path.rename

    def refused(self, target):
        if self.name.endswith(".tmp"):
            raise PermissionError("not to there")
        return rename(self, target)

    monkeypatch.setattr(data_files.Path, "rename", refused)
    log.write_text(LOG + "3 a 10\n")
    with pytest.raises(PermissionError, match="not to there"):
        prepare(log, tmp_path / "out", overwrite=True)
    assert PreparedData.open(tmp_path / "out").fingerprint == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.txt", "out"]


def test_a_source_that_changes_to_another_of_its_size_is_refused(log, tmp_path):
    def change(stage, done, total):
        if stage == "sorting":
            log.write_text(LOG.replace("2 c 5", "2 d 5"))
            os.utime(log, ns=(1, 1))

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(log, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_interactions_of_one_moment_keep_the_files_order(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(40)}", f"i{rng.integers(300)}", int(rng.integers(3)) + 10**9) for _ in range(5000)]
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    data = prepare(path, tmp_path / "out")
    wanted = {user: [] for user, _, _ in rows}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # which keeps the order of equals
        wanted[user].append(item)
    for user, sequence in zip(data.user_ids.to_list(), data.sequences, strict=True):
        assert data.catalogue.decode(sequence) == wanted[user]
