"""``cprec plan``: what smaller tables would cost and save, before anything is trained."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cprec.cli_options import (
    Block,
    BlockKind,
    Dilations,
    Dim,
    JsonFile,
    KernelSize,
    Machine,
    Objective,
    Repeats,
    Sharing,
    SharingKind,
    check_json,
    numbers,
    print_rich,
    whole_numbers,
    write_json_file,
)


def plan(
    data: Annotated[Path, typer.Argument(help="Prepared folder.")],
    dim: Dim = 64,
    compressions: Annotated[
        str | None, typer.Option(help="Compressions to plan for, e.g. 2,4,6. Default: a range of them.")
    ] = None,
    max_clusters: Annotated[int, typer.Option(help="At most so many clusters, up to 8.")] = 5,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks to choose from. Default: powers of two from 4, 24, 48, ..., and d.")
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="What is made least: loss alone (quality), or loss and predicted times.")
    ] = Objective.balanced,
    machine: Annotated[Machine, typer.Option(help="Whose rates turn work into times.")] = Machine.cpu,
    tokens: Annotated[int, typer.Option(help="Predicted items per training step: batch size times length.")] = 2560,
    rows: Annotated[int, typer.Option(help="Histories per search.")] = 1,
    dilations: Dilations = "1,4",
    repeats: Repeats = 2,
    kernel_size: KernelSize = 3,
    block: BlockKind = Block.residual,
    sharing: SharingKind = Sharing.none,
    tie_tails: Annotated[
        bool, typer.Option(help="Embedding and softmax share the rows of all clusters but the first.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Also draw the curves into this PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Where to cut a catalogue and which ranks to take, from its item counts alone; nothing is trained.

    Every row is the best partition for at least so many times fewer parameters than the uncompressed twin, the whole
    model counted. Three things are predicted for it:

    [bold]loss[/]: a surrogate between 0 and 1 for what is lost of what can be learnt. Frequent items lose when they get
    too few columns; rare ones lose when they get more columns than their few occurrences can fill. It orders partitions
    of the same data; it is no metric, and settling between two close ones takes training both.

    [bold]step ms[/] and [bold]top-N ms[/]: item tables, softmax and optimizer of a training step, and a search of the
    whole catalogue, by a model of work with measured rates. The blocks between the tables are not in them.

    A remark says where a plan is predicted to be worse or slower than the twin: a small, dense catalogue is better left
    whole, and where no plan of the default range is better by the objective, the last line says to train the twin.
    docs/planning.md has the model.

    Examples: [bold]cprec plan data --plot plan.png[/], [bold]cprec plan data --dim 128 --compressions 4,8,16[/]. Then:
    [bold]cprec train data -o run --compression 6[/].
    """
    from cprec.data import PreparedData
    from cprec.model import NextItNetConfig
    from cprec.planning import frontier_table, plan_frontier, plot_frontier

    check_json(json_file)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ValueError(f"{plot}: a plot is written as PNG, name a file that ends in .png")
    check_json(plot)
    wanted = None if compressions is None else [float(n) for n in numbers(compressions, "--compressions")]
    prepared = PreparedData.open(data)
    model = NextItNetConfig.from_plan(
        prepared.num_items, dim, dilations=tuple(whole_numbers(dilations, "--dilations")), repeats=repeats,
        kernel_size=kernel_size, block=str(block), sharing=str(sharing), tie_tails=tie_tails,
    )  # fmt: skip
    plans = plan_frontier(
        model, prepared.counts, wanted, max_clusters=max_clusters, objective=str(objective), machine=str(machine),
        ranks=None if ranks is None else whole_numbers(ranks, "--ranks"), tokens=tokens, rows=rows,
    )  # fmt: skip
    title = f"{prepared.name}: {prepared.num_items:,} items, {int(prepared.counts.sum()):,} training interactions"
    if plot is not None:
        plot_frontier(plans, plot, title)
    if str(json_file) != "-":
        typer.echo(title)
        print_rich(frontier_table(plans))
        best = min(plans, key=lambda found: found.tables.score)
        tables = f"--compression {best.asked:g}" + ("" if tie_tails else " --no-tie-tails")
        if wanted is None and best.tables.is_outscored:
            tables = "--twin"
        typer.echo(f"{best.tables.advice}\nnext: cprec train {shlex.quote(str(data))} --out RUN {tables}")
    write_json_file(json_file, {"data": prepared.name, "plans": [found.to_dict() for found in plans]})
