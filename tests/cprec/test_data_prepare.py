"""The prepared folder: order of items and interactions, splits, and what happens when something was touched."""

import json
import pickle

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cprec.data import Catalogue, DataError, PreparedData, Sequences, prepare, summarise
from cprec.data.splits import by_time, by_user, leave_one_out, make_split

LOG = "2 c 5\n1 a 1\n1 b 3\n2 a 1\n1 c 2\n3 d 9\n2 b 2\n1 d 2\n2 e 7\n"


def write(tmp_path, text, name="log.txt"):
    path = tmp_path / name
    path.write_text(text)
    return path


def decoded(data, sequences):
    return [data.catalogue.decode(sequence) for sequence in sequences]


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def test_leave_one_out_by_hand(tmp_path):
    data = prepare(write(tmp_path, LOG), tmp_path / "out")
    assert data.user_ids.to_list() == ["2", "1", "3"]
    # by time within a user, equal times in file order
    assert decoded(data, data.sequences) == [["a", "b", "c", "e"], ["a", "c", "d", "b"], ["d"]]
    assert decoded(data, data.train) == [["a", "b"], ["a", "c"], ["d"]]
    valid, test = data.evaluation("valid"), data.evaluation("test")
    assert data.catalogue.decode(valid.targets) == ["c", "d"]
    assert decoded(data, valid.histories) == [["a", "b"], ["a", "c"]]
    assert data.catalogue.decode(test.targets) == ["e", "b"]
    assert decoded(data, test.histories) == [["a", "b", "c"], ["a", "c", "d"]]
    assert valid.user_ids.to_list() == test.user_ids.to_list() == ["2", "1"]
    # counted in training alone; ties (c, b, d once each) by first appearance in the file; e never trained
    assert data.catalogue.raw_ids.to_list() == ["a", "c", "b", "d", "e"]
    assert data.counts.tolist() == [2, 1, 1, 1, 0]
    assert data.num_items == 5
    assert data.name == "log"


def test_file_order_where_there_is_no_time(tmp_path):
    data = prepare(write(tmp_path, "2 x\n1 a\n2 y\n1 b\n2 z\n1 c\n2 w\n"), tmp_path / "out", format="pairs")
    assert decoded(data, data.sequences) == [["x", "y", "z", "w"], ["a", "b", "c"]]


def test_round_trip_and_source_check(tmp_path):
    path = write(tmp_path, LOG)
    made = prepare(path, tmp_path / "deep" / "out")
    data = PreparedData.open(tmp_path / "deep" / "out")
    assert data.fingerprint == made.fingerprint
    assert prepare(path, tmp_path / "other").fingerprint == made.fingerprint
    assert prepare(path, tmp_path / "named", name="other").fingerprint != made.fingerprint
    for mine, theirs in ((data.train, made.train), (data.sequences, made.sequences)):
        assert [row.tolist() for row in mine] == [row.tolist() for row in theirs]
    assert data.sequences.items.dtype == np.int32
    assert isinstance(data.sequences.items, np.memmap)
    data.check_source(path)
    path.write_text(LOG + "3 a 10\n")
    with pytest.raises(DataError, match=r"is not the file that .*out was prepared from \(log.txt"):
        data.check_source(path)
    assert str(tmp_path) not in (data.folder / "meta.json").read_text()


def test_summary_fits_one_screen(tmp_path):
    data = prepare(write(tmp_path, LOG.rstrip()), tmp_path / "out", name="little")
    summary = summarise(data)
    assert (summary.users, summary.items, summary.interactions) == (3, 5, 9)
    assert (summary.valid, summary.test, summary.train_interactions, summary.untrained_items) == (2, 2, 5, 1)
    assert summary.length_quartiles[0] == 1
    assert summary.length_quartiles[-1] == 4
    text = str(summary)
    assert "little" in text
    assert "line break" in text
    assert len(text.splitlines()) < 20


def test_progress_is_told(tmp_path):
    told = []
    prepare(write(tmp_path, LOG), tmp_path / "out", progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("done", 6, 6)


sequences_of_items = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences_of_items)
def test_order_and_counts_of_any_log(tmp_path_factory, rows):
    rows = [*rows, [1, 2, 3, 1], [4, 4]]
    folder = tmp_path_factory.mktemp("log")
    path = write(folder, "".join(" ".join(f"i{item}" for item in row) + "\n" for row in rows))
    data = prepare(path, folder / "out", format="sequences")
    assert decoded(data, data.sequences) == [[f"i{item}" for item in row] for row in rows]
    trained = [row[:-2] if len(row) >= 3 else row for row in rows]
    assert decoded(data, data.train) == [[f"i{item}" for item in row] for row in trained]
    flat = [f"i{item}" for row in rows for item in row]
    seen = [f"i{item}" for row in trained for item in row]
    expected = sorted(set(flat), key=lambda item: (-seen.count(item), flat.index(item)))
    assert data.catalogue.raw_ids.to_list() == expected
    assert data.counts.tolist() == [seen.count(item) for item in expected]
    assert data.catalogue.encode(expected).tolist() == list(range(len(expected)))


@given(st.lists(st.integers(1, 30), min_size=4, max_size=60), st.integers(0, 5))
def test_split_by_user_holds_whole_users_out(lengths, seed):
    lengths = np.array([*lengths, 2, 2, 2])
    offsets = offsets_of(lengths)
    split = by_user(offsets, 0.2, 0.1, seed)
    trained = split.train_ends - offsets[:-1]
    held = np.flatnonzero(trained == 0)
    assert np.array_equal(trained[trained > 0], lengths[trained > 0])
    targets = np.concatenate([split.valid, split.test])
    assert len(set(targets.tolist())) == len(targets)
    assert np.array_equal(np.sort(targets), offsets[held + 1] - 1)
    assert (lengths[held] >= 2).all()
    eligible = int((lengths >= 2).sum())
    assert len(split.valid) == max(1, round(0.2 * eligible))
    assert np.array_equal(by_user(offsets, 0.2, 0.1, seed).valid, split.valid)


@given(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=12), min_size=1, max_size=20))
def test_split_by_time_trains_the_past_only(rows):
    rows = [sorted(row) for row in rows]
    offsets = offsets_of([len(row) for row in rows])
    times = np.array([time for row in rows for time in row], dtype=np.float64)
    split = by_time(offsets, times, 0.2, 0.2)
    first, second = split.cuts
    assert first <= second
    valid, test = [], []
    for row, start, end in zip(rows, offsets[:-1], split.train_ends, strict=True):
        assert row[: end - start] == [time for time in row if time < first]
        later = next((place for place, time in enumerate(row) if time >= first), None)
        if later and row[later] < second:
            valid.append(start + later)
        latest = next((place for place, time in enumerate(row) if time >= second), None)
        if latest:
            test.append(start + latest)
    assert split.valid.tolist() == valid
    assert split.test.tolist() == test


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_leave_one_out_keeps_the_last_two_hidden(lengths):
    offsets = offsets_of(lengths)
    split = leave_one_out(offsets)
    long = np.flatnonzero(np.array(lengths) >= 3)
    assert split.test.tolist() == (offsets[long + 1] - 1).tolist()
    assert split.valid.tolist() == (split.test - 1).tolist()
    assert (split.train_ends - offsets[:-1]).tolist() == [n - 2 if n >= 3 else n for n in lengths]


def test_split_by_time_of_a_file(tmp_path):
    lines = [f"{user},{item},{10 * item + user}" for user in range(3) for item in range(10)]
    path = write(tmp_path, "user,item,time\n" + "\n".join(reversed(lines)) + "\n")
    data = prepare(path, tmp_path / "out", split="time", valid_fraction=0.2, test_fraction=0.2)
    assert data.meta["options"]["cuts"] == [60.0, 80.0]
    assert decoded(data, data.train) == [[str(item) for item in range(6)]] * 3
    assert data.catalogue.decode(data.evaluation("valid").targets) == ["6"] * 3
    test = data.evaluation("test")
    assert data.catalogue.decode(test.targets) == ["8"] * 3
    assert decoded(data, test.histories) == [[str(item) for item in range(8)]] * 3
    assert data.counts.tolist() == [3] * 6 + [0] * 4


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a b\nc d\n", {"format": "sequences"}, "valid split is empty: no sequence has the 3 interactions"),
        ("a b c\nc d a\n", {}, "train split is empty"),
        ("a\nb\n", {}, "train split is empty"),
        ("a b c d\na b c d\n", {"split": "user"}, "train split is empty"),
        ("a b c d\na b c d\nc\n", {"split": "time"}, "needs timestamps"),
        ("1 a 5\n1 b 5\n2 a 5\n2 b 5\n", {"split": "time", "format": "pairs"}, "train split is empty"),
        ("1 a 1\n1 b 2\n1 d 3\n2 a 8\n2 b 9\n", {"split": "time", "format": "pairs"}, "valid split is empty"),
        ("a b c d\na b c d\n", {"min_item_count": 3}, "no interaction is left with min_item_count=3"),
    ],
)
def test_empty_splits_are_refused(tmp_path, text, options, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        prepare(path, tmp_path / "out", **options)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.txt"]


def test_split_by_user_runs_out_of_users():
    with pytest.raises(DataError, match="train split is empty: under split='user'"):
        make_split("user", offsets_of([1, 5, 3]), None, 0.9, 0.05, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "random"}, "split must be one of"),
        ({"valid_fraction": 0.0}, "valid_fraction must be between 0 and 1"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "must be below 1"),
        ({"min_item_count": 0}, "min_item_count must be at least 1"),
        ({"split": "user", "seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(write(tmp_path, LOG), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_core_holds_for_items_and_users(tmp_path_factory, log, least_item, least_user):
    log = [*log, *((user, item) for user in (7, 8, 9, 10) for item in (7, 8, 9, 10))]
    folder = tmp_path_factory.mktemp("core")
    path = write(folder, "".join(f"{user},{item}\n" for user, item in log))
    data = prepare(path, folder / "out", format="pairs", min_item_count=least_item, min_sequence_length=least_user)
    kept = log
    for _ in range(len(log)):
        items, users = [item for _, item in kept], [user for user, _ in kept]
        kept = [(u, i) for u, i in kept if items.count(i) >= least_item and users.count(u) >= least_user]
    left = {user for user, _ in kept}
    users = [user for user in dict.fromkeys(user for user, _ in log) if user in left]
    assert data.user_ids.to_list() == [str(user) for user in users]
    expected = [[str(item) for owner, item in kept if owner == user] for user in users]
    assert decoded(data, data.sequences) == expected


@pytest.fixture
def folder(tmp_path):
    prepare(write(tmp_path, LOG), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "name", ["sequences.npy", "offsets.npy", "items.arrow", "counts.npy", "users.arrow", "test.npy"]
)
def test_damaged_files_are_named(folder, name):
    path = folder / name
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    with pytest.raises(DataError, match=rf"{name}: has [\d,]+ bytes, was written with"):
        PreparedData.open(folder, verify=False)
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: has changed since it was written"):
        PreparedData.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        PreparedData.open(folder)


def test_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        PreparedData.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is not a prepared folder \(it has no meta.json\)"):
        PreparedData.open(tmp_path / "empty")
    meta = folder / "meta.json"
    values = json.loads(meta.read_text())
    for change, message in (
        ({"format": "other"}, "was not written by"),
        ({"version": 99}, "has format version 99"),
        ({"name": "renamed"}, "has been edited"),
    ):
        meta.write_text(json.dumps(values | change))
        with pytest.raises(DataError, match=message):
            PreparedData.open(folder)
    meta.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        PreparedData.open(folder)


def test_overwrite_replaces_prepared_folders_only(folder, tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    before = PreparedData.open(folder).fingerprint
    with pytest.raises(DataError, match="exists already; pass overwrite=True"):
        prepare(path, folder)
    assert PreparedData.open(folder).fingerprint == before
    path.write_text(LOG + "3 a 10\n")
    assert prepare(path, folder, overwrite=True).fingerprint != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"files that prepare did not write \(notes.txt\)"):
        prepare(path, folder, overwrite=True)
    assert (folder / "notes.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    prepare(path, other)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(DataError, match="not a folder written by prepare"):
        prepare(path, precious, overwrite=True)
    with monkeypatch.context() as patch:
        patch.chdir(other)
        with pytest.raises(DataError, match="is the current folder, which cannot be replaced"):
            prepare(path, ".", overwrite=True)
    with pytest.raises(DataError, match="is not a folder"):
        prepare(path, path, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.txt", "other", "out", "precious"]


def test_a_failure_while_writing_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    before = PreparedData.open(folder).fingerprint

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Catalogue, "save", full)
    with pytest.raises(OSError, match="no space left"):
        prepare(tmp_path / "log.txt", folder, overwrite=True)
    assert PreparedData.open(folder).fingerprint == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.txt", "out"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path):
    path = write(tmp_path, LOG)

    def touch(stage, done, total):
        if stage == "sorting":
            path.write_text(LOG + "3 a 10\n")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(path, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_catalogue_encodes_and_decodes(folder):
    catalogue = PreparedData.open(folder).catalogue
    assert catalogue.encode(["e", "nobody", "a", "a", ""]).tolist() == [4, -1, 0, 0, -1]
    assert catalogue.encode([]).tolist() == []
    assert catalogue.encode(["a"]).dtype == np.int64
    assert catalogue.decode([4, 0]) == ["e", "a"]
    assert catalogue.decode(range(2)) == ["a", "c"]
    with pytest.raises(IndexError, match=r"item 5 is outside 0\.\.4"):
        catalogue.decode([0, 5])
    with pytest.raises(IndexError, match="item -1"):
        catalogue.decode(np.array([-1]))
    with pytest.raises(TypeError, match="a list of ids"):
        catalogue.encode("abc")
    with pytest.raises(TypeError, match="got 3 of type int"):
        catalogue.encode(["a", 3])


def test_catalogue_by_hand():
    catalogue = Catalogue(["x", "y"], [3, 1])
    assert (len(catalogue), catalogue.encode(["y"]).tolist()) == (2, [1])
    with pytest.raises(ValueError, match="item 1 has 4, more than item 0"):
        Catalogue(["x", "y"], [3, 4])
    with pytest.raises(ValueError, match="need as many counts"):
        Catalogue(["x", "y"], [3])


def test_sequences():
    items = np.arange(10, dtype=np.int32)
    whole = Sequences(items, [0, 4, 4, 10])
    assert [row.tolist() for row in whole] == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8, 9]]
    assert whole.offsets.tolist() == [0, 4, 4, 10]
    assert whole[-1].tolist() == [4, 5, 6, 7, 8, 9]
    view = Sequences.view(items, np.array([1, 6]), np.array([3, 9]))
    assert (len(view), view.num_interactions, view.lengths.tolist()) == (2, 5, [2, 3])
    with pytest.raises(ValueError, match="gaps"):
        _ = view.offsets
    assert view.compact().offsets.tolist() == [0, 2, 5]
    assert view.compact().items.tolist() == [1, 2, 6, 7, 8]
    with pytest.raises(IndexError):
        whole[3]
    with pytest.raises(ValueError, match="within the 10 items"):
        Sequences(items, [0, 11])
    with pytest.raises(ValueError, match="vector of integers"):
        Sequences(items.astype(np.float32), [0, 2])


def test_pickled_sequences_map_the_file_again(folder):
    train = PreparedData.open(folder).train
    data = pickle.dumps(train)
    again = pickle.loads(data)
    assert isinstance(again.items, np.memmap)
    assert [row.tolist() for row in again] == [row.tolist() for row in train]


def test_a_folder_that_is_prepared_again_is_not_mixed_with_the_open_one(folder, tmp_path):
    data, whole = PreparedData.open(folder), PreparedData.open(folder)
    train = [row.tolist() for row in whole.train]
    targets, ids = whole.evaluation("test").targets.tolist(), whole.catalogue.raw_ids.to_list()
    pickled = pickle.dumps(data.train)
    (tmp_path / "log.txt").write_text(LOG.replace("e", "new") + "4 new 1\n4 new 2\n4 a 3\n4 b 4\n")
    prepare(tmp_path / "log.txt", folder, overwrite=True)
    assert [row.tolist() for row in data.train] == train
    assert data.evaluation("test").targets.tolist() == targets
    assert whole.catalogue.raw_ids.to_list() == ids
    for read in (
        lambda: data.catalogue.raw_ids,
        lambda: data.user_ids,
        lambda: data.evaluation("test").user_ids,
        lambda: pickle.loads(pickled),
    ):
        with pytest.raises(DataError, match="has been prepared again since it was opened"):
            read()


def test_a_million_rows(tmp_path):
    """Vectorised all the way: with Python loops over rows this one would be felt."""
    random = np.random.default_rng(0)
    log = pl.DataFrame(
        {
            "user": random.integers(0, 50_000, 1_000_000),
            "item": (random.zipf(1.4, 1_000_000) % 100_000).astype(np.int64),
            "time": random.integers(0, 10**9, 1_000_000),
        }
    )
    path = tmp_path / "log.csv"
    log.write_csv(path)
    data = prepare(path, tmp_path / "out", ids="integer")
    expected = log.sort("user", "time", maintain_order=True).group_by("user").agg("item")
    assert data.sequences.num_interactions == 1_000_000
    assert data.num_users == expected.height
    rows = dict(zip(data.user_ids.to_list(), range(data.num_users), strict=True))
    for user, items in expected.head(50).iter_rows():
        assert data.catalogue.decode(data.sequences[rows[str(user)]]) == [str(item) for item in items]
    assert (np.diff(data.counts) <= 0).all()
    assert data.counts.sum() == data.train.num_interactions


def test_a_full_disk_is_named_with_the_folder(tmp_path, small_disk):
    """numpy says how many bytes it could write, and not where."""
    log = tmp_path / "log.txt"
    with log.open("w") as file:  # below the limit, and twice as large as numbers
        file.writelines(f"{' '.join(str(item % 10) for item in range(user, user + 20))}\n" for user in range(90))
    with pytest.raises(OSError, match=r"out: cannot be written whole \(.*\); is the disk full\?"):
        prepare(log, tmp_path / "out", format="sequences")
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.txt"]


def test_files_in_place_of_folders_are_called_that(tmp_path):
    (tmp_path / "log.txt").write_text("a b c\n")
    with pytest.raises(DataError, match="is a file, not a prepared folder"):
        PreparedData.open(tmp_path / "log.txt")
