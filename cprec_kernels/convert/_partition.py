"""Clusters for trained tables: those whose truncated SVDs lose least within a number of parameters.

The planner of untrained models (``cprec_kernels.planning``) has to assume a spectrum and what training can estimate. A
trained table shows its spectrum, and what it holds has been estimated: here every parameter of the budget is of use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..fitting import chunks
from ..partition import Partition
from ..planning.search import Edges, FloatArray, best_path

MAX_CLUSTERS = 4
PLACES = 28  # where a cluster may end, geometrically spaced
# Share of the most frequent items below which no cluster ends.
FIRST_PLACE = 1e-3


def fitted_partition(
    tables: Sequence[Tensor],
    weights: Tensor,
    compression: float,
    *,
    softmax: bool = False,
    bias: bool = False,
    padding: bool = False,
) -> Partition:
    """The partition, with at most 4 clusters, that minimises the sum of the tables' relative squared errors.

    Args:
        tables: (K, d) each, rows by falling frequency: the item table, and a classifier of its width if there is one.
        weights: (K,) what an item's row counts for.
        compression: how many times fewer parameters, at least, there will be, all of the following counted.
        softmax: one of the tables becomes a clustered softmax, with parent labels and a bias in its head.
        bias: the classifier had biases, which stay. padding: one of the tables has a row more.

    Raises:
        ValueError: rank 1 everywhere has too many parameters still.
    """
    num_items, width = tables[0].shape
    places = _places(num_items)
    ranks = _ranks(width)
    lost = sum(_lost(table, weights, places, ranks) for table in tables)
    items = (places[None, :] - places[:, None])[None].astype(np.float64)
    rank = np.array(ranks, dtype=np.float64)[:, None, None]
    spent = len(tables) * (items * rank + np.where(rank < width, rank * width, 0.0))
    spent[:, :, -1] += padding * rank[:, :, 0]
    heads, tails = spent[:, 0] + softmax * items[:, 0], spent + bias * items + softmax * (width + 1)
    backwards = np.broadcast_to(items <= 0, spent.shape)
    lost, tails, heads = (
        np.where(mask, np.inf, array)
        for mask, array in ((backwards, lost), (backwards, tails), (backwards[:, 0], heads))
    )
    losses, sizes = (
        Edges(np.repeat(first[None], MAX_CLUSTERS, axis=0), rest)
        for first, rest in ((lost[:, 0], lost), (heads, tails))
    )
    before = num_items * (len(tables) * width + bias) + padding * width
    path = best_path(losses, sizes, before / compression)
    if path is None:
        most = before / sizes.heads[0].min(axis=0)[-1]
        raise ValueError(f"compression = {compression:g} is out of reach: rank 1 for all items gives {most:.3g}")
    cutoffs = [int(places[end]) for end in path.ends[:-1]]
    return Partition(num_items, cutoffs, [ranks[i] for i in path.ranks], width)


def _places(num_items: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    first = max(1.0, FIRST_PLACE * num_items)
    inner = np.unique(np.geomspace(first, num_items, PLACES).round().astype(np.int64))
    return np.unique(np.concatenate([[0], inner, [num_items]]))


def _ranks(width: int) -> list[int]:
    """Ranks to choose from, falling: all small ones, then in steps of about an eighth."""
    found, rank = [width], width
    while rank > 1:
        rank = max(1, rank - max(1, rank // 8))
        found.append(rank)
    return found


def _lost(
    table: Tensor, weights: Tensor, places: np.ndarray[tuple[int], np.dtype[np.int64]], ranks: Sequence[int]
) -> FloatArray:
    """(R, m, m): what the truncated SVD of the rows between two places loses, of the whole table's weighted square."""
    width = table.shape[1]
    grams = torch.zeros(len(places), width, width, dtype=torch.float64, device=table.device)
    for index, (low, high) in enumerate(itertools.pairwise(places), start=1):
        grams[index] = grams[index - 1]
        for part in chunks(int(high - low)):
            rows = table[int(low) :][part].double()
            grams[index] += rows.T @ (weights[int(low) :][part].double()[:, None] * rows)
    total = float(grams[-1].diagonal().sum())
    spectra = grams.new_zeros(len(places), len(places), width)  # ascending; zero where the second place is not behind
    for first in range(len(places) - 1):
        spectra[first, first + 1 :] = torch.linalg.eigvalsh(grams[first + 1 :] - grams[first]).clamp(min=0.0)
    left = torch.cat([torch.zeros_like(spectra[..., :1]), spectra.cumsum(-1)], dim=-1)  # [d - r]: lost at rank r
    kept = torch.stack([left[..., width - rank] for rank in ranks])
    return np.asarray((kept / total if total > 0 else kept * 0.0).cpu().numpy(), dtype=np.float64)
