"""From histories of item numbers to the best items: the part of serving that needs torch alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cprec.model import NextItNet


class TopItems(NamedTuple):
    """The best items of one history, best first. ``fallback``: the history was empty and popularity answered."""

    items: list[int]
    scores: list[float]
    fallback: bool


def pad_left(histories: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """The last ``length`` items of every history, padded on the left: (B, length) int64."""
    rows = torch.full((len(histories), length), pad, dtype=torch.int64)
    for row, history in zip(rows, histories, strict=True):
        last = history[-length:]
        if last:
            row[length - len(last) :] = torch.tensor(last, dtype=torch.int64)
    return rows


def items_to_exclude(histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All items of every history, each once: offsets (B + 1,) and items (n,), both int64.

    Not padded: one long history would make every row as long.
    """
    unique = [sorted(set(history)) for history in histories]
    offsets = [0, *itertools.accumulate(map(len, unique))]
    items = list(itertools.chain.from_iterable(unique))
    return torch.tensor(offsets, dtype=torch.int64), torch.tensor(items, dtype=torch.int64)


def popularity_scores(counts: Sequence[int] | Tensor) -> Tensor:
    """Log of every item's share of the training interactions, one added to every count: (K,) float64."""
    values = torch.as_tensor(counts, dtype=torch.float64) + 1.0
    return torch.log(values / values.sum())


@torch.inference_mode()
def top_items(
    model: NextItNet,
    histories: Sequence[Sequence[int]],
    k: int,
    *,
    length: int,
    popularity: Tensor,
    exclude_seen: bool = True,
    candidates: Tensor | None = None,
    storage: str | None = None,
) -> list[TopItems]:
    """The k best items of every history.

    Args:
        model: in evaluation mode, on the device to use.
        histories: item numbers, oldest first, known items only.
        k: items wanted, at least 1; a history with fewer left gets fewer.
        length: how many of the newest items the model sees.
        popularity: :func:`popularity_scores`, for empty histories, which get the most popular items.
        exclude_seen: leave out every item of the history, also those beyond ``length``.
        candidates: (c,) int64, the only items allowed, ascending and without repeats.
        storage: as in :meth:`NextItNet.topk`.

    Returns:
        One :class:`TopItems` per history; scores are log-probabilities.
    """
    limit = model.config.num_items if candidates is None else len(candidates)
    k = min(k, limit)
    known = [index for index, history in enumerate(histories) if len(history)]
    popular = (torch.arange(k) if candidates is None else candidates[:k].cpu()).tolist()
    fallback = TopItems(popular, popularity[popular].tolist(), True)
    results = [fallback] * len(histories)
    if not known or k < 1:
        return results
    device = next(model.parameters()).device
    rows = [histories[index] for index in known]
    offsets, seen = items_to_exclude(rows)
    scores, items = model.topk(
        pad_left(rows, length, model.config.num_items).to(device),
        k,
        exclude=(offsets.to(device), seen.to(device)) if exclude_seen else None,
        candidates=None if candidates is None else candidates.to(device),
        storage=storage,
    )
    for index, row_scores, row_items in zip(known, scores.float().tolist(), items.tolist(), strict=True):
        kept = [(item, score) for item, score in zip(row_items, row_scores, strict=True) if item >= 0]
        results[index] = TopItems([item for item, _ in kept], [score for _, score in kept], False)
    return results
