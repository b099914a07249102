"""Options that several subcommands of ``cprec`` share, and how their texts become values."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cprec.model import NextItNetConfig


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


class Part(enum.StrEnum):
    """Held-out parts."""

    valid = "valid"
    test = "test"


# Options that train and info share.
Dim = Annotated[int, typer.Option("--dim", help="Width d of the model.", rich_help_panel="Model")]
Cutoffs = Annotated[
    str,
    typer.Option(
        help="Where the catalogue, sorted by frequency, is cut: item numbers (500,4000) or fractions of it (0.05,0.2). "
        "'none' for one cluster.",
        rich_help_panel="Model",
    ),
]
Ranks = Annotated[
    str | None,
    typer.Option(help="Columns kept per cluster, falling, one more than cutoffs. Default: d, d/4, d/16, ...",
                 rich_help_panel="Model"),
]  # fmt: skip
Twin = Annotated[
    bool, typer.Option("--twin", help="The uncompressed model: one cluster, full rank.", rich_help_panel="Model")
]
Dilations = Annotated[str, typer.Option(help="Dilation of every block, in order.", rich_help_panel="Model")]
Repeats = Annotated[int, typer.Option(help="How often the list of dilations is repeated.", rich_help_panel="Model")]
KernelSize = Annotated[int, typer.Option(help="Taps of a convolution.", rich_help_panel="Model")]
BlockKind = Annotated[Block, typer.Option("--block", help="Kind of residual block.", rich_help_panel="Model")]
SharingKind = Annotated[
    Sharing, typer.Option("--sharing", help="Which blocks share parameters.", rich_help_panel="Model")
]
Dropout = Annotated[float, typer.Option(help="Dropout probability.", rich_help_panel="Model")]
Smoothing = Annotated[float, typer.Option(help="Label smoothing of the softmax, per level.", rich_help_panel="Model")]
HeadBias = Annotated[bool, typer.Option("--head-bias", help="A bias in the head.", rich_help_panel="Model")]
TailBias = Annotated[bool, typer.Option("--tail-bias", help="A bias in every tail.", rich_help_panel="Model")]
SparseEmbedding = Annotated[
    bool,
    typer.Option(
        "--sparse-embedding",
        help="Sparse gradients for item tables: steps cost time for the rows of a batch alone.",
        rich_help_panel="Model",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file ('-': print them).")]


def _numbers(text: str, option: str) -> list[int | float]:
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
    values = _numbers(text, option)
    if fractional := [value for value in values if isinstance(value, float)]:
        raise typer.BadParameter(f"{fractional[0]} in {text!r} is not a whole number", param_hint=option)
    return [int(value) for value in values]


def make_model_config(
    num_items: int, dim: int, cutoffs: str, ranks: str | None, twin: bool, **options: Any
) -> NextItNetConfig:
    """A model configuration from what was typed."""
    from cprec.model import NextItNetConfig

    options["dilations"] = tuple(whole_numbers(options["dilations"], "--dilations"))
    if twin:
        cutoffs, ranks = "none", None
    cuts = [] if cutoffs in ("none", "") else _numbers(cutoffs, "--cutoffs")
    falling = [max(1, dim >> 2 * j) for j in range(len(cuts) + 1)]
    columns = falling if ranks is None else whole_numbers(ranks, "--ranks")
    try:
        return NextItNetConfig.from_plan(num_items, dim, cuts, columns, **options)
    except ValueError as error:
        if "cutoffs" not in str(error):
            raise
        raise ValueError(
            f"{error}. --cutoffs {cutoffs} does not suit a catalogue of {num_items:,} items: choose others, or "
            "--cutoffs none for one cluster"
        ) from None
