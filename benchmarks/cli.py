"""The command line: ``python -m benchmarks run | trained | dense | list | table | report | quick``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import cases, machine, registry
from benchmarks.errors import BenchmarkError, unknown
from benchmarks.presets import QUICK
from benchmarks.registry import DTYPES, OPS, Op, Provider, Setting, get_op
from benchmarks.results import Run, read_run, write_run
from benchmarks.run import Options, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

Job = tuple[Op, Setting, Sequence[Provider]]

app = typer.Typer(
    name="benchmarks",
    help="Measure the kernels against the reference and against what people use instead.\n\n"
    "A first look: [bold]python -m benchmarks quick[/]. One setting: [bold]python -m benchmarks run --op "
    "clustered_softmax --case 1m-d128-t512[/]. What there is: [bold]python -m benchmarks list[/]. A model of your own: "
    "[bold]python -m benchmarks trained --run RUN[/].\n\n"
    "Providers whose package is missing, or that need more memory than is free, are listed as skipped. A provider with "
    "wrong outputs gets no time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all rows here, after every setting.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Write a bar chart here (PNG).")]


def _words(values: Sequence[str] | None) -> list[str]:
    """Names given by repeating an option, by commas, or both."""
    return [word.strip() for value in values or () for word in value.split(",") if word.strip()]


def _choices(text: str, option: str, known: Sequence[str]) -> list[str]:
    words = _words([text])
    for word in words:
        if word not in known:
            raise unknown(option, word, known)
    return words or [known[0]]


def _whole_numbers(text: str, option: str) -> list[int]:
    words = _words([text])
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise BenchmarkError(f"{option} {word} is not a whole number of at least 1")
    if not words:
        raise BenchmarkError(f"{option} is empty: give at least one number")
    return [int(word) for word in words]


def _threads(text: str) -> list[int]:
    counts = []
    for word in _words([text]):
        if not word.isdecimal() or not 1 <= int(word) <= machine.cores():
            raise BenchmarkError(f"--threads {word} is not a number in 1..{machine.cores()}, the cores of this machine")
        counts.append(int(word))
    return counts or [1]


def _check_writable(*paths: Path | None) -> None:
    """Refuse a place that cannot be written before hours of work, not after."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{path.parent}: no such directory to write {path.name} in")


def _print_rows(finished: Run) -> None:
    from rich.console import Console

    from benchmarks.table import render

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a file has no width: do not fold the table
    for part in render(finished.rows):
        console.print(part)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, Setting, str, float], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def show(index: int, setting: Setting, doing: str, share: float) -> None:
            bar.update(task, completed=index + share, description=f"{setting.label()}: {doing}")

        yield show


def _measure(jobs: Sequence[Job], options: Options, json_file: Path | None, plot_file: Path | None) -> Run:
    """Run the jobs, keep the rows so far on disk, print the tables."""
    _check_writable(json_file, plot_file)
    with _progress(len(jobs)) as show:
        finished = run(
            jobs, options, show, on_rows=lambda rows: write_run(json_file, rows) if json_file is not None else None
        )
    _print_rows(finished)
    if plot_file is not None:
        from benchmarks.plots import plot

        plot(finished.rows, plot_file)
    return finished


@app.command("run")
def run_command(
    op: Annotated[str, typer.Option(help=f"One of {', '.join(OPS)}.")],
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="SIZE-dWIDTH-tTOKENS, e.g. 1m-d128-t512; for searches SIZE-dWIDTH-bROWS. Without -dWIDTH the width is "
            "128: 1m-b1, 1m-b32, 100k-b256, 1m-t512. Repeat it or use commas. Default: the op's first."
        ),
    ] = None,
    providers: Annotated[str, typer.Option(help="Comma-separated; default: all. `list` names them.")] = "",
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 (fp32 weights under autocast), or both.")] = "float32",
    threads: Annotated[str, typer.Option(help="Numbers of threads, e.g. 1,2.")] = "1",
    targets: Annotated[str, typer.Option(help="zipf, uniform (the worst case), or both.")] = "zipf",
    mode: Annotated[str | None, typer.Option(help="fwd or fwd_bwd; step for train_step. Default: the op's.")] = None,
    min_rounds: Annotated[int, typer.Option(min=1, help="Timed calls that every provider gets.")] = 5,
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per setting beyond those.")] = 30.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, a process per provider.")] = True,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Gate, then time the providers of an op, interleaved, in every combination of the options.

    Example: [bold]python -m benchmarks run --op clustered_softmax --case 1m-d128-t512 --threads 1,2 --json out.json[/]
    """
    chosen = get_op(op)
    names = _words(case) or [chosen.cases[0]]
    parsed = [cases.Case.parse(name) for name in names]
    registry.check_device(device)
    settings = [
        Setting(op, one_case, registry.choose_mode(chosen, mode), target, kind, count, device)
        for one_case in parsed
        for target in _choices(targets, "targets", cases.TARGETS)
        for kind in _choices(dtype, "dtype", DTYPES)
        for count in _threads(threads)
    ]
    jobs = [
        (chosen, setting, registry.choose_providers(chosen, _words([providers]), setting.dtype)) for setting in settings
    ]
    _measure(jobs, Options(min_rounds, budget_s, memory), json_file, plot_file)


@app.command("trained")
def trained_command(
    run_folder: Annotated[Path, typer.Option("--run", help="A run folder of `cprec train`.")],
    rows: Annotated[str, typer.Option(help="Histories at a time, e.g. 32,256.")] = "1,32,256",
    k: Annotated[int, typer.Option(help="Items per history.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Batches per number of rows, each searched in every way.")] = 50,
    threads: Annotated[str, typer.Option(help="Numbers of threads, e.g. 1,2.")] = "1",
    data: Annotated[Path | None, typer.Option(help="The run's prepared data, if it has moved.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Search a trained model's packed index over its test histories, early termination on and off, interleaved.

    Ids must be the same on and off, and the best ones: exits with 1 when they are not. Remarks count the levels, 64-item
    leaves and items that a row met, and how many ids of an approximate index agree with the exact ones.

    Example: [bold]cprec train data -o run[/], then [bold]python -m benchmarks trained --run run --rows 1,256[/]
    """
    from benchmarks.trained import run_trained

    _check_writable(json_file)
    row_counts = _whole_numbers(rows, "--rows")
    finished = Run([], [])
    for count in _threads(threads):
        found = run_trained(run_folder, row_counts, k, rounds, count, data, lambda doing: typer.echo(doing, err=True))
        finished.rows += found.rows
        if json_file is not None:
            write_run(json_file, finished)
    _print_rows(finished)
    if any(row.correct is False for row in finished.rows):
        raise typer.Exit(1)


@app.command("dense")
def dense_command(
    data: Annotated[Path, typer.Option(help="A folder from `cprec prepare`.")],
    model: Annotated[
        str, typer.Option(help="sasrec (scores by its item table) or gru (a linear classifier).")
    ] = "sasrec",
    compression: Annotated[float, typer.Option(min=1.0, help="Times fewer parameters of items.")] = 6.0,
    fine_tune: Annotated[int, typer.Option(min=1, help="Epochs after compression, the best of them kept.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Of the dense model, at most; it stops early.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and dropout.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write settings and metrics here.")] = None,
) -> None:
    """Train a dense model, compress it with `cprec_kernels.compress`, fine-tune it; test metrics after each stage.

    Example: [bold]cprec prepare log.csv -o data[/], then [bold]python -m benchmarks dense --data data --model sasrec[/]
    """
    from benchmarks.dense import Settings, describe, run_dense
    from benchmarks.results import write_text
    from cprec.data import PreparedData

    _check_writable(json_file)
    settings = Settings(model=model, compression=compression, fine_tune=fine_tune, epochs=epochs, seed=seed)
    try:
        prepared = PreparedData.open(data)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{error}; `cprec prepare LOG -o FOLDER` makes one") from None
    result = run_dense(prepared, settings, lambda doing: typer.echo(doing, err=True))
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1) + "\n")
    typer.echo(describe(result))


@app.command("list")
def list_command() -> None:
    """Ops with their modes, cases and providers, and what cannot run here."""
    for name in OPS:
        op = get_op(name)
        typer.echo(f"{op.name}: {op.about}; modes {', '.join(op.modes)}; baseline {op.baseline}")
        typer.echo(f"  cases      {', '.join(op.cases)}, or any such name (tiny-d32-t64; 1m-b1 is 1m-d128-b1)")
        typer.echo("  providers")
        for provider in op.providers:
            setting = Setting(op.name, cases.Case.parse("tiny-d32-t64"), op.modes[0])
            reason = provider.missing(setting)
            typer.echo(f"    {provider.name}{f'  (skipped here: {reason})' if reason else ''}")


@app.command("table")
def table_command(files: Annotated[list[Path], typer.Argument(help="Files written by run --json.")]) -> None:
    """Print the tables of result files."""
    from benchmarks.report import merge

    _print_rows(merge([read_run(path) for path in files]))


@app.command("report")
def report_command(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files written by run --json. Default: benchmarks/results/*.json.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.", show_default=False)] = PAGE,
    images: Annotated[Path | None, typer.Option(help="Folder of its plots. Default: images/ beside the page.")] = None,
) -> None:
    """Write docs/performance.md and its plots from result files: every number on the page comes from them."""
    from benchmarks.report import write_report

    _check_writable(out)
    sources = files or sorted(RESULTS.glob("*.json"))
    finished = write_report(sources, out, images or out.parent / "images")
    typer.echo(f"{out.name}: {len(finished.rows)} rows from {len(sources)} files")


@app.command("quick")
def quick_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for quick.json and quick.png.")] = Path("bench"),
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per setting.")] = 20.0,
) -> None:
    """A first look at every op in about ten minutes on two cores: table, JSON and plot."""
    jobs: list[Job] = []
    for op_name, case, names in QUICK:
        op = get_op(op_name)
        setting = Setting(op_name, cases.Case.parse(case), op.modes[0], threads=machine.cores())
        jobs.append((op, setting, registry.choose_providers(op, names)))
    out.mkdir(parents=True, exist_ok=True)
    _measure(jobs, Options(min_rounds=3, budget_s=budget_s), out / "quick.json", out / "quick.png")
    typer.echo(f"rows are in {out / 'quick.json'}, the plot is {out / 'quick.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for wrong usage in one line, 130 when stopped."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m benchmarks")
    except KeyboardInterrupt:
        sys.exit(130)
    except BenchmarkError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        sys.exit(2)
