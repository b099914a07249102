"""What a file is not taken for: JSON, tables without known columns, columns of time that nobody named."""

import json
import subprocess

import polars as pl
import pytest

from cprec.data import DataError, detect_format, prepare, scan_interactions, summarise
from cprec.data.files import fingerprint

WALK = [(f"u{user}", f"i{(user * step + 1) % 7}", 1_600_000_000 - 10 * step) for user in range(6) for step in range(5)]


def write(tmp_path, text, name="data.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def table(rows, separator=",", header=""):
    return header + "".join(separator.join(map(str, row)) + "\n" for row in rows)


def rows(path, **options):
    interactions = scan_interactions(path, **options)
    interactions.check()
    return interactions.collect(interactions.frame).rows()


def read(path, **options):
    return scan_interactions(path, **options).layout.roles


REVIEWS = [{"overall": 5.0, "reviewerID": user, "asin": item, "unixReviewTime": time} for user, item, time in WALK]
HISTORIES = [{"user": f"u{user}", "items": ["a", "b", "c"][: user % 3 + 1]} for user in range(5)]


@pytest.mark.parametrize("of", [REVIEWS, HISTORIES], ids=["interactions", "histories"])
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "array"])
def test_json_is_refused_with_a_command_that_converts_it(tmp_path, of, lines):
    text = "".join(json.dumps(row) + "\n" for row in of) if lines else json.dumps(of, indent=1)
    path = write(tmp_path, "\n  \n" + text, "my log.json")
    for call in (detect_format, scan_interactions):
        with pytest.raises(DataError, match=r"my log.json:3: is JSON, which is not read") as caught:
            call(path)
    command = str(caught.value).split(", as with ")[1]
    target = tmp_path / command.rsplit(" > ", 1)[1]
    assert f"jq -r '{'' if lines else '.[] | '}" in command
    try:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    except subprocess.CalledProcessError:
        pytest.skip("no jq here")
    expected = [(user, item, float(time)) for user, item, time in WALK]
    if of is HISTORIES:
        expected = [(str(line), item, None) for line, row in enumerate(of, 1) for item in row["items"]]
    assert rows(target) == expected


TABLES = {
    "gowalla": (table([(u[1:], "2010-10-19T23:55:27Z", "30.2", "-97.7", i[1:]) for u, i, _ in WALK], "\t"), 5),
    "yoochoose": (table([(u[1:], "2014-04-07T10:51:09.277Z", i[1:], 0) for u, i, _ in WALK]), 4),
    "userbehavior": (table([(u[1:], i[1:], 77, "pv", t) for u, i, t in WALK]), 5),
    "steam": (table([(u, i, "purchase", 1.0, 0) for u, i, _ in WALK]), 5),
    "empty fields": (table([(u, "2009-05-04T23:08:57Z", "", "", i) for u, i, _ in WALK], "\t"), 5),
    "titles": (table([(u, f"song {i}" + " live" * (t % 3), "x") for u, i, t in WALK], "\t"), 3),
    "semicolons": (table([(u, i, "a b") for u, i, _ in WALK], ";"), 3),
    "blanks": (table([(u, i, "web", t) for u, i, t in WALK], " "), 4),
    "unknown header": (table([(u, i, "web", "12/3/2019 10:00") for u, i, _ in WALK], ",", "buyer,sku,channel,at\n"), 4),
    "quoted": (table([(u, f'"{i}, {i}"' if t % 3 else i, "web") for u, i, t in WALK]), 3),
    "numbers": (table([(u[1:], i[1:], 5) for u, i, _ in reversed(WALK[::2] + WALK[1::2])]), 3),
    "two lines": ("ann,apple,web,1.0\nbob,fig,web,2.0\n", 4),
    "one line of 31 is cut": (table([(u, i, "web", 1) for u, i, _ in WALK]) + "u1,i", 4),
}


@pytest.mark.parametrize(("text", "width"), TABLES.values(), ids=TABLES)
def test_a_table_is_not_taken_for_sequences(tmp_path, text, width):
    path = write(tmp_path, text)
    expected = rf"looks like a table of {width} columns, none of which is known as the user or the item.*--user-column"
    for call in (detect_format, scan_interactions):
        with pytest.raises(DataError, match=expected):
            call(path)
    with pytest.raises(DataError, match="none of which is 'buyers'"):
        scan_interactions(path, user_column="buyers")
    assert scan_interactions(path, format="sequences").format == "sequences"


def test_a_table_with_an_unknown_header_is_read_by_its_names(tmp_path):
    path = write(tmp_path, TABLES["unknown header"][0])
    assert [row[:2] for row in rows(path, user_column="buyer", item_column="sku")] == [row[:2] for row in WALK]


@pytest.mark.parametrize(
    "text",
    [
        "a b c d\nb c a d\nc d a\n" * 20,
        "1 2 3 4 5 6 7 8\n1 2 3 4\n1 2 3 4 5 6 7 8\n1 2 3 4 5 6 7 8\n",  # cut to a length, but for one
        "1,5,2\n4,2\n7,8,9,1\n2,6,7\n",
        "a b c d\nb c d e\nc d e f\n",  # three lines alike in width and kind
        "a b c d e f g\n",
        "1234567890,5,100,7\n",
        "a\nb\nc\nd\n",
        " ".join(f"i{item}" for item in range(30_000)),
    ],
)
def test_sequences_stay_sequences(tmp_path, text):
    assert detect_format(write(tmp_path, text)) == "sequences"


def test_a_known_header_is_no_table(tmp_path):
    for separator, kind in (("\t", "tsv"), (",", "csv")):
        text = table(WALK, separator, separator.join(("user", "item", "time")) + "\n")
        assert detect_format(write(tmp_path, text)) == kind


@pytest.mark.parametrize(
    "name",
    ["created_at", "event_timestamp", "eventTime", "Purchase Date", "reviewTime", "rating_timestamp", "review-timestamp",
     "order_date", "click_time", "watched.date", "server_timestamp", "event_ts", "Event-TS", "ts_ms", "event_ts_ms", "time_ms",
     "timestamp_ms", "timestamp_us", "updated_at", "added at", "t_dat"],
)  # fmt: skip
def test_columns_of_time(tmp_path, name):
    path = write(tmp_path, table(WALK, ",", f"user_id,item_id,{name}\n"))
    assert read(path)["time"] == name
    assert rows(path)[0] == ("u0", "i1", 1.6e9)
    dates = write(
        tmp_path, table([(u, i, f"2020-01-{9 - t // 10 % 7:02d}") for u, i, t in WALK], ",", f"user,item,{name}\n")
    )
    assert scan_interactions(dates).has_time
    pl.DataFrame(WALK, schema=["user", "item", name], orient="row").write_parquet(tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet")["time"] == name


@pytest.mark.parametrize(
    ("header", "of"),
    [
        ("user,item,rating", lambda u, i, t: (u, i, 5)),
        ("user,item,candidate", lambda u, i, t: (u, i, t)),
        ("user,item,release_date", lambda u, i, t: (u, i, "1999-01-01")),
        ("user,item,watch_time", lambda u, i, t: (u, i, t % 100)),  # a duration
        ("user,item,ship_date,pay_date", lambda u, i, t: (u, i, t, t)),  # which of them?
        ("user,item,paid_at,event_ts", lambda u, i, t: (u, i, t, t)),
        *(
            (f"user,item,{name}", lambda u, i, t: (u, i, t))
            for name in ("counts", "points", "products", "format", "flat")
        ),
        *(
            (f"user,item,{name}", lambda u, i, t: (u, i, t))
            for name in ("item_counts", "file_format", "geo_lat", "items_ms")
        ),
        ("user,item,bought_at", lambda u, i, t: (u, i, "the market")),
        ("user,item,looked_at", lambda u, i, t: (u, i, t % 100)),  # how often?
    ],
)
def test_columns_that_are_no_time(tmp_path, header, of):
    made = [of(*row) for row in WALK]
    path = write(tmp_path, table(made, ",", header + "\n"))
    assert read(path) == {"user": "user", "item": "item", "time": None}
    pl.DataFrame(made, schema=header.split(","), orient="row").write_parquet(tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet") == read(path)
    named = header.split(",")[-1]
    if named == "watch_time":
        assert read(path, time_column=named)["time"] == named


def test_a_time_that_cannot_be_read_may_be_left_out(tmp_path):
    made = [(u, i, "12/3/2019 10:00") for u, i, _ in WALK]
    path = write(tmp_path, table(made, ",", "user,item,order_date\n"))
    pl.DataFrame(made, schema=["user", "item", "order_date"], orient="row").write_parquet(tmp_path / "log.parquet")
    for of, message in (
        (path, ":2: the timestamp '12/3/2019 10:00' is neither"),
        (tmp_path / "log.parquet", "is String"),
    ):
        with pytest.raises(DataError, match=f"{message}.*--time-column ''"):
            scan_interactions(of)
        assert [row[:2] for row in rows(of, time_column="")] == [row[:2] for row in WALK]
        assert not scan_interactions(of, time_column="").has_time


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        (table(WALK, ",", "user_id,item_id,created_at\n"), {}, "user = user_id, item = item_id, time = created_at"),
        (
            table([(u, i, 5) for u, i, _ in WALK], ",", "user_id,item_id,stars\n"),
            {},
            "user = user_id, item = item_id, time = none: lines are taken in the file's order",
        ),
        (
            table([(u, i) for u, i, _ in WALK]),
            {},
            "user = field 1, item = field 2, time = none: lines are taken in the file's order",
        ),
        (table([(u, i, 5, t) for u, i, t in WALK]), {}, "user = field 1, item = field 2, time = field 4"),
        (
            table([(i, u, 5, t) for u, i, t in WALK]),
            {"user_column": "2", "item_column": "1"},
            "user = field 2, item = field 1, time = field 4",
        ),
        ("a b c d\na b c\nb a c d e\n", {}, "user = the line's number, item = its fields"),
    ],
)
def test_the_summary_says_which_columns_were_read(tmp_path, text, options, line):
    data = prepare(write(tmp_path, text), tmp_path / "out", **options)
    assert ("columns", line) in summarise(data).rows()
    assert f"columns         {line}\n" in str(summarise(data))


def test_names_of_columns_leave_fingerprints_as_they_were(tmp_path):
    """Runs know their data by them."""
    named = prepare(write(tmp_path, table(WALK, ",", "user,item,time\n")), tmp_path / "named")
    assert named.meta["source"]["columns"] == {"user": "user", "item": "item", "time": "time"}
    del named.meta["source"]["columns"]  # prepared by an earlier version
    assert fingerprint(named.meta) == named.fingerprint
    assert "columns" not in dict(summarise(named).rows())


@pytest.mark.parametrize("name", ["gowalla", "empty fields"])
def test_fields_by_number_between_tabs(tmp_path, name):
    found = rows(write(tmp_path, TABLES[name][0]), user_column="1", item_column="5", time_column="2")
    assert [(user.lstrip("u"), item.lstrip("i")) for user, item, _ in found] == [(u[1:], i[1:]) for u, i, _ in WALK]
    assert all(time > 10**15 for *_, time in found)


@pytest.mark.parametrize("format", [None, "csv"])
def test_fields_by_number(tmp_path, format):
    path = write(tmp_path, TABLES["userbehavior"][0])
    found = rows(path, format=format, user_column="1", item_column="2", time_column="5")
    assert found == [(u[1:], i[1:], float(t)) for u, i, t in WALK]
    quoted = rows(write(tmp_path, TABLES["quoted"][0]), format=format, user_column="1", item_column="2")
    assert quoted == [(u, f"{i}, {i}" if t % 3 else i, None) for u, i, t in WALK]
    blanks = rows(write(tmp_path, TABLES["blanks"][0]), user_column="2", item_column="1", time_column="4")
    assert blanks == [(i, u, float(t)) for u, i, t in WALK]


def test_fields_by_number_go_before_those_of_the_format(tmp_path):
    swapped = write(tmp_path, table([(i, u, 5, t) for u, i, t in WALK]))
    assert rows(swapped, user_column="2", item_column="1") == [(u, i, float(t)) for u, i, t in WALK]
    assert rows(swapped, user_column="2", item_column="1", time_column="")[0] == ("u0", "i1", None)
    timed = write(tmp_path, table([(t, u, i) for u, i, t in WALK], " "))
    found = rows(timed, format="pairs", user_column="2", item_column="3", time_column="1", ids="text")
    assert found == [(u, i, float(t)) for u, i, t in WALK]
    assert read(timed, format="pairs", user_column="2", item_column="3", ids="text")["time"] is None


def test_first_rows_that_look_like_the_numbers(tmp_path):
    """A user 1 with an item 2 is no header; columns counted from 0, as pandas writes them, are one."""
    path = write(tmp_path, table([(1, 2, 7, "pv"), (1, 3, 7, "pv"), (2, 2, 7, "pv"), (2, 4, 7, "pv")]))
    assert rows(path, user_column="1", item_column="2")[0] == ("1", "2", None)
    for index in ("", ","):
        made = [(row, *WALK[row]) if index else WALK[row] for row in range(len(WALK))]
        pandas = write(tmp_path, table(made, ",", f"{index}0,1,2\n"))
        assert rows(pandas, user_column="0", item_column="1", time_column="2")[0] == ("u0", "i1", 1.6e9)
        assert rows(pandas, user_column="1", item_column="2")[0] == ("i1", "1600000000", None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("steam", {"user_column": "1"}, "needs both --user-column and --item-column"),
        ("steam", {"user_column": "1", "item_column": "9"}, ":1: there is no column 9: its lines have 5 fields"),
        ("steam", {"user_column": "2", "item_column": "2"}, r"must be different columns, got \[2, 2\]"),
        ("steam", {"user_column": "1", "item_column": "2", "format": "sequences"}, "its lines have no columns"),
    ],
)
def test_numbers_that_are_wrong(tmp_path, name, options, message):
    with pytest.raises(DataError, match=message):
        scan_interactions(write(tmp_path, TABLES[name][0]), **options)


def test_numbers_are_no_names(tmp_path):
    path = write(tmp_path, table(WALK, ",", "user,item,time\n"))
    with pytest.raises(DataError, match="no column '1'; the columns are: user, item, time"):
        scan_interactions(path, user_column="1")
    with pytest.raises(DataError, match=r"need a header.*give numbers of fields, the first being 1"):
        scan_interactions(write(tmp_path, table([(u, i) for u, i, _ in WALK])), user_column="user")


@pytest.mark.parametrize(
    ("damage", "line", "message"),
    [("\n\nu9,,web,1.0,0\n", 33, "the item is empty"), ("u9,i1\n", 31, "expected 5 fields")],
)
def test_damage_without_a_header_has_its_line(tmp_path, damage, line, message):
    path = write(tmp_path, TABLES["steam"][0] + damage)
    with pytest.raises(DataError, match=rf"data.txt:{line}: {message}"):
        scan_interactions(path, user_column="1", item_column="2").check()


def test_a_time_is_not_lost_to_one_of_a_looser_name(tmp_path):
    path = write(tmp_path, table([(u, i, 5, t) for u, i, t in WALK], ",", "user,item,updated_at,click_time\n"))
    assert read(path)["time"] == "click_time"
    path = write(tmp_path, table([(t, u, "x", i) for u, i, t in WALK], ",", "t_dat,customer_id,price,article_id\n"))
    assert read(path) == {"user": "customer_id", "item": "article_id", "time": "t_dat"}


def noted(name):
    return (
        f"the column '{name}' looks like a time and was not used, lines are taken in the file's order: pass "
        f"--time-column {name}, or '' to keep it so"
    )


def test_a_column_that_looks_like_a_time_and_is_not_used_is_noted(tmp_path):
    made = [(u, i, t, f"2020-01-{9 - t // 10 % 7:02d}", 5) for u, i, t in WALK]
    text = table(made, ",", "user,item,event_x,day,stars\n")
    assert scan_interactions(write(tmp_path, text[:-1])).notes[1:] == (noted("event_x"), noted("day"))
    path = write(tmp_path, text)
    assert scan_interactions(path).notes == (noted("event_x"), noted("day"))
    for chosen in ("event_x", "day", ""):
        assert scan_interactions(path, time_column=chosen).notes == ()
    data = prepare(path, tmp_path / "out")
    assert [value for label, value in summarise(data).rows() if label == "note"] == [noted("event_x"), noted("day")]
    by_number = write(tmp_path, table([(*row, "web") for row in WALK]))
    assert scan_interactions(by_number, user_column="1", item_column="2").notes == (noted("3"),)


@pytest.mark.parametrize("header", ["user,item,order_id", "user,item,isbn", "user,item,time", "user_id,item_id,stars"])
def test_columns_that_are_not_noted(tmp_path, header):
    made = [(u, i, 5 if header.endswith("stars") else t) for u, i, t in WALK]
    assert scan_interactions(write(tmp_path, table(made, ",", header + "\n"))).notes == ()


def test_dates_in_parquet_that_are_not_used_are_noted(tmp_path):
    log = pl.DataFrame(WALK, schema=["user", "item", "number"], orient="row")
    log = log.with_columns(moment=pl.from_epoch("number"), day=pl.from_epoch("number").dt.date())
    log.write_parquet(tmp_path / "log.parquet")
    assert scan_interactions(tmp_path / "log.parquet").notes == (noted("moment"), noted("day"))
    for chosen in ("moment", ""):
        assert scan_interactions(tmp_path / "log.parquet", time_column=chosen).notes == ()


def test_notes_on_columns_leave_fingerprints_as_they_were(tmp_path):
    data = prepare(write(tmp_path, table(WALK, ",", "user,item,event_x\n")[:-1]), tmp_path / "out")
    assert len(data.meta["notes"]) == 2
    data.meta["notes"].pop()  # prepared by an earlier version
    assert fingerprint(data.meta) == data.fingerprint
    data.meta["notes"].pop()  # of the line break that is missing
    assert fingerprint(data.meta) != data.fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "ann\ta b c\nbob\ta\neve smith\tc d\n",
        "ann\ta b\nbob\tc d\ndan\tb a\neve\tc a\n",
        "ann\ta,b,c\nbob\td,e\neve\t\n",
        "1\t10,20\n2\t30,10\n3\t20,30\n",  # pairs, had they blanks
        "1\t10,20\n2\t30\n3\t20,30\n",
        "".join(f"{user}\t{' '.join(map(str, range(user % 5 + 1)))}\n" for user in range(1, 50)),
    ],
)
def test_histories_of_users_are_not_taken_for_sequences(tmp_path, text):
    path = write(tmp_path, text, "my histories.txt")
    expected = r"is user<TAB>items: cut the users off \(cut -f 2- 'my histories.txt'\), or pass --format sequences"
    for call in (detect_format, scan_interactions):
        with pytest.raises(DataError, match=expected):
            call(path)
    first = text.split("\t")[0].split()[0]
    assert rows(path, format="sequences", ids="text")[0][1].split("\t")[0] == first


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\tc\td\nb\tc\na\td\tc\tb\te\n",
        "ann\ta b\nbob\tc\nann\td e f\n",  # twice
        "ann\ta\nbob\tb\neve\tc\n",
        "a b c d\nb\tc d\na e\n",
    ],
)
def test_sequences_with_tabs_stay_sequences(tmp_path, text):
    assert detect_format(write(tmp_path, text)) == "sequences"


REVIEWERS = [f"A{number:09X}Z" for number in range(6)]
PRODUCTS = ["B000000A1Z", "0205616461", "020561646X", "B000000A2Z", "0205616463", "B000000A3Z"]


@pytest.mark.parametrize("format", [None, "amazon"])
@pytest.mark.parametrize("items_first", [False, True])
def test_amazon_ratings_of_both_orders(tmp_path, items_first, format):
    made = [(user, item, 5.0, 1_369_699_200) for user, item in zip(REVIEWERS, PRODUCTS, strict=True)]
    text = table([(item, user, *rest) for user, item, *rest in made] if items_first else made)
    path = write(tmp_path, text)
    assert detect_format(path) == "amazon"
    expected = [(user, item, float(time)) for user, item, _, time in made]
    assert rows(path, format=format) == expected
    assert rows(path, format=format, time_column="4") == expected
    chosen = rows(path, format=format, user_column="1", item_column="2")
    assert chosen == [(item, user, time) if items_first else (user, item, time) for user, item, time in expected]
    assert read(path, format=format, user_column="1") == {"user": "field 1", "item": "field 2", "time": "field 4"}
    damaged = write(tmp_path, text + "?,?,1.0,1369699200\n")
    assert rows(damaged, format=format)[:6] == expected


def test_amazon_ratings_of_other_ids_keep_their_order(tmp_path):
    for users in (PRODUCTS, REVIEWERS, ["u1", "u2", "u3", "u4", "u5", "u6"]):
        made = [(user, user, 5.0, 1_369_699_200) for user in users]
        assert read(write(tmp_path, table(made)))["user"] == "field 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>\n<body>1 2 3</body>\n", r"log:1: is HTML or XML, which is not read: save it as CSV"),
        ("sep=;\nuser;item\na;b\n", r"log:1: begins with 'sep=;', which is for spreadsheets: delete that line"),
        ('u1,"a,b,c"\nu2,"b"\nu3,"c,a"\n', r"log: has quoted fields, .* pass --format sequences"),
    ],
)
def test_what_is_no_sequence_is_said_to_be_none(tmp_path, text, message):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        detect_format(path)
    with pytest.raises(DataError, match=message):
        scan_interactions(path)
    assert scan_interactions(path, format="sequences").check() > 0
