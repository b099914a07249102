"""The command line: ``python -m benchmarks.paper --preset quick|core|full --table 1..7 --data FOLDER --out DIR``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.errors import BenchmarkError, unknown
from benchmarks.paper.page import write_page
from benchmarks.paper.presets import PRESETS, Preset
from benchmarks.paper.store import Store
from benchmarks.paper.table import TITLES
from benchmarks.paper.tables import ACCELERATORS, FACTORS, GENERATED, WIDE, run_table

app = typer.Typer(
    name="benchmarks.paper", add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


def _tables(text: str, preset: Preset) -> list[int]:
    left_out = {number for number in (WIDE, FACTORS) if not _lengths(preset, number)}
    if text == "all":
        return [number for number in TITLES if number not in left_out]
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in {str(number) for number in TITLES}:
            raise unknown("table", word, [*map(str, TITLES), "all"])
    if not words:
        raise BenchmarkError("--table is empty: give numbers such as 1,3, or all")
    for number in sorted(left_out):
        if str(number) in words:
            able = ", ".join(name for name, other in PRESETS.items() if _lengths(other, number))
            raise BenchmarkError(
                f"preset {preset.name} does not run table {number}, whose models take hours: use one of {able}"
            )
    return [int(word) for word in words]


def _lengths(preset: Preset, number: int) -> tuple[int, ...]:
    """The lengths of table 6 or 7."""
    return preset.wide_lengths if number == WIDE else preset.factor_lengths


@app.command()
def paper(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results: made, added to, gone on with.")],
    preset: Annotated[
        str,
        typer.Option(
            help="quick (minutes), core (hours: one length), full (most of a day on two cores: every length and table), tiny (tests)."
        ),
    ] = "quick",
    table: Annotated[str, typer.Option(help="Numbers from 1 to 7, e.g. 1,3, or all.")] = "all",
    data: Annotated[
        list[Path] | None, typer.Option(help="A folder from `cprec prepare`; repeat it for more. Table 5 needs none.")
    ] = None,
    accelerator: Annotated[
        str,
        typer.Option(
            help="Where to train: cpu or gpu. Runs that are there already count wherever they were trained; times are "
            "always the CPU's."
        ),
    ] = "cpu",
    times_here: Annotated[
        bool,
        typer.Option("--times-here", help="Time models on this machine too, where others have: the page shows both."),
    ] = False,
    page: Annotated[Path | None, typer.Option(help="The page to write. Default: paper.md in --out.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the page from what is in --out.")
    ] = False,
) -> None:
    """Train, tune and measure what the paper claims, on prepared data, and write a page of tables and plots.

    Tables: 1 twin and compressed model at several lengths, 2 sharing schemes, 3 clusters and ranks, 4 embedding or softmax
    or both, 5 inference against catalogue size, 6 table 1 at twice the width, 7 the same from factors (both: core and full).
    Every run is a JSON file in --out, found again by its settings: a command that was stopped goes on where it was, and
    tables share runs. Popularity and the uncompressed twin are in the tables; the twin is tuned over the same grid.

    Example: [bold]python -m benchmarks.paper --preset quick --table 1 --data beauty --out results[/]
    """  # fmt: skip
    from cprec.data import PreparedData

    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if accelerator not in ACCELERATORS:
        raise unknown("accelerator", accelerator, ACCELERATORS)
    numbers = _tables(table, PRESETS[preset])
    target = page or out / "paper.md"
    if page is not None and not page.parent.is_dir():
        raise BenchmarkError(f"{page.parent}: no such directory to write {page.name} in")
    if not report:
        if not data and any(number not in GENERATED for number in numbers):
            raise BenchmarkError("give --data FOLDER, as `cprec prepare` leaves it; table 5 alone needs none")
        opened = [PreparedData.open(folder) for folder in data or ()]
        if len({prepared.name for prepared in opened}) < len(opened):
            raise BenchmarkError("two folders of --data have the same name: their tables would replace each other")
        out.mkdir(parents=True, exist_ok=True)
        store = Store(out)
        for number in numbers:
            for prepared in [None] if number in GENERATED else opened:
                where = "" if prepared is None else f", {prepared.name}"
                least = PRESETS[preset].factor_items
                if number == FACTORS and prepared is not None and prepared.num_items <= least:
                    items = f"{prepared.num_items:,} items{where}"
                    typer.echo(f"table {number}: left out for {items}: it is for more than {least:,}", err=True)
                    continue
                typer.echo(f"table {number}: {TITLES[number]}{where}", err=True)
                run_table(
                    number,
                    store,
                    PRESETS[preset],
                    prepared,
                    lambda doing: typer.echo(f"  {doing}", err=True),
                    accelerator,
                    times_here,
                )
    tables = write_page(out, target)
    typer.echo(f"{target}: {len(tables)} tables, {sum(len(found.rows) for found in tables)} rows")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for wrong usage in one line, 130 when stopped."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m benchmarks.paper")
    except KeyboardInterrupt:
        sys.exit(130)
    except (BenchmarkError, OSError, ValueError) as error:
        sys.stderr.write(f"benchmarks.paper: {error}\n")
        sys.exit(2)
