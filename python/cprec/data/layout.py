"""What kind of interaction file this is, judged by its content.

Only the head and the tail of the file are read (64 KiB each). :mod:`cprec.data.readers` then checks every line
against the layout found here.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from cprec.serving_io import BLANK

from .errors import DataError
from .sample import Sample, check_file, is_parquet, read_sample

FORMATS = ("pairs", "sequences", "csv", "tsv", "parquet", "inter", "ml-1m", "ml-100k", "amazon")

# known column names in lower case without "_", "-", " " and "."; an earlier one is preferred
_USER_NAMES = ("user", "userid", "uid", "u", "reviewerid", "customer", "customerid", "visitor", "visitorid", "memberid")
_SESSION_NAMES = ("accountid", "session", "sessionid", "sid", "playlistid", "basketid")
_ITEM_NAMES = ("item", "itemid", "iid", "i", "movieid", "movie", "productid", "product", "asin", "parentasin", "isbn")
_THING_NAMES = ("trackid", "songid", "artistid", "bookid", "newsid", "articleid", "videoid", "businessid", "locationid")
_TIME_NAMES = ("timestamp", "time", "ts", "t", "unixreviewtime", "unixtime", "eventtime", "datetime", "date")

_TYPED = re.compile(r"[^:\t]+:(token|token_seq|float|float_seq)")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d.*)?")
_DATE_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_TIME_LIKE = 100_000_000  # 1973 in Unix seconds: smaller numbers are as likely to be items or ratings


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the lines of a file are to be read.

    Attributes:
        format: one of ``FORMATS``.
        separator: between fields; ``" "`` means any run of blanks in ``pairs`` and ``sequences``.
        fields: fields per line, 0 for any number (``sequences``) or unknown (``parquet``).
        columns: names from the header, empty when there is none. header: its line, from 1; 0 when there is none.
        user, item, time: positions of the fields, None where there is none.
        integer_users, integer_items: a value that is no integer is an error.
        time_format: how timestamps are parsed: ``"float"``, ``"int"`` (beyond 2**53) or a ``strptime`` pattern.
    """

    format: str
    separator: str = ""
    fields: int = 0
    columns: tuple[str, ...] = ()
    user: int | None = None
    item: int | None = None
    time: int | None = None
    integer_users: bool = False
    integer_items: bool = False
    time_format: str = "float"
    header: int = 0


def detect_format(path: str | Path) -> str:
    """Name of the format of ``path``, one of ``FORMATS``, by its content.

    The file's name plays no part. In order: Parquet's magic bytes; a typed header (``.inter``); a header with known
    column names, or one whose columns turn into numbers or dates below it (``csv``, ``tsv``); ``::`` between four
    fields (``ml-1m``); four fields with a timestamp at the end, tabs (``ml-100k``) or commas (``amazon``) between
    them; else ``pairs`` or ``sequences``. Lines of two fields are ``pairs`` when a first field comes again on another
    line, when the first fields are integers that never fall, or when one field is a number and the other is not. Lines
    of three are ``pairs`` when the third is a number and it is at least 10**8, the second is none, or the lines of one
    user stand together. Every other text is ``sequences``. Where that guesses wrong, pass ``format=``.

    Raises:
        DataError: no such file, an empty one, or one that is compressed, binary or not UTF-8.
    """
    path = check_file(path)
    if is_parquet(path):
        return "parquet"
    return _detect(read_sample(path), None, None)


def make_layout(
    path: Path,
    sample: Sample,
    format: str | None,
    user_column: str | None,
    item_column: str | None,
    time_column: str | None,
    ids: str,
) -> Layout:
    """The layout of a text file, detected, or of the given ``format``.

    Raises:
        DataError: a column is missing (the message lists those there are), or the first line does not fit the format.
    """
    kind = format or _detect(sample, user_column, item_column)
    number, first = sample.head[0]
    if kind in ("csv", "tsv", "inter"):
        separator = "\t" if kind != "csv" else _csv_separator(first, user_column, item_column)
        columns = tuple(split_header(first, separator))
        if kind == "inter":
            bad = [name for name in columns if not _TYPED.fullmatch(name)]
            if bad:
                raise DataError(
                    f"column {bad[0]!r} of an .inter header needs a type, as in user_id:token", path, number
                )
            columns = tuple(name.rsplit(":", 1)[0] for name in columns)
        user, item, time = resolve_columns(path, columns, user_column, item_column, time_column, number)
        layout = Layout(kind, separator, len(columns), columns, user, item, time, header=number)
        if len(sample.head) < 2:
            raise DataError("the file has a header and nothing below it", path)
    else:
        if user_column or item_column or time_column:
            raise DataError(
                f"user_column, item_column and time_column need a header, but the file reads as {kind!r}, without one "
                f"(its first line is {first[:80]!r})",
                path,
            )
        layout = _headerless(path, sample, kind)
    return _with_types(path, sample, layout, ids)


def split_header(line: str, separator: str) -> list[str]:
    """Column names on a header line, quotes removed."""
    return [name.strip(BLANK) for name in _fields(line, separator)]


def _fields(line: str, separator: str) -> list[str]:
    """Fields of a line, quotes removed; none where a carriage return stands in it, which ends a line for csv."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def resolve_columns(
    path: Path,
    columns: Sequence[str],
    user_column: str | None,
    item_column: str | None,
    time_column: str | None,
    line: int | None,
) -> tuple[int, int, int | None]:
    """Positions of user, item and time among ``columns``. Raises DataError that lists the columns there are."""
    listed = ", ".join(columns)
    doubled = {name for name in columns if columns.count(name) > 1}
    if doubled:
        raise DataError(f"the column {sorted(doubled)[0]!r} is there twice; the columns are: {listed}", path, line)

    def find(role: str, wanted: str | None, known: tuple[str, ...], needed: bool) -> int | None:
        if wanted is not None:
            if wanted not in columns:
                raise DataError(f"there is no column {wanted!r}; the columns are: {listed}", path, line)
            return list(columns).index(wanted)
        plain = [_plain(name) for name in columns]
        for name in known:
            if name in plain:
                return plain.index(name)
        if needed:
            raise DataError(
                f"no column looks like the {role}; the columns are: {listed}. Name it with {role}_column= "
                f"(--{role}-column)",
                path,
                line,
            )
        return None

    user = find("user", user_column, _USER_NAMES + _SESSION_NAMES, True)
    item = find("item", item_column, _ITEM_NAMES + _THING_NAMES, True)
    assert user is not None
    assert item is not None
    time = find("time", time_column, _TIME_NAMES, False)
    if user == item:
        raise DataError(f"the column {columns[user]!r} cannot be both user and item; the columns are: {listed}", path)
    return user, item, time


def _plain(name: str) -> str:
    return re.sub(r"[_\- .]", "", name).lower()


def _detect(sample: Sample, user_column: str | None, item_column: str | None) -> str:
    lines = sample.lines
    if all(_TYPED.fullmatch(name) for name in lines[0].split("\t")):
        return "inter"
    separator = _header_separator(lines, user_column, item_column)
    if separator is not None:
        return "tsv" if separator == "\t" else "csv"
    if _most([line.count("::") == 3 for line in lines]):
        return "ml-1m"
    for separator, kind in (("\t", "ml-100k"), (",", "amazon")):
        rows = [line.split(separator) for line in lines]
        if _most([len(row) == 4 and _is_number(row[2]) and _at_least(row[3], _TIME_LIKE) for row in rows]):
            return kind
    return "pairs" if _are_pairs(_tokens(lines)) else "sequences"


def _most(matches: list[bool]) -> bool:
    """More than half: what a damaged line looks like must not decide on the format of the others."""
    return sum(matches) * 2 > len(matches)


def _usual_width(rows: list[list[str]]) -> int:
    return Counter(map(len, rows)).most_common(1)[0][0]


def _are_pairs(rows: list[list[str]]) -> bool:
    width = _usual_width(rows)
    regular = [row for row in rows if len(row) == width]
    users = [row[0] for row in regular]
    repeats = len(set(users)) < len(users)
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(users))
    together = repeats and blocks == len(set(users))
    # A line cut short, or one that is damaged, is for the reader to report; more of them are sequences.
    odd = len(rows) - len(regular) - (len(rows[-1]) < width)
    allowed = max(int(together and len(rows) > 3), len(rows) // 20)
    if width not in (2, 3) or odd > allowed:
        return False
    of_numbers = [_most([_is_number(row[place]) for row in regular]) for place in range(width)]
    if width == 2:
        numbers = [int(user) for user in users if _is_integer(user)]
        ascending = len(numbers) == len(users) and sorted(numbers) == numbers
        return repeats or ascending or of_numbers[0] != of_numbers[1]
    if not of_numbers[2]:
        return False
    return together or not of_numbers[1] or _most([_at_least(row[2], _TIME_LIKE) for row in regular])


def _header_separator(lines: list[str], user_column: str | None, item_column: str | None) -> str | None:
    """The separator of a header, or None where the first line is none."""
    lines = [line for line in lines if len(line) < 10_000] if len(lines[0]) < 10_000 else []
    if not lines:
        return None
    for separator in ("\t", ",", ";", "|", " "):
        names = split_header(lines[0], separator)
        if len(names) < 2:
            continue
        if (user_column and user_column in names) or (item_column and item_column in names):
            return separator
        plain = {_plain(name) for name in names}
        if plain & {*_USER_NAMES, *_SESSION_NAMES} and plain & {*_ITEM_NAMES, *_THING_NAMES}:
            return separator
        body = [row for line in lines[1:] if len(row := _fields(line, separator)) == len(names)]
        unnamed = len(set(names)) < len(names) or any(not name or _is_number(name) or _is_date(name) for name in names)
        if unnamed or len(body) * 2 <= len(lines) - 1:
            continue
        for column in zip(*body, strict=True):
            if all(_is_number(value) or _is_date(value) for value in column):
                return separator
    return None


def _csv_separator(first: str, user_column: str | None, item_column: str | None) -> str:
    """The separator of a CSV header: the one that yields known or wanted names, else the most frequent one."""
    found = _header_separator([first], user_column, item_column)
    return found if found not in (None, "\t") else max(",;|", key=first.count)


def _tokens(lines: list[str]) -> list[list[str]]:
    separator = _list_separator(lines)
    return [line.split(None if separator == " " else separator) for line in lines]


def _list_separator(lines: list[str]) -> str:
    """``","`` when lines without a comma are single ids, else ``" "`` (runs of blanks)."""
    commas = any("," in line for line in lines)
    return "," if commas and all("," in line or len(line.split()) == 1 for line in lines) else " "


def _headerless(path: Path, sample: Sample, kind: str) -> Layout:
    number = sample.head[0][0]
    if kind == "sequences":
        return Layout(kind, _list_separator(sample.lines), item=0)
    if kind == "pairs":
        separator = _list_separator(sample.lines)
        width = _usual_width(_tokens(sample.lines))
        if width not in (2, 3):
            raise DataError(f"expected 'user item' or 'user item timestamp', found {width} fields", path, number)
        return Layout(kind, separator, width, user=0, item=1, time=2 if width == 3 else None)
    separator = {"ml-1m": "::", "ml-100k": "\t", "amazon": ","}[kind]
    return Layout(kind, separator, 4, user=0, item=1, time=3)


def _with_types(path: Path, sample: Sample, layout: Layout, ids: str) -> Layout:
    """``layout`` with what the sampled ids and timestamps are."""
    skip = 1 if layout.columns else 0
    numbered = sample.head[skip:]
    rows = _split_all([line for _, line in numbered], layout)
    if ids == "auto":
        both = rows + _split_all(sample.tail, layout)
        if layout.format in ("ml-1m", "ml-100k"):
            users = items = True
        elif layout.format == "amazon":
            users = items = False
        else:
            users = layout.user is not None and _mostly_integers([row[layout.user] for row in both if row])
            of_item = [row if layout.fields == 0 else [row[layout.item or 0]] for row in both if row]
            items = _mostly_integers([value for values in of_item for value in values])
    else:
        users = items = ids == "integer"
    layout = dataclasses.replace(layout, integer_users=users and layout.user is not None, integer_items=items)
    if layout.time is None:
        return layout
    times = [(number, row[layout.time]) for (number, _), row in zip(numbered, rows, strict=True) if row]
    return dataclasses.replace(layout, time_format=_time_format(path, times))


def _split_all(lines: list[str], layout: Layout) -> list[list[str]]:
    """Fields of every line; an empty list for a line with the wrong number of them."""
    if layout.format in ("csv", "tsv"):
        rows = [_fields(line, layout.separator) for line in lines]
    else:
        blank = layout.separator == " " and layout.format in ("pairs", "sequences")
        rows = [line.split(None if blank else layout.separator) for line in lines]
    rows = [[value.strip(BLANK) for value in row] for row in rows]
    return [row if layout.fields in (0, len(row)) else [] for row in rows]


def _mostly_integers(values: list[str]) -> bool:
    """More than nine in ten: a damaged id among integers is to be reported, not to become a new item."""
    return bool(values) and sum(map(_is_integer, values)) * 10 > len(values) * 9


def _time_format(path: Path, times: list[tuple[int, str]]) -> str:
    good = [float(value) for _, value in times if _is_number(value)]
    series = (
        pl.Series([value for _, value in times], dtype=pl.String)
        .str.replace("T", " ", literal=True)
        .str.strip_suffix("Z")
    )
    for pattern in _DATE_FORMATS:
        if series.str.to_datetime(pattern, strict=False).null_count() * 2 < len(series):
            return pattern
    if good or not times:
        return "int" if good and max(map(abs, good)) > 2**53 else "float"
    number, value = times[0]
    raise DataError(f"the timestamp {value!r} is neither a number nor a date like 2024-05-31 23:59:59", path, number)


def _is_integer(value: str) -> bool:
    return re.fullmatch(r"[+-]?\d{1,18}", value, re.ASCII) is not None


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value)) and "_" not in value
    except ValueError:
        return False


def _is_date(value: str) -> bool:
    return _DATE.fullmatch(value) is not None


def _at_least(value: str, bound: float) -> bool:
    return _is_number(value) and float(value) >= bound
