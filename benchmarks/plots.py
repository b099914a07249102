"""Bar charts: speed-up over the baseline with its spread, and the fraction of the roofline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.results import Row, group, ratio_spread, write_bytes
from benchmarks.table import main_baseline, number

BAR_INCHES = 0.23
HEADER_BARS = 1.9  # a setting's name, above its bars
OURS = {
    "cprec-avx512": "#08519c", "cprec-avx2": "#4292c6", "cprec-scalar": "#9ecae1", "cprec-index": "#6a51a3",
    "cprec-": "#08519c", "reference": "#969696",
}  # fmt: skip
PEER, BASELINE = "#fdae6b", "#d94801"


def colour_of(row: Row) -> str:
    """Blues are ours, by instruction set, purple our index; grey the reference, dark orange the baseline, orange its peers."""
    for name, colour in OURS.items():
        if row.provider.startswith(name):
            return colour
    return BASELINE if row.provider == row.baseline else PEER


def short_label(row: Row, rows: Sequence[Row]) -> str:
    """The parts of a row's setting that differ among the rows; its case in any event."""
    parts = [row.case]
    for name in ("op", "mode", "targets", "dtype", "threads"):
        if len({getattr(other, name) for other in rows}) > 1:
            value = getattr(row, name)
            parts.append(f"{value} thr" if name == "threads" else str(value))
    return ", ".join(parts)


def plot(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Write a PNG with one bar per timed row, grouped by setting.

    Raises:
        BenchmarkError: no row was timed.
    """
    from matplotlib.figure import Figure  # a figure without pyplot needs no display and leaves no global state
    from matplotlib.ticker import FuncFormatter

    settings = [[row for row in members if row.median_ms is not None] for members in group(rows)]
    settings = [members for members in settings if members]
    if not settings:
        raise BenchmarkError("there is no timed row to plot")
    timed = [row for members in settings for row in members]
    places: list[float] = []
    headers: list[float] = []
    y = 0.0
    for members in settings:
        headers.append(y)
        places += [y + 1 + index for index in range(len(members))]
        y += len(members) + HEADER_BARS

    figure = Figure(figsize=(11, 1.5 + BAR_INCHES * y), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colours = [colour_of(row) for row in timed]

    ratios = [row.ratio_to_baseline or 0.0 for row in timed]
    spreads = [ratio_spread(row, timed) or (ratio, ratio) for row, ratio in zip(timed, ratios, strict=True)]
    errors = [
        [max(0.0, ratio - low) for ratio, (low, _) in zip(ratios, spreads, strict=True)],
        [max(0.0, high - ratio) for ratio, (_, high) in zip(ratios, spreads, strict=True)],
    ]
    left.barh(places, ratios, height=0.85, color=colours, xerr=errors, error_kw={"elinewidth": 1.0, "capsize": 2})
    widest = max([high for _, high in spreads] + [1.0])
    left.set_xlim(0, widest * 1.22)  # room for the numbers
    halo = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the line at 1 must not cross a number
    for place, ratio, (_, high) in zip(places, ratios, spreads, strict=True):
        if ratio:
            left.text(max(high, ratio) + widest * 0.012, place, f"{number(ratio)}x", va="center", fontsize=8, bbox=halo)
        else:
            left.text(widest * 0.012, place, "no baseline", va="center", fontsize=8, color="#666666")
    right.tick_params(axis="y", length=0)
    left.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("speed-up over the baseline (bars: median, whiskers: p20 and p80 of both)")
    left.set_yticks(places, [row.provider for row in timed], fontsize=8)
    for header, members in zip(headers, settings, strict=True):
        left.text(0, header, short_label(members[0], timed), va="center", fontsize=9, fontweight="bold", bbox=halo)
    left.tick_params(axis="y", length=0)
    left.set_ylim(y - HEADER_BARS + 0.8, -0.8)  # first setting on top

    fractions = [row.roofline_fraction or 0.0 for row in timed]
    right.barh(places, fractions, height=0.85, color=colours)
    right.set_xlim(0, max(1.0, 1.15 * max(fractions)))
    for place, fraction in zip(places, fractions, strict=True):
        if fraction:
            right.text(fraction + 0.012, place, f"{100 * fraction:.0f}%", va="center", fontsize=8)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    right.set_xlabel("fraction of the machine's roofline")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)

    baselines = list(dict.fromkeys(main_baseline(members) for members in settings))
    title = title or " and ".join(dict.fromkeys(row.op for row in timed))
    figure.suptitle(f"{title}: speed-up over {', '.join(baselines)}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
