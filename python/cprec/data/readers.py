"""Interactions from a file, as one lazy table whatever the format.

Nothing here loops over rows in Python. Text is read by Polars line by line, so that a line's number is its row number;
every line is checked against the layout in one streaming pass (:meth:`Interactions.check`), and only when that finds
something wrong is the file searched for the place.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import polars as pl

from cprec.serving_io import BLANK

from .columns import only_named_as_time, resolve_columns, unused_time
from .errors import DataError
from .layout import FORMATS, Layout, detect_format, make_layout, unused_times
from .sample import check_file, is_parquet, not_utf8, read_sample

__all__ = ["FORMATS", "Interactions", "detect_format", "scan_interactions"]

Ids = Literal["auto", "text", "integer"]

_IDS = ("auto", "text", "integer")
_SEPARATOR_NEVER_SEEN = "\x1f"
_INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Int128, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
_INTEGERS_ONLY = (
    "as ids='integer' asks for, or as nearly all others are; "
    "mend the line or pass ids='text' (cprec prepare --ids text)"
)
_REASONS = {
    1: "expected {fields} fields, found {found}: {text!r}; the line is cut short or damaged",
    2: "the user is empty",
    3: "the item is empty",
    4: "the user {user!r} is no integer, " + _INTEGERS_ONLY,
    5: "the item {item!r} is no integer, " + _INTEGERS_ONLY,
    6: "the timestamp {time!r} cannot be read as {time_format}",
    7: "the timestamp is missing or not a number; drop the row or convert it",
}


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Interactions of users with items, in file order, not read yet.

    Attributes:
        frame: columns ``user`` (String; the line number for ``sequences``), ``item`` (String) and ``time`` (Float64;
            Int64 for dates, in microseconds, and for numbers beyond 2**53; all null where the file has no times).
            Collect it with ``engine="streaming"``, after :meth:`check`.
        path: the file. format: one of ``FORMATS``. has_time: whether ``time`` is filled.
        notes: what looks odd without being wrong.
    """

    frame: pl.LazyFrame
    path: Path
    format: str
    has_time: bool
    notes: tuple[str, ...]
    layout: Layout
    _checked: pl.LazyFrame

    def check(self) -> int:
        """Read the whole file once; return the number of interactions.

        Raises:
            DataError: with file and line: wrong number of fields, an empty or unparsable id, an unparsable timestamp,
                bytes that are not UTF-8; or the file holds no interaction at all.
        """
        if self.format in ("csv", "tsv"):
            self._check_fields()
        problem = pl.col("problem")
        facts = self.collect(
            self._checked.select(pl.len(), bad=(problem > 0).sum(), first=pl.col("row").filter(problem > 0).min())
        ).row(0, named=True)
        if facts["bad"]:
            self._raise_at(facts["first"], facts["bad"])
        if not facts["len"]:
            raise DataError("the file holds no interactions", self.path)
        return int(facts["len"])

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """``frame``, derived from this file, collected by the streaming engine; its failures as DataError."""
        return self.collect_all([frame])[0]

    def collect_all(self, frames: list[pl.LazyFrame]) -> list[pl.DataFrame]:
        """Several such frames in one pass over the file."""
        try:
            return pl.collect_all(frames, engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise self._explain(error) from None

    def _check_fields(self) -> None:
        """Every line of a CSV has as many fields as the header. Only quoted line breaks need the slow look."""
        outside = pl.col("line").str.replace_all(r'"[^"]*"', "")
        open_quote = outside.str.contains('"', literal=True)
        separators = outside.str.count_matches(self.layout.separator, literal=True)
        wrong = (pl.col("line").str.strip_chars(BLANK) != "") & (separators != self.layout.fields - 1)
        if self.collect(_lines(self.path).select((open_quote | wrong).any())).item():
            self._raise_at_csv_width()

    def _raise_at_csv_width(self) -> None:
        for line, row in _csv_rows(self.path, self.layout.separator):
            if row and len(row) != self.layout.fields:
                reason = _REASONS[1].format(
                    fields=self.layout.fields, found=len(row), text=self.layout.separator.join(row)
                )
                raise DataError(reason, self.path, line)

    def _raise_at(self, row: int, count: int) -> None:
        """Raise the error for row ``row`` of the checked frame, the first of ``count`` bad ones."""
        bad = self.collect(self._checked.filter((pl.col("row") == row) & (pl.col("problem") > 0)).head(1)).row(
            0, named=True
        )
        line: int | None = row + 1
        where = ""
        if self.format in ("csv", "tsv"):
            first = -1 if self.layout.header else 0
            line = next(
                (line for i, (line, _) in enumerate(_csv_rows(self.path, self.layout.separator), first) if i == row),
                None,
            )
        elif self.format == "parquet":
            line, where = None, f"row {row}: "
        text = bad.get("text") or ""
        separator = self.layout.separator
        found = len(text.split(None if separator in (" ", "") else separator))
        kinds = {"float": "a number", "int": "an integer"}
        physical = bad["problem"] == 6 and self.layout.time_format == "physical"
        reason = _REASONS[7 if physical else bad["problem"]].format(
            fields=self.layout.fields,
            found=found,
            text=text[:120],
            user=bad["user"],
            item=bad["item"],
            time=bad["time_text"],
            time_format=kinds.get(self.layout.time_format, f"a date like those above ({self.layout.time_format})"),
        )
        more = f" ({count:,} such lines in all)" if count > 1 else ""
        raise DataError(where + reason + more, self.path, line)

    def _explain(self, error: pl.exceptions.PolarsError) -> DataError:
        """What in the file made Polars fail."""
        if self.format == "parquet":
            return DataError(f"cannot be read as Parquet; is it complete? ({_first_line(error)})", self.path)
        with self.path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError:
                    return not_utf8(self.path, line, raw)
                if _SEPARATOR_NEVER_SEEN.encode() in raw:
                    return DataError("holds the control character 0x1f", self.path, line)
        if self.format in ("csv", "tsv") and (stray := self._stray_quote()):
            return DataError(
                "has a quote within a field: a field with quotes in it is quoted whole, and they are doubled, as in "
                f'"5"" disc" (cannot be read as {self.format})',
                self.path,
                stray,
            )
        return DataError(f"cannot be read as {self.format}: {_first_line(error)}", self.path)

    def _stray_quote(self) -> int | None:
        """The first line with a quote inside a field, or with text after the quote that closes one."""
        separator = re.escape(self.layout.separator)
        stray = re.compile(rf'(?:^|{separator})(?:"(?:[^"]|"")*"(?!"|{separator}|$)|[^"{separator}]+")')
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            return next((line for line, text in enumerate(file, 1) if stray.search(text.rstrip("\r\n"))), None)


def scan_interactions(
    path: str | Path,
    *,
    format: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    ids: Ids = "auto",
) -> Interactions:
    """The interactions in a file, lazily. Only its head and tail are read here.

    Args:
        format: one of ``FORMATS``, or None to judge by content, see :func:`detect_format`:

            - ``pairs``: ``user item`` or ``user item timestamp`` per line, blanks or commas between;
            - ``sequences``: one sequence per line, blanks or commas between the items; the line number is the user;
            - ``csv``, ``tsv``: named columns (``csv`` also with ``;``, ``|`` or a space between), quotes allowed;
            - ``parquet``: named columns;
            - ``inter``: RecBole's atomic file, tabs and a typed header (``user_id:token``);
            - ``ml-1m``, ``ml-100k``: MovieLens ``ratings.dat`` (``::``) and ``u.data`` (tabs), user item rating time;
            - ``amazon``: ``user,item,rating,time`` without a header, as in 2014; ``item,user,rating,time``, as from 2018
              on, where most first fields look like products (B0..., an ISBN) and most second ones like reviewers (A...).
        user_column, item_column, time_column: names in the header, where it is not the usual ones; in a file without
            a header numbers of fields as text, from ``"1"``. Without a time column, or with ``""`` for it, the file's
            order is taken as the order in time; a column that looks like a time but is not used is noted.
        ids: ``"text"`` takes any non-empty id, ``"integer"`` integers only. ``"auto"`` is ``"integer"`` where more than
            nine in ten of the ids at the head and the tail of the file are integers (and in MovieLens files), so that
            a damaged id is reported. Ids are kept as text in every case: ``"007"`` is not ``"7"``.

    Raises:
        DataError: the file is missing, empty, compressed, binary, JSON or not UTF-8, or its name is not; a column is
            missing or not known; the lines are ``user<TAB>items``, and no ``format`` is given.
        ValueError: ``format`` or ``ids`` is not one of those above.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if ids not in _IDS:
        raise ValueError(f"ids must be one of {', '.join(_IDS)}, got {ids!r}")
    path = check_file(path)
    if format == "parquet" or (format is None and is_parquet(path)):
        return _scan_parquet(path, user_column, item_column, time_column, ids)
    sample = read_sample(path)
    layout = make_layout(path, sample, format, user_column, item_column, time_column, ids)
    notes = () if sample.ends_with_newline else ("the last line has no line break at its end; is the file complete?",)
    if time_column is None and layout.time is None:
        notes = (*notes, *map(unused_time, unused_times(sample, layout)))
    if layout.format == "sequences":
        raw = _sequence_items(path, layout)
    elif layout.format in ("csv", "tsv"):
        raw = _csv_fields(path, layout)
    else:
        raw = _line_fields(path, layout)
    return _interactions(path, layout, raw, notes)


def _interactions(path: Path, layout: Layout, raw: pl.LazyFrame, notes: tuple[str, ...]) -> Interactions:
    """Interactions from a frame of row, user, item, time_text (String or number or null), ragged and text."""
    time_text = pl.col("time_text")
    problem = (
        pl.when(pl.col("ragged"))
        .then(1)
        .when(_empty("user"))
        .then(2)
        .when(_empty("item"))
        .then(3)
        .when(pl.lit(layout.integer_users) & pl.col("user").cast(pl.Int128, strict=False).is_null())
        .then(4)
        .when(pl.lit(layout.integer_items) & pl.col("item").cast(pl.Int128, strict=False).is_null())
        .then(5)
    )
    if layout.time is not None:
        problem = problem.when(pl.col("time").is_null()).then(6)
    time = pl.lit(None, pl.Float64) if layout.time is None else _time(time_text, layout.time_format)
    checked = raw.with_columns(time=time).with_columns(problem=problem.otherwise(0))
    frame = checked.select("user", "item", "time")
    return Interactions(frame, path, layout.format, layout.time is not None, notes, layout, checked)


def _empty(name: str) -> pl.Expr:
    return pl.col(name).is_null() | (pl.col(name) == "")


def _time(text: pl.Expr, time_format: str) -> pl.Expr:
    if time_format == "physical":  # already a number, from Parquet
        return pl.when(text.cast(pl.Float64).is_finite()).then(text)
    if time_format == "float":
        number = text.cast(pl.Float64, strict=False)
        return pl.when(number.is_finite()).then(number)
    if time_format == "int":
        return text.cast(pl.Int64, strict=False)
    plain = text.str.replace("T", " ", literal=True).str.strip_suffix("Z")
    return plain.str.to_datetime(time_format, strict=False, time_unit="us").dt.epoch("us")


def _lines(path: Path) -> pl.LazyFrame:
    """Columns row (from 0) and line (String) of a text file."""
    return pl.scan_csv(
        path,
        has_header=False,
        separator=_SEPARATOR_NEVER_SEEN,
        quote_char=None,
        schema={"line": pl.String},
        row_index_name="row",
        glob=False,
    ).with_columns(pl.col("line").fill_null(""))


def _line_fields(path: Path, layout: Layout) -> pl.LazyFrame:
    """``pairs``, ``inter`` and the headerless ratings: fixed fields, no quotes."""
    # the ends of a line with tabs in it may be empty fields, so only blanks that separate nothing are cut off
    text = pl.col("line").str.strip_chars(BLANK.replace("\t", "") if layout.separator == "\t" else BLANK)
    if layout.separator == " ":
        text = text.str.replace_all(r"\s+", " ")
    fields = pl.col("text").str.split_exact(layout.separator, layout.fields)

    def field(position: int | None) -> pl.Expr:
        if position is None:
            return pl.lit(None, pl.String)
        return pl.col("fields").struct.field(f"field_{position}").str.strip_chars(BLANK)

    return (
        _lines(path)
        .filter(pl.col("row") >= layout.header)  # rows count from 0
        .select("row", text=text)
        .filter(pl.col("text") != "")
        .with_columns(fields=fields)
        .select(
            "row",
            "text",
            user=field(layout.user),
            item=field(layout.item),
            time_text=field(layout.time),
            ragged=pl.col("fields").struct.field(f"field_{layout.fields - 1}").is_null()
            | pl.col("fields").struct.field(f"field_{layout.fields}").is_not_null(),
        )
    )


def _sequence_items(path: Path, layout: Layout) -> pl.LazyFrame:
    text = pl.col("line").str.strip_chars(BLANK)
    if layout.separator == " ":
        text = text.str.replace_all("\t", " ", literal=True)
    items = (
        _lines(path)
        .select("row", text=text)
        .filter(pl.col("text") != "")
        .select("row", item=pl.col("text").str.split(layout.separator))
        .explode("item")
        .with_columns(pl.col("item").str.strip_chars(BLANK))
    )
    if layout.separator == " ":
        items = items.filter(pl.col("item") != "")  # two blanks in a row; two commas in a row are a missing item
    return items.with_columns(
        user=(pl.col("row") + 1).cast(pl.String), time_text=pl.lit(None, pl.String), ragged=pl.lit(False)
    )


def _csv_fields(path: Path, layout: Layout) -> pl.LazyFrame:
    frame = pl.scan_csv(
        path,
        has_header=layout.header > 0,
        separator=layout.separator,
        infer_schema=False,
        row_index_name="_row",
        glob=False,
        quote_char='"',
    )

    def field(position: int | None) -> pl.Expr:
        return pl.lit(None, pl.String) if position is None else pl.nth(position + 1).str.strip_chars(BLANK)

    return frame.filter(~pl.all_horizontal(pl.nth(range(1, layout.fields + 1)).is_null())).select(  # blank lines
        row="_row", user=field(layout.user), item=field(layout.item), time_text=field(layout.time), ragged=pl.lit(False)
    )


def _csv_rows(path: Path, separator: str) -> Any:
    """Pairs of line number (of the row's last line) and fields, for the second look at a file that is wrong."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        for row in reader:
            yield reader.line_num, row


def _scan_parquet(
    path: Path, user_column: str | None, item_column: str | None, time_column: str | None, ids: Ids
) -> Interactions:
    frame = pl.scan_parquet(path, glob=False)
    try:
        schema = frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"cannot be read as Parquet; is it complete? ({_first_line(error)})", path) from None
    names = schema.names()
    user, item, time = resolve_columns(path, names, user_column, item_column, time_column, None)
    for position in (user, item):
        kind = schema.dtypes()[position]
        if kind not in (pl.String, *_INTEGERS) and not isinstance(kind, pl.Categorical | pl.Enum):
            raise DataError(f"the column {names[position]!r} is {kind}; ids must be integers or strings", path)
    kind = pl.Null() if time is None or time_column is not None else schema.dtypes()[time]
    if time is not None and (kind.is_numeric() or kind == pl.String):
        values = frame.select(names[time]).head(1000).collect().to_series().cast(pl.String).drop_nulls()
        time = None if only_named_as_time(names[time], values.to_list()) else time
    stamp = None if time is None else pl.col(names[time])
    if stamp is not None and time is not None:
        kind = schema.dtypes()[time]
        if isinstance(kind, pl.Datetime | pl.Date):
            stamp = stamp.cast(pl.Datetime("us")).dt.epoch("us")
        elif not kind.is_numeric():
            raise DataError(
                f"the column {names[time]!r} is {kind}; times must be numbers or dates. Convert it, or pass "
                "--time-column '' (time_column=\"\") to take the rows in the file's order",
                path,
            )
    raw = frame.with_row_index("_row").select(
        row="_row",
        user=pl.col(names[user]).cast(pl.String),
        item=pl.col(names[item]).cast(pl.String),
        time_text=pl.lit(None, pl.Float64) if stamp is None else stamp,
        ragged=pl.lit(False),
    )
    integer = ids == "integer"
    layout = Layout("parquet", "", 0, tuple(names), user, item, time, integer, integer, "physical")
    dated = [name for name, kind in schema.items() if isinstance(kind, pl.Datetime | pl.Date)]
    unused = [unused_time(name) for name in dated if time_column is None and time is None]
    return _interactions(path, layout, raw, tuple(unused))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
