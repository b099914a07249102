"""Which interactions are trained, and which are the hidden targets of validation and test.

All three splits are stored the same way: where the training part of every sequence ends, and the positions of the
targets in the flat array of all interactions. The history of a target is all that precedes it in its sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError

SPLITS = ("leave-one-out", "user", "time")

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Split:
    """Positions in the flat array of interactions, int64.

    Attributes:
        train_ends: (N,) end of the training part of every sequence; its start where nothing of it is trained.
        valid, test: positions of the targets, ascending, at most one per sequence.
        cuts: the two times that a split by time cuts at, else None.
    """

    train_ends: IntArray
    valid: IntArray
    test: IntArray
    cuts: tuple[float, float] | None = None


def make_split(
    kind: str,
    offsets: IntArray,
    times: npt.NDArray[Any] | None,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
) -> Split:
    """One of ``SPLITS`` over sequences ``offsets`` (N + 1,), none of them empty.

    Raises:
        DataError: a part is empty: no transition to train, or no target; or a split by time without times.
    """
    if kind == "leave-one-out":
        split = leave_one_out(offsets)
    elif kind == "user":
        split = by_user(offsets, valid_fraction, test_fraction, seed)
    elif times is None:
        raise DataError("a split by time needs timestamps, and there are none; name the column with time_column=")
    else:
        split = by_time(offsets, times, valid_fraction, test_fraction)
    longest = int((split.train_ends - offsets[:-1]).max(initial=0))
    if longest < 2:
        raise DataError(
            f"the train split is empty: under split={kind!r} no sequence keeps the 2 interactions of a "
            f"transition (the longest of {len(offsets) - 1:,} sequences has {int(np.diff(offsets).max(initial=0))} in all)"
        )
    for name, targets in (("valid", split.valid), ("test", split.test)):
        if not len(targets):
            why = {
                "leave-one-out": "no sequence has the 3 interactions that leave-one-out needs",
                "user": "no user with 2 interactions was left for it; raise its fraction or bring more users",
                "time": "no user has interactions both before and after the cut; change the fractions",
            }[kind]
            raise DataError(f"the {name} split is empty: {why}")
    return split


def leave_one_out(offsets: IntArray) -> Split:
    """Last interaction for test, the one before for validation; sequences shorter than 3 are trained whole."""
    starts, ends = offsets[:-1], offsets[1:]
    long = ends - starts >= 3
    return Split(np.where(long, ends - 2, ends), ends[long] - 2, ends[long] - 1)


def by_user(offsets: IntArray, valid_fraction: float, test_fraction: float, seed: int) -> Split:
    """Random users held out whole, their last interaction being the target; at least one for each part.

    Only users with 2 interactions or more are drawn; the fractions are of those.
    """
    starts, ends = offsets[:-1], offsets[1:]
    users = np.flatnonzero(ends - starts >= 2)
    sizes = [max(1, round(fraction * len(users))) for fraction in (valid_fraction, test_fraction)]
    drawn = np.random.default_rng(seed).permutation(users)
    valid, test = np.sort(drawn[: sizes[0]]), np.sort(drawn[sizes[0] : sum(sizes)])
    train_ends = ends.copy()
    train_ends[valid], train_ends[test] = starts[valid], starts[test]
    return Split(train_ends, ends[valid] - 1, ends[test] - 1)


def by_time(offsets: IntArray, times: npt.NDArray[Any], valid_fraction: float, test_fraction: float) -> Split:
    """Two cuts in time, the same for all users: training is what comes before the first.

    The cuts are the times of the interactions that stand ``valid_fraction + test_fraction`` and ``test_fraction`` from
    the end of all interactions in order of time. The validation target of a user is the first interaction at or after
    the first cut (and before the second), the test target the first one at or after the second; without a history
    before it, it is left out.

    Args:
        times: (n,) time of every interaction, ascending within every sequence.
    """
    starts, ends = offsets[:-1], offsets[1:]
    n = len(times)
    places = [min(n - 1, int(n * (1 - valid_fraction - test_fraction))), min(n - 1, int(n * (1 - test_fraction)))]
    first, second = np.partition(times, places)[places]

    def before(cut: Any) -> IntArray:
        """Position of every sequence's first interaction at or after ``cut``."""
        total = np.concatenate([[0], np.cumsum(times < cut, dtype=np.int64)])
        return np.asarray(starts + total[ends] - total[starts], dtype=np.int64)

    at_first, at_second = before(first), before(second)
    valid = at_first[(at_first > starts) & (at_first < at_second)]
    test = at_second[(at_second > starts) & (at_second < ends)]
    return Split(at_first, valid, test, (float(first), float(second)))


def check_fractions(kind: str, valid_fraction: float, test_fraction: float) -> None:
    """Raises ValueError for an unknown split or fractions outside (0, 1) or together 1 and more."""
    if kind not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {kind!r}")
    for name, value in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if valid_fraction + test_fraction >= 1.0:
        raise ValueError(f"valid_fraction + test_fraction must be below 1, got {valid_fraction + test_fraction}")
