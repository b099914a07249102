"""Rows and the files that hold them: one JSON file per run, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from cprec.files import atomic_write

SCHEMA = 1


@dataclasses.dataclass
class Row:
    """One provider in one setting. None where a number was not measured; ``error`` says why.

    Attributes:
        correct: True and False are the gate's verdict, None when it was not asked (skipped providers).
        error: "" or one line: what was wrong, or "skipped: " and why.
        note: what a provider chose while preparing.
        baseline: the provider that ``ratio_to_baseline`` (its median over this row's) refers to.
        peak_mb: 10^6 bytes beyond inputs and weights, at the worst moment of a call. gradients_mb: of these, the
            gradients that the call returns; extra_mb the rest.
        flops, exps, bytes: of one call, by the op's model. roofline_fraction: least time by the model over the median.
        figures: further numbers that belong to the row, by name.
        versions: of the packages that were timed. commit: of this repository. date: UTC day.
    """

    op: str
    case: str
    provider: str
    mode: str
    targets: str
    device: str
    dtype: str
    isa: str
    threads: int
    machine: str
    versions: dict[str, str]
    commit: str
    date: str
    baseline: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    peak_mb: float | None = None
    gradients_mb: float | None = None
    extra_mb: float | None = None
    flops: float | None = None
    exps: float | None = None
    bytes: float | None = None
    roofline_fraction: float | None = None
    ratio_to_baseline: float | None = None
    correct: bool | None = None
    error: str = ""
    note: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def setting_key(self) -> tuple[Any, ...]:
        """Rows of one setting may be compared with one another."""
        return self.op, self.case, self.mode, self.targets, self.device, self.dtype, self.threads, self.machine

    def setting_label(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.op} {self.case}, {self.mode}, {self.targets}, {self.dtype}, {threads}"


@dataclasses.dataclass
class Run:
    """What one run measured. roofs: as :meth:`benchmarks.roofline.Roof.to_dict`, with the "machine" of each."""

    roofs: list[dict[str, Any]]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "roofs": self.roofs, "rows": [dataclasses.asdict(row) for row in self.rows]}


def write_text(path: Path, text: str) -> None:
    """``text`` becomes ``path`` when all of it is written; otherwise nothing changes."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`."""
    with atomic_write(path) as stream:
        stream.write(data)


def write_run(path: Path, run: Run) -> None:
    """Write a run as JSON, atomically."""
    write_text(path, json.dumps(run.to_dict(), indent=1) + "\n")


def read_run(path: Path) -> Run:
    """A run from :func:`write_run`.

    Raises:
        BenchmarkError: no such file, or not one of ours.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise BenchmarkError(f"{path} was not written by `benchmarks run` (schema {SCHEMA})")
    try:
        return Run(list(values["roofs"]), [Row(**row) for row in values["rows"]])
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} has rows that this version does not read: {error}") from None


def group(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by setting, in the order in which settings first appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting_key(), []).append(row)
    return list(groups.values())


def fill_ratios(rows: Sequence[Row]) -> None:
    """Set every row's ratio to its baseline's median in the same setting, where both were timed."""
    for members in group(rows):
        medians = {row.provider: row.median_ms for row in members}
        for row in members:
            base = medians.get(row.baseline)
            row.ratio_to_baseline = base / row.median_ms if base and row.median_ms else None


def ratio_spread(row: Row, rows: Iterable[Row]) -> tuple[float, float] | None:
    """The ratio if the baseline ran at its p20 and this row at its p80, and the other way round."""
    for other in rows:
        if other.provider == row.baseline and other.setting_key() == row.setting_key():
            if row.p20_ms and row.p80_ms and other.p20_ms and other.p80_ms:
                return other.p20_ms / row.p80_ms, other.p80_ms / row.p20_ms
            break
    return None
