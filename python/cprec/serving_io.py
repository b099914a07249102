"""Histories in, recommendations out: files, standard input and standard output."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from cprec.files import atomic_write

if TYPE_CHECKING:
    from cprec.serving import Chunk

HistoryFormat = Literal["sequences", "users", "jsonl"]
HISTORY_FORMATS: tuple[HistoryFormat, ...] = ("sequences", "users", "jsonl")
COLUMNS = ("user", "rank", "item", "score", "fallback")
OUTPUT_FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
STDIO = "-"
PREPARED_USERS = 1 << 14  # whose items are looked up together
# What an id does not begin or end with; it may hold other white space, and other than blanks and tabs within.
BLANK = " \t\r\f\v\ufeff"


class History(NamedTuple):
    """One user's raw item ids, oldest first."""

    user: str
    items: list[str]


def refuse_string(ids: object, what: str) -> None:
    """Raise TypeError for a plain string where item ids are expected: its characters would pass for ids."""
    if isinstance(ids, str):
        raise TypeError(f"{what} is a list of item ids, got the string {ids!r}: wrap it, [...]")


def read_histories(source: str | Path | IO[bytes], *, format: HistoryFormat | None = None) -> Iterator[History]:
    """Read histories one by one; nothing is kept in memory.

    Args:
        source: a path, ``"-"`` for standard input, or a binary stream. UTF-8; blank lines are skipped. Or a folder of ``cprec
            prepare``, for all of its users: what was hidden for validation and test belongs to their histories.
        format: ``"sequences"`` (items separated by spaces or, if there is a comma in the line, by commas; the user is
            the line number), ``"users"`` (``user<TAB>items``) or ``"jsonl"`` (``{"user": ..., "items": [...]}``;
            without a user, the line number). By default told by the first line that is not blank, which then must not be
            the header of an interaction log, nor start with a bracket.

    Raises:
        FileNotFoundError: no such file.
        DataError: a folder that is not a prepared one, or is damaged.
        ValueError: a line that does not fit the format, with its number; an unknown format, or one for a folder; or no
            history at all.
    """
    if format is not None and format not in HISTORY_FORMATS:
        raise ValueError(f"unknown history format {format!r}; known are {', '.join(HISTORY_FORMATS)}")
    if isinstance(source, str | Path) and str(source) != STDIO:
        path = Path(source)
        if path.is_dir():
            if format is not None:
                raise ValueError(f"{path} is a folder, which has no history format {format!r}: leave the format out")
            yield from _prepared(path)
            return
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of histories")
        with path.open("rb") as stream:
            yield from _parse(stream, str(path), format)
    elif isinstance(source, str | Path):
        if sys.stdin is None:
            raise ValueError("standard input is closed: name a file of histories")
        yield from _parse(sys.stdin.buffer, "standard input", format)
    else:
        yield from _parse(source, str(getattr(source, "name", "input")), format)


def _prepared(folder: Path) -> Iterator[History]:
    from cprec.data import PreparedData

    data = PreparedData.open(folder)
    for start in range(0, data.num_users, PREPARED_USERS):
        users = data.user_ids[start : start + PREPARED_USERS].to_list()
        parts = [data.sequences[start + index] for index in range(len(users))]
        items = iter(data.catalogue.decode(itertools.chain.from_iterable(part.tolist() for part in parts)))
        for user, part in zip(users, parts, strict=True):
            yield History(user, list(itertools.islice(items, len(part))))


def _parse(stream: IO[bytes], name: str, format: HistoryFormat | None) -> Iterator[History]:
    found = False
    for number, raw in enumerate(stream, start=1):
        where = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text (byte {error.start}): convert the file to UTF-8") from None
        if not line.strip(BLANK + "\n"):
            continue
        found = True
        if format is None:
            format = _format_of(line, where)
        line = line.rstrip("\r\n")
        if "\r" in line:
            raise ValueError(
                f"{where}: a carriage return within the line: end lines with a newline, as `tr '\\r' '\\n'` does"
            )
        yield _PARSERS[format](line, number, where)
    if not found:
        raise ValueError(f"{name}: holds no history; give one line per user")


def _format_of(line: str, where: str) -> HistoryFormat:
    """What the first line shows. Raises ValueError for one that is no history."""
    if line.lstrip().startswith("{"):
        return "jsonl"
    shown = repr(line.strip(BLANK + "\n")[:60])
    unless = "; if it is a history, name the format (--history-format, format=)"
    if line.lstrip().startswith("["):
        raise ValueError(
            f'{where}: starts with a bracket ({shown}): a history is {{"user": ..., "items": [...]}} or ids between blanks'
            + unless
        )
    if _is_log_header(line.strip(BLANK + "\n")):
        raise ValueError(
            f"{where}: looks like the header of an interaction log ({shown}): run `cprec prepare` on it and give that "
            f"folder, or write one history per line{unless}"
        )
    return "users" if "\t" in line else "sequences"


def _is_log_header(line: str) -> bool:
    try:
        from cprec.data.columns import has_user_and_item
        from cprec.data.layout import split_header
    except ImportError:  # no Polars, which reading histories does not need
        return False
    rows = [split_header(line, separator) for separator in "\t,;"]
    return any(has_user_and_item([re.sub(":(token|float)(_seq)?$", "", name) for name in names]) for names in rows)


def _split(text: str, where: str) -> list[str]:
    if "," not in text:
        return [item for item in re.split("[ \t]+", text.strip(BLANK)) if item]
    items = [item.strip(BLANK) for item in text.split(",")]
    if "" in items:
        raise ValueError(f"{where}: item {items.index('') + 1} between the commas is empty")
    return items


def _parse_sequence(line: str, number: int, where: str) -> History:
    if "\t" in line:
        raise ValueError(f"{where}: a tab in a file of plain sequences; with users, every line must be user<TAB>items")
    return History(str(number), _split(line, where))


def _parse_user(line: str, number: int, where: str) -> History:
    user, tab, items = line.partition("\t")
    if not tab or not user.strip(BLANK):
        raise ValueError(f"{where}: expected user<TAB>items, got {line[:60]!r}")
    return History(user.strip(BLANK), _split(items.replace("\t", " "), where))


def _parse_json(line: str, number: int, where: str) -> History:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: too many brackets within brackets for a history") from None
    if not isinstance(record, dict) or not isinstance(record.get("items"), list):
        raise ValueError(f'{where}: expected {{"user": ..., "items": [...]}}, got {line[:60]!r}')
    items = record["items"]
    for position, item in enumerate(items, start=1):
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise ValueError(f"{where}: item {position} is {item!r}; items are strings or integers")
    user = record.get("user", number)
    if isinstance(user, bool) or not isinstance(user, str | int):
        raise ValueError(f"{where}: user is {user!r}; a user is a string or an integer")
    history = History(str(user), [str(item) for item in items])
    for text in (history.user, *history.items):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{where}: {text!r} is no text: half of a surrogate pair, which no file can hold")
    return history


_PARSERS: dict[str, Callable[[str, int, str], History]] = {
    "sequences": _parse_sequence,
    "users": _parse_user,
    "jsonl": _parse_json,
}


def output_format(target: str | Path, format: str | None = None) -> str:
    """The format for a target: the named one, else by suffix; CSV for standard output.

    Raises:
        ValueError: an unknown format or suffix.
    """
    known = sorted(set(OUTPUT_FORMATS.values()))
    if format is not None:
        if format not in known:
            raise ValueError(f"unknown output format {format!r}; known are {', '.join(known)}")
        return format
    if str(target) == STDIO:
        return "csv"
    suffix = Path(target).suffix.lower()
    if suffix not in OUTPUT_FORMATS:
        raise ValueError(
            f"{target}: cannot tell the output format from {suffix or 'no suffix'!r}; "
            f"end the name in one of {', '.join(OUTPUT_FORMATS)}"
        )
    return OUTPUT_FORMATS[suffix]


def write_recommendations(chunks: Iterable[Chunk], target: str | Path | IO[bytes], *, format: str | None = None) -> int:
    """Write the columns user, rank, item, score (log-probability) and fallback.

    Args:
        chunks: from :meth:`cprec.serving.Recommendations.chunks`; CSV and JSON lines are streamed.
        target: a path, ``"-"`` for standard output, or a binary stream (which needs ``format``). A file appears under
            its name only when it is complete, and replaces one of that name.
        format: ``"csv"``, ``"parquet"`` or ``"jsonl"``; by default by the suffix, CSV on standard output.

    Returns:
        The number of rows.

    Raises:
        ValueError: an unknown format or suffix; FileNotFoundError: no such directory. Both before any work is done.
    """
    if not isinstance(target, str | Path):
        if format is None:
            raise ValueError("a stream needs a format: csv, parquet or jsonl")
        return _WRITERS[output_format(STDIO, format)](chunks, target)
    chosen = output_format(target, format)
    if str(target) == STDIO:
        if sys.stdout is None:
            raise ValueError("standard output is closed: name a file to write")
        rows = _WRITERS[chosen](chunks, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return rows
    path = Path(target)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory to write {path.name} in")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a file")
    with atomic_write(path) as stream:
        return _WRITERS[chosen](chunks, stream)


def _write_csv(chunks: Iterable[Chunk], stream: IO[bytes]) -> int:
    # A buffer per chunk, not a text wrapper around the stream: that would close standard output when a chunk fails.
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    # A carriage return ends a line for readers, but needs no quotes for writers whose lines end otherwise.
    quoting = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    rows = 0
    for chunk in chunks:
        for user, rank, item, score, fallback in chunk.rows():
            row = (user, rank, item, f"{score:.6f}", "true" if fallback else "false")
            (quoting if "\r" in user or "\r" in item else writer).writerow(row)
        rows += len(chunk)
        stream.write(buffer.getvalue().encode())
        buffer.seek(0)
        buffer.truncate()
    stream.write(buffer.getvalue().encode())  # the header, when there was no chunk
    return rows


def _write_jsonl(chunks: Iterable[Chunk], stream: IO[bytes]) -> int:
    rows = 0
    for chunk in chunks:
        lines = (json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in chunk.rows())
        stream.write("".join(f"{line}\n" for line in lines).encode())
        rows += len(chunk)
    return rows


def _write_parquet(chunks: Iterable[Chunk], stream: IO[bytes]) -> int:
    import polars as pl

    schema: dict[str, Any] = dict(zip(COLUMNS, (pl.String, pl.Int32, pl.String, pl.Float32, pl.Boolean), strict=True))
    frames = [pl.DataFrame(chunk.columns(), schema=schema) for chunk in chunks]
    table = pl.concat(frames) if frames else pl.DataFrame(schema=schema)
    # Polars reports what happens to the stream as an error of its own.
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    stream.write(buffer.getbuffer())
    return len(table)


_WRITERS: dict[str, Callable[[Iterable[Chunk], IO[bytes]], int]] = {
    "csv": _write_csv,
    "parquet": _write_parquet,
    "jsonl": _write_jsonl,
}
