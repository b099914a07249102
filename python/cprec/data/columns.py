"""Names of columns and what their values look like."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError

# known column names in lower case without "_", "-", " " and "."; an earlier one is preferred
_USER_NAMES = ("user", "userid", "uid", "u", "reviewerid", "customer", "customerid", "visitor", "visitorid", "memberid")
_SESSION_NAMES = ("accountid", "session", "sessionid", "sid", "playlistid", "basketid")
_ITEM_NAMES = ("item", "itemid", "iid", "i", "movieid", "movie", "productid", "product", "asin", "parentasin", "isbn")
_THING_NAMES = ("trackid", "songid", "artistid", "bookid", "newsid", "articleid", "videoid", "businessid", "locationid")
_ENDS_AS_TIME = re.compile(r".*(timestamp|time|(?<!candi)(?<!birth)(?<!release)(?<!publish)date)")
_TIME_NAMES = (
    *("timestamp", "time", "ts", "t", "unixreviewtime", "unixtime", "eventtime", "datetime", "date"),
    *("eventtimestamp", "ratingtimestamp", "reviewtimestamp", "createdat", "reviewtime", "purchasedate", "orderdate"),
    "tdat",
)
# names as they stand: without what separates their words, counts and formats would end in "ts" and "at", too
_IS_STAMP = re.compile(
    r".*[_\- .](ts|at)|(.*[_\- .])?ts[_\- .]?(ms|us|ns)|.*time(stamp)?[_\- .]?ms|.*timestamp[_\- .]?(us|ns)",
    re.IGNORECASE,
)

_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d.*)?")
TIME_LIKE = 100_000_000  # 1973 in Unix seconds: smaller numbers are as likely to be items or ratings
UNUSED_TIME = ", or '' to keep it so"  # how the note on a column that looks like a time ends


def resolve_columns(
    path: Path,
    columns: Sequence[str],
    user_column: str | None,
    item_column: str | None,
    time_column: str | None,
    line: int | None,
) -> tuple[int, int, int | None]:
    """Positions of user, item and time among ``columns``. Raises DataError that lists the columns there are.

    A time column is one of a known name, or else the only one whose name ends in time or date, or else the only one whose
    name ends in _ts, _at or a unit (``event_ts``, ``time_ms``); with ``""`` there is none.
    """
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
    time = None if time_column == "" else find("time", time_column, _TIME_NAMES, False)
    if time is None and time_column is None:
        others = [place for place in range(len(columns)) if place not in (user, item)]
        ends = [place for place in others if _ENDS_AS_TIME.fullmatch(_plain(columns[place]))]
        ends = ends or [place for place in others if _IS_STAMP.fullmatch(columns[place])]
        time = ends[0] if len(ends) == 1 else None
    if user == item:
        raise DataError(f"the column {columns[user]!r} cannot be both user and item; the columns are: {listed}", path)
    return user, item, time


def _plain(name: str) -> str:
    return re.sub(r"[_\- .]", "", name).lower()


def has_user_and_item(names: Sequence[str]) -> bool:
    """Whether a user's and an item's column are among these by their known names."""
    plain = {_plain(name) for name in names}
    return bool(plain & {*_USER_NAMES, *_SESSION_NAMES} and plain & {*_ITEM_NAMES, *_THING_NAMES})


def only_named_as_time(name: str, values: Sequence[str]) -> bool:
    """Whether a column found by the end of its name holds numbers too small for timestamps: a duration, or a year. Or
    words, where it says when as little as where: ``bought_at``."""
    small = [is_number(value) and not at_least(value, TIME_LIKE) for value in values]
    words = [bool(value) and not re.search(r"\d", value) for value in values]
    return _plain(name) not in _TIME_NAMES and (most(small) or (bool(_IS_STAMP.fullmatch(name)) and most(words)))


def looks_like_time(name: str, values: Sequence[str]) -> bool:
    """Whether a column, whatever its name, holds dates or numbers of a timestamp's size, and no ids by its name."""
    known = (*_USER_NAMES, *_SESSION_NAMES, *_ITEM_NAMES, *_THING_NAMES)
    of_ids = _plain(name).endswith("id") or _plain(name) in known
    return not of_ids and most([is_date(value) or at_least(value, TIME_LIKE) for value in values])


def unused_time(name: str) -> str:
    """The note on a column that looks like a time in a file read without one."""
    return (
        f"the column {name!r} looks like a time and was not used, lines are taken in the file's order: pass "
        f"--time-column {shlex.quote(name)}{UNUSED_TIME}"
    )


def json_advice(path: Path, lines: list[str]) -> str:
    """How to make a table of this JSON, by the keys at its beginning."""
    keys = re.findall(r'"([A-Za-z_]\w*)"\s*:', " ".join(lines[:50])[:10_000], re.ASCII)
    roles = ((_USER_NAMES + _SESSION_NAMES, "user"), (_ITEM_NAMES + _THING_NAMES, "item"), (_TIME_NAMES, "timestamp"))
    chosen = [next((key for name in names for key in keys if _plain(key) == name), role) for names, role in roles]
    each, file = ".[] | " if lines[0][0] == "[" else "", shlex.quote(path.name)
    wanted = ", ".join(f".{key}" for key in chosen)
    how = f"a CSV, as with (echo user,item,timestamp; jq -r '{each}[{wanted}] | @csv' {file}) > log.csv"
    if "items" in keys:
        how = f"text, as with jq -r '{each}.items | @tsv' {file} > sequences.txt"
    return f"is JSON, which is not read; make it {how}"


def no_log(first: str) -> str:
    """Why a file with this first line is no log, "" if it may be one."""
    if first[0] == "<":
        return "is HTML or XML, which is not read: save it as CSV"
    if re.fullmatch("sep=.", first, re.IGNORECASE):
        return f"begins with {first!r}, which is for spreadsheets: delete that line"
    return ""


def most(matches: list[bool]) -> bool:
    """More than half: what a damaged line looks like must not decide on the format of the others."""
    return sum(matches) * 2 > len(matches)


def kind_of(values: Sequence[str]) -> str:
    """``"number"``, ``"date"``, ``"word"``, or ``""`` for a mixture."""
    kinds = {"number" if is_number(value) else "date" if is_date(value) else "word" for value in values}
    return kinds.pop() if len(kinds) == 1 else ""


def is_integer(value: str) -> bool:
    """Of at most 18 digits, which fit into 64 bits."""
    return re.fullmatch(r"[+-]?\d{1,18}", value, re.ASCII) is not None


def is_number(value: str) -> bool:
    """A finite number, without the underscores that Python allows."""
    try:
        return math.isfinite(float(value)) and "_" not in value
    except ValueError:
        return False


def is_date(value: str) -> bool:
    """As ``2024-05-31``, perhaps with a time of day behind it."""
    return _DATE.fullmatch(value) is not None


def at_least(value: str, bound: float) -> bool:
    """A number, and not below ``bound``."""
    return is_number(value) and float(value) >= bound
