"""Item counts of any size, reduced to what planning reads: runs of equal counts and a few hundred places to cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CHUNK = 1 << 22  # items looked at a time: temporaries stay small beside 10^8 counts
MAX_RUNS = 1 << 16  # runs kept; counts in n columns of a power law have about sqrt(2 * interactions) distinct values
MAX_CUTS = 96


@dataclasses.dataclass(frozen=True)
class Popularity:
    """Counts of K items, most frequent first, as runs of equal values.

    Attributes:
        num_items: K. total: sum of all counts.
        starts: (runs + 1,) first item of every run, then K.
        values: (runs,) the count of the run's items; their mean where neighbouring runs had to be joined.
    """

    num_items: int
    total: float
    starts: IntArray
    values: FloatArray

    @classmethod
    def of(cls, counts: npt.ArrayLike) -> Popularity:
        """Check counts and reduce them.

        Args:
            counts: (K,) integers or floats, not increasing, none below 0; a tensor on the CPU will do.

        Raises:
            TypeError: not numbers; ValueError: empty, not a vector, negative, not finite, increasing somewhere, or
                shares (the largest is below 1), of which nobody can say how well an item is known.
        """
        array = np.asarray(counts)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"counts must be integers or floats, got dtype {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"counts must be a vector, one count per item, got shape {array.shape}")
        if not len(array):
            raise ValueError("counts is empty: a catalogue needs at least one item")
        if array.dtype.kind == "f" and 0 < array[0] < 1:
            raise ValueError(
                f"counts[0] = {array[0]} is the largest and below 1, so these are shares: pass how often each item was seen"
            )
        starts = np.concatenate([*_run_starts(array), [len(array)]]).astype(np.int64)
        values = array[starts[:-1]].astype(np.float64)
        if len(values) > MAX_RUNS:
            starts, values = _join(starts, values)
        with np.errstate(over="ignore"):
            total = float(values @ np.diff(starts))
        if not np.isfinite(total):
            raise ValueError("the counts add up to more than a float holds")
        return cls(len(array), total, starts, values)

    def prefix(self, per_item: FloatArray, positions: IntArray) -> FloatArray:
        """Sums over the items before every position, of a quantity (..., runs) that is the same within a run.

        Args:
            positions: (m,) in 0..K.

        Returns:
            (..., m) float64.
        """
        before = np.concatenate(
            [np.zeros((*per_item.shape[:-1], 1)), np.cumsum(per_item * np.diff(self.starts), axis=-1)], axis=-1
        )
        run = np.clip(np.searchsorted(self.starts, positions, side="right") - 1, 0, len(self.values) - 1)
        sums: FloatArray = before[..., run] + per_item[..., run] * (positions - self.starts[run])
        return sums

    def shares(self, positions: IntArray) -> FloatArray:
        """Share of the interactions before every position; of the items, where nothing was counted at all."""
        if self.total == 0:
            return positions / self.num_items
        return self.prefix(self.values, positions) / self.total

    def cut_candidates(self, limit: int = MAX_CUTS) -> IntArray:
        """Places at which a partition may be cut, ascending: all of 1..K-1 when these are at most ``limit``.

        Otherwise half of them are spaced evenly in log(item) from K^(1/3), a quarter evenly in the share of the
        interactions, and a quarter are where the smallest counts change (0 to 1, 1 to 2, ...): rare items come in long
        runs, and a rank that suits one of them suits the whole run.
        """
        size = self.num_items
        if size - 1 <= limit:
            return np.arange(1, size, dtype=np.int64)
        quarter = limit // 4
        spaced = np.geomspace(size ** (1 / 3), size - 1, limit - 2 * quarter)
        steps = np.arange(1, quarter + 1) / (quarter + 1)
        # The share before each run start is not decreasing; within a run it is linear.
        even = np.interp(steps, self.shares(self.starts), self.starts)
        found = np.concatenate([spaced, even, self.starts[1:-1][-quarter:]]).round().astype(np.int64)
        return np.unique(found[(found > 0) & (found < size)])


def _run_starts(counts: npt.NDArray[Any]) -> Iterator[IntArray]:
    """First items of the runs of equal counts, chunk by chunk; raises ValueError for what is wrong with the counts."""
    for first in range(0, len(counts), CHUNK):
        chunk = counts[max(0, first - 1) : first + CHUNK]
        offset = max(0, first - 1)
        if counts.dtype.kind == "f" and not np.isfinite(chunk).all():
            item = int((~np.isfinite(chunk)).argmax())
            raise ValueError(f"counts[{offset + item}] = {chunk[item]} is not a finite number")
        if chunk[chunk.argmin()] < 0:
            item = int((chunk < 0).argmax())
            raise ValueError(f"counts[{offset + item}] = {chunk[item]} is negative")
        rising = chunk[1:] > chunk[:-1]
        if rising.any():
            item = int(rising.argmax())
            raise ValueError(
                f"counts must not increase, but counts[{offset + item + 1}] = {chunk[item + 1]} follows {chunk[item]}: "
                "number the items by falling frequency"
            )
        if first == 0:
            yield np.zeros(1, dtype=np.int64)
        yield np.flatnonzero(chunk[1:] != chunk[:-1]) + offset + 1


def _join(starts: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """At most MAX_RUNS runs, of neighbours with their mean count; the sum stays what it was."""
    kept = np.unique(np.linspace(0, len(values), MAX_RUNS + 1).astype(np.int64))
    sums = np.add.reduceat(values * np.diff(starts), kept[:-1])
    joined = starts[kept]
    return joined, sums / np.diff(joined)
