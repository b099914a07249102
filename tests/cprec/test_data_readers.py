"""Every format is recognised by its content and read; every kind of damage is reported with file and line."""

import os

import polars as pl
import pytest

from cprec.data import DataError, detect_format, prepare, scan_interactions

PAIRS = "1 10\n1 20\n2 10\n2 30\n2 20\n3 10\n"
TIMED = "1 10 978300760\n1 20 978300761\n2 10 978300762\n2 30 978300763\n"


def write(tmp_path, text, name="data.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(path, **options):
    interactions = scan_interactions(path, **options)
    count = interactions.check()
    table = interactions.collect(interactions.frame)
    assert table.height == count
    assert table.columns == ["user", "item", "time"]
    return table.rows()


def pairs(path, **options):
    return [row[:2] for row in rows(path, **options)]


FILES = {
    "pairs": [
        PAIRS,
        TIMED,
        "ann,apple\nann,pear\nbob,apple\n",
        "ann\tapple\nbob\tpear\nann\tfig\n",
        "  1   10 \r\n1\t20\r\n\r\n2 10\r\n",
        "\ufeff1 10\n2 20\n3 30\n",
        "5 3\n",
        "2 c 5\n1 a 1\n2 d 6\n",
        "ann 5\nbob 7\n",
    ],
    "sequences": [
        "1 2 3 4\n5 6\n7\n",
        "a,b,c,d,e\nb,c,a,e,d\n",
        "x, y, z\nz\n",
        "4 1\n2 3\n9 8\n",  # two per line, but the first neither comes again nor rises
        "5 9 2\n7 1 3\n5 2 2\n",  # three numbers per line, no time among them
        "solo\nalone\n",
    ],
    "csv": [
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n",
        "session_id;item_id\n1;a\n1;b\n",
        "shopper,thing,when\nann,apple,2020-01-01\nbob,fig,2020-01-02\n",
        'who,"item id",user\n"a","b, c","d"\n',
    ],
    "tsv": ["user\titem\ttime\n1\t2\t3\n"],
    "inter": ["user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3.0\n"],
    "ml-1m": ["1::1193::5::978300760\n1::661::3::978302109\n"],
    "ml-100k": ["196\t242\t3\t881250949\n186\t302\t3\t891717742\n"],
    "amazon": ["A39H,0205616461,5.0,1369699200\nA3JM,0558925278,3.0,1355443200\n"],
}


@pytest.mark.parametrize(("expected", "text"), [(kind, text) for kind, texts in FILES.items() for text in texts])
def test_detects_by_content(tmp_path, expected, text):
    assert detect_format(write(tmp_path, text, "data.xyz")) == expected


def test_pairs_are_read_with_any_blanks(tmp_path):
    path = write(tmp_path, "\ufeff  1   10 \r\n1\t20\r\n\r\n2 10\r\n")
    assert rows(path) == [("1", "10", None), ("1", "20", None), ("2", "10", None)]
    assert rows(write(tmp_path, TIMED))[1] == ("1", "20", 978300761.0)
    assert scan_interactions(write(tmp_path, TIMED)).has_time


def test_pairs_may_be_forced(tmp_path):
    path = write(tmp_path, "4 1\n2 3\n9 8\n")
    assert pairs(path, format="pairs") == [("4", "1"), ("2", "3"), ("9", "8")]
    assert pairs(path) == [("1", "4"), ("1", "1"), ("2", "2"), ("2", "3"), ("3", "9"), ("3", "8")]


def test_sequences_take_the_line_number_as_user(tmp_path):
    assert pairs(write(tmp_path, "a  b\tc \n\nd\n")) == [("1", "a"), ("1", "b"), ("1", "c"), ("3", "d")]
    assert pairs(write(tmp_path, "x, y ,z\nz\n")) == [("1", "x"), ("1", "y"), ("1", "z"), ("2", "z")]


def test_ids_keep_their_text(tmp_path):
    path = write(tmp_path, "1 007\n1 7\n2 +7\n2 99999999999999999999\n")
    assert [item for _, item in pairs(path)] == ["007", "7", "+7", "99999999999999999999"]


def test_csv_quotes_and_column_choice(tmp_path):
    path = write(tmp_path, 'who,"item id",extra\n"a","b, c",1\n"d","two\nlines",2\n\ne,f,3\n')
    expected = [("a", "b, c"), ("d", "two\nlines"), ("e", "f")]
    assert pairs(path, user_column="who") == expected
    assert pairs(path, user_column="item id", item_column="who") == [(item, user) for user, item in expected]


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("user,item,time\n1,2,3\n1,4,2.5\n", [3.0, 2.5]),
        ("user,item,time\n1,2,2020-01-01\n1,4,1970-01-02\n", [1577836800 * 10**6, 86400 * 10**6]),
        ("user,item,time\n1,2,1970-01-01T00:00:01.5Z\n1,4,1970-01-01T00:01:00Z\n", [1500000, 60 * 10**6]),
        ("user,item,time\n1,2,1970-01-01 01:00:01+01:00\n", [10**6]),
        ("user,item,time\n1,2,1700000000000000001\n1,3,1700000000000000002\n", [17 * 10**17 + 1, 17 * 10**17 + 2]),
    ],
)
def test_times(tmp_path, text, times):
    assert [row[2] for row in rows(write(tmp_path, text))] == times


def test_inter_and_movielens_and_amazon(tmp_path):
    text = "user_id:token\trating:float\titem_id:token\ttimestamp:float\n1\t5\ta b\t7.5\n"
    assert rows(write(tmp_path, text)) == [("1", "a b", 7.5)]
    assert rows(write(tmp_path, FILES["ml-1m"][0]))[0] == ("1", "1193", 978300760.0)
    assert rows(write(tmp_path, FILES["ml-100k"][0]))[1] == ("186", "302", 891717742.0)
    assert rows(write(tmp_path, FILES["amazon"][0]))[0] == ("A39H", "0205616461", 1369699200.0)


def test_parquet(tmp_path):
    path = tmp_path / "log.bin"
    stamp = pl.Series([1, 2, 3]).cast(pl.Datetime("ms"))
    pl.DataFrame({"item_id": ["a", "b", "a"], "user_id": [1, 1, 2], "ts": stamp}).write_parquet(path)
    assert detect_format(path) == "parquet"
    assert rows(path) == [("1", "a", 1000), ("1", "b", 2000), ("2", "a", 3000)]
    with pytest.raises(DataError, match="no column 'nobody'; the columns are: item_id, user_id, ts"):
        scan_interactions(path, user_column="nobody")
    with pytest.raises(DataError, match=r"'ts' is Datetime.*ids must be integers or strings"):
        scan_interactions(path, user_column="ts")


def test_parquet_damage(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, None, 2], "item": [1, 2, 3]}).write_parquet(path)
    with pytest.raises(DataError, match="row 1: the user is empty"):
        scan_interactions(path).check()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="Parquet; is it complete"):
        scan_interactions(path)


@pytest.mark.parametrize(
    "times", [[1.0, None, 2.0], [1.0, float("nan"), 2.0], pl.Series([1, None, 2]).cast(pl.Datetime("us"))]
)
def test_parquet_without_a_time_in_a_row(tmp_path, times):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3], "time": times}).write_parquet(path)
    with pytest.raises(
        DataError, match=r"row 1: the timestamp is missing or not a number; drop the row or convert it$"
    ):
        scan_interactions(path).check()


GOOD = "".join(f"{user} {item}\n" for user in range(1, 11) for item in range(4))  # 40 lines

DAMAGE = [
    ("pairs cut short", GOOD + "11", 41, "expected 2 fields, found 1: '11'; the line is cut short"),
    ("pairs with a third field", GOOD + "11 1 1\n" + GOOD, 41, "expected 2 fields, found 3"),
    ("pairs without an item", "1,10\n1,20\n2,\n2,30\n", 3, "the item is empty"),
    ("an item that is no integer", GOOD + "11 4x\n", 41, "item '4x' is no integer"),
    ("a user that is no integer", GOOD + "u1 4\n" + GOOD, 41, "user 'u1' is no integer.*ids='text'"),
    ("a time that is none", TIMED + "3 10 97830076O\n", 5, "timestamp '97830076O' cannot be read as a number"),
    ("a time cut off", TIMED + "3 10\n", 5, "expected 3 fields, found 2"),
    ("sequence with a gap", "a,b,c\n\na,,c\nb,c\n", 3, "the item is empty"),
    ("sequence cut after a comma", "a,b,c\nb,c,", 2, "the item is empty"),
    ("sequence with a bad number", "1 2 3 4 5 6 7 8\n1 2 3 4 5 x 7 8\n", 2, "item 'x' is no integer"),
    ("ml-1m cut short", "1::2::3::978300760\n1::2::3::978300761\n2::10", 3, "expected 4 fields, found 2"),
    ("ml-1m id", "1::2::3::978300760\n1::2b::3::978300761\n", 2, "item '2b'"),
    ("ml-100k cut short", FILES["ml-100k"][0] + "1\t2\n", 3, "expected 4 fields, found 2"),
    ("inter cut short", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n1\t2", 3, "expected 3 fields"),
    ("inter time", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n1\t2\tnan\n", 3, "timestamp 'nan'"),
    ("csv cut short", "user,item,time\n1,2,3\n1,2", 3, "expected 3 fields, found 2: '1,2'"),
    ("csv with a field too many", "user,item\n1,2\n\n1,2,3\n", 4, "expected 2 fields, found 3"),
    ("csv quoted and short", 'user,item,x\n1,"a, b",2\n1,"two\nlines",2\n1,"c, d"\n', 5, "expected 3 fields, found 2"),
    ("csv without a user", "user,item\n1,2\n\n,2\n", 4, "the user is empty"),
    ("csv time", "user,item,time\n1,2,3\n1,2,\n", 3, "timestamp None cannot be read as a number"),
    ("csv date", "user,item,time\n1,2,2020-01-01\n1,2,2020-01-01\n1,2,2020-13-01\n", 4, "'2020-13-01'"),
    ("csv after a quoted line break", 'user,item\n"a\nb",2\nc,\n', 4, "the item is empty"),
    ("no UTF-8 at the head", b"1 2\n1 \xff\n", 2, "byte 0xff at column 3 is not UTF-8"),
    ("no UTF-8 behind the head", b"1 2\n" * 100_000 + b"1 \xe9\n", 100_001, "byte 0xe9 at column 3"),
    ("NUL bytes", b"1 2\n1 3\n\0\0\0\0", 3, "NUL bytes"),
    ("control character", b"1 2\n" * 100_000 + b"1 \x1f2\n", 100_001, "control character"),
]


@pytest.mark.parametrize(("text", "line", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_reported_with_file_and_line_and_nothing_is_written(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        prepare(path, tmp_path / "out")
    assert f"{path}:{line}: " in str(caught.value)
    assert (caught.value.path, caught.value.line) == (path, line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.txt"]


def test_the_first_of_several_bad_lines_is_named_with_their_number(tmp_path):
    path = write(tmp_path, GOOD + "11 a\n11 b\n" + GOOD)
    with pytest.raises(DataError, match=r":41: the item 'a' .* \(2 such lines in all\)"):
        scan_interactions(path).check()


def test_ids_option(tmp_path):
    path = write(tmp_path, GOOD + "11 4x\n")
    assert pairs(path, ids="text")[-1] == ("11", "4x")
    mixed = write(tmp_path, "1 a\n1 2\n2 b\n")
    assert pairs(mixed)[0] == ("1", "a")
    with pytest.raises(DataError, match=":1: the item 'a'"):
        scan_interactions(mixed, ids="integer").check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n  \n\n", "blank lines only"),
        ("user,item\n", "a header and nothing below it"),
        (b"\x1f\x8b\x08rest", "compressed; unpack it first \\(gunzip\\)"),
        (b"\x28\xb5\x2f\xfd\0\0rest", "compressed; unpack it first \\(unzstd\\)"),
        ("user,item\n1,2\n".encode("utf-16"), r"is UTF-16; convert it \(iconv -f UTF-16 -t UTF-8\)"),
        ("\ufeffuser,item\n1,2\n".encode("utf-16-be"), "is UTF-16; convert it"),
        ("shopper,thing,when\nann,apple,2020-01-01\n", "looks like the user; the columns are: shopper, thing, when"),
        ("user,item,item\n1,2,3\n", "the column 'item' is there twice"),
        ("user,item,timestamp\ru1,a,1\ru1,b,2\r", "ends its lines with carriage returns alone"),
        ('user,item,title\n1,2,"a" b\n3,4,c\n', ":2: has a quote within a field"),
        ("user,item,title\n1,2,c\n" + '3,4,5" disc\n5,6,d\n' * 40, ":3: has a quote within a field"),
    ],
)
def test_unusable_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        prepare(write(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_line_breaks_within_every_line(tmp_path):
    """Quoted ones in all rows, so that no line of the sample is a row; a bare carriage return in one."""
    rows = [f'{i // 4},i{i % 3},"good\nvery good",{i}\n' for i in range(40)]
    data = prepare(write(tmp_path, "user,item,review,timestamp\n" + "".join(rows)), tmp_path / "out")
    assert (data.num_users, data.num_items) == (10, 3)
    rows = [f"{i // 4},i{i % 3},good,{i}\n" for i in range(40)]
    rows[7] = rows[7].replace("good", "good\rvery good")
    again = prepare(write(tmp_path, "user,item,review,timestamp\n" + "".join(rows)), tmp_path / "two")
    assert again.num_items == 3


def test_missing_column_lists_those_there_are(tmp_path):
    path = write(tmp_path, "user,item,stars\n1,2,3\n")
    with pytest.raises(DataError, match=":1: there is no column 'when'; the columns are: user, item, stars"):
        scan_interactions(path, time_column="when")
    with pytest.raises(DataError, match="cannot be both user and item"):
        scan_interactions(path, item_column="user")
    with pytest.raises(DataError, match="need a header"):
        scan_interactions(write(tmp_path, PAIRS), user_column="user")


def test_missing_file_folder_and_options(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        detect_format(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is not a file"):
        scan_interactions(tmp_path)
    with pytest.raises(ValueError, match="format must be one of pairs"):
        scan_interactions(write(tmp_path, PAIRS), format="xml")
    with pytest.raises(ValueError, match="ids must be one of"):
        scan_interactions(write(tmp_path, PAIRS), ids="int")


def test_missing_line_break_at_the_end_is_noted(tmp_path):
    assert "line break" in scan_interactions(write(tmp_path, "a b\nc d e")).notes[0]
    assert scan_interactions(write(tmp_path, "a b\nc d e\n")).notes == ()


def test_one_line_longer_than_the_sample(tmp_path):
    path = write(tmp_path, "é" + " ".join(f"i{number}é" for number in range(60_000)))
    assert len(pairs(path)) == 60_000


def test_an_inter_header_below_blank_lines_is_no_user(tmp_path):
    text = "\n \nuser_id:token\titem_id:token\n" + "".join(f"u{n}\ti{n % 5}\n" for n in range(20))
    found = rows(write(tmp_path, text))
    assert len(found) == 20
    assert not any("id" in str(value) for row in found for value in row)


def test_names_that_are_not_utf8(tmp_path):
    """Polars takes them for something else than a path. A link of another name will do for a source."""
    folder = tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    for number, path in enumerate((write(tmp_path, PAIRS, os.fsdecode(b"r\xe9.txt")), write(folder, PAIRS))):
        for call in (detect_format, scan_interactions, lambda path: prepare(path, tmp_path / "none")):
            with pytest.raises(DataError, match="the name is not UTF-8: rename it, or make a link of another name"):
                call(path)
        link = tmp_path / f"link{number}"
        link.symlink_to(path)
        assert prepare(link, tmp_path / f"out{number}").num_users == 3
    good = write(tmp_path, PAIRS)
    (tmp_path / "to").symlink_to(folder)
    for out in (tmp_path / os.fsdecode(b"o\xe9"), folder / "out", tmp_path / "to" / "out"):
        with pytest.raises(DataError, match="the name is not UTF-8: choose another one"):
            prepare(good, out)
    assert [entry.name for entry in folder.iterdir()] == ["data.txt"]
