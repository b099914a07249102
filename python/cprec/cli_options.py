"""Options that several subcommands of ``cprec`` share, and how their texts become values."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import RenderableType

    from cprec.model import NextItNetConfig

DEFAULT_CUTOFFS = "0.05,0.2"
SMALL_CATALOGUE = 10  # items, at most: DEFAULT_CUTOFFS suit larger ones alone
MODEL = "Model"  # the options that give a model its shape


class Sharing(enum.StrEnum):
    """Parameter sharing between residual blocks."""

    none = "none"
    cross_layer = "cross-layer"
    cross_block = "cross-block"
    adjacent_layer = "adjacent-layer"
    adjacent_block = "adjacent-block"


class Block(enum.StrEnum):
    """Kinds of residual block."""

    residual = "residual"
    bottleneck = "bottleneck"


class Init(enum.StrEnum):
    """Where item vectors start."""

    random = "random"
    als = "als"


class Split(enum.StrEnum):
    """Ways to hold out data."""

    leave_one_out = "leave-one-out"
    user = "user"
    time = "time"


class Ids(enum.StrEnum):
    """What raw ids may look like."""

    auto = "auto"
    text = "text"
    integer = "integer"


class Objective(enum.StrEnum):
    """What a plan makes least."""

    balanced = "balanced"
    quality = "quality"
    speed = "speed"


class Machine(enum.StrEnum):
    """Whose rates predict times."""

    cpu = "cpu"
    gpu = "gpu"


class Part(enum.StrEnum):
    """Held-out parts."""

    valid = "valid"
    test = "test"


# Options that train and info share.
Dim = Annotated[int, typer.Option("--dim", help="Width d of the model.", rich_help_panel=MODEL)]
Cutoffs = Annotated[
    str | None,
    typer.Option(
        help="Where the catalogue, sorted by frequency, is cut: item numbers (500,4000) or fractions of it (0.05,0.2). "
        "'none' for one cluster. Default: 0.05,0.2.",
        rich_help_panel=MODEL,
    ),
]
Ranks = Annotated[
    str | None,
    typer.Option(help="Columns kept per cluster, falling, one more than cutoffs. Default: d, d/4, d/16, ...",
                 rich_help_panel=MODEL),
]  # fmt: skip
SoftmaxCutoffs = Annotated[
    str | None,
    typer.Option(help="Other cutoffs for the softmax alone. Default: those of --cutoffs.", rich_help_panel=MODEL),
]
SoftmaxRanks = Annotated[
    str | None,
    typer.Option(help="Other ranks for the softmax alone. Default: those of --ranks.", rich_help_panel=MODEL),
]
Compression = Annotated[
    float | None,
    typer.Option(
        help="Choose cutoffs and ranks from item counts, for at least so many times fewer parameters than the twin "
        "(`cprec plan` shows what that costs). Instead of --cutoffs and --ranks.",
        rich_help_panel=MODEL,
    ),
]
TieTails = Annotated[
    bool | None,
    typer.Option(
        "--tie-tails/--no-tie-tails",
        help="Embedding and softmax share the rows of all clusters but the first: ranks cost half there. Default: yes with "
        "--compression, unless embeddings are sparse; else no.",
        rich_help_panel=MODEL,
    ),
]
Twin = Annotated[
    bool, typer.Option("--twin", help="The uncompressed model: one cluster, full rank.", rich_help_panel=MODEL)
]
Dilations = Annotated[
    str, typer.Option(help="Dilation of every block, in order: 1,4 twice sees 61 items.", rich_help_panel=MODEL)
]
Repeats = Annotated[int, typer.Option(help="How often the list of dilations is repeated.", rich_help_panel=MODEL)]
KernelSize = Annotated[int, typer.Option(help="Taps of a convolution.", rich_help_panel=MODEL)]
BlockKind = Annotated[Block, typer.Option("--block", help="Kind of residual block.", rich_help_panel=MODEL)]
SharingKind = Annotated[
    Sharing, typer.Option("--sharing", help="Which blocks share parameters.", rich_help_panel=MODEL)
]
Dropout = Annotated[
    float, typer.Option(help="Dropout probability; sparse catalogues gain from 0.5.", rich_help_panel=MODEL)
]
Smoothing = Annotated[float, typer.Option(help="Label smoothing of the softmax, per level.", rich_help_panel=MODEL)]
HeadBias = Annotated[bool, typer.Option("--head-bias", help="A bias in the head.", rich_help_panel=MODEL)]
TailBias = Annotated[bool, typer.Option("--tail-bias", help="A bias in every tail.", rich_help_panel=MODEL)]
SparseEmbedding = Annotated[
    bool,
    typer.Option(
        "--sparse-embedding",
        help="Sparse gradients for item tables: steps cost time for the rows of a batch alone.",
        rich_help_panel=MODEL,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file ('-': print them).")]


def numbers(text: str, option: str) -> list[int | float]:
    """A comma-separated list: all integers, or all with a point."""
    values: list[int | float] = []
    for part in text.split(","):
        try:
            values.append(float(part) if "." in part or "e" in part.lower() else int(part))
        except ValueError:
            raise typer.BadParameter(f"{part.strip()!r} in {text!r} is not a number", param_hint=option) from None
    return values


def whole_numbers(text: str, option: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    values = numbers(text, option)
    if fractional := [value for value in values if isinstance(value, float)]:
        raise typer.BadParameter(f"{fractional[0]} in {text!r} is not a whole number", param_hint=option)
    return [int(value) for value in values]


def make_model_config(
    counts: npt.NDArray[np.int64],
    dim: int,
    cutoffs: str | None,
    ranks: str | None,
    twin: bool,
    *,
    compression: float | None = None,
    softmax_cutoffs: str | None = None,
    softmax_ranks: str | None = None,
    tie_tails: bool | None = None,
    **options: Any,
) -> NextItNetConfig:
    """A model configuration from what was typed, for a catalogue with these training counts (K,)."""
    from cprec.model import NextItNetConfig
    from cprec.planning import plan_model

    num_items = len(counts)
    options["dilations"] = tuple(whole_numbers(options["dilations"], "--dilations"))
    if tie_tails is None:
        tie_tails = compression is not None and not options.get("sparse_embedding")
    options["tie_tails"] = tie_tails
    of_softmax = {"--softmax-cutoffs": softmax_cutoffs, "--softmax-ranks": softmax_ranks}
    if compression is not None:
        given = {"--cutoffs": cutoffs, "--ranks": ranks, **of_softmax, "--twin": twin or None}
        if conflicts := [option for option, value in given.items() if value is not None]:
            raise ValueError(
                f"--compression {compression:g} chooses cutoffs and ranks itself: leave out {' and '.join(conflicts)}, "
                "or leave out --compression"
            )
        model = NextItNetConfig.from_plan(num_items, dim, **options)
        return plan_model(model, counts, compression).config
    if twin:
        given = {"--cutoffs": cutoffs, "--ranks": ranks, **of_softmax}
        if conflicts := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"--twin has one cluster in both tables: leave out {' and '.join(conflicts)}")
        cutoffs, ranks, options["tie_tails"] = "none", None, False
    cutoffs = DEFAULT_CUTOFFS if cutoffs is None else cutoffs
    cuts, columns = _clusters(cutoffs, ranks, dim, "")
    if softmax_cutoffs is not None or softmax_ranks is not None:
        options["output_cutoffs"], options["output_ranks"] = _clusters(
            cutoffs if softmax_cutoffs is None else softmax_cutoffs,
            ranks if softmax_ranks is None and softmax_cutoffs is None else softmax_ranks,
            dim,
            "softmax-",
        )
    try:
        return NextItNetConfig.from_plan(num_items, dim, cuts, columns, **options)
    except ValueError as error:
        if "cutoffs" not in str(error):
            raise
        side = "softmax-" if str(error).startswith("output_") else ""
        raise ValueError(
            f"{error}. --{side}cutoffs {softmax_cutoffs if side else cutoffs} does not suit a catalogue of {num_items:,} "
            f"items: choose others, or --{side}cutoffs none for one cluster"
        ) from None


def _clusters(cutoffs: str, ranks: str | None, dim: int, side: str) -> tuple[list[int | float], list[int]]:
    """Cutoffs and ranks from what was typed; ranks fall by a factor of 4 from the width when none were."""
    cuts = [] if cutoffs in ("none", "") else numbers(cutoffs, f"--{side}cutoffs")
    falling = [max(1, dim >> 2 * j) for j in range(len(cuts) + 1)]
    return cuts, falling if ranks is None else whole_numbers(ranks, f"--{side}ranks")


def announce_model(data: str, config: NextItNetConfig, length: int, *, planned: bool, note: str | None = None) -> None:
    """Say what is about to be trained: once, however many processes Lightning starts for it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    times = config.twin().num_parameters / config.num_parameters
    typer.echo(
        f"{data}: {config.num_items:,} items; {config.num_parameters:,} parameters, {times:.2f} times fewer than the "
        "uncompressed twin"
    )
    if length > config.receptive_field:
        typer.echo(
            f"--length {length} is beyond the {config.receptive_field} items that the blocks see: larger --dilations, or more "
            "--repeats, would see further"
        )
    if planned:
        partition = config.input_partition
        tied = ", tails tied" if config.tie_tails else ""
        typer.echo(f"planned: cutoffs {list(partition.cutoffs)}, ranks {list(partition.ranks)}{tied}")
    if note is not None:
        typer.echo(note)


def tails_of_run(folder: Path) -> bool | None:
    """Whether the model of a run that is gone on with has tied tails; None where there is no run to ask.

    A run from before tails were tied by default goes on with the command that began it.
    """
    from cprec import checkpoint

    try:
        return checkpoint.read_config(folder)[0].tie_tails
    except checkpoint.CheckpointError:
        return None


def print_rich(*renderables: RenderableType) -> None:
    """Print tables and text as wide as the terminal is. What cannot be as narrow runs over its edge and is not cut."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable, crop=False)


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def grown_model(context: typer.Context, former: Path, num_items: int, **changes: float) -> tuple[NextItNetConfig, int]:
    """The configuration and length of the model in a run or an export, for another number of items.

    ``changes`` are made where they were typed; other options of a model are refused, since weights have a shape.
    """
    from cprec import checkpoint
    from cprec.warm_start import grown

    shape = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if getattr(parameter, "rich_help_panel", None) == MODEL
        and parameter.name not in changes
        and typed(context, str(parameter.name))
    ]
    if shape:
        raise ValueError(
            f"with --from the model has the shape of that in {former}, which {', '.join(shape)} cannot change: leave it out, "
            "or train anew without --from"
        )
    config, sections = checkpoint.read_config(former)
    section = sections.get("export", sections.get("training"))
    length = section.get("length") if isinstance(section, dict) else None
    if not isinstance(length, int) or length < 1:
        raise ValueError(
            f"{former / checkpoint.CONFIG_NAME} is that of neither a run nor an export: it lacks their length"
        )
    try:
        kept = {name: value for name, value in changes.items() if typed(context, name)}
        return grown(config, num_items, **kept), length
    except ValueError as error:
        raise ValueError(f"the model in {former}: {error}") from None


def refuse_model_options(context: typer.Context, path: Path, allowed: tuple[str, ...]) -> None:
    """Refuse options of a model to be made where ``path`` holds one that is."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in allowed and typed(context, str(parameter.name))
    ]
    if given:
        raise ValueError(
            f"{path} holds a model, which {', '.join(given)} cannot change: leave it out, or give prepared data"
        )


def check_json(target: Path | None) -> None:
    """Refuse a place that cannot be written before the work is done, not after."""
    if target is None or str(target) == "-":
        return
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory: name a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory to write {target.name} in")


def write_json_file(target: Path | None, values: Any) -> None:
    """``values`` where --json says: nowhere, on standard output ('-'), or in a file."""
    if target is None:
        return
    if str(target) == "-":
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
        return
    from cprec.files import write_json

    write_json(target, values)
