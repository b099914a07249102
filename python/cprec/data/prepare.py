"""From an interaction file to a prepared folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from .catalogue import Catalogue, write_ids
from .errors import DataError, Progress, no_progress
from .files import MARKER, META, check_target, digest, fingerprint, new_folder
from .readers import Ids, Interactions, scan_interactions
from .sequences import FILES, ITEMS, OFFSETS, TEST, TRAIN_ENDS, USERS, VALID, VERSION, IntArray, PreparedData
from .splits import check_fractions, make_split

Codes = npt.NDArray[np.int32]

_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Coded:
    """Interactions as numbers, sequence after sequence.

    Attributes:
        items: (n,) int32 codes 0..M-1. offsets: (N + 1,) int64, no sequence empty. times: (n,) or None.
        item_ids: (M,) raw ids by code; codes are in order of first appearance. user_ids: (N,) raw ids.
    """

    items: Codes
    offsets: IntArray
    times: npt.NDArray[Any] | None
    item_ids: pl.Series
    user_ids: pl.Series


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    ids: Ids = "auto",
    split: str = "leave-one-out",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_item_count: int = 1,
    min_sequence_length: int = 1,
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Read an interaction file, split it and write one folder that training maps into memory.

    The order within a user is by time where the source has times (stable: equal times keep the file's order), else the
    file's. Repeated interactions are kept. Users stand in order of first appearance. The folder appears whole or not at
    all. Memory: about 20 bytes per interaction besides the raw ids of the different users and items.

    Args:
        source: the file. out: the folder to write.
        format, user_column, item_column, time_column, ids: see :func:`scan_interactions`.
        split: ``"leave-one-out"`` (last interaction of every user for test, the one before for validation; users with
            fewer than 3 are only trained), ``"user"`` (random users held out whole, the target being their last
            interaction) or ``"time"`` (two cuts in time for all users alike; the target is a user's first interaction
            after a cut).
        valid_fraction, test_fraction: of users or of interactions, for the last two splits.
        min_item_count, min_sequence_length: drop rarer items and users with fewer interactions, again and again until
            both hold (both 5: the "5-core").
        seed: draws the users of a split by user. name: of the data set, by default that of the file.
        overwrite: replace ``out`` if it is a prepared folder. progress: see :data:`Progress`.

    Raises:
        DataError: the input is unusable (with file and line), a part of the split is empty, or ``out`` exists.
        ValueError: an option is out of its range.
    """
    source, out = Path(source), Path(out)
    tell = progress or no_progress
    check_fractions(split, valid_fraction, test_fraction)
    for option, value in (("min_item_count", min_item_count), ("min_sequence_length", min_sequence_length)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    check_target(out, overwrite)
    interactions = scan_interactions(
        source,
        format=format,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        ids=ids,
    )
    if split == "time" and not interactions.has_time:
        hint = f"; its columns are: {', '.join(interactions.layout.columns)}" if interactions.layout.columns else ""
        raise DataError(f"a split by time needs timestamps, but this {interactions.format} file has none{hint}", source)
    before = _identity(source)
    tell("checking the file", 1, _STEPS)
    interactions.check()
    coded = _encode(interactions, tell, min_item_count, min_sequence_length, keep_times=split == "time")
    origin = {"name": source.name, "bytes": before[0], "sha256": digest(source), "columns": interactions.layout.roles}
    if _identity(source) != before:
        raise DataError("the file changed while it was read; nothing was written", source)
    return write_prepared(
        out,
        coded,
        path=source,
        name=name or source.stem,
        source=origin,
        options={
            "format": interactions.format,
            "split": split,
            "valid_fraction": valid_fraction,
            "test_fraction": test_fraction,
            "min_item_count": min_item_count,
            "min_sequence_length": min_sequence_length,
            "seed": seed,
        },
        notes=interactions.notes,
        overwrite=overwrite,
        progress=tell,
    )


def _identity(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _encode(
    interactions: Interactions, tell: Progress, min_item_count: int, min_sequence_length: int, keep_times: bool
) -> Coded:
    """Numbers for users and items in order of first appearance, rows sorted by user and time."""
    tell("collecting users and items", 2, _STEPS)
    frame = interactions.frame.with_row_index("_row")
    first = [frame.group_by(column).agg(pl.col("_row").min()).sort("_row") for column in ("user", "item")]
    numbered = [table.with_row_index("code").with_columns(pl.col("code").cast(pl.Int32)) for table in first]
    users, items = interactions.collect_all(numbered)
    tell("numbering the interactions", 3, _STEPS)
    rows = interactions.frame
    for table, column in ((users, "user"), (items, "item")):
        codes = table.lazy().select(column, pl.col("code").alias(f"{column}_code"))
        rows = rows.join(codes, on=column, how="left", maintain_order="left")
    wanted = ["user_code", "item_code", *(["time"] if interactions.has_time else [])]
    coded = interactions.collect(rows.select(wanted))
    if coded["user_code"].null_count() or coded["item_code"].null_count():
        raise DataError("the file changed while it was read; nothing was written", interactions.path)
    coded, users, items = _core(coded, users, items, min_item_count, min_sequence_length)
    if not coded.height:
        raise DataError(
            f"no interaction is left with min_item_count={min_item_count} and min_sequence_length={min_sequence_length}",
            interactions.path,
        )
    tell("sorting", 4, _STEPS)
    keys = ["user_code", *(["time"] if interactions.has_time else [])]
    if interactions.has_time or not coded["user_code"].is_sorted():
        coded = coded.sort(keys, maintain_order=True)
    lengths = np.bincount(coded["user_code"].to_numpy(), minlength=users.height)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = coded["time"].to_numpy() if keep_times else None
    return Coded(coded["item_code"].to_numpy(), offsets, times, items["item"], users["user"])


def _core(
    coded: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, min_item_count: int, min_sequence_length: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Drop rare items and short users until none is left of either, and number the rest anew in the same order."""
    if min_item_count == min_sequence_length == 1:
        return coded, users, items
    user, item = coded["user_code"].to_numpy(), coded["item_code"].to_numpy()
    kept = np.arange(len(user))
    while True:
        often = np.bincount(item[kept], minlength=items.height) >= min_item_count
        remaining = kept[often[item[kept]]]
        long = np.bincount(user[remaining], minlength=users.height) >= min_sequence_length
        remaining = remaining[long[user[remaining]]]
        if len(remaining) == len(kept):
            break
        kept = remaining
    present = []
    for codes, table in ((user, users), (item, items)):
        seen = np.zeros(table.height, dtype=bool)
        seen[codes[kept]] = True
        present.append(seen)
    anew = [(np.cumsum(seen) - 1).astype(np.int32) for seen in present]
    coded = coded[kept].with_columns(user_code=pl.Series(anew[0][user[kept]]), item_code=pl.Series(anew[1][item[kept]]))
    return coded, users.filter(pl.Series(present[0])), items.filter(pl.Series(present[1]))


def write_prepared(
    out: Path,
    coded: Coded,
    *,
    path: Path | None = None,
    name: str,
    source: dict[str, Any],
    options: dict[str, Any],
    notes: tuple[str, ...] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> PreparedData:
    """Split coded interactions, sort the catalogue by training frequency and write the folder.

    ``path`` names the source in errors; the other arguments go into meta.json.

    Raises:
        DataError: a part of the split is empty, or ``out`` exists.
    """
    fractions = options["valid_fraction"], options["test_fraction"]
    try:
        split = make_split(options["split"], coded.offsets, coded.times, *fractions, options["seed"])
    except DataError as error:
        raise DataError(str(error), path) from None
    progress("counting training interactions", 5, _STEPS)
    trained = _inside(coded.offsets[:-1], split.train_ends, len(coded.items))
    counts = np.bincount(coded.items[trained], minlength=len(coded.item_ids)).astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    number = np.empty(len(order), dtype=np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    catalogue = Catalogue(coded.item_ids.gather(order), counts[order])
    meta: dict[str, Any] = {
        "format": MARKER,
        "version": VERSION,
        "name": name,
        "source": source,
        "options": options | ({} if split.cuts is None else {"cuts": list(split.cuts)}),
        "notes": list(notes),
        "sizes": {
            "users": len(coded.offsets) - 1,
            "items": len(order),
            "interactions": len(coded.items),
            "train_interactions": int(counts.sum()),
            "train_sequences": int((split.train_ends > coded.offsets[:-1]).sum()),
            "trained_items": int((counts > 0).sum()),
            "valid": len(split.valid),
            "test": len(split.test),
        },
    }
    with new_folder(out, overwrite) as work:
        for file, array in (
            (ITEMS, number[coded.items]),
            (OFFSETS, coded.offsets),
            (TRAIN_ENDS, split.train_ends),
            (VALID, split.valid),
            (TEST, split.test),
        ):
            np.save(work / file, array, allow_pickle=False)
        write_ids(work / USERS, coded.user_ids)
        catalogue.save(work)
        meta["files"] = {
            file: {"bytes": (work / file).stat().st_size, "blake2b": digest(work / file, "blake2b")} for file in FILES
        }
        meta["fingerprint"] = fingerprint(meta)
        (work / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
    progress("done", _STEPS, _STEPS)
    return PreparedData.open(out, verify=False)


def _inside(starts: IntArray, ends: IntArray, size: int) -> npt.NDArray[np.bool_]:
    """(size,) True between every start and its end; the spans do not overlap."""
    some = ends > starts
    change = np.zeros(size + 1, dtype=np.int8)
    change[starts[some]] += 1
    change[ends[some]] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool)
