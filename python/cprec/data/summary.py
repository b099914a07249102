"""One screen on what a prepared folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .sequences import PreparedData


@dataclasses.dataclass(frozen=True)
class PreparedSummary:
    """Figures of a prepared folder; ``str()`` gives a table in plain text, :meth:`rows` its rows."""

    name: str
    folder: str
    source: str
    format: str
    split: str
    users: int
    items: int
    interactions: int
    train_sequences: int
    train_interactions: int
    valid: int
    test: int
    untrained_items: int
    length_quartiles: tuple[int, int, int, int, int]
    head_shares: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
    columns: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of every line."""
        shares = ", ".join(f"{top:.0%} of items: {share:.0%}" for top, share in self.head_shares)
        quartiles = " / ".join(f"{length:,}" for length in self.length_quartiles)
        rows = [
            ("data set", f"{self.name} ({self.source}, {self.format})"),
            *([("columns", self.columns)] if self.columns else []),
            ("folder", self.folder),
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,} ({self.untrained_items:,} never in training)"),
            ("interactions", f"{self.interactions:,}"),
            ("sequence length", f"{quartiles} (least, quartiles, greatest)"),
            ("training share", f"most frequent {shares}"),
            ("split", self.split),
            ("train", f"{self.train_interactions:,} interactions in {self.train_sequences:,} sequences"),
            ("valid / test", f"{self.valid:,} / {self.test:,} targets"),
        ]
        return rows + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(f"{label:<16}{value}" for label, value in self.rows())


def _columns(roles: Mapping[str, str | None]) -> str:
    """Which columns were read as what; empty where that is not known."""
    read = {role: name or "none: lines are taken in the file's order" for role, name in roles.items()}
    return ", ".join(f"{role} = {name}" for role, name in read.items())


def summarise(data: PreparedData) -> PreparedSummary:
    """The summary of an open folder."""
    sizes, options = data.meta["sizes"], data.meta["options"]
    reached = np.cumsum(data.counts) / max(1, int(data.counts.sum()))
    shares = tuple((top, float(reached[max(1, round(top * data.num_items)) - 1])) for top in (0.01, 0.05, 0.2))
    least, low, middle, high, most = np.quantile(data.sequences.lengths, [0, 0.25, 0.5, 0.75, 1], method="nearest")
    source, split = data.meta["source"], options["split"]
    if split != "leave-one-out":
        split += (
            f" (valid {options['valid_fraction']:.0%}, test {options['test_fraction']:.0%}, seed {options['seed']})"
        )
    return PreparedSummary(
        name=data.name,
        folder=str(data.folder),
        source=source["name"],
        format=options["format"],
        split=split,
        users=sizes["users"],
        items=sizes["items"],
        interactions=sizes["interactions"],
        train_sequences=sizes["train_sequences"],
        train_interactions=sizes["train_interactions"],
        valid=sizes["valid"],
        test=sizes["test"],
        untrained_items=sizes["items"] - sizes["trained_items"],
        length_quartiles=(int(least), int(low), int(middle), int(high), int(most)),
        head_shares=shares,
        notes=tuple(data.meta["notes"]),
        columns=_columns(source.get("columns", {})),
    )
