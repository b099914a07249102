"""Recommendations for raw histories: unknown items reported and ignored, empty histories answered by popularity."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cprec.progress import progress_bar
from cprec.ranking import popularity_scores, top_items
from cprec.serving_io import COLUMNS, History, read_histories, refuse_string, write_recommendations

if TYPE_CHECKING:
    from cprec.data import Catalogue
    from cprec.model import NextItNet

__all__ = [
    "Chunk",
    "History",
    "Recommendation",
    "Recommendations",
    "UnknownItems",
    "UnknownItemsWarning",
    "read_histories",
    "recommend",
    "write_recommendations",
]


ENCODE_USERS = 4096  # histories whose ids are looked up together: a look-up scans the whole catalogue


class UnknownItemsWarning(UserWarning):
    """Items in the histories or the whitelist that the catalogue does not know."""


class Recommendation(NamedTuple):
    """One recommended item. ``rank`` starts at 1; ``score`` is a log-probability."""

    user: str
    rank: int
    item: str
    score: float
    fallback: bool


@dataclasses.dataclass
class Chunk:
    """Recommendations of some users as columns of one length."""

    user: list[str]
    rank: list[int]
    item: list[str]
    score: list[float]
    fallback: list[bool]

    def __len__(self) -> int:
        return len(self.user)

    def columns(self) -> dict[str, list[Any]]:
        return {name: getattr(self, name) for name in COLUMNS}

    def rows(self) -> Iterator[Recommendation]:
        return map(Recommendation._make, zip(*self.columns().values(), strict=True))


@dataclasses.dataclass
class UnknownItems:
    """Occurrences of items outside the catalogue, and the first few of them."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, items: Iterable[str]) -> None:
        for item in items:
            self.count += 1
            if len(self.examples) < 5 and item not in self.examples:
                self.examples.append(item)

    def message(self, where: str = "the histories") -> str:
        """One sentence for people; empty when everything was known."""
        if not self.count:
            return ""
        plural = "item" if self.count == 1 else "items"
        examples = ", ".join(repr(item) for item in self.examples)
        return f"ignored {self.count:,} {plural} in {where} that the catalogue does not know, such as {examples}"


class Recommendations:
    """Recommendations made while they are read, batch by batch; can be read once.

    Iterating gives :class:`Recommendation` rows, :meth:`chunks` columns. ``unknown``, ``users`` and ``fallbacks``
    (users answered by popularity) grow as it is read.
    """

    def __init__(self, chunks: Iterator[Chunk], unknown: UnknownItems) -> None:
        self._chunks = chunks
        self.unknown = unknown
        self.users = 0
        self.fallbacks = 0

    def chunks(self) -> Iterator[Chunk]:
        return self._chunks

    def __iter__(self) -> Iterator[Recommendation]:
        for chunk in self._chunks:
            yield from chunk.rows()


def encode_candidates(catalogue: Catalogue, candidates: Iterable[str]) -> torch.Tensor:
    """A whitelist of raw ids as ascending item numbers, (c,) int64. Unknown ones are reported and ignored.

    Raises:
        ValueError: not one of them is in the catalogue. TypeError: a plain string was given.
    """
    refuse_string(candidates, "a whitelist")
    names = list(dict.fromkeys(candidates))
    numbers = [int(number) for number in catalogue.encode(names)]
    unknown = UnknownItems()
    unknown.add(name for name, number in zip(names, numbers, strict=True) if number < 0)
    known = sorted({number for number in numbers if number >= 0})
    if not known:
        raise ValueError(
            f"none of the {len(names):,} candidates is in the catalogue of {catalogue.num_items:,} items"
            + (f"; the first is {names[0]!r}" if names else ": the whitelist is empty")
        )
    if unknown.count:
        warnings.warn(unknown.message("the candidates"), UnknownItemsWarning, stacklevel=3)
    return torch.tensor(known, dtype=torch.int64)


def recommend(
    model: NextItNet,
    catalogue: Catalogue,
    histories: Iterable[Sequence[str] | History],
    k: int = 10,
    *,
    length: int,
    exclude_seen: bool = True,
    candidates: Iterable[str] | None = None,
    storage: str | None = None,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    progress: bool = False,
    warn_unknown: bool = True,
) -> Recommendations:
    """The k best next items for every history, lazily.

    Args:
        model: trained on the items of ``catalogue``.
        histories: raw ids, oldest first; a plain list gets its 1-based position as user.
        k: items per user; fewer where fewer are left.
        length: how many of the newest items the model sees, the length it was trained with.
        exclude_seen: never recommend an item of the history.
        candidates: raw ids of the only items allowed.
        storage: as in :meth:`NextItNet.topk`: an index, for many calls or histories on the CPU.
        device: moves the model there first.
        warn_unknown: after the last history, warn once (:class:`UnknownItemsWarning`) with count and examples of items
            that the catalogue does not know; they are ignored. They are in ``.unknown`` either way.

    A history without a known item gets the most popular items, with ``fallback`` set and the log of their share of the
    training interactions (one added to every count) as score.

    Raises:
        ValueError: k, length or batch_size below 1, model and catalogue of different sizes, no known candidate.
        TypeError: a plain string for the histories, a history (found when it is its turn) or the candidates.
    """
    if isinstance(histories, str):
        raise TypeError(f"histories is a list of lists of item ids, got the string {histories!r}: wrap it, [[...]]")
    for name, value in (("k", k), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if model.config.num_items != catalogue.num_items:
        raise ValueError(
            f"the model knows {model.config.num_items:,} items but the catalogue {catalogue.num_items:,}: "
            "use the catalogue of the data the model was trained on"
        )
    allowed = None if candidates is None else encode_candidates(catalogue, candidates)
    if device is not None:
        model = model.to(device)
    model.eval()
    popularity = popularity_scores(torch.as_tensor(catalogue.counts))
    unknown = UnknownItems()

    def chunks() -> Iterator[Chunk]:
        numbered = itertools.starmap(_history, enumerate(histories, start=1))
        with progress_bar("recommending", None, progress) as advance:
            while users := list(itertools.islice(numbered, min(max(batch_size, ENCODE_USERS), sys.maxsize))):
                encoded = _encode(catalogue, users, unknown)
                best = [
                    top
                    for start in range(0, len(users), batch_size)
                    for top in top_items(
                        model,
                        encoded[start : start + batch_size],
                        k,
                        length=length,
                        popularity=popularity,
                        exclude_seen=exclude_seen,
                        candidates=allowed,
                        storage=storage,
                    )
                ]
                result.users += len(users)
                result.fallbacks += sum(top.fallback for top in best)
                sizes = [len(top.items) for top in best]
                yield Chunk(
                    [history.user for history, size in zip(users, sizes, strict=True) for _ in range(size)],
                    [rank for size in sizes for rank in range(1, size + 1)],
                    catalogue.decode([item for top in best for item in top.items]),
                    [score for top in best for score in top.scores],
                    [top.fallback for top in best for _ in top.items],
                )
                advance(len(users))
        if unknown.count and warn_unknown:
            warnings.warn(unknown.message(), UnknownItemsWarning, stacklevel=2)

    result = Recommendations(chunks(), unknown)
    return result


def _history(position: int, history: Sequence[str] | History) -> History:
    items = history.items if isinstance(history, History) else history
    refuse_string(items, "a history")
    return history if isinstance(history, History) else History(str(position), list(items))


def _encode(catalogue: Catalogue, users: list[History], unknown: UnknownItems) -> list[list[int]]:
    """Known item numbers of every history; one call to the catalogue for all."""
    flat = [item for history in users for item in history.items]
    numbers = catalogue.encode(flat).tolist() if flat else []
    unknown.add(item for item, number in zip(flat, numbers, strict=True) if number < 0)
    encoded = []
    start = 0
    for history in users:
        end = start + len(history.items)
        encoded.append([number for number in numbers[start:end] if number >= 0])
        start = end
    return encoded
