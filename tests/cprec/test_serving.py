"""Recommendations for raw histories, and the files they come from and go to."""

import csv
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

from cprec.data import DataError, prepare
from cprec.model import NextItNet, NextItNetConfig
from cprec.ranking import items_to_exclude, pad_left
from cprec.serving import (
    History,
    UnknownItemsWarning,
    encode_candidates,
    read_histories,
    recommend,
    write_recommendations,
)

LENGTH = 4
LOG = "user,item,time\n" + "".join(
    f"u{user},i{(3 * user + 5 * step) % 23},{100 * step + user}\n"
    for step in range(7)
    for user in range(30)
    if step <= user % 7
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [" ".join(f"i{item}" for item in rng.zipf(1.3, size=8) % 40) for _ in range(90)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return prepare(folder / "log.txt", folder / "prepared", format="sequences").catalogue


@pytest.fixture(scope="module")
def model(catalogue):
    torch.manual_seed(0)
    size = catalogue.num_items
    return NextItNet(NextItNetConfig.from_plan(size, 8, [size // 6, size // 2], [8, 4, 2], dilations=(1, 2)))


def best(model, catalogue, history, k, exclude=(), candidates=None):
    """The same by the whole score vector."""
    numbers = catalogue.encode(list(history)).tolist()
    with torch.no_grad():
        scores = model.softmax.log_prob(model(pad_left([numbers], LENGTH, catalogue.num_items))[:, -1])[0]
    allowed = range(catalogue.num_items) if candidates is None else catalogue.encode(list(candidates)).tolist()
    taken = set(catalogue.encode(list(exclude)).tolist()) if exclude else set()
    order = sorted((item for item in allowed if item not in taken), key=lambda item: (-scores[item].item(), item))[:k]
    return list(zip(catalogue.decode(order), scores[order].tolist(), strict=True))


def rows_by_user(rows):
    result = {}
    for row in rows:
        result.setdefault(row.user, []).append((row.item, row.score))
        assert row.rank == len(result[row.user])
    return result


def assert_same(found, expected):
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-4)


def test_padding():
    assert pad_left([[1, 2, 3], [], [4]], 2, 9).tolist() == [[2, 3], [9, 9], [9, 4]]
    assert [part.tolist() for part in items_to_exclude([[3, 1, 3], [], [2]])] == [[0, 2, 2, 3], [1, 3, 2]]
    assert [part.tolist() for part in items_to_exclude([[]])] == [[0, 0], []]


def test_seen_items_are_left_out_even_beyond_what_the_model_sees(model, catalogue):
    history = catalogue.decode([0, 3, 9, 1, 2, 12, 7])  # seven items, the model sees four
    rows = list(recommend(model, catalogue, [history], k=catalogue.num_items, length=LENGTH))
    assert not {row.item for row in rows} & set(history)
    assert len(rows) == catalogue.num_items - 7
    assert_same([(row.item, row.score) for row in rows], best(model, catalogue, history, 10**6, exclude=history))
    everything = recommend(model, catalogue, [history], k=5, length=LENGTH, exclude_seen=False)
    assert_same(rows_by_user(everything)["1"], best(model, catalogue, history, 5))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_keep_users_and_order(model, catalogue, batch_size):
    histories = [History(f"u{i}", catalogue.decode([i, 2 * i, i + 3])) for i in range(5)]
    found = rows_by_user(recommend(model, catalogue, histories, k=3, length=LENGTH, batch_size=batch_size))
    assert list(found) == [history.user for history in histories]
    for history in histories:
        assert_same(found[history.user], best(model, catalogue, history.items, 3, exclude=history.items))


def test_a_whitelist_limits_the_answer(model, catalogue):
    allowed = catalogue.decode([11, 2, 30, 5])
    history = catalogue.decode([2, 8])
    with pytest.warns(UnknownItemsWarning, match="ignored 1 item in the candidates .*'nowhere'"):
        result = recommend(model, catalogue, [history, []], k=9, length=LENGTH, candidates=[*allowed, "nowhere"])
    found = rows_by_user(result)
    assert_same(found["1"], best(model, catalogue, history, 9, exclude=history, candidates=allowed))
    assert [item for item, _ in found["2"]] == catalogue.decode([2, 5, 11, 30])  # popularity among the allowed
    with pytest.raises(ValueError, match="none of the 1 candidates"):
        recommend(model, catalogue, [history], length=LENGTH, candidates=["nowhere"])
    with pytest.raises(ValueError, match="whitelist is empty"):
        recommend(model, catalogue, [history], length=LENGTH, candidates=[])


def test_unknown_items_are_reported_once_and_ignored(model, catalogue):
    known = catalogue.decode([4, 6])
    histories = [[known[0], "x1", known[1], "x1"], *[[known[0], f"y{i}"] for i in range(9)]]
    result = recommend(model, catalogue, histories, k=2, length=LENGTH, batch_size=3)
    with pytest.warns(UnknownItemsWarning) as caught:
        found = rows_by_user(result)
    assert len(caught) == 1
    assert "ignored 11 items in the histories" in str(caught[0].message)
    assert "'x1', 'y0', 'y1', 'y2', 'y3'" in str(caught[0].message)
    assert result.unknown.count == 11
    assert_same(found["1"], best(model, catalogue, known, 2, exclude=known))


def test_empty_and_unknown_histories_fall_back_to_popularity(model, catalogue, recwarn):
    histories = [[], ["x"], catalogue.decode([1])]
    result = recommend(model, catalogue, histories, k=3, length=LENGTH, warn_unknown=False)
    rows = list(result)
    assert not recwarn.list
    assert [row.fallback for row in rows] == [True] * 6 + [False] * 3
    assert (result.users, result.fallbacks) == (3, 2)
    for start in (0, 3):
        assert [row.item for row in rows[start : start + 3]] == catalogue.decode([0, 1, 2])
    counts = np.asarray(catalogue.counts, dtype=float) + 1
    expected = np.log(counts[:3] / counts.sum())
    np.testing.assert_allclose([row.score for row in rows[:3]], expected)


def test_a_history_of_every_item_leaves_nothing(model, catalogue):
    everything = catalogue.decode(list(range(catalogue.num_items)))
    assert list(recommend(model, catalogue, [everything], length=LENGTH)) == []


def test_impossible_requests_are_refused_before_work(model, catalogue):
    for options in ({"k": 0}, {"length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            recommend(model, catalogue, [], **{"length": LENGTH, **options})
    with pytest.raises(ValueError, match="the model knows 5 items"):
        recommend(NextItNet(NextItNetConfig.from_plan(5, 8)), catalogue, [], length=LENGTH)


def test_plain_strings_do_not_pass_for_lists_of_ids(model, catalogue):
    for histories in ("i1", ["i1"], [["i1"], "i2"], [History("u", "i1")]):
        with pytest.raises(TypeError, match=r"got the string 'i\d': wrap it"):
            list(recommend(model, catalogue, histories, length=LENGTH))
    with pytest.raises(TypeError, match="a whitelist is a list of item ids, got the string 'i1'"):
        recommend(model, catalogue, [["i1"]], length=LENGTH, candidates="i1")


def test_candidates_become_ascending_item_numbers(catalogue):
    names = catalogue.decode([7, 0, 3])
    with pytest.warns(UnknownItemsWarning, match="ignored 2 items in the candidates .*'nowhere', 'x'"):
        numbers = encode_candidates(catalogue, iter([*names, "nowhere", names[0], "x", "nowhere"]))
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [0, 3, 7]
    with pytest.raises(ValueError, match=r"none of the 2 candidates .* the first is 'nowhere'"):
        encode_candidates(catalogue, ["nowhere", "x"])


# Reading histories


def read(text, **options):
    return list(read_histories(io.BytesIO(text if isinstance(text, bytes) else text.encode()), **options))


def test_formats_are_told_by_content():
    assert read("a b  c\n\nd\n") == [History("1", ["a", "b", "c"]), History("3", ["d"])]
    assert read("a, b b,c\r\nd e\n") == [History("1", ["a", "b b", "c"]), History("2", ["d", "e"])]
    assert read("ann\ta b\nbob\t\neve smith\tc,d\n") == [
        History("ann", ["a", "b"]), History("bob", []), History("eve smith", ["c", "d"]),
    ]  # fmt: skip
    assert read('{"user": 7, "items": ["a", 3]}\n{"items": []}\n') == [History("7", ["a", "3"]), History("2", [])]
    assert read(b"\xef\xbb\xbfa b\n") == [History("1", ["a", "b"])]
    assert read('{"a"} b\n', format="sequences") == [History("1", ['{"a"}', "b"])]
    assert read("[a] b\n", format="sequences") == [History("1", ["[a]", "b"])]
    assert read("a b\n[a] b\n") == [History("1", ["a", "b"]), History("2", ["[a]", "b"])]
    assert read("a,b\nuser,item\n") == [History("1", ["a", "b"]), History("2", ["user", "item"])]
    assert read("user:1\titem:2\n") == [History("user:1", ["item:2"])]


@pytest.mark.parametrize(
    "header",
    ["user_id,item_id,timestamp", "userId;movieId", "user\titem\ttime", '"session_id","price","item_id"',
     "user_id:token\titem_id:token\ttimestamp:float"],
)  # fmt: skip
def test_the_header_of_a_log_is_no_history(header):
    with pytest.raises(
        ValueError, match=r":2: looks like the header of an interaction log \(.*\): run `cprec prepare`"
    ) as e:
        read(f"\n  {header}\r\n1,2,3\n")
    assert repr(header[:60]) in str(e.value)
    assert read(f"{header}\n", format="users" if "\t" in header else "sequences")


def test_histories_are_read_without_polars():
    code = "import io, sys; sys.modules['polars'] = None; from cprec.serving_io import read_histories as r\n"
    code += "print([history.items for history in r(io.BytesIO(b'user,item\\n'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[['user', 'item']]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\nc\td\n", ":2: a tab"),
        ("a b\rc d\r", ":1: a carriage return within the line"),
        ("a,,b\n", ":1: item 2 between the commas is empty"),
        ("u\ta\nv b\n", r":2: expected user<TAB>items, got 'v b'"),
        ('{"items": ["a"]}\n{"items": ["a"\n', ":2: not a JSON object"),
        ('{"items": ["a"]}\n{"itmes": ["a"]}\n', ":2: expected"),
        ('{"items": ["a", 1.5]}\n', ":1: item 2 is 1.5"),
        ('{"items": ["a", null]}\n', ":1: item 2 is None"),
        ('{"user": [], "items": ["a"]}\n', r":1: user is \[\]"),
        ('{"items": []}\n{"user": "\\ud800", "items": ["a"]}\n', r":2: '\\ud800' is no text"),
        ('{"items": ["a", "é\\udfff"]}\n', r":1: 'é\\udfff' is no text"),
        ('{"items": ' + 99_999 * "[" + "\n", ":1: (too many brackets|not a JSON object)"),
        (b"a b\n\xff\xfe\n", ":2: not UTF-8"),
        ("\n \n", "holds no history"),
        ("", "holds no history"),
        (
            "[1, 2, 3]\n",
            r""":1: starts with a bracket \('\[1, 2, 3\]'\): a history is \{"user": ..., "items": \[...\]\} or ids""",
        ),
    ],
)
def test_bad_lines_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_histories_from_a_file_and_from_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "h.txt"
    path.write_text("a b\nc\td\n")
    with pytest.raises(ValueError, match=r"h\.txt:2"):
        list(read_histories(path))
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        list(read_histories(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="unknown history format 'xml'"):
        list(read_histories(path, format="xml"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a b\n")))
    assert list(read_histories("-")) == [History("1", ["a", "b"])]
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of `<&-`
    with pytest.raises(ValueError, match="standard input is closed: name a file of histories"):
        list(read_histories("-"))


# Writing recommendations


@pytest.fixture
def result(model, catalogue):
    histories = [History('x, "y"', catalogue.decode([1, 2])), History("ü", []), History("3", catalogue.decode([5]))]
    return lambda: recommend(model, catalogue, histories, k=2, length=LENGTH, batch_size=2)


def test_closed_standard_output_is_named(result, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(ValueError, match="standard output is closed: name a file to write"):
        write_recommendations(result().chunks(), "-")


def test_any_number_of_histories_at_a_time(model, catalogue, result):
    histories = [History('x, "y"', catalogue.decode([1, 2])), History("ü", []), History("3", catalogue.decode([5]))]
    assert list(recommend(model, catalogue, histories, k=2, length=LENGTH, batch_size=10**30)) == list(result())


def test_csv_parquet_and_json_lines_say_the_same(result, tmp_path):
    expected = [row._asdict() for row in result()]
    assert len(expected) == 6
    for name in ("r.csv", "r.parquet", "r.jsonl", "r.NDJSON"):
        assert write_recommendations(result().chunks(), tmp_path / name) == 6
    tables = {
        "csv": pl.read_csv(tmp_path / "r.csv", schema_overrides={"user": pl.String}).to_dicts(),
        "parquet": pl.read_parquet(tmp_path / "r.parquet").to_dicts(),
        "jsonl": [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()],
    }
    for name, rows in tables.items():
        assert list(rows[0]) == ["user", "rank", "item", "score", "fallback"], name
        for row, wanted in zip(rows, expected, strict=True):
            assert math.isclose(row.pop("score"), wanted["score"], abs_tol=1e-5), name
            assert row == {key: value for key, value in wanted.items() if key != "score"}, name
    assert (tmp_path / "r.NDJSON").read_text() == (tmp_path / "r.jsonl").read_text()
    assert len(list(tmp_path.iterdir())) == 4


def test_standard_output_and_streams(result, capfdbinary):
    assert write_recommendations(result().chunks(), "-") == 6
    rows = list(csv.reader(io.StringIO(capfdbinary.readouterr().out.decode())))
    assert rows[0] == ["user", "rank", "item", "score", "fallback"]
    assert [row[0] for row in rows[1:]] == ['x, "y"'] * 2 + ["ü"] * 2 + ["3"] * 2
    stream = io.BytesIO()
    write_recommendations(result().chunks(), stream, format="parquet")
    assert len(pl.read_parquet(io.BytesIO(stream.getvalue()))) == 6
    with pytest.raises(ValueError, match="a stream needs a format"):
        write_recommendations(result().chunks(), stream)


def test_parquet_without_any_row_keeps_its_columns(model, catalogue, tmp_path):
    write_recommendations(recommend(model, catalogue, [], length=LENGTH).chunks(), tmp_path / "r.parquet")
    assert pl.read_parquet(tmp_path / "r.parquet").columns == ["user", "rank", "item", "score", "fallback"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_failure_half_way_leaves_the_old_file(result, tmp_path, suffix):
    def broken():
        yield from result().chunks()
        raise RuntimeError("disk on fire")

    target = tmp_path / f"r.{suffix}"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_recommendations(broken(), target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_targets_are_checked_before_work(tmp_path):
    def never():
        raise AssertionError("was asked for rows")
        yield

    for target, error, message in (
        (tmp_path / "r.xlsx", ValueError, "'.xlsx'"),
        (tmp_path / "r", ValueError, "no suffix"),
        (tmp_path / "no" / "r.csv", FileNotFoundError, "no such directory"),
    ):
        with pytest.raises(error, match=message):
            write_recommendations(never(), target)
    with pytest.raises(ValueError, match="unknown output format 'xml'"):
        write_recommendations(never(), "-", format="xml")


def test_ids_keep_white_space_that_does_not_separate(result, tmp_path):
    """What `cprec prepare` takes for one item is one item: blanks and tabs separate, other white space does not."""
    assert read("a\u00a0b  c\u3000d \n") == [History("1", ["a\u00a0b", "c\u3000d"])]
    assert read("\u2003u\ta\u00a0b\tc\n") == [History("\u2003u", ["a\u00a0b", "c"])]
    assert read("a\u00a0, b\n") == [History("1", ["a\u00a0", "b"])]
    assert read("\u00a0\n \na\fb\f c\f\n") == [History("1", ["\u00a0"]), History("3", ["a\fb\f", "c"])]


def test_a_carriage_return_in_an_id_stays_in_its_field(model, catalogue, tmp_path):
    histories = [History("a\rb", catalogue.decode([1, 2])), History("plain", catalogue.decode([1, 2]))]
    found = recommend(model, catalogue, histories, k=2, length=LENGTH)
    write_recommendations(found.chunks(), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        users = [row[0] for row in csv.reader(file)]
    assert users == ["user", "a\rb", "a\rb", "plain", "plain"]


def test_links_stay_links_and_pipes_are_written_to(result, tmp_path):
    write_recommendations(result().chunks(), tmp_path / "real.csv")
    expected = (tmp_path / "real.csv").read_bytes()
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write_recommendations(result().chunks(), tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_bytes() == expected
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    read_end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_recommendations(result().chunks(), pipe)
    assert os.read(read_end, 1 << 16) == expected
    os.close(read_end)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "pipe.csv", "real.csv"]


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_a_prepared_folder_gives_the_histories_of_all_its_users(tmp_path, monkeypatch, at_a_time):
    monkeypatch.setattr("cprec.serving_io.PREPARED_USERS", at_a_time)
    (tmp_path / "log.csv").write_text(LOG)
    prepare(tmp_path / "log.csv", tmp_path / "data")
    wanted = {}
    for line in sorted(LOG.splitlines()[1:], key=lambda line: int(line.split(",")[2])):
        user, item, _ = line.split(",")
        wanted.setdefault(user, []).append(item)
    given = list(read_histories(tmp_path / "data"))
    assert len(given) == 30
    assert {history.user: history.items for history in given} == wanted
    with pytest.raises(ValueError, match="is a folder, which has no history format 'users'"):
        list(read_histories(tmp_path / "data", format="users"))
    with pytest.raises(DataError, match="is not a prepared folder"):
        list(read_histories(tmp_path))


def test_users_of_other_data_are_served_by_what_the_model_knows(catalogue, model, tmp_path):
    (tmp_path / "later.txt").write_text("i3 i5 new1\nnew2 new3\ni7\n")
    prepare(tmp_path / "later.txt", tmp_path / "later", format="sequences")
    found = recommend(model, catalogue, read_histories(tmp_path / "later"), 3, length=LENGTH, warn_unknown=False)
    rows = rows_by_user(found)
    assert [len(own) for own in rows.values()] == [3, 3, 3]
    assert (found.users, found.fallbacks, found.unknown.count) == (3, 1, 3)
    told = recommend(model, catalogue, [["i3", "i5"], [], ["i7"]], 3, length=LENGTH)
    assert list(rows_by_user(told).values()) == list(rows.values())


def test_a_model_in_training_is_served_without_dropout(catalogue):
    torch.manual_seed(0)
    config = NextItNetConfig.from_plan(catalogue.num_items, 8, dilations=(1,), dropout=0.9)
    model = NextItNet(config).train()
    history = catalogue.decode([0, 1, 2])
    first, again = (list(recommend(model, catalogue, [history], k=5, length=LENGTH)) for _ in range(2))
    assert first == again
    assert_same([(row.item, row.score) for row in first], best(model.eval(), catalogue, history, 5, exclude=history))


def test_json_lines_may_begin_with_a_byte_order_mark():
    lines = b'\xef\xbb\xbf{"user": "a", "items": ["i1", "i2"]}\n'
    assert list(read_histories(io.BytesIO(lines))) == [History("a", ["i1", "i2"])]
