"""Plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cprec.files import atomic_write

if TYPE_CHECKING:
    from cprec.training import EpochRecord


def plot_curve(history: Sequence[EpochRecord], path: Path, monitor: str = "ndcg@10") -> None:
    """Training loss (left axis) and a validation metric (right axis) by epoch, as a PNG, written atomically."""
    from matplotlib.figure import Figure  # a figure without pyplot needs no display and leaves no global state
    from matplotlib.ticker import MaxNLocator

    epochs = [record.epoch + 1 for record in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    losses = figure.subplots()
    metrics = losses.twinx()
    (loss_line,) = losses.plot(epochs, [record.train_loss for record in history], "o-", color="tab:blue")
    metric_values = [record.validation[monitor] for record in history]
    (metric_line,) = metrics.plot(epochs, metric_values, "s-", color="tab:orange")
    losses.set_xlabel("epoch")
    losses.set_ylabel("training loss (nats per item)", color="tab:blue")
    metrics.set_ylabel(f"validation {monitor.upper()}", color="tab:orange")
    metrics.set_ylim(bottom=0.0)
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    if history:
        best = max(range(len(history)), key=lambda index: metric_values[index])
        metrics.axvline(epochs[best], color="tab:gray", linewidth=0.8, linestyle=":")
    # Above the axes: the curves may run anywhere within.
    labels = ["training loss", f"validation {monitor.upper()}"]
    figure.legend([loss_line, metric_line], labels, loc="outside upper center", ncols=2, frameon=False)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
