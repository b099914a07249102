"""What kind of interaction file this is, judged by its content.

Only the head and the tail of the file are read (64 KiB each). :mod:`cprec.data.readers` then checks every line
against the layout found here.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
import shlex
from collections import Counter
from pathlib import Path

import polars as pl

from cprec.serving_io import BLANK

from .columns import (
    TIME_LIKE,
    at_least,
    has_user_and_item,
    is_date,
    is_integer,
    is_number,
    json_advice,
    kind_of,
    looks_like_time,
    most,
    no_log,
    only_named_as_time,
    resolve_columns,
)
from .errors import DataError
from .sample import Sample, check_file, is_parquet, read_sample

FORMATS = ("pairs", "sequences", "csv", "tsv", "parquet", "inter", "ml-1m", "ml-100k", "amazon")

_TYPED = re.compile(r"[^:\t]+:(token|token_seq|float|float_seq)")
_DATE_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_SEPARATORS = ("\t", ",", ";", "|", " ")
_REVIEWER = re.compile(r"A[0-9A-Z]{9,20}")  # Amazon's users
_PRODUCT = re.compile(r"B[0-9A-Z]{9}|\d{9}[\dX]", re.ASCII)
_TABLE_LINES = 4  # as wide as each other they are a table; fewer, where their columns also differ in kind


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

    @property
    def roles(self) -> dict[str, str | None]:
        """What is read as user, item and time: names of columns or ``field 1``; ``sequences`` have no time to name."""
        if self.format == "sequences":
            return {"user": "the line's number", "item": "its fields"}
        names = self.columns or [f"field {place}" for place in range(1, self.fields + 1)]
        places = {"user": self.user, "item": self.item, "time": self.time}
        return {role: None if place is None else names[place] for role, place in places.items()}


def detect_format(path: str | Path) -> str:
    """Name of the format of ``path``, one of ``FORMATS``, by its content.

    The file's name plays no part. In order: Parquet's magic bytes; a typed header (``.inter``); a header with known
    column names, or one whose columns turn into numbers or dates below it (``csv``, ``tsv``); ``::`` between four
    fields (``ml-1m``); four fields with a timestamp at the end, tabs (``ml-100k``) or commas (``amazon``) between them
    (in ``amazon`` files user and item are swapped where ids look it, see :func:`scan_interactions`); else ``pairs`` or
    ``sequences``. Lines of two fields are ``pairs`` when a first field comes again on another line, when the first
    fields are integers that never fall, or when one field is a number and the other is not. Lines of three are
    ``pairs`` when the third is a number and it is at least 10**8, the second is none, or the lines of one user stand
    together. Every other text is ``sequences``, unless its lines are JSON or all of one width, three fields or more,
    as those of a table are, or a user, a tab and that user's items. Where that guesses wrong, pass ``format=``.

    Raises:
        DataError: no such file, an empty one, one that is compressed, binary or not UTF-8, JSON, HTML, a table whose columns
            are not known, histories of users, or quoted fields without a header.
    """
    path = check_file(path)
    if is_parquet(path):
        return "parquet"
    return _detect(path, read_sample(path), None, None)


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
    number, first = sample.head[0]
    places = _places(sample, format, user_column, item_column, time_column)
    names = (None, None) if places else (user_column, item_column)
    kind = format or _detect(path, sample, *names, placed=places is not None)
    if kind in ("csv", "tsv", "inter") and not places:
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
        rows = _split_all(sample.lines[1:], layout)
        if (
            time is not None
            and not time_column
            and only_named_as_time(columns[time], [row[time] for row in rows if row])
        ):
            layout = dataclasses.replace(layout, time=None)
    else:
        if not places and (user_column or item_column or time_column):
            raise DataError(
                f"user_column, item_column and time_column need a header, but the file reads as {kind!r}, without one "
                f"(its first line is {first[:80]!r}); "
                + ("its lines have no columns" if kind == "sequences" else "give numbers of fields, the first being 1"),
                path,
            )
        layout = _headerless(path, sample, kind, places or (None, None, None), time_column)
    return _with_types(path, sample, layout, ids)


def _places(sample: Sample, format: str | None, *wanted: str | None) -> tuple[int | None, ...] | None:
    """The wanted columns as fields, from 0, where they are numbers, from 1, and the file has no header; else None."""
    numbers = [re.fullmatch(r"[1-9]\d{0,5}", name, re.ASCII) for name in wanted if name]
    lines = sample.lines
    if not numbers or not all(numbers) or format in ("inter", "sequences") or _is_inter(lines[0]):
        return None
    if _header_separator(lines, None, None) is not None:
        return None
    for separator in _SEPARATORS:  # numbers as names, as pandas writes them, perhaps with an index before them
        names = split_header(lines[0], separator)
        names = names[1:] if names[:1] == [""] else names
        if len(names) > 1 and names == [str(place) for place in range(len(names))]:
            return None
    return tuple(int(name) - 1 if name else None for name in wanted)


def split_header(line: str, separator: str) -> list[str]:
    """Column names on a header line, quotes removed."""
    return [name.strip(BLANK) for name in _fields(line, separator)]


def _fields(line: str, separator: str) -> list[str]:
    """Fields of a line, quotes removed; none where a carriage return stands in it, which ends a line for csv."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _is_inter(first: str) -> bool:
    return all(_TYPED.fullmatch(name) for name in first.split("\t"))


def _detect(path: Path, sample: Sample, user_column: str | None, item_column: str | None, placed: bool = False) -> str:
    """The format; ``"table"`` for what is none of them, but whose fields were chosen by number (``placed``)."""
    lines = sample.lines
    if reason := json_advice(path, lines) if lines[0][0] in "{[" else no_log(lines[0]):
        raise DataError(reason, path, sample.head[0][0])
    if _is_inter(lines[0]):
        return "inter"
    separator = _header_separator(lines, user_column, item_column)
    if separator is not None:
        return "tsv" if separator == "\t" else "csv"
    if most([line.count("::") == 3 for line in lines]):
        return "ml-1m"
    for separator, kind in (("\t", "ml-100k"), (",", "amazon")):
        rows = [line.split(separator) for line in lines]
        if most([len(row) == 4 and is_number(row[2]) and at_least(row[3], TIME_LIKE) for row in rows]):
            return kind
    table = _table(lines)
    histories = _are_histories(lines)
    by_commas = histories and most(["," in line.partition("\t")[2] for line in lines])
    # pairs split at blanks and commas alone
    if not (table and table[0] in ";|") and not by_commas and _are_pairs(_tokens(lines)):
        return "pairs"
    if placed:
        return "table"
    if histories:
        raise DataError(
            f"is user<TAB>items: cut the users off (cut -f 2- {shlex.quote(path.name)}), or pass --format sequences "
            "(format='sequences') if the first field is an item",
            path,
        )
    if table:
        named = " or ".join(repr(name) for name in (user_column, item_column) if name)
        raise DataError(
            f"looks like a table of {table[1]} columns, none of which is {named or 'known as the user or the item'} (its "
            f"first line is {lines[0][:80]!r}): name them with --user-column and --item-column (user_column=, "
            "item_column=), in a file without a header by number, from 1, or pass --format sequences if every line "
            "is one sequence",
            path,
        )
    if most([re.search('(^|,)"', line) is not None for line in lines]):
        quotes = "has quoted fields, and sequences would keep the quotes: take them off, or pass --format sequences "
        raise DataError(quotes + "(format='sequences') if they belong to the ids", path)
    return "sequences"


def _table(lines: list[str]) -> tuple[str, int] | None:
    """Separator and width of lines that are all as wide as each other, three fields or more; None for sequences.

    One line says nothing. Of two or three, between blanks, and where a few have another width, the columns must also differ
    in kind: windows of one length are written so.
    """
    for separator in _SEPARATORS:
        rows = _rows(lines, separator)
        width = _usual_width(rows)
        regular = [row for row in rows if len(row) == width]
        odd = len(rows) - len(regular)
        if width < 3 or len(regular) < 2 or odd > len(rows) // 20:
            continue
        kinds = {kind_of(column) for column in zip(*regular, strict=True)} - {""}
        if len(kinds) > 1 or (not odd and len(rows) >= _TABLE_LINES and separator != " "):
            return separator, width
    return None


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
    of_numbers = [most([is_number(row[place]) for row in regular]) for place in range(width)]
    if width == 2:
        numbers = [int(user) for user in users if is_integer(user)]
        ascending = len(numbers) == len(users) and sorted(numbers) == numbers
        return repeats or ascending or of_numbers[0] != of_numbers[1]
    if not of_numbers[2]:
        return False
    return together or not of_numbers[1] or most([at_least(row[2], TIME_LIKE) for row in regular])


def _are_histories(lines: list[str]) -> bool:
    """Whether these are ``user<TAB>items``, as ``cprec recommend`` takes them, each user on one line."""
    rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if len(row) == 2]
    several = any(len(re.findall("[^ ,]+", items)) > 1 for _, items in rows)
    return several and len(rows) * 2 > len(lines) and len({user for user, _ in rows}) == len(rows)


def _header_separator(lines: list[str], user_column: str | None, item_column: str | None) -> str | None:
    """The separator of a header, or None where the first line is none."""
    lines = [line for line in lines if len(line) < 10_000] if len(lines[0]) < 10_000 else []
    if not lines:
        return None
    for separator in _SEPARATORS:
        names = split_header(lines[0], separator)
        if len(names) < 2:
            continue
        if (user_column and user_column in names) or (item_column and item_column in names):
            return separator
        if has_user_and_item(names):
            return separator
        body = [row for line in lines[1:] if len(row := _fields(line, separator)) == len(names)]
        unnamed = len(set(names)) < len(names) or any(not name or is_number(name) or is_date(name) for name in names)
        if unnamed or len(body) * 2 <= len(lines) - 1:
            continue
        for column in zip(*body, strict=True):
            if all(is_number(value) or is_date(value) for value in column):
                return separator
    return None


def _csv_separator(first: str, user_column: str | None, item_column: str | None) -> str:
    """The separator of a CSV header: the one that yields known or wanted names, else the most frequent one."""
    found = _header_separator([first], user_column, item_column)
    return found if found not in (None, "\t") else max(",;|", key=first.count)


def _rows(lines: list[str], separator: str) -> list[list[str]]:
    return [line.split() if separator == " " else _fields(line, separator) for line in lines]


def _tokens(lines: list[str]) -> list[list[str]]:
    separator = _list_separator(lines)
    return [line.split(None if separator == " " else separator) for line in lines]


def _list_separator(lines: list[str]) -> str:
    """``","`` when lines without a comma are single ids, else ``" "`` (runs of blanks)."""
    commas = any("," in line for line in lines)
    return "," if commas and all("," in line or len(line.split()) == 1 for line in lines) else " "


def _headerless(
    path: Path, sample: Sample, kind: str, places: tuple[int | None, ...], time_column: str | None
) -> Layout:
    """The layout of a file without a header; ``places`` go before what its format says."""
    lines, number = sample.lines, sample.head[0][0]
    if kind == "sequences":
        return Layout(kind, _list_separator(lines), item=0)
    usual: tuple[int | None, ...] = (0, 1, 3)
    if kind in ("table", "csv", "tsv"):
        separator, width = _table(lines) or (_list_separator(lines), 0)
        if kind != "table":
            separator = "\t" if kind == "tsv" else _csv_separator(lines[0], None, None)
        width = _usual_width(_rows(lines, separator))
        kind, usual = {"\t": "tsv", " ": "pairs"}.get(separator, "csv"), (None, None, None)
    elif kind == "pairs":
        separator, width = _list_separator(lines), _usual_width(_tokens(lines))
        if width not in (2, 3) and places[:2] == (None, None):
            raise DataError(f"expected 'user item' or 'user item timestamp', found {width} fields", path, number)
        usual = (0, 1, 2 if width == 3 else None)
    else:
        separator, width = {"ml-1m": "::", "ml-100k": "\t", "amazon": ","}[kind], 4
        if kind == "amazon" and places[:2] == (None, None) and _items_first(lines):
            usual = (1, 0, 3)
    user, item, time = (standard if place is None else place for place, standard in zip(places, usual, strict=True))
    if time_column == "" or (places[2] is None and time in (user, item)):
        time = None
    if user is None or item is None:
        raise DataError("a file without a header needs both --user-column and --item-column", path)
    found = [place for place in (user, item, time) if place is not None]
    if max(found) >= width:
        raise DataError(f"there is no column {max(found) + 1}: its lines have {width} fields", path, number)
    if len(set(found)) < len(found):
        raise DataError(f"user, item and time must be different columns, got {[place + 1 for place in found]}", path)
    return Layout(kind, separator, width, user=user, item=item, time=time)


def _items_first(lines: list[str]) -> bool:
    """Whether Amazon's ratings are those of 2018 or later, whose first two fields have changed places."""
    rows = [[field.strip(BLANK) for field in line.split(",")[:2]] for line in lines]
    rows = [row for row in rows if len(row) == 2]
    products = most([_PRODUCT.fullmatch(first) is not None for first, _ in rows])
    return products and most([_REVIEWER.fullmatch(second) is not None for _, second in rows])


def unused_times(sample: Sample, layout: Layout) -> list[str]:
    """Columns besides user and item that look like times, by name or, without a header, by number."""
    rows = [row for row in _split_all(sample.lines[1 if layout.columns else 0 :], layout) if row]
    names = layout.columns or [str(place) for place in range(1, layout.fields + 1)]
    others = [place for place in range(layout.fields) if place not in (layout.user, layout.item)]
    return [names[place] for place in others if looks_like_time(names[place], [row[place] for row in rows])]


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
    return bool(values) and sum(map(is_integer, values)) * 10 > len(values) * 9


def _time_format(path: Path, times: list[tuple[int, str]]) -> str:
    good = [float(value) for _, value in times if is_number(value)]
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
    raise DataError(
        f"the timestamp {value!r} is neither a number nor a date like 2024-05-31 23:59:59; convert it, or pass "
        "--time-column '' (time_column=\"\") to take the lines in the file's order",
        path,
        number,
    )
