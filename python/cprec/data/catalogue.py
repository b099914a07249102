"""Items by their numbers: 0 is the most frequent one in training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from .files import of_one_preparation

IDS = "items.arrow"
COUNTS = "counts.npy"


class Catalogue:
    """Raw item ids and training counts, sorted by count.

    Items are numbered 0..num_items-1 by falling number of training interactions; ties by first appearance in the
    source, so items that training never sees come last, with count 0. The ids stay in their Arrow file until they are
    asked for, and look-ups scan it, so that 10**7 items open at once.

    Args:
        raw_ids: (K,) ids as text, all different, in the order of the numbers.
        counts: (K,) int64 training counts, not increasing.

    Raises:
        ValueError: the two differ in length, or the counts increase somewhere.
    """

    _folder: Path
    _fingerprint: str

    def __init__(self, raw_ids: Sequence[str] | pl.Series, counts: npt.ArrayLike) -> None:
        self.raw_ids = raw_ids if isinstance(raw_ids, pl.Series) else pl.Series("id", raw_ids, dtype=pl.String)
        self.counts: npt.NDArray[np.int64] = np.asarray(counts, dtype=np.int64)
        if self.counts.shape != (len(self.raw_ids),):
            raise ValueError(f"{len(self.raw_ids):,} ids need as many counts, got shape {self.counts.shape}")
        if (self.counts[1:] > self.counts[:-1]).any():
            item = int((self.counts[1:] > self.counts[:-1]).argmax()) + 1
            raise ValueError(
                f"counts must not increase, but item {item} has {self.counts[item]:,}, more than item {item - 1}"
            )

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> Catalogue:
        """The catalogue of the prepared folder that has this fingerprint, memory-mapped."""
        catalogue = cls.__new__(cls)
        catalogue._folder, catalogue._fingerprint = folder, fingerprint
        catalogue.counts = np.load(folder / COUNTS, allow_pickle=False)
        return catalogue

    def save(self, folder: Path) -> None:
        """Write the two files that :meth:`load` reads."""
        write_ids(folder / IDS, self.raw_ids)
        np.save(folder / COUNTS, self.counts, allow_pickle=False)

    @functools.cached_property
    def raw_ids(self) -> pl.Series:
        """(K,) ids as text; indexing and iteration give str, :meth:`decode` is quicker for many."""
        return read_ids(self._folder, IDS, self._fingerprint)

    @property
    def num_items(self) -> int:
        return len(self.counts)

    def __len__(self) -> int:
        return self.num_items

    def __repr__(self) -> str:
        return f"Catalogue({self.num_items:,} items, {int(self.counts.sum()):,} training interactions)"

    def encode(self, ids: Sequence[str] | Iterable[str] | pl.Series) -> npt.NDArray[np.int64]:
        """Numbers of raw ids, -1 where the catalogue does not know one. One scan of the catalogue per call: batch them.

        Raises:
            TypeError: a single string was given, or an id is not a string.
        """
        if isinstance(ids, str):
            raise TypeError(f"encode takes a list of ids, got the string {ids!r}")
        wanted = ids if isinstance(ids, pl.Series) else list(ids)
        if not isinstance(wanted, pl.Series):
            other = next((value for value in wanted if not isinstance(value, str)), None)
            if other is not None:
                raise TypeError(f"ids are strings, got {other!r} of type {type(other).__name__}")
        query = pl.DataFrame({"id": pl.Series(wanted, dtype=pl.String)})
        known = pl.DataFrame({"id": self.raw_ids}).lazy().with_row_index("item")
        hits = known.filter(pl.col("id").is_in(query["id"].unique().implode()))
        joined = query.lazy().join(hits, on="id", how="left", maintain_order="left")
        numbers = joined.select(pl.col("item").cast(pl.Int64).fill_null(-1)).collect()["item"]
        return numbers.to_numpy(writable=True)

    def decode(self, items: Iterable[int] | npt.NDArray[np.integer]) -> list[str]:
        """Raw ids of item numbers. Raises IndexError for a number outside 0..num_items-1."""
        numbers = np.asarray(items if isinstance(items, np.ndarray) else list(items), dtype=np.int64).reshape(-1)
        outside = (numbers < 0) | (numbers >= self.num_items)
        if outside.any():
            raise IndexError(f"item {numbers[outside][0]} is outside 0..{self.num_items - 1}")
        found: list[str] = self.raw_ids.gather(numbers).to_list()
        return found


def write_ids(path: Path, ids: pl.Series) -> None:
    """One column ``id`` as Arrow IPC. The oldest layout keeps text in one buffer: same ids, same bytes."""
    frame = ids.rename("id").rechunk().to_frame()
    frame.write_ipc(path, compression="uncompressed", compat_level=pl.CompatLevel.oldest())


def read_ids(folder: Path, name: str, fingerprint: str) -> pl.Series:
    """What :func:`write_ids` wrote. Raises DataError if the folder is not that of this fingerprint any more."""
    with of_one_preparation(folder, fingerprint):
        return pl.read_ipc(folder / name)["id"]
