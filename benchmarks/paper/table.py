"""A finished table as plain values: what the page is written from."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.results import write_text

SCHEMA = 1
TITLES = {
    1: "Twin and compressed model",
    2: "Sharing schemes of the middle layers",
    3: "Number of clusters and ranks",
    4: "Which table is compressed",
    5: "Inference against catalogue size",
    6: "At twice the width, planned for shared layers",
    7: "From factors, with smoothed labels",
}
# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond them the last one serves.
T_QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


TIMES = ("step_ms", "epoch_s", "to_metric_s", "topk_ms", "index_ms", "search_ms")


@dataclasses.dataclass
class Row:
    """A model in a table.

    Attributes:
        group: rows of a group may be compared, e.g. "L = 20". baseline: label of the row to compare with, or "".
        metrics: test metric -> one value per seed. figures: further numbers, e.g. "step_ms".
        settings: what was chosen for the model, for people to read.
        times: a provenance with those figures that are times, per machine; the first one's are in ``figures``.
    """

    group: str
    label: str
    baseline: str = ""
    parameters: int | None = None
    seeds: int = 0
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Table:
    """The rows of one table for one data set ("" for generated catalogues).

    complete: all rows are there. provenance: where the table was put together; see :attr:`Row.times`.
    """

    number: int
    data: dict[str, Any]
    preset: dict[str, Any]
    provenance: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)
    complete: bool = False

    @property
    def file_name(self) -> str:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.data.get("name", "generated").lower())
        return f"table-{self.number}-{name}.json"

    def write(self, folder: Path) -> None:
        """Write the table into ``folder``, atomically."""
        text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1)
        write_text(folder / self.file_name, text + "\n")


def read_table(path: Path) -> Table:
    """A table from :meth:`Table.write`. Raises BenchmarkError when it is not one."""
    try:
        values = json.loads(path.read_bytes())
        if values.pop("schema") != SCHEMA:
            raise BenchmarkError(f"{path} has another schema than {SCHEMA}, which this version reads")
        rows = [Row(**row) for row in values.pop("rows")]
        return Table(**values, rows=rows)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"{path} is not a table of benchmarks.paper: {error}") from None


def read_tables(folder: Path) -> list[Table]:
    """All tables of a folder, by number and data set."""
    found = [read_table(path) for path in sorted(folder.glob("table-*.json"))]
    return sorted(found, key=lambda table: (table.number, table.file_name))


# Seeds


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether two sets of seeds differ: Welch's t test at 95%, of values of which more is better.

    Returns:
        "better", "worse", "the same", "within the noise", or "one seed" where no noise can be estimated.
    """
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if len(ours) < 2 or len(theirs) < 2:
        return "one seed"
    parts = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    if sum(parts) == 0:
        return "the same" if difference == 0 else "better" if difference > 0 else "worse"
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs), strict=True)
    )
    quantile = T_QUANTILES[min(max(1, math.floor(freedom)), len(T_QUANTILES)) - 1]
    if abs(difference) <= quantile * math.sqrt(sum(parts)):
        return "within the noise"
    return "better" if difference > 0 else "worse"
