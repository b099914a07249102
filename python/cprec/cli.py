"""The ``cprec`` command: one function per subcommand, thin over the library."""

from __future__ import annotations

import inspect
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cprec.cli_options import (
    SMALL_CATALOGUE,
    Block,
    BlockKind,
    Compression,
    Cutoffs,
    Dilations,
    Dim,
    HeadBias,
    Ids,
    JsonFile,
    KernelSize,
    Overwrite,
    Part,
    Quiet,
    Ranks,
    Repeats,
    Sharing,
    SharingKind,
    SoftmaxCutoffs,
    SoftmaxRanks,
    Split,
    TailBias,
    TieTails,
    Twin,
    check_json,
    make_model_config,
    print_rich,
    refuse_model_options,
    whole_numbers,
    write_json_file,
)
from cprec.cli_plan import plan
from cprec.cli_train import train
from cprec.serving_io import BLANK

if TYPE_CHECKING:
    from cprec.data import Progress

app = typer.Typer(
    name="cprec",
    help="Train and serve next-item recommenders with compressed item tables (CpRec).\n\n"
    "A first look: [bold]cprec demo[/]. With your own data: [bold]prepare[/], [bold]train[/], [bold]evaluate[/], "
    "[bold]recommend[/], [bold]export[/].\n\nSet CPREC_TRACEBACK=1 to see where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _check_device(name: str | None) -> str | None:
    """A device that is there."""
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}; leave it out to run on the CPU") from None
    return name


def _read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that are not blank, without the blanks around them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {option} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {option} must be UTF-8 text, one item per line: {error}") from None
    return [line for raw in text.split("\n") if (line := raw.strip(BLANK))]


def _bars(quiet: bool) -> Any:
    """A context manager that gives a ``Progress`` callback for the data layer, drawn on standard error."""
    from cprec.progress import staged_progress

    return staged_progress(not quiet)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and plots.")] = Path("demo"),
    items: Annotated[int, typer.Option(help="Items in the generated catalogue.")] = 20_000,
    users: Annotated[int, typer.Option(help="Sequences to generate.")] = 6_000,
    epochs: Annotated[int, typer.Option(help="Epochs for each of the two models.")] = 4,
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Generate a catalogue, train the uncompressed twin and the compressed model, and compare them.

    Leaves the prepared data, both runs, comparison.json and comparison.png in the folder. Under five minutes on two
    cores.
    """
    from cprec.demo import run_demo

    run_demo(out, items=items, users=users, epochs=epochs, seed=seed, overwrite=overwrite, quiet=quiet)


@app.command()
def prepare(
    source: Annotated[Path | None, typer.Argument(help="File of interactions. Leave out with --dataset.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Download a known data set instead: ml-100k, ml-1m, ml-20m, ... ('list' names all)."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="pairs, sequences, csv, tsv, parquet, inter, ml-1m, ml-100k or amazon. Default: by content."),
    ] = None,
    user_column: Annotated[str | None, typer.Option(help="Name of the user column, or its number from 1.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Name of the item column, or its number.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Name, or number; '' for the file's order.")] = None,
    split: Annotated[Split, typer.Option(help="How validation and test targets are held out.")] = Split.leave_one_out,
    valid_fraction: Annotated[float, typer.Option(help="Validation share, for splits by user or time.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Test share, for splits by user or time.")] = 0.1,
    min_item_count: Annotated[
        int | None, typer.Option(help="Drop items with fewer interactions. Default: 1; 5 for the amazon data sets.")
    ] = None,
    min_sequence_length: Annotated[
        int | None, typer.Option(help="Drop users with fewer interactions. Default: 1; 5 for the amazon data sets.")
    ] = None,
    ids: Annotated[
        Ids, typer.Option(help="Whether ids must be integers; auto: where nearly all are, the others are errors.")
    ] = Ids.auto,
    cache: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the users of a split by user.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Read interactions, sort items by training frequency, split, and write a folder that training maps into memory.

    Examples: [bold]cprec prepare ratings.csv -o data[/], [bold]cprec prepare --dataset ml-1m -o data[/].
    """
    from cprec.data import DATASETS, prepare_dataset, summarise
    from cprec.data import prepare as prepare_file

    if dataset == "list":
        for known in DATASETS.values():
            typer.echo(f"{known.name:16s} {known.about}")
        return
    if (source is None) == (dataset is None):
        raise typer.BadParameter("give either a file or --dataset NAME", param_hint="SOURCE")
    if out is None:
        raise typer.BadParameter("name the folder to write", param_hint="--out")
    options: dict[str, Any] = {
        "format": format, "user_column": user_column, "item_column": item_column, "time_column": time_column,
        "min_item_count": min_item_count, "min_sequence_length": min_sequence_length,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"split": str(split), "valid_fraction": valid_fraction, "test_fraction": test_fraction}
    options |= {"seed": seed, "overwrite": overwrite, "ids": str(ids)}
    progress: Progress
    with _bars(quiet) as progress:
        if source is not None:
            data = prepare_file(source, out, progress=progress, **options)
        else:
            data = prepare_dataset(str(dataset), out, cache=cache, progress=progress, **options)
    typer.echo(str(summarise(data)))
    whole = " --cutoffs none" if data.num_items <= SMALL_CATALOGUE else ""
    typer.echo(f"\nnext: cprec train {shlex.quote(str(out))} --out RUN{whole}")


@app.command()
def info(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(help="A run or exported folder, or prepared data with the model options below.")
    ],
    dim: Dim = 64,
    cutoffs: Cutoffs = None,
    ranks: Ranks = None,
    softmax_cutoffs: SoftmaxCutoffs = None,
    softmax_ranks: SoftmaxRanks = None,
    compression: Compression = None,
    tie_tails: TieTails = None,
    twin: Twin = False,
    dilations: Dilations = "1,4",
    repeats: Repeats = 2,
    kernel_size: KernelSize = 3,
    block: BlockKind = Block.residual,
    sharing: SharingKind = Sharing.none,
    head_bias: HeadBias = False,
    tail_bias: TailBias = False,
    json_file: JsonFile = None,
) -> None:
    """Parameters per block, compression against the uncompressed twin, and bytes.

    For a run or an export, of its model; for prepared data, of the model that `train` would make with these options.
    """
    from cprec import checkpoint
    from cprec.data import PreparedData, summarise
    from cprec.report import parameter_table

    check_json(json_file)
    if (path / checkpoint.CONFIG_NAME).is_file():
        refuse_model_options(context, path, ("path", "json_file"))
        config, _ = checkpoint.read_config(path)
    else:
        data = PreparedData.open(path)
        if str(json_file) != "-":
            typer.echo(f"{summarise(data)}\n")
        config = make_model_config(
            data.counts, dim, cutoffs, ranks, twin, compression=compression, softmax_cutoffs=softmax_cutoffs,
            softmax_ranks=softmax_ranks, tie_tails=tie_tails, dilations=dilations, repeats=repeats, kernel_size=kernel_size,
            block=str(block), sharing=str(sharing), head_bias=head_bias, tail_bias=tail_bias,
        )  # fmt: skip
    table = parameter_table(config)
    if str(json_file) != "-":
        print_rich(table.render())
    write_json_file(json_file, table.to_dict())


app.command()(plan)


app.command()(train)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="The run's prepared data, if it has moved.")] = None,
    split: Annotated[Part, typer.Option(help="Which held-out part.")] = Part.test,
    topn: Annotated[str, typer.Option(help="Cut-offs N of HR, NDCG and MRR.")] = "5,10,20",
    batch_size: Annotated[int, typer.Option(help="Histories at a time.")] = 512,
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda. Default: CPU.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """HR, NDCG and MRR over the whole catalogue, beside the popularity baseline and per popularity band.

    Items of a history compete for its places, as it may hold its target; recommend leaves them out, unless it is given
    --include-seen.
    """
    from cprec import checkpoint
    from cprec.evaluation import evaluate as evaluate_model
    from cprec.run_folder import RunConfig

    check_json(json_file)
    device = _check_device(device)
    config = RunConfig.read(run)
    cuts = whole_numbers(topn, "--topn")
    prepared = config.open_data(data)
    report = evaluate_model(
        checkpoint.load(run), prepared, str(split), length=config.training.length, batch_size=batch_size, topn=cuts,
        device=device, progress=not quiet,
    )  # fmt: skip
    if str(json_file) != "-":
        print_rich(report.table())
    write_json_file(json_file, report.to_dict())


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    histories: Annotated[
        str,
        typer.Argument(
            help="File of histories: a sequence per line, user<TAB>items, or JSON lines; '-': standard input. Or a prepared "
            "folder: all of its users, with all that they did."
        ),
    ] = "-",
    out: Annotated[
        str, typer.Option("--out", "-o", help="File ending in .csv, .parquet or .jsonl. '-': standard output, as CSV.")
    ] = "-",
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Allow items of the history.")] = False,
    candidates: Annotated[Path | None, typer.Option(help="File with the only items allowed, one per line.")] = None,
    history_format: Annotated[
        str | None, typer.Option(help="sequences, users or jsonl. Default: by the first line.")
    ] = None,
    output_format: Annotated[str | None, typer.Option(help="csv, parquet or jsonl. Default: by the name.")] = None,
    data: Annotated[Path | None, typer.Option(help="The run's prepared data, if it has moved.")] = None,
    batch_size: Annotated[int, typer.Option(help="Histories at a time.")] = 512,
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda. Default: CPU.")] = None,
    quiet: Quiet = False,
) -> None:
    """The best next items for histories of raw item ids. Items that were seen are left out; unknown ones are ignored."""  # fmt: skip
    from cprec import checkpoint
    from cprec.run_folder import RunConfig
    from cprec.serving import recommend as recommend_items
    from cprec.serving_io import output_format as check_output
    from cprec.serving_io import read_histories, write_recommendations

    check_output(out, output_format)
    device = _check_device(device)
    allowed = None if candidates is None else _read_lines(candidates, "--candidates")
    config = RunConfig.read(run)
    model = checkpoint.load(run)
    with warnings.catch_warnings(record=True) as caught:
        results = recommend_items(
            model, config.open_data(data).catalogue, read_histories(histories, format=history_format), k,  # type: ignore[arg-type]
            length=config.training.length, exclude_seen=not include_seen, candidates=allowed, batch_size=batch_size,
            device=device, progress=not quiet, warn_unknown=False,
        )  # fmt: skip
    for warning in caught:  # of candidates that are not known
        typer.echo(str(warning.message), err=True)
    rows = write_recommendations(results.chunks(), out, format=output_format)
    typer.echo(f"{rows:,} recommendations for {results.users:,} users", err=True)
    if results.fallbacks:
        typer.echo(f"{results.fallbacks:,} users without a known item got the most popular items", err=True)
    if results.unknown.count:
        typer.echo(results.unknown.message(), err=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    data: Annotated[Path | None, typer.Option(help="The run's prepared data, if it has moved.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a folder that cprec.load(path) reads with torch alone: configuration, safetensors weights, item ids."""
    from cprec.exported import export as export_run

    folder = export_run(run, out, data=data, overwrite=overwrite)
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB; use it with: model = cprec.load({str(folder)!r})")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the kernels: a quick look at every op, or what `python -m benchmarks` takes (`cprec bench --help`)."""
    from cprec.bench import run_bench

    run_bench(context.args)


def _version(show: bool) -> None:
    if show:
        from cprec_kernels._version import __version__

        typer.echo(f"cprec {__version__}")
        raise typer.Exit


for _command in app.registered_commands:  # lines of a docstring are as long as ours, not as the terminal's
    _paragraphs = (inspect.getdoc(_command.callback) or "").split("\n\n")
    _command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
