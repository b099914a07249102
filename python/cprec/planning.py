"""Plans for a whole model: clusters from item counts, for so many times fewer parameters than the uncompressed twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from cprec.files import atomic_write
from cprec.model import NextItNetConfig
from cprec_kernels import Partition
from cprec_kernels.planning import BudgetError, Plan, Planner

if TYPE_CHECKING:
    from rich.table import Table

COMPRESSIONS = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 32.0, 48.0)


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A model whose two tables have a planned partition.

    Attributes:
        asked: the compression that was asked for. tables: what is predicted of the tables.
    """

    config: NextItNetConfig
    asked: float
    tables: Plan

    @property
    def compression(self) -> float:
        """Parameters of the twin over those of the model."""
        return self.config.twin().num_parameters / self.config.num_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "asked": self.asked,
            "compression": self.compression,
            "parameters": self.config.num_parameters,
            "tie_tails": self.config.tie_tails,
            "tables": self.tables.to_dict(),
        }


def plan_model(
    model: NextItNetConfig, counts: npt.ArrayLike, compression: float, *, planner: Planner | None = None, **options: Any
) -> ModelPlan:
    """Give a model the partition that loses least among those that make all of it small enough.

    Args:
        model: everything but the partitions, which are replaced.
        counts: (K,) training counts, not increasing.
        compression: the model is to have at least so many times fewer parameters than its twin, all parts counted.
        planner: made from counts and ``options`` (see :class:`cprec_kernels.planning.Planner`) unless given.

    Raises:
        ValueError: counts are for another catalogue, ``planner`` for tails tied otherwise, or ``compression`` is not a
            finite number above 0, or more than the model allows; the message has the largest that it does.
    """
    planner = planner or Planner(counts, model.embedding_dim, tie_tails=model.tie_tails, **options)
    if planner.num_items != model.num_items:
        raise ValueError(f"there are counts of {planner.num_items:,} items, the model has {model.num_items:,}")
    if planner.tie_tails != model.tie_tails:
        raise ValueError(
            f"the planner has tie_tails = {planner.tie_tails}, the model {model.tie_tails}: they must agree"
        )
    if not 0 < compression < float("inf"):
        raise ValueError(f"compression must be a finite number above 0, got {compression}")
    limit = model.twin().num_parameters / compression
    extra = 0  # the padding row and biases, which the planner does not count and which depend on the partition
    while (budget := limit - model.backbone_parameters - extra) > 0:
        try:
            found = planner.plan(max_parameters=budget)
        except BudgetError:
            break
        planned = _with(model, found.partition)
        if planned.num_parameters <= limit:
            return ModelPlan(planned, compression, found)
        extra = planned.num_parameters - model.backbone_parameters - found.prediction.parameters
    least = _smallest(model, planner)
    raise ValueError(
        f"compression {compression:g} is more than this model allows: with the smallest tables it has "
        f"{least.num_parameters:,} parameters, {_compression(least):.4g} times fewer than "
        f"its twin ({model.backbone_parameters:,} of them are in the blocks, which sharing makes fewer)"
    )


def _smallest(model: NextItNetConfig, planner: Planner) -> NextItNetConfig:
    """The model with the smallest tables that can be planned."""
    return _with(model, planner.plan(max_parameters=planner.smallest("parameters")).partition)


def _compression(model: NextItNetConfig) -> float:
    """How many times fewer parameters than its twin a model has; a little less, so that it can be asked for in 4 digits."""
    return model.twin().num_parameters / model.num_parameters / 1.0005


def _with(model: NextItNetConfig, partition: Partition) -> NextItNetConfig:
    return dataclasses.replace(model, input_partition=partition, output_partition=partition)


def plan_frontier(
    model: NextItNetConfig, counts: npt.ArrayLike, compressions: Iterable[float] | None = None, **options: Any
) -> list[ModelPlan]:
    """Plans for several compressions, largest model first. Those that nothing fits are left out, repeated ones come once.

    ``compressions``: by default a range; where nothing fits the least of it, the largest that the model allows.

    Raises:
        ValueError: as :func:`plan_model`, and when nothing fits any of them.
    """
    planner = Planner(counts, model.embedding_dim, tie_tails=model.tie_tails, **options)
    if compressions is None:
        largest = _compression(_smallest(model, planner))
        compressions = COMPRESSIONS if largest >= min(COMPRESSIONS) else [largest]
    plans: list[ModelPlan] = []
    for compression in sorted(set(compressions)):
        try:
            found = plan_model(model, counts, compression, planner=planner)
        except ValueError:
            if not plans:
                raise
            break
        if plans and plans[-1].config == found.config:
            plans.pop()
        plans.append(found)
    return plans


def frontier_table(plans: Sequence[ModelPlan]) -> Table:
    """One row per plan, the uncompressed twin first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("smaller", justify="right", no_wrap=True)
    table.add_column("cutoffs", overflow="fold", min_width=7)
    table.add_column("ranks", overflow="fold", min_width=5)
    for heading in ("parameters", "step ms", "faster", "top-N ms", "faster", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    remarks = []
    twin, plain = plans[0].config.twin(), plans[0].tables.plain
    table.add_row(
        "twin", "none", str(twin.embedding_dim), f"{twin.num_parameters:,}",
        f"{plain.train_ms:.3g}", "", f"{plain.topk_ms:.3g}", "", f"{plain.loss:.3f}",
    )  # fmt: skip
    for plan in plans:
        partition, ours = plan.config.input_partition, plan.tables.prediction
        flags = {
            "worse": plan.tables.is_worse, "slower to train": plan.tables.is_slower_to_train,
            "slower to search": plan.tables.is_slower_to_search,
        }  # fmt: skip
        if any(flags.values()):
            told = ", ".join(name for name, is_so in flags.items() if is_so)
            remarks.append(f"{plan.compression:.2f}x: predicted {told} than the twin")
        table.add_row(
            f"{plan.compression:.2f}x", ",".join(map(str, partition.cutoffs)) or "none",
            ",".join(map(str, partition.ranks)), f"{plan.config.num_parameters:,}",
            f"{ours.train_ms:.3g}", f"{plain.train_ms / ours.train_ms:.1f}x",
            f"{ours.topk_ms:.3g}", f"{plain.topk_ms / ours.topk_ms:.1f}x", f"{ours.loss:.3f}",
        )  # fmt: skip
    table.caption, table.caption_justify = "\n".join(remarks) or None, "left"
    return table


def plot_frontier(plans: Sequence[ModelPlan], path: Path, title: str) -> None:
    """Predicted loss, step and search against compression, the twin at 1x; a PNG, written atomically."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    plain = plans[0].tables.plain
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (
        ("predicted loss (surrogate)", "loss", "tab:orange"),
        ("predicted training step, ms", "train_ms", "tab:blue"),
        ("predicted top-N search, ms", "topk_ms", "tab:green"),
    )
    sizes = [plan.compression for plan in plans]
    ticks: dict[str, float] = {f"{tick}x": tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= 1.2 * max(sizes)}
    if max(sizes) < 2:
        ticks = {f"{tick:.4g}x": tick for tick in (max(sizes), 1)}
    for axis, (label, name, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.axhline(getattr(plain, name), color="tab:gray", linewidth=0.8, linestyle=":")
        axis.plot([1], [getattr(plain, name)], "s", color="tab:gray", label="uncompressed twin")
        axis.plot(sizes, [getattr(plan.tables.prediction, name) for plan in plans], "o-", color=colour, label="planned")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(list(ticks.values()), list(ticks))
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("times fewer parameters")
        axis.set_title(label, fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
