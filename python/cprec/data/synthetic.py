"""Sequences made up with a seed: Zipf popularity, and an order that a model can learn.

The process. All K items lie on a circle of length 1, in random order. The item of popularity rank r (0 = most popular)
takes an arc of length p_r = (r + 1)**-zipf / sum_s (s + 1)**-zipf. A user is a point u on the circle and interacts with
the item whose arc holds it:

    u_1 ~ uniform;   u_{t+1} = u_t + drift + spread * normal  (mod 1)   with probability 1 - restart
                     u_{t+1} ~ uniform                                  with probability restart

A uniform point stays uniform under such a step, so every interaction has exactly the Zipf marginal p, whatever came
before, while the next item given the history is one of the few whose arcs lie near u + drift. A popular item's wide arc
tells little on u, and the items before it tell more: a model that sees the history beats one that sees the last item.
There is no (K, K) table: a step is one binary search in the K cumulated arcs.

Item ids are 0..K-1 in random order, unrelated to popularity and to the place on the circle. Lengths are
``min_length`` plus a geometric number with mean ``mean_length - min_length``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from .errors import DataError, Progress, no_progress
from .files import check_target, new_file
from .prepare import Coded, write_prepared
from .sequences import PreparedData, Sequences
from .splits import check_fractions

_CHUNK = 1 << 16  # sequences drawn from one random stream: bounds the memory, and is part of what a seed means


def generate(
    num_items: int,
    num_sequences: int,
    *,
    mean_length: float = 20.0,
    min_length: int = 3,
    zipf: float = 1.0,
    drift: float = 0.381966,
    spread: float = 0.01,
    restart: float = 0.1,
    seed: int = 0,
) -> Sequences:
    """Sequences by the process above, the same for the same arguments.

    Args:
        num_items: K. Rare items may not occur. num_sequences: N.
        mean_length: mean length of a sequence. min_length: least length; 3 lets leave-one-out use every sequence.
        zipf: exponent of the popularity; 0 makes all items equally popular.
        drift: step along the circle; away from small fractions like 1/2, sequences do not close on themselves soon.
        spread: standard deviation of a step, as a share of the circle: larger is harder to predict.
        restart: probability of a step to a random place.

    Returns:
        Sequences with int32 items in 0..K-1.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, count in (("num_items", num_items), ("num_sequences", num_sequences), ("min_length", min_length)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if num_items > np.iinfo(np.int32).max:
        raise ValueError(f"num_items must be below 2**31, got {num_items}")
    if mean_length < min_length:
        raise ValueError(f"mean_length must be at least min_length ({min_length}), got {mean_length}")
    if zipf < 0 or spread < 0 or not 0 <= restart <= 1:
        raise ValueError(f"needs zipf >= 0, spread >= 0 and restart in 0..1, got {zipf}, {spread}, {restart}")
    random = np.random.default_rng((seed, 0))
    item_at = random.permutation(num_items).astype(np.int32)
    arcs = (random.permutation(num_items) + 1.0) ** -zipf
    arc_ends = np.cumsum(arcs)
    arc_ends /= arc_ends[-1]
    lengths = min_length - 1 + random.geometric(1 / (mean_length - min_length + 1), num_sequences)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.empty(offsets[-1], dtype=np.int32)
    for chunk, first in enumerate(range(0, num_sequences, _CHUNK)):
        bounds = offsets[first : first + _CHUNK + 1]
        walk = _walk(np.random.default_rng((seed, 1, chunk)), bounds - bounds[0], drift, spread, restart)
        place = np.minimum(np.searchsorted(arc_ends, walk, side="right"), num_items - 1)
        items[bounds[0] : bounds[-1]] = item_at[place]
    return Sequences(items, offsets)


def _walk(
    random: np.random.Generator, offsets: npt.NDArray[np.int64], drift: float, spread: float, restart: float
) -> npt.NDArray[np.float64]:
    """Points (n,) in 0..1 of the sequences between ``offsets``."""
    n = int(offsets[-1])
    fresh = random.random(n) < restart
    fresh[offsets[:-1]] = True
    jump = random.random(n)
    travelled = np.cumsum(np.where(fresh, 0.0, drift + spread * random.standard_normal(n)))
    start = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))  # last fresh point at or before each
    return np.asarray((jump[start] + travelled - travelled[start]) % 1.0)


def write_interactions(path: str | Path, sequences: Sequences, *, overwrite: bool = False) -> Path:
    """Write sequences as text, one per line with spaces between the items (format ``sequences``), whole or not at all.

    Raises:
        DataError: ``path`` exists and ``overwrite`` is False. ValueError: a sequence is empty, which a line cannot say.
    """
    path = Path(path)
    if path.exists() and (not overwrite or not path.is_file()):
        raise DataError("exists already; pass overwrite=True to replace it", path)
    if (sequences.lengths < 1).any():
        raise ValueError(f"sequence {int((sequences.lengths < 1).argmax())} is empty")
    with new_file(path) as work, work.open("wb") as file:
        for first in range(0, len(sequences), _CHUNK):
            part = slice(first, first + _CHUNK)
            block = Sequences.view(sequences.items, sequences.starts[part], sequences.ends[part]).compact()
            frame = pl.DataFrame({"row": np.repeat(np.arange(len(block)), block.lengths), "item": block.items})
            lines = frame.group_by("row", maintain_order=True).agg(pl.col("item").cast(pl.String).str.join(" "))
            lines.select("item").write_csv(file, include_header=False, quote_style="never")
    return path


def prepare_synthetic(
    out: str | Path,
    num_items: int,
    num_sequences: int,
    *,
    mean_length: float = 20.0,
    min_length: int = 3,
    zipf: float = 1.0,
    drift: float = 0.381966,
    spread: float = 0.01,
    restart: float = 0.1,
    seed: int = 0,
    split: str = "leave-one-out",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    name: str = "synthetic",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """:func:`generate` straight into a prepared folder, without a text file between.

    The catalogue has all ``num_items`` items, those that never occur last with count 0; users are numbered from 1.

    Raises:
        DataError: ``out`` exists, or a part of the split is empty (``"time"``: there are no times).
    """
    out, tell = Path(out), progress or no_progress
    check_fractions(split, valid_fraction, test_fraction)
    check_target(out, overwrite)
    tell("generating", 0, None)
    process: dict[str, Any] = {"mean_length": mean_length, "min_length": min_length, "zipf": zipf, "drift": drift}
    process |= {"spread": spread, "restart": restart}
    size = {"num_items": num_items, "num_sequences": num_sequences}
    made = generate(num_items, num_sequences, **process, seed=seed)
    first = np.full(num_items, len(made.items), dtype=np.int64)
    first[made.items[::-1]] = np.arange(len(made.items) - 1, -1, -1)
    by_appearance = np.argsort(first, kind="stable")
    code = np.empty(num_items, dtype=np.int32)
    code[by_appearance] = np.arange(num_items, dtype=np.int32)
    ids = pl.Series("item", by_appearance).cast(pl.String)
    users = pl.int_range(1, num_sequences + 1, eager=True).cast(pl.String)
    return write_prepared(
        out,
        Coded(code[made.items], made.offsets, None, ids, users),
        name=name,
        source={"name": "synthetic", "generator": size | process},
        options={
            "format": "generated",
            "split": split,
            "valid_fraction": valid_fraction,
            "test_fraction": test_fraction,
            "min_item_count": 0,
            "min_sequence_length": 1,
            "seed": seed,
        },
        overwrite=overwrite,
        progress=tell,
    )
