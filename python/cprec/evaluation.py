"""Ranking metrics over the whole catalogue, beside the popularity baseline and per popularity band.

Every evaluation example has one relevant item, the hidden last one. With its 0-based rank r among all items,
HR@N = [r < N], NDCG@N = [r < N] / log2(r + 2) and MRR@N = [r < N] / (r + 1), averaged over the examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cprec.batches import ordered_batches
from cprec.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from cprec.data import PreparedData
    from cprec.model import NextItNet

TOPN = (5, 10, 20)
BANDS = (("head", 0.5), ("mid", 0.8), ("tail", 1.0))

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Means over ``count`` examples, by cut-off N."""

    count: int
    hr: dict[int, float]
    ndcg: dict[int, float]
    mrr: dict[int, float]

    def to_dict(self) -> dict[str, float]:
        """Flat, for JSON: ``{"hr@5": ..., "ndcg@5": ..., "mrr@5": ..., ...}``."""
        values: dict[str, float] = {}
        for n in self.hr:
            values |= {f"hr@{n}": self.hr[n], f"ndcg@{n}": self.ndcg[n], f"mrr@{n}": self.mrr[n]}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, float], count: int) -> Metrics:
        """From :meth:`to_dict` and the number of examples."""
        means: dict[str, dict[int, float]] = {"hr": {}, "ndcg": {}, "mrr": {}}
        for name, value in values.items():
            metric, _, n = name.partition("@")
            means[metric][int(n)] = value
        return cls(count, **means)


@dataclasses.dataclass(frozen=True)
class BandReport:
    """Metrics of the examples whose hidden item lies in one popularity band."""

    name: str
    first_item: int
    num_items: int
    interaction_share: float
    model: Metrics
    popularity: Metrics


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """What :func:`evaluate` found on one split."""

    split: str
    num_items: int
    topn: tuple[int, ...]
    model: Metrics
    popularity: Metrics
    bands: tuple[BandReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "split": self.split,
            "num_items": self.num_items,
            "examples": self.model.count,
            "model": self.model.to_dict(),
            "popularity": self.popularity.to_dict(),
            "bands": [
                {
                    "name": band.name,
                    "first_item": band.first_item,
                    "num_items": band.num_items,
                    "interaction_share": band.interaction_share,
                    "examples": band.model.count,
                    "model": band.model.to_dict(),
                    "popularity": band.popularity.to_dict(),
                }
                for band in self.bands
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationReport:
        """From :meth:`to_dict`."""

        def metrics(part: Mapping[str, Any], name: str) -> Metrics:
            return Metrics.from_dict(part[name], part["examples"])

        model = metrics(values, "model")
        bands = tuple(
            BandReport(
                band["name"],
                band["first_item"],
                band["num_items"],
                band["interaction_share"],
                metrics(band, "model"),
                metrics(band, "popularity"),
            )
            for band in values["bands"]
        )
        return cls(values["split"], values["num_items"], tuple(model.hr), model, metrics(values, "popularity"), bands)

    def table(self) -> Table:
        """The report as a Rich table: one row per metric; model and popularity side by side, in all and per band."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.split}: {self.model.count:,} examples, {self.num_items:,} items ranked",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("", no_wrap=True)
        columns = [("all", self.model), ("popul.", self.popularity)]
        for band in self.bands:
            columns += [(band.name, band.model), ("popul.", band.popularity)]
        for heading, _ in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for title in ("hr", "ndcg", "mrr"):
            for n in self.topn:
                means = [getattr(metrics, title)[n] if metrics.count else None for _, metrics in columns]
                table.add_row(f"{title.upper()}@{n}", *("-" if mean is None else f"{mean:.4f}" for mean in means))
            table.add_section()
        footers = {
            "items": (f"{self.num_items:,}", [f"{band.num_items:,}" for band in self.bands]),
            "interactions": ("100%", [f"{band.interaction_share:.0%}" for band in self.bands]),
            "examples": (f"{self.model.count:,}", [f"{band.model.count:,}" for band in self.bands]),
        }
        for title, (total, parts) in footers.items():
            table.add_row(title, total, "", *(cell for part in parts for cell in (part, "")))
        for column in table.columns:  # digits are not cut where a terminal is too narrow for them
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
        return table


def check_topn(topn: Sequence[int]) -> tuple[int, ...]:
    """``topn`` sorted and without repeats. Raises ValueError when empty or when a value is below 1."""
    values = tuple(sorted(set(topn)))
    if not values or values[0] < 1:
        raise ValueError(f"topn must name at least one cut-off of at least 1, got {tuple(topn)}")
    return values


def metrics_of_ranks(ranks: IntArray, topn: Sequence[int] = TOPN) -> Metrics:
    """Metrics from the 0-based ranks (N,) of the relevant items; all 0 when there are none."""
    count = len(ranks)
    gains = {"hr": np.ones(count), "ndcg": 1.0 / np.log2(ranks + 2.0), "mrr": 1.0 / (ranks + 1.0)}
    means = {
        name: {n: float(np.where(ranks < n, gain, 0.0).mean()) if count else 0.0 for n in topn}
        for name, gain in gains.items()
    }
    return Metrics(count, **means)


def popularity_bands(
    counts: npt.ArrayLike, bands: Sequence[tuple[str, float]] = BANDS
) -> list[tuple[str, int, int, float]]:
    """Cut the catalogue, sorted by training count, at shares of all training interactions.

    By default the head holds the items that make up the first half of the interactions, mid those up to 80%, and the
    tail the rest, items never seen in training included. The item that crosses a limit belongs to the band it crosses
    from, so a band is empty only when the item before it already covers its share.

    Args:
        counts: (K,), not increasing.
        bands: name and upper limit of the cumulative share, ascending, the last one 1.0.

    Returns:
        (name, first item, end item, share of interactions) for every band.
    """
    values = np.asarray(counts, dtype=np.float64)
    total = values.sum()
    share = np.cumsum(values) / total if total > 0 else np.arange(1, len(values) + 1) / len(values)
    result = []
    start = 0
    for name, limit in bands:
        end = len(values) if limit >= 1.0 else int(np.searchsorted(share, limit - 1e-12, side="left")) + 1
        end = max(start, min(end, len(values)))
        result.append((name, start, end, float(values[start:end].sum() / total) if total > 0 else 0.0))
        start = end
    return result


def rank_targets(
    model: NextItNet,
    data: PreparedData,
    split: str,
    *,
    length: int,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[IntArray, IntArray]:
    """The model's 0-based rank of every hidden item of a split, and the hidden items: two (N,) int64 arrays.

    The model is put in evaluation mode for the while, on ``device`` if given.

    Raises:
        ValueError: the model is for another catalogue, or ``batch_size`` is below 1.
    """
    from cprec.data import EvaluationWindows

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 history at a time, got {batch_size}")
    if data.num_items != model.config.num_items:
        raise ValueError(
            f"the model ranks {model.config.num_items:,} items but {data.folder} holds {data.num_items:,}: "
            "evaluate on the data the model was trained on"
        )
    if device is not None:
        model = model.to(device)
    place = next(model.parameters()).device
    windows = EvaluationWindows(data.evaluation(split), length, data.num_items)
    ranks = np.empty(len(windows), dtype=np.int64)
    targets = np.empty(len(windows), dtype=np.int64)
    was_training = model.training
    model.eval()
    done = 0
    try:
        with torch.inference_mode(), progress_bar(f"evaluating {split}", len(windows), progress) as advance:
            for history, target, _ in ordered_batches(windows, batch_size):
                end = done + len(target)
                ranks[done:end] = model.rank(history.to(place), target.to(place)).cpu().numpy()
                targets[done:end] = target.numpy()
                advance(end - done)
                done = end
    finally:
        model.train(was_training)
    return ranks, targets


def report_of_ranks(
    ranks: IntArray, targets: IntArray, counts: npt.ArrayLike, split: str, topn: Sequence[int] = TOPN
) -> EvaluationReport:
    """The report from ranks and hidden items, (N,) each.

    Items are numbered by training frequency, so the popularity baseline ranks an item at its own number.
    """
    topn = check_topn(topn)
    bands = []
    for name, start, end, share in popularity_bands(counts):
        inside = (targets >= start) & (targets < end)
        bands.append(
            BandReport(
                name,
                start,
                end - start,
                share,
                metrics_of_ranks(ranks[inside], topn),
                metrics_of_ranks(targets[inside], topn),
            )
        )
    return EvaluationReport(
        split,
        len(np.asarray(counts)),
        topn,
        metrics_of_ranks(ranks, topn),
        metrics_of_ranks(targets, topn),
        tuple(bands),
    )


def evaluate(
    model: NextItNet,
    data: PreparedData,
    split: str = "test",
    *,
    length: int,
    batch_size: int = 512,
    topn: Sequence[int] = TOPN,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> EvaluationReport:
    """Rank every hidden item of ``split`` among the whole catalogue and summarise.

    Args:
        model: for the catalogue of ``data``.
        split: ``"valid"`` or ``"test"``. Only the last position of an example is hidden; the model sees the ``length``
            items before it.
        device: moves the model there first.
        progress: show a bar on standard error.

    Raises:
        ValueError: the model is for another catalogue, ``batch_size`` is below 1, or ``topn`` is empty or holds a value
            below 1.
    """
    topn = check_topn(topn)
    ranks, targets = rank_targets(
        model, data, split, length=length, batch_size=batch_size, device=device, progress=progress
    )
    return report_of_ranks(ranks, targets, data.counts, split, topn)
