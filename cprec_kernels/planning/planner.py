"""Partitions from item counts: the one that loses least under a budget, what it costs, and what a plain softmax costs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cprec_kernels.partition import MAX_CLUSTERS, Partition, as_int
from cprec_kernels.planning import costs
from cprec_kernels.planning.counts import FloatArray, IntArray, Popularity
from cprec_kernels.planning.quality import QualityModel
from cprec_kernels.planning.search import Edges, best_path, cheapest

T = TypeVar("T")

DEFAULT_CLUSTERS = 5
DEFAULT_TOKENS = 2560  # the batch of `cprec train`: 128 sequences of 20 items
FRONTIER = (
    1.25,
    1.5,
    2.0,
    2.5,
    3.0,
    4.0,
    5.0,
    6.0,
    7.0,
    8.0,
    10.0,
    12.0,
    14.0,
    16.0,
    20.0,
    24.0,
    28.0,
    32.0,
    48.0,
    64.0,
)
BUDGETS = {
    "max_parameters": "parameters", "compression": "parameters", "max_train_ms": "train_ms", "max_topk_ms": "topk_ms",
}  # fmt: skip


class BudgetError(ValueError):
    """No partition is small or fast enough. ``smallest``: the least that the budgeted quantity can be."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class Objective(NamedTuple):
    """What is minimised: the loss, and weights times the share of a plain softmax's cost in a step and in a search.

    A weight of 0.1 gives up 1% of what can be known for a tenth of the plain softmax's cost.
    """

    train: float
    topk: float


OBJECTIVES = {"balanced": Objective(0.1, 0.1), "quality": Objective(0.0, 0.0), "speed": Objective(0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of a partition used for both tables of a recommender, embedding and softmax.

    Attributes:
        parameters: of a block embedding and a clustered softmax without biases, what they share once. bytes: theirs, in
            fp32.
        loss: the surrogate of :mod:`cprec_kernels.planning.quality`: share of what can be known that is lost; lower is
            better. It orders partitions of the same data and is no metric.
        train_ms: of a training step, without the model between the tables. topk_ms: of a search.
    """

    parameters: int
    loss: float
    train_ms: float
    topk_ms: float

    @property
    def bytes(self) -> int:
        return costs.FLOAT_BYTES * self.parameters

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "bytes": self.bytes}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A partition, what is predicted of it and of a plain softmax (one cluster at full rank).

    Attributes:
        budget: what was asked, e.g. {"compression": 6.0}.
        score: the minimised objective. plain_score: that of a plain softmax.
    """

    partition: Partition
    prediction: Prediction
    plain: Prediction
    budget: dict[str, float]
    score: float
    plain_score: float

    @property
    def compression(self) -> float:
        """Parameters of the plain tables over those of this partition."""
        return self.plain.parameters / self.prediction.parameters

    @property
    def is_slower_to_train(self) -> bool:
        return self.prediction.train_ms > self.plain.train_ms

    @property
    def is_slower_to_search(self) -> bool:
        return self.prediction.topk_ms > self.plain.topk_ms

    @property
    def is_worse(self) -> bool:
        """Whether a plain softmax is predicted to lose less."""
        return self.prediction.loss > self.plain.loss

    @property
    def is_outscored(self) -> bool:
        """Whether the objective is no better, rounding aside, than that of a plain softmax."""
        return self.score >= self.plain_score * (1 - 1e-9)

    @property
    def advice(self) -> str:
        """A sentence on whether to cluster at all."""
        ours, plain = self.prediction, self.plain
        if self.partition == Partition.single(self.partition.num_items, self.partition.embedding_dim):
            return "A plain softmax is the best there is within the budget: do not cluster."
        parts = [
            _compare("training step", plain.train_ms / ours.train_ms),
            _compare("top-N search", plain.topk_ms / ours.topk_ms),
        ]
        verdict = "worse" if self.is_worse else "no worse"
        parts.append(f"{verdict} than a plain softmax by the surrogate (loss {ours.loss:.3f}, plain {plain.loss:.3f})")
        return f"Predicted for tables of {self.compression:.2f} times fewer parameters: {', '.join(parts)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "budget": self.budget,
            "partition": self.partition.to_dict(),
            "compression": self.compression,
            "prediction": self.prediction.to_dict(),
            "plain": self.plain.to_dict(),
            "slower_to_train": self.is_slower_to_train,
            "slower_to_search": self.is_slower_to_search,
            "worse": self.is_worse,
            "advice": self.advice,
        }


def _compare(what: str, ratio: float) -> str:
    return f"{what} {ratio:.2f} times faster" if ratio >= 1 else f"{what} {1 / ratio:.2f} times slower"


def default_ranks(width: int) -> tuple[int, ...]:
    """Ranks worth trying, falling: the width, and below it the powers of two from 4 and their threefold from 24.

    4 is the least rank that anything was measured with (docs/planning.md); name lower ones where they are wanted.
    """
    powers = [2**i for i in range(2, width.bit_length())]
    found = {width, *powers, *(3 * power for power in powers if power >= 8)}
    return tuple(sorted((rank for rank in found if rank <= width), reverse=True))


class Planner:
    """Plans partitions of one catalogue; what does not depend on a budget is computed once.

    Args:
        counts: (K,) how often every item was seen, not increasing; integers or floats.
        embedding_dim: width d of the model.
        max_clusters: at most this many, itself at most 8.
        ranks: ranks to choose from, in 1..embedding_dim; default :func:`default_ranks`.
        objective: "balanced", "quality", "speed", or an :class:`Objective`.
        machine: "cpu", "gpu", or a :class:`~cprec_kernels.planning.costs.Machine`.
        tokens: predicted items per training step. rows: hidden states per search.
        quality: constants of the surrogate.
        tie_tails: embedding and softmax share the rows of all clusters but the first, each with projections of its own
            (:class:`cprec_kernels.nn.TiedBlocks`): a tail costs half, and has less than full rank.

    Raises:
        TypeError, ValueError: a value breaks one of these rules; the message names it.
    """

    def __init__(
        self,
        counts: npt.ArrayLike,
        embedding_dim: int,
        *,
        max_clusters: int = DEFAULT_CLUSTERS,
        ranks: Sequence[int] | None = None,
        objective: str | Objective = "balanced",
        machine: str | costs.Machine = "cpu",
        tokens: int = DEFAULT_TOKENS,
        rows: int = 1,
        quality: QualityModel | None = None,
        tie_tails: bool = False,
    ) -> None:
        self.tie_tails = tie_tails
        self.width = _whole("embedding_dim", embedding_dim, 1)
        self.tokens, self.rows = _whole("tokens", tokens, 1), _whole("rows", rows, 1)
        self.max_clusters = _whole("max_clusters", max_clusters, 1)
        if self.max_clusters > MAX_CLUSTERS:
            raise ValueError(f"max_clusters = {max_clusters}: at most {MAX_CLUSTERS} clusters are supported")
        given = default_ranks(self.width) if ranks is None else ranks
        self.ranks = tuple(sorted({_whole(f"ranks[{i}]", rank, 1) for i, rank in enumerate(given)}, reverse=True))
        if not self.ranks or self.ranks[0] > self.width:
            raise ValueError(f"ranks must hold at least one rank in 1..{self.width} (embedding_dim), got {given}")
        self.objective = _choose("objective", objective, Objective, OBJECTIVES)
        if not all(0 <= weight < math.inf for weight in self.objective):
            raise ValueError(f"weights of the objective must be finite numbers of at least 0, got {self.objective}")
        self.machine = _choose("machine", machine, costs.Machine, costs.MACHINES)
        self.quality = quality or QualityModel()
        self.popularity = Popularity.of(counts)

    @property
    def num_items(self) -> int:
        return self.popularity.num_items

    @functools.cached_property
    def plain(self) -> Prediction:
        """One cluster at full rank."""
        return self.predict(Partition.single(self.num_items, self.width))

    def predict(self, partition: Partition) -> Prediction:
        """What the model says of any partition of this catalogue.

        Raises:
            ValueError: it is one of another catalogue or width.
        """
        if (partition.num_items, partition.embedding_dim) != (self.num_items, self.width):
            raise ValueError(
                f"the partition is for {partition.num_items:,} items of width {partition.embedding_dim}, the planner "
                f"for {self.num_items:,} of width {self.width}"
            )
        clusters = partition.num_clusters
        sums = dict.fromkeys(("parameters", "loss", "train_ms", "topk_ms"), 0.0)
        for j, (first, end) in enumerate(itertools.pairwise(partition.offsets)):
            table = self._table(
                np.array([float(partition.ranks[j])]), np.array([first, end]), clusters - 1 if j == 0 else None
            )
            for name in sums:
                sums[name] += float(table[name][0, 0, 1])
        return Prediction(round(sums["parameters"]), sums["loss"], sums["train_ms"], sums["topk_ms"])

    def plan(
        self,
        *,
        max_parameters: float | None = None,
        compression: float | None = None,
        max_train_ms: float | None = None,
        max_topk_ms: float | None = None,
    ) -> Plan:
        """The partition with the least objective under exactly one budget.

        Args:
            max_parameters: of embedding and softmax together.
            compression: the same, as the least factor by which they are to be fewer than those of one cluster at full
                rank.
            max_train_ms, max_topk_ms: predicted cost of a step or a search.

        Raises:
            ValueError: no budget, or more than one, or one that is not a finite number above 0.
            BudgetError: nothing fits; the message has the smallest budget that something fits in.
        """
        given = {
            "max_parameters": max_parameters, "compression": compression,
            "max_train_ms": max_train_ms, "max_topk_ms": max_topk_ms,
        }  # fmt: skip
        budget = {name: float(value) for name, value in given.items() if value is not None}
        if len(budget) != 1:
            what = " and ".join(budget) or "none"
            raise ValueError(f"give exactly one budget of {', '.join(BUDGETS)}; got {what}")
        ((name, amount),) = budget.items()
        if not 0 < amount < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {given[name]}")
        limit = self.plain.parameters / amount if name == "compression" else amount
        quantity = BUDGETS[name]
        if quantity == "parameters":
            limit = math.floor(limit)
        spent = self._edges[quantity]
        path = best_path(self._score, spent, limit)
        if path is None:
            smallest = self.smallest(quantity)
            raise BudgetError(self._too_small(name, amount, smallest), smallest)
        cutoffs = [int(self._places[end]) for end in path.ends[:-1]]
        partition = Partition(self.num_items, cutoffs, [self.ranks[i] for i in path.ranks], self.width)
        plain_score = self.plain.loss + sum(self.objective)  # whose times are those that the weights are shares of
        return Plan(partition, self.predict(partition), self.plain, budget, path.value, plain_score)

    def smallest(self, quantity: str) -> float:
        """The least "parameters", "train_ms" or "topk_ms" of any partition."""
        return cheapest(self._edges[quantity])

    def frontier(self, compressions: Iterable[float] = FRONTIER) -> list[Plan]:
        """Plans for a list of compressions, those that nothing fits left out; a plan that others repeat is there once."""
        plans: list[Plan] = []
        for compression in sorted(set(compressions)):
            try:
                plan = self.plan(compression=compression)
            except BudgetError:
                break
            if plans and plans[-1].partition == plan.partition:
                plans.pop()
            plans.append(plan)
        return plans

    def _too_small(self, name: str, amount: float, smallest: float) -> str:
        # Rounded so that the number in the message is one that works.
        if name == "compression":
            return (
                f"compression = {amount:g} is more than there is: the smallest tables have {smallest:,.0f} parameters, "
                f"{self.plain.parameters / smallest / 1.0005:.4g} times fewer than the {self.plain.parameters:,} of a plain softmax"
            )
        least = f"{smallest:,.0f}" if name == "max_parameters" else f"{smallest * 1.0005:.4g}"
        return f"{name} = {amount:g} is too small for {self.num_items:,} items: the smallest possible is {least}"

    # Tables of every quantity per cluster

    @functools.cached_property
    def _places(self) -> IntArray:
        return np.concatenate([[0], self.popularity.cut_candidates(), [self.num_items]]).astype(np.int64)

    @functools.cached_property
    def _edges(self) -> dict[str, Edges]:
        ranks = np.array(self.ranks, dtype=np.float64)
        clusters = min(self.max_clusters, self.num_items)
        heads = [self._table(ranks, self._places, tails) for tails in range(clusters)]
        tails = self._table(ranks, self._places, None)
        backwards = np.arange(len(self._places))[:, None] >= np.arange(len(self._places))
        found = {}
        for name, tail in tails.items():
            head = np.stack([table[name][:, 0, :] for table in heads])
            head[:, :, 0] = np.inf
            tail = np.where(backwards, np.inf, tail)
            if self.tie_tails:  # at full rank there are no projections, and one vector would have to do for both roles
                tail[ranks == self.width] = np.inf
            found[name] = Edges(head, tail)
        return found

    @functools.cached_property
    def _score(self) -> Edges:
        score = self._edges["loss"].plus(self._edges["train_ms"], self.objective.train / self.plain.train_ms)
        return score.plus(self._edges["topk_ms"], self.objective.topk / self.plain.topk_ms)

    def _table(self, ranks: FloatArray, places: IntArray, labels: int | None) -> dict[str, FloatArray]:
        """Every quantity of clusters between two places: (R, m, m) for tails (``labels`` None).

        For a head with so many parent labels (R, 1, m): it starts at the first place.
        """
        is_tail = labels is None
        rank = ranks[:, None, None]
        first = places if is_tail else places[:1]
        items = np.abs(places[None, :] - first[:, None])[None].astype(np.float64)
        share = self.popularity.shares(places)
        seen = np.abs(share[None, :] - (share if is_tail else share[:1])[:, None])[None]
        losses = self.popularity.prefix(
            self.quality.item_losses(self.popularity, ranks, self.width, is_tail, self.tie_tails and is_tail), places
        )  # (R, m)
        entries = items + (labels or 0)
        projection = rank * self.width * (rank < self.width)
        target_tokens = self.tokens * (seen if is_tail else np.ones_like(seen))
        embedding = items * rank + projection
        softmax = entries * rank + projection
        stored = embedding + softmax - (items * rank if self.tie_tails and is_tail else 0.0)
        shared = 2.0 * projection + (labels or 0) * rank
        train = (
            costs.softmax_step_ms(self.machine, entries, rank, target_tokens, self.width)
            + costs.embedding_step_ms(self.machine, items, rank, self.tokens * seen, self.width)
            + costs.optimizer_ms(self.machine, stored)
        )
        return {
            "parameters": stored,
            "loss": losses[:, None, :]
            - losses[:, : len(first), None]
            + self.quality.shared_loss(self.popularity, shared),
            "train_ms": train,
            "topk_ms": costs.search_ms(self.machine, entries, rank, self.rows, self.width),
        }


def plan(
    counts: npt.ArrayLike,
    embedding_dim: int,
    *,
    max_parameters: float | None = None,
    compression: float | None = None,
    max_train_ms: float | None = None,
    max_topk_ms: float | None = None,
    **options: Any,
) -> Plan:
    """A partition for item counts under one budget; see :class:`Planner` for ``options`` and :meth:`Planner.plan`.

    Example:
        >>> plan([100, 40, 10, 5, 2, 1, 1, 0], 8, compression=2).partition.ranks[0] <= 8
        True
    """
    return Planner(counts, embedding_dim, **options).plan(
        max_parameters=max_parameters, compression=compression, max_train_ms=max_train_ms, max_topk_ms=max_topk_ms
    )


def _whole(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``."""
    number = as_int(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _choose(name: str, value: str | T, kind: type[T], known: dict[str, T]) -> T:
    """A value by its name, or as it is."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    raise ValueError(f"{name} must be one of {', '.join(known)} or a {kind.__name__}, got {value!r}")
