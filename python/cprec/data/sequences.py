"""Sequences of items in one flat array, and the prepared folder that holds them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from .catalogue import COUNTS, IDS, Catalogue, read_ids
from .errors import DataError
from .files import MARKER, META, digest, fingerprint, of_one_preparation

VERSION = 1
ITEMS, OFFSETS, TRAIN_ENDS, VALID, TEST = "sequences.npy", "offsets.npy", "train_ends.npy", "valid.npy", "test.npy"
USERS = "users.arrow"
FILES = (ITEMS, OFFSETS, TRAIN_ENDS, VALID, TEST, USERS, IDS, COUNTS)

IntArray = npt.NDArray[np.int64]


class Sequences:
    """Sequences of item numbers: sequence i is ``items[starts[i]:ends[i]]``.

    Args:
        items: flat integer array, usually a read-only memory map; never copied.
        offsets: (N + 1,) int64; sequence i lies between ``offsets[i]`` and ``offsets[i + 1]``.

    A copy in another process maps the file of ``items`` again.
    """

    _file: tuple[int, ...] | None = None  # which file ``items`` is mapped from, where that is known

    def __init__(self, items: npt.NDArray[np.integer], offsets: npt.ArrayLike) -> None:
        offsets = np.asarray(offsets, dtype=np.int64)
        if offsets.ndim != 1 or not len(offsets):
            raise ValueError(f"offsets must be a vector of N + 1 positions, got shape {offsets.shape}")
        self._set(items, offsets[:-1], offsets[1:])

    @classmethod
    def view(cls, items: npt.NDArray[np.integer], starts: IntArray, ends: IntArray) -> Sequences:
        """Sequences that need neither touch each other nor fill ``items``: (N,) starts and (N,) ends."""
        sequences = cls.__new__(cls)
        sequences._set(items, np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64))
        return sequences

    def _set(self, items: npt.NDArray[np.integer], starts: IntArray, ends: IntArray) -> None:
        if items.ndim != 1 or items.dtype.kind not in "iu":
            raise ValueError(f"items must be a vector of integers, got {items.dtype} of shape {items.shape}")
        if starts.shape != ends.shape:
            raise ValueError(f"as many starts as ends are needed, got {starts.shape} and {ends.shape}")
        if len(starts) and (starts.min() < 0 or ends.max() > len(items) or (ends < starts).any()):
            raise ValueError(f"starts and ends must be in order and within the {len(items):,} items")
        self.items, self.starts, self.ends = items, starts, ends

    @property
    def offsets(self) -> IntArray:
        """(N + 1,) offsets. Raises ValueError for a view with gaps; see :meth:`compact`."""
        if not np.array_equal(self.starts[1:], self.ends[:-1]):
            raise ValueError("these sequences have gaps between them: use starts and ends, or compact()")
        return np.concatenate([self.starts, self.ends[-1:] if len(self.ends) else np.zeros(1, np.int64)])

    @property
    def lengths(self) -> IntArray:
        """(N,) int64."""
        return self.ends - self.starts

    @property
    def num_interactions(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        """Items of one sequence, oldest first, as a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return np.asarray(self.items[self.starts[index] : self.ends[index]])

    def __iter__(self) -> Iterator[npt.NDArray[np.integer]]:
        return (self[index] for index in range(len(self)))

    def compact(self) -> Sequences:
        """The same sequences without gaps, copied into memory."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        shift = np.repeat(self.starts - offsets[:-1], self.lengths)
        return Sequences(np.asarray(self.items[np.arange(offsets[-1]) + shift]), offsets)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        items = self.items
        # a memory map would be pickled as its contents; workers map the file again instead
        if isinstance(items, np.memmap) and items.filename is not None and not isinstance(items.base, np.ndarray):
            state["items"] = (str(items.filename), items.dtype.str, items.shape, items.offset)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["items"], tuple):
            name, dtype, shape, offset = state["items"]
            if state.get("_file") not in (None, _file_of(name)):
                raise DataError("has been prepared again since it was opened; open it again", Path(name).parent)
            state["items"] = np.memmap(name, dtype=dtype, mode="r", shape=shape, offset=offset)
        self.__dict__.update(state)


def _file_of(path: str | Path) -> tuple[int, ...]:
    """What tells a file from another one of its name."""
    about = Path(path).stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class EvaluationSplit:
    """Hidden targets and what came before them.

    Attributes:
        name: "valid" or "test". histories: N sequences, none empty, without their targets.
        targets: (N,) int64 item numbers. users: (N,) int64 row of the user among all users of the folder.
    """

    name: str
    histories: Sequences
    targets: IntArray
    users: IntArray
    _read_user_ids: Callable[[], pl.Series] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def user_ids(self) -> pl.Series:
        """(N,) raw user ids as text."""
        return self._read_user_ids().gather(self.users)


class PreparedData:
    """A folder written by :func:`cprec.data.prepare`; get one with :meth:`open`.

    What is not read at once is mapped at once, so a folder that is prepared again meanwhile changes nothing here; ids of
    users and items, which are read when asked for, are then refused.

    Attributes:
        folder: where it is. meta: what meta.json says. catalogue: items, counts and raw ids.
        name: name of the data set. fingerprint: digest of everything in the folder and of how it was made.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        with of_one_preparation(folder, self.fingerprint):
            self.catalogue = Catalogue.load(folder, self.fingerprint)
            self._items: npt.NDArray[np.integer] = np.load(folder / ITEMS, mmap_mode="r", allow_pickle=False)
            self._items_file = _file_of(folder / ITEMS)
            self._offsets: IntArray = np.load(folder / OFFSETS, allow_pickle=False)
            self._train_ends, self._valid, self._test = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (TRAIN_ENDS, VALID, TEST)
            )

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> PreparedData:
        """Open a prepared folder.

        Args:
            verify: compare the checksum of every file (about a second per gigabyte); sizes are compared always.

        Raises:
            DataError: not a prepared folder, of another format version, or a file is missing, cut short or changed;
                the message names the file.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        for name, facts in meta["files"].items():
            path = folder / name
            if not path.is_file():
                raise DataError(f"is missing from the prepared folder; {_AGAIN}", path)
            size = path.stat().st_size
            if size != facts["bytes"]:
                raise DataError(
                    f"has {size:,} bytes, was written with {facts['bytes']:,}: cut short or changed; {_AGAIN}", path
                )
            if verify and digest(path, "blake2b") != facts["blake2b"]:
                raise DataError(f"has changed since it was written (its checksum differs); {_AGAIN}", path)
        try:
            return cls(folder, meta)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be opened: {error}; {_AGAIN}", folder) from None

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def fingerprint(self) -> str:
        return str(self.meta["fingerprint"])

    @property
    def num_items(self) -> int:
        """K; also the padding id of model inputs."""
        return self.catalogue.num_items

    @property
    def num_users(self) -> int:
        return len(self._offsets) - 1

    @property
    def counts(self) -> IntArray:
        """(K,) training counts, not increasing."""
        return self.catalogue.counts

    @functools.cached_property
    def user_ids(self) -> pl.Series:
        """Raw ids of all users, in order of first appearance."""
        return read_ids(self.folder, USERS, self.fingerprint)

    def _of_file(self, sequences: Sequences) -> Sequences:
        sequences._file = self._items_file
        return sequences

    @functools.cached_property
    def sequences(self) -> Sequences:
        """All interactions of every user, hidden targets included."""
        return self._of_file(Sequences(self._items, self._offsets))

    @functools.cached_property
    def train(self) -> Sequences:
        """Training parts of the sequences, those without one left out."""
        starts = self._offsets[:-1]
        ends = np.asarray(self._train_ends)
        some = ends > starts
        return self._of_file(Sequences.view(self._items, starts[some], ends[some]))

    def evaluation(self, split: str) -> EvaluationSplit:
        """Targets and histories of ``"valid"`` or ``"test"``."""
        if split not in ("valid", "test"):
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        positions: IntArray = np.asarray(self._valid if split == "valid" else self._test)
        users = np.searchsorted(self._offsets, positions, side="right") - 1
        histories = self._of_file(Sequences.view(self._items, self._offsets[users], positions))
        read_user_ids = functools.partial(read_ids, self.folder, USERS, self.fingerprint)
        return EvaluationSplit(split, histories, self._items[positions].astype(np.int64), users, read_user_ids)

    def check_source(self, path: str | Path) -> None:
        """Raises DataError when ``path`` is not byte for byte the file this folder was prepared from."""
        path = Path(path)
        source = self.meta["source"]
        if "sha256" not in source:
            raise DataError("was not prepared from a file", self.folder)
        if not path.is_file():
            raise DataError("no such file", path)
        size = path.stat().st_size
        if size != source["bytes"] or digest(path) != source["sha256"]:
            raise DataError(
                f"is not the file that {self.folder} was prepared from ({source['name']}, {source['bytes']:,} bytes; "
                f"this one has {size:,}); prepare it again",
                path,
            )

    def __repr__(self) -> str:
        return f"PreparedData({str(self.folder)!r}: {self.num_users:,} users, {self.num_items:,} items)"


_AGAIN = "prepare the data again"


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder, checked. Raises DataError."""
    path = folder / META
    if not folder.is_dir():
        if folder.exists():
            raise DataError("is a file, not a prepared folder; make one with 'cprec prepare'", folder)
        raise DataError("no such folder; make it with 'cprec prepare'", folder)
    if not path.is_file():
        raise DataError(f"is not a prepared folder (it has no {META}); make one with 'cprec prepare'", folder)
    try:
        meta = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"is not JSON: {error}; {_AGAIN}", path) from None
    if not isinstance(meta, dict) or meta.get("format") != MARKER:
        raise DataError("was not written by 'cprec prepare'", path)
    if meta.get("version") != VERSION:
        raise DataError(f"has format version {meta.get('version')}, this program reads {VERSION}; {_AGAIN}", path)
    if meta.get("fingerprint") != fingerprint(meta):
        raise DataError(f"has been edited since it was written; {_AGAIN}", path)
    return meta
