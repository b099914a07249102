"""Rows as people read them: a table in the terminal, a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.results import Row, group

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("provider", "median ms", "p20 .. p80 ms", "rounds", "speed-up", "of roof", "peak MB", "extra MB", "remarks")
NUMERIC = range(1, 8)


def number(value: float | None) -> str:
    """Three significant digits, no exponent; "" for None."""
    if value is None:
        return ""
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:,.{decimals}f}"


def spread(row: Row) -> str:
    return "" if row.p20_ms is None else f"{number(row.p20_ms)} .. {number(row.p80_ms)}"


def speed_up(row: Row) -> str:
    """How many times faster than the baseline; the baseline itself says so."""
    if row.provider == row.baseline:
        return "baseline" if row.median_ms is not None else ""
    return "" if row.ratio_to_baseline is None else f"{number(row.ratio_to_baseline)}x"


def remarks(row: Row, main_baseline: str) -> str:
    parts = []
    if row.correct is False and "failed:" not in row.error:
        parts.append(f"WRONG: {row.error}")
    elif row.error:
        parts.append(row.error)
    if row.note:
        parts.append(row.note)
    if row.ratio_to_baseline is not None and row.baseline not in (main_baseline, row.provider):
        parts.append(f"against {row.baseline}")
    return "; ".join(parts)


def cells(row: Row, main_baseline: str) -> tuple[str, ...]:
    """One row in the order of COLUMNS."""
    roof = "" if row.roofline_fraction is None else f"{100 * row.roofline_fraction:.0f}%"
    return (
        row.provider,
        number(row.median_ms),
        spread(row),
        str(row.rounds) if row.rounds else "",
        speed_up(row),
        roof,
        number(row.peak_mb),
        number(row.extra_mb),
        remarks(row, main_baseline),
    )


def main_baseline(rows: Sequence[Row]) -> str:
    """The baseline that most rows of a setting refer to."""
    names = [row.baseline for row in rows]
    return max(dict.fromkeys(names), key=names.count)


def software(rows: Iterable[Row]) -> list[str]:
    """One line per distinct versions, commit and day."""
    lines = []
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
        lines.append(f"{versions}; commit {row.commit or 'unknown'}, {row.date}")
    return list(dict.fromkeys(lines))


def provenance(rows: Sequence[Row]) -> list[str]:
    """One line per distinct machine, versions, commit and day."""
    machines = dict.fromkeys(row.machine for row in rows)
    return [f"{name}; {line}" for name in machines for line in software(row for row in rows if row.machine == name)]


def render(rows: Sequence[Row]) -> list[RenderableType]:
    """Tables for a terminal, one per setting, and the machine line."""
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for members in group(rows):
        base = main_baseline(members)
        table = Table(title=f"{members[0].setting_label()}; speed-up over {base}", title_justify="left")
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if index in NUMERIC else "left", no_wrap=index != len(COLUMNS) - 1)
        for row in members:
            style = "red" if row.correct is False else "dim" if row.median_ms is None else ""
            table.add_row(*map(Text, cells(row, base)), style=style)
        parts.append(table)
    parts += [Text(line) for line in provenance(rows)]
    return parts


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]], numeric: Iterable[int]) -> str:
    """A Markdown table; the ``numeric`` columns are aligned to the right."""
    right = set(numeric)
    lines = [list(header), ["---:" if index in right else "---" for index in range(len(header))]]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(rows: Sequence[Row]) -> str:
    """The rows of one setting in Markdown."""
    base = main_baseline(rows)
    return markdown_table(COLUMNS, (cells(row, base) for row in rows), NUMERIC)
