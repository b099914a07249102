"""How a catalogue is cut into frequency clusters: the one truth on sizes, ranks and offsets.

Items are numbered 0..num_items-1 by falling training frequency. ``cutoffs`` split them into n = len(cutoffs) + 1
contiguous clusters; cluster j holds k_j items and stores them in d_j = ``ranks[j]`` columns (CpRec, arXiv 2004.13139,
section 3.2).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_CLUSTERS = 8


def as_int(value: Any, name: str) -> int:
    """``value`` as an int; floats, strings and bools are refused with ``name`` in the message."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got the bool {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None


def _integers(values: Iterable[Any], name: str) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    return tuple(as_int(value, f"{name}[{i}]") for i, value in enumerate(values))


@dataclasses.dataclass(frozen=True)
class Partition:
    """Clusters of a catalogue sorted by frequency.

    Args:
        num_items: number of items, K >= 1.
        cutoffs: first item of every cluster but the first, ascending, each in 1..num_items-1. As in
            ``torch.nn.AdaptiveLogSoftmaxWithLoss``, without ``num_items`` at the end. Empty for one cluster.
        ranks: columns stored per item in every cluster, one more than ``cutoffs``, not increasing, each in
            1..embedding_dim. A cluster whose rank is ``embedding_dim`` has no projection.
        embedding_dim: width d of the model.

    Raises:
        TypeError: a value is not an integer.
        ValueError: a value breaks one of the rules above; the message names it.

    Example:
        >>> partition = Partition(1000, cutoffs=[50, 200], ranks=[64, 16, 4], embedding_dim=64)
        >>> partition.sizes
        (50, 150, 800)
    """

    num_items: int
    cutoffs: tuple[int, ...]
    ranks: tuple[int, ...]
    embedding_dim: int

    def __init__(self, num_items: int, cutoffs: Sequence[int], ranks: Sequence[int], embedding_dim: int) -> None:
        num_items = as_int(num_items, "num_items")
        embedding_dim = as_int(embedding_dim, "embedding_dim")
        cutoffs, ranks = _integers(cutoffs, "cutoffs"), _integers(ranks, "ranks")
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if len(cutoffs) >= MAX_CLUSTERS:
            raise ValueError(
                f"at most {MAX_CLUSTERS} clusters are supported, got {len(cutoffs)} cutoffs ({len(cutoffs) + 1} clusters)"
            )
        for i, cutoff in enumerate(cutoffs):
            if not 0 < cutoff < num_items:
                raise ValueError(
                    f"cutoffs[{i}] = {cutoff} is outside 1..{num_items - 1} (num_items is {num_items} and is not a cutoff)"
                )
            if i and cutoff <= cutoffs[i - 1]:
                raise ValueError(f"cutoffs must be ascending, but cutoffs[{i}] = {cutoff} follows {cutoffs[i - 1]}")
        if len(ranks) != len(cutoffs) + 1:
            raise ValueError(
                f"{len(cutoffs)} cutoffs make {len(cutoffs) + 1} clusters, which need as many ranks; got {len(ranks)}: {ranks}"
            )
        for j, rank in enumerate(ranks):
            if not 1 <= rank <= embedding_dim:
                raise ValueError(f"ranks[{j}] = {rank} is outside 1..{embedding_dim} (embedding_dim)")
            if j and rank > ranks[j - 1]:
                raise ValueError(
                    f"ranks must not increase, but ranks[{j}] = {rank} follows {ranks[j - 1]}: rarer items get fewer columns"
                )
        object.__setattr__(self, "num_items", num_items)
        object.__setattr__(self, "cutoffs", cutoffs)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "embedding_dim", embedding_dim)

    @classmethod
    def single(cls, num_items: int, embedding_dim: int) -> Partition:
        """One cluster at full rank: a plain embedding table and a plain softmax, the uncompressed twin."""
        return cls(num_items, (), (embedding_dim,), embedding_dim)

    @classmethod
    def from_fractions(
        cls, num_items: int, fractions: Sequence[float], ranks: Sequence[int], embedding_dim: int
    ) -> Partition:
        """Cut at fractions of the catalogue, e.g. ``(0.05, 0.2)``: the most frequent 5%, the next 15% and the rest.

        Args:
            fractions: ascending, each strictly between 0 and 1. A cutoff is ``round(fraction * num_items)``; cutoffs
                that fall together in a small catalogue are an error, as everywhere.
        """
        for i, fraction in enumerate(fractions):
            if not 0.0 < fraction < 1.0:
                raise ValueError(f"fractions[{i}] = {fraction} is outside (0, 1)")
        return cls(num_items, [round(fraction * num_items) for fraction in fractions], ranks, embedding_dim)

    @classmethod
    def from_counts(
        cls,
        counts: npt.ArrayLike,
        embedding_dim: int,
        *,
        max_parameters: float | None = None,
        compression: float | None = None,
        max_train_ms: float | None = None,
        max_topk_ms: float | None = None,
        objective: str = "balanced",
        max_clusters: int = 5,
        **options: Any,
    ) -> Partition:
        """The partition that is predicted to lose least under one budget; :func:`cprec_kernels.planning.plan` says more.

        Args:
            counts: (K,) integers or floats, how often every item was seen, not increasing.
            max_parameters, compression, max_train_ms, max_topk_ms: exactly one of them. The parameters of embedding and
                softmax together, the factor by which they are to be fewer than those of one cluster at full rank, the
                predicted time of a training step or of a search.
            objective: "balanced" weighs quality and speed, "quality" looks at quality alone, "speed" mostly at speed.
            max_clusters: 1..8.
            options: see :class:`cprec_kernels.planning.Planner`: ranks, machine, tokens, rows, quality (constants of the
                surrogate), tie_tails (embedding and softmax share the rows of all clusters but the first).

        Raises:
            TypeError, ValueError: counts or options that are refused.
            cprec_kernels.planning.BudgetError: (a ValueError) nothing fits; it has the smallest budget possible.

        Example:
            >>> Partition.from_counts([900, 500, 20, 3, 2, 1, 1, 1, 1, 0], 8, compression=1.5).num_items
            10
        """
        from cprec_kernels.planning import plan

        budget = {
            "max_parameters": max_parameters, "compression": compression,
            "max_train_ms": max_train_ms, "max_topk_ms": max_topk_ms,
        }  # fmt: skip
        found = plan(counts, embedding_dim, objective=objective, max_clusters=max_clusters, **budget, **options)
        return found.partition

    @property
    def num_clusters(self) -> int:
        return len(self.ranks)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First item of every cluster, then ``num_items``: length n + 1."""
        return (0, *self.cutoffs, self.num_items)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Items per cluster, k_j."""
        bounds = self.offsets
        return tuple(hi - lo for lo, hi in itertools.pairwise(bounds))

    @property
    def head_size(self) -> int:
        """Rows of the head's weight: the items of cluster 0 and one parent label per tail cluster, k_0 + n - 1."""
        return self.sizes[0] + self.num_clusters - 1

    @property
    def projected(self) -> tuple[int, ...]:
        """Clusters whose rank is below ``embedding_dim``: those that have a projection."""
        return tuple(j for j, rank in enumerate(self.ranks) if rank < self.embedding_dim)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of a block embedding: sum_j k_j d_j, and d_j d where there is a projection."""
        tables = sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))
        return tables + sum(self.ranks[j] * self.embedding_dim for j in self.projected)

    def softmax_parameters(self, head_bias: bool = False, tail_bias: bool = False) -> int:
        """Parameters of a clustered softmax: as the embedding, plus the parent labels and biases."""
        parents = self.num_clusters - 1
        biases = self.head_size * head_bias + (self.num_items - self.sizes[0]) * tail_bias
        return self.embedding_parameters + parents * self.ranks[0] + biases

    def cluster_of(self, item: int) -> int:
        """Cluster that holds ``item``. Raises IndexError when the item is not in the catalogue."""
        if not 0 <= item < self.num_items:
            raise IndexError(f"item {item} is outside 0..{self.num_items - 1}")
        return sum(item >= cutoff for cutoff in self.cutoffs)

    def with_padding(self) -> Partition:
        """The same clusters with one more item at the end, ``num_items``, to serve as a padding id of the input."""
        return Partition(self.num_items + 1, self.cutoffs, self.ranks, self.embedding_dim)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        return {
            "num_items": self.num_items,
            "cutoffs": list(self.cutoffs),
            "ranks": list(self.ranks),
            "embedding_dim": self.embedding_dim,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Partition:
        """A partition from :meth:`to_dict`. Raises ValueError for missing or unknown keys."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise ValueError(f"not a partition: missing keys {missing}, unknown keys {unknown}")
        return cls(**values)
