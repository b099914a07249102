"""Exact top-N and rank over all items, by the definition: order by log-probability, ties by smaller id.

No search is cut short here: this is what early termination (CpRec, arXiv 2004.13139, section 3.2.2) must agree with.
Rows are taken in chunks, so memory is bounded by MAX_LOGITS or one row, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .clustered_softmax import clustered_log_prob
from .common import accumulate_dtype, row_chunks


def _log_prob_chunks(
    input: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their log-probabilities (rows, K)."""
    num_items = sum(weight.shape[0] for weight in weights) - len(weights) + 1
    for rows in row_chunks(input.shape[0], num_items, min_rows=1):
        yield rows, clustered_log_prob(input[rows], weights, projections, head_bias, tail_biases)


def _excluded(exclude: Tensor, exclude_offsets: Tensor | None, rows: slice, num_items: int) -> tuple[Tensor, Tensor]:
    """Row (within the chunk) and item of every exclusion of ``rows``; entries to be skipped come as column K."""
    if exclude_offsets is None:  # padded (T, m): negative entries are padding
        items = exclude[rows]
        row = torch.arange(items.shape[0], device=items.device)[:, None].expand_as(items)
        return row.reshape(-1), torch.where(items < 0, num_items, items).reshape(-1)
    position = torch.arange(exclude.numel(), device=exclude.device)
    row = torch.searchsorted(exclude_offsets, position, right=True) - 1
    outside = (row < rows.start) | (row >= rows.stop) | (exclude < 0)
    return (row - rows.start).clamp(0, rows.stop - rows.start - 1), torch.where(outside, num_items, exclude)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, ties by smaller column; -inf entries come back as item -1."""
    num_items = scores.shape[1]
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > threshold, scores == threshold
    needed = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= needed))
    columns = torch.arange(num_items, device=scores.device)
    items = torch.where(chosen, columns, num_items).topk(k, dim=1, largest=False, sorted=True).values
    values, order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, order)
    return values, items.masked_fill(values == -torch.inf, -1)


def clustered_topk(
    input: Tensor,
    k: int,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores (T, k), fp32 or wider, and items (T, k) int64 of the k most probable items that are allowed.

    Raises:
        ValueError: a score is NaN (CPU only), with the row.
    """
    num_items = sum(weight.shape[0] for weight in weights) - len(weights) + 1
    scores = torch.empty(input.shape[0], k, dtype=accumulate_dtype(input.dtype), device=input.device)
    items = torch.empty(input.shape[0], k, dtype=torch.int64, device=input.device)
    if k == 0 or input.shape[0] == 0:
        return scores, items
    forbidden = None
    if candidates is not None:
        forbidden = torch.ones(num_items, dtype=torch.bool, device=input.device).index_fill_(0, candidates, False)
    for rows, log_prob in _log_prob_chunks(input, weights, projections, head_bias, tail_biases):
        log_prob = without_nan(log_prob, rows)
        # One more column takes the exclusions that do not count.
        log_prob = torch.cat([log_prob, log_prob.new_full((log_prob.shape[0], 1), -torch.inf)], 1)
        if exclude is not None:
            row, column = _excluded(exclude, exclude_offsets, rows, num_items)
            log_prob.index_put_((row, column), log_prob.new_tensor(-torch.inf))
        log_prob = log_prob[:, :num_items]
        if forbidden is not None:
            log_prob = log_prob.masked_fill(forbidden, -torch.inf)
        scores[rows], items[rows] = _largest(log_prob, k)
    return scores, items


def clustered_rank(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Tensor:
    """0-based place (T,) int64 of every target: items that score higher, or the same with a smaller id."""
    rank = torch.empty_like(target)
    for rows, log_prob in _log_prob_chunks(input, weights, projections, head_bias, tail_biases):
        log_prob = without_nan(log_prob, rows)
        own = log_prob.gather(1, target[rows, None])
        smaller_id = torch.arange(log_prob.shape[1], device=input.device) < target[rows, None]
        rank[rows] = ((log_prob > own) | ((log_prob == own) & smaller_id)).sum(1)
    return rank


def without_nan(log_prob: Tensor, rows: slice) -> Tensor:
    """A chunk of scores that can be ordered. Raises ValueError for NaN on the CPU, naming the first row.

    On a device, which is not waited for, an item whose score is NaN counts as impossible: last in rank, not found.
    """
    if log_prob.device.type != "cpu":
        return log_prob.masked_fill(log_prob.isnan(), -torch.inf)
    bad = log_prob.isnan().any(1)
    if bad.any():
        row = rows.start + int(bad.nonzero()[0])
        raise ValueError(f"scores of row {row} are NaN: the input row or the weights hold NaN or inf")
    return log_prob
