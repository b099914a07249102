"""The best path under a budget: which cuts and ranks make a sum least while another sum stays within bounds.

A partition is a path through the places to cut, 0 = p_0 < ... < p_m = K; an edge is a cluster together with its rank. Both
the objective and what the budget limits are sums over edges, of which the first (the head) depends on the number of
clusters. Dynamic programming solves the problem in which the budget is priced at a multiplier; the best multiplier gives a
bound from below for every beginning of a path, and a path. Beginnings whose bound does not beat the best path so far are
dropped, as are those that another beginning with the same end beats in both sums, and the rest is enumerated: the result
is the optimum, not an approximation of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PRICE_STEPS = 40
EDGES_AT_ONCE = 1 << 22  # labels times edges that one expansion holds in memory
# Relative: sums this near to each other are equal but for the order of their terms. Paths whose values are count as equally
# good, and a path whose sum is this near to the budget is within it.
SLACK = 1e-12


@dataclasses.dataclass(frozen=True)
class Edges:
    """A quantity per cluster, for R ranks, falling, and m + 1 places.

    Attributes:
        heads: (n, R, m + 1), of a head that ends at a place, when there are 1..n clusters; inf at place 0.
        tails: (R, m + 1, m + 1), of a tail between two places; inf where the second is not behind the first.
    """

    heads: FloatArray
    tails: FloatArray

    def plus(self, other: Edges, price: float) -> Edges:
        """This quantity and ``price`` times the other one."""
        # 0 times inf is no number: what an edge that is not there costs is left to the first term.
        heads, tails = (np.where(np.isinf(array), 0.0, array) for array in (other.heads, other.tails))
        return Edges(self.heads + price * heads, self.tails + price * tails)


@dataclasses.dataclass(frozen=True)
class Path:
    """Place at which every cluster ends, index of its rank, and the sums of both quantities."""

    ends: tuple[int, ...]
    ranks: tuple[int, ...]
    value: float
    spent: float


def cost_to_go(edges: Edges) -> FloatArray:
    """(n, R, m + 1): least sum of t tails, t = 0..n-1, from a place to the last one, of this rank or a lower one."""
    clusters, ranks, places = edges.heads.shape
    found = np.full((clusters, ranks, places), np.inf)
    found[0, :, -1] = 0.0
    for left in range(1, clusters):
        best = (edges.tails + found[left - 1][:, None, :]).min(axis=2)
        found[left] = np.minimum.accumulate(best[::-1], axis=0)[::-1]
    return found


def cheapest(edges: Edges) -> float:
    """The least sum of a path."""
    return float((edges.heads + cost_to_go(edges)).min())


def best_path(value: Edges, spent: Edges, budget: float) -> Path | None:
    """The path with the least ``value`` among those whose ``spent`` is at most ``budget``; None when there is none."""
    budget += SLACK * abs(budget)
    least_left = cost_to_go(spent)
    if not (spent.heads + least_left).min() <= budget:
        return None
    price, bound_left, best = _best_price(value, spent, budget)
    if price == 0.0:
        return best
    return _enumerate(value, spent, budget, price, bound_left, least_left, best)


def _best_price(value: Edges, spent: Edges, budget: float) -> tuple[float, FloatArray, Path | None]:
    """The multiplier with the highest bound, its costs to go, and the best path met within the budget."""

    def at(price: float) -> tuple[FloatArray, Path]:
        priced = value.plus(spent, price)
        left = cost_to_go(priced)
        return left, _trace(priced, left, value, spent)

    left, path = at(0.0)
    if path.spent <= budget:
        return 0.0, left, path
    low, high = 0.0, 1.0 / max(budget, 1e-300)
    best: Path | None = None
    for _ in range(PRICE_STEPS):
        left, path = at(high)
        if path.spent <= budget:
            best = path
            break
        low, high = high, high * 8
    if best is None:  # only a path that is the cheapest of all fits, and no price makes it stand out
        return high, left, None
    for _ in range(PRICE_STEPS):
        middle = 0.5 * (low + high)
        if not low < middle < high or high - low <= 1e-9 * high:
            break
        at_middle = at(middle)
        if at_middle[1].spent <= budget:
            high, (left, path) = middle, at_middle
            best = path if path.value < best.value else best
        else:
            low = middle
    return high, left, best


def _trace(priced: Edges, left: FloatArray, value: Edges, spent: Edges) -> Path:
    """The path that attains the costs to go."""
    totals = priced.heads + left
    tails, rank, end = map(int, np.unravel_index(int(totals.argmin()), totals.shape))
    ends, ranks = [end], [rank]
    worth, used = value.heads[tails, rank, end], spent.heads[tails, rank, end]
    for remaining in range(tails - 1, -1, -1):
        options = priced.tails[ranks[-1] :, ends[-1], :] + left[remaining][ranks[-1] :]
        step, end = map(int, np.unravel_index(int(options.argmin()), options.shape))
        rank = ranks[-1] + step
        worth += value.tails[rank, ends[-1], end]
        used += spent.tails[rank, ends[-1], end]
        ends.append(end)
        ranks.append(rank)
    return Path(tuple(ends), tuple(ranks), float(worth), float(used))


@dataclasses.dataclass
class _Labels:
    """Beginnings of paths: place and rank of the last cluster, sums so far, and the label each goes on from."""

    end: IntArray
    rank: IntArray
    value: FloatArray
    spent: FloatArray
    parent: IntArray

    def take(self, kept: npt.NDArray[np.generic]) -> _Labels:
        return _Labels(*(getattr(self, field.name)[kept] for field in dataclasses.fields(self)))

    @staticmethod
    def join(parts: list[_Labels]) -> _Labels:
        names = [field.name for field in dataclasses.fields(_Labels)]
        return _Labels(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _enumerate(
    value: Edges,
    spent: Edges,
    budget: float,
    price: float,
    bound_left: FloatArray,
    least_left: FloatArray,
    best: Path | None,
) -> Path | None:
    """Every path that may beat ``best``, layer by layer; layer t holds beginnings that t tails complete."""
    clusters, ranks, places = value.heads.shape
    limit = np.inf if best is None else best.value - SLACK * abs(best.value)

    def promising(values: FloatArray, used: FloatArray, bound: FloatArray, least: FloatArray) -> npt.NDArray[np.bool_]:
        within = used + least <= budget
        found: npt.NDArray[np.bool_] = within & (values + price * (used - budget) + bound < limit)
        return found

    layers: dict[int, _Labels] = {}
    entering: _Labels | None = None
    for left in range(clusters - 1, -1, -1):
        heads = promising(value.heads[left], spent.heads[left], bound_left[left], least_left[left])
        rank, end = np.nonzero(heads)
        root = np.full(len(rank), -1, dtype=np.int64)
        labels = _Labels(end, rank, value.heads[left, rank, end], spent.heads[left, rank, end], root)
        labels = labels if entering is None else _Labels.join([labels, entering])
        layers[left] = labels = labels.take(_undominated(labels, places))
        if left == 0:
            break
        parts = [labels.take(np.zeros(0, dtype=np.int64))]
        step = max(1, EDGES_AT_ONCE // (ranks * places))
        allowed = np.arange(ranks)
        for first in range(0, len(labels.end), step):
            some = slice(first, first + step)
            values = labels.value[some, None, None] + value.tails[:, labels.end[some], :].transpose(1, 0, 2)
            used = labels.spent[some, None, None] + spent.tails[:, labels.end[some], :].transpose(1, 0, 2)
            good = promising(values, used, bound_left[left - 1], least_left[left - 1])
            good &= (allowed >= labels.rank[some, None])[:, :, None]
            parent, rank, end = np.nonzero(good)
            parts.append(_Labels(end, rank, values[good], used[good], parent + first))
        entering = _Labels.join(parts)
    final = layers[0]
    if not len(final.end):
        return best
    index = int(np.lexsort((final.spent, final.value))[0])
    ends, chosen, result = [], [], (float(final.value[index]), float(final.spent[index]))
    for left in range(clusters):
        ends.append(int(layers[left].end[index]))
        chosen.append(int(layers[left].rank[index]))
        index = int(layers[left].parent[index])
        if index < 0:
            break
    return Path(tuple(ends[::-1]), tuple(chosen[::-1]), *result)


def _undominated(labels: _Labels, places: int) -> IntArray:
    """Labels that no other one with the same end and rank beats in one sum and meets in the other."""
    if not len(labels.end):
        return np.zeros(0, dtype=np.int64)
    key = labels.rank * places + labels.end
    order = np.lexsort((labels.value, labels.spent, key))
    _, group = np.unique(key[order], return_inverse=True)
    # A later group's values are shifted below all of an earlier one's, so that one running minimum serves them all.
    span = float(np.ptp(labels.value)) + 1.0
    shifted = labels.value[order] - group * span
    kept = np.ones(len(order), dtype=bool)
    kept[1:] = shifted[1:] < np.minimum.accumulate(shifted)[:-1]
    return np.asarray(order[kept], dtype=np.int64)
