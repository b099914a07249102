"""Exact top-N on a GPU: ``cprec::clustered_topk``. The host never waits, and no (rows, num_items) tensor exists.

The levels are searched one after another, head first. For every row, tau is the score of its k-th best item so far. An item
of tail j scores parent + s - lse, where parent is its label's log-probability and lse the log-sum-exp of the tail's logits
s >= its own; so it never scores above parent, nor above parent + max s - L for a lower bound L of lse. Both hold in exact
arithmetic for any weights; comparisons carry a slack far above fp32's rounding. Hence, with rows packed between the steps:

1. rows with parent < tau need nothing of the tail;
2. for the others a pass without exponentials gives max s and L (clustered_topk_scan.py), and rows that parent + max s - L
   leaves below tau are done as well. The same pass gives a logit that k allowed items reach, so that anything below is not
   among the level's best k, even while tau is -inf;
3. for the survivors, the log-sum-exp, and a pass that appends all items that reach both thresholds to the row's keys;
4. excluded items are struck out and the k largest keys are the row's best (clustered_topk_select.py).

A row that finds more items than its buffer holds, because they tie, is searched exhaustively. "Exact" is meant for logits of
the operands' dtype, the projected hidden state rounded to it, summed in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .clustered_softmax import refusal as refusal
from .clustered_softmax_plan import Level, levels_of
from .clustered_topk_rows import Rows, items_of, log_sum_exp, may_reach, parent_logits
from .clustered_topk_scan import append, bound
from .clustered_topk_select import EMPTY, Excluded, decode, prune, select

# Rows are searched in slices whose buffers stay near this many bytes.
MAX_BYTES = 2**28
# Keys that a row has room for beyond twice the k + exclusions that it is expected to find.
SPARE_KEYS = 256
# A level of fewer items than this many times the keys expected is taken whole.
FEW_ITEMS = 8


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
    """The op ``cprec::clustered_topk``: scores (R, k) fp32 and items (R, k) int64."""
    num_rows, device = input.shape[0], input.device
    scores = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    items = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    if k == 0 or num_rows == 0:
        return scores, items
    levels = levels_of(weights, projections, head_bias, tail_biases)
    excluded = Excluded.of(exclude, exclude_offsets, num_rows, device)
    # What a row is expected to find: a guess, which only memory and time depend on.
    expected = k + (0 if exclude is None else -(-2 * exclude.numel() // num_rows))
    allowed = None
    if candidates is not None:
        allowed = torch.zeros(levels[-1].hi, dtype=torch.int8, device=device).index_fill_(0, candidates, 1)
    at_a_time = max(1, MAX_BYTES // max(bytes_per_row(level.hi - level.lo, expected, k) for level in levels))
    # Multiplied before rows are sliced: the bits of torch's products may depend on how many rows there are.
    projected = [level.project(input).contiguous() for level in levels]
    labels = parent_logits(levels[0], projected[0])
    for start in range(0, num_rows, at_a_time):
        rows = slice(start, min(start + at_a_time, num_rows))
        keys = _search(
            [z[rows] for z in projected], labels[:, rows], k, levels, excluded.of_rows(rows), allowed, expected
        )
        scores[rows], items[rows] = decode(keys)
    return scores, items


def chunks_for(num_items: int, expected: int) -> int:
    """Chunks that the floor of a level's logits comes from: 0 where all of the level's items have room."""
    return 0 if num_items <= FEW_ITEMS * expected + SPARE_KEYS else 2 * expected


def capacity_for(num_items: int, expected: int) -> int:
    """Keys that a row has room for in a level."""
    return num_items if chunks_for(num_items, expected) == 0 else 2 * expected + SPARE_KEYS


def bytes_per_row(num_items: int, expected: int, k: int) -> int:
    """Memory of a row while a level is searched."""
    return 8 * (k + capacity_for(num_items, expected)) + 4 * chunks_for(num_items, expected)


def _search(
    projected: Sequence[Tensor], labels: Tensor, k: int, levels: Sequence[Level],
    excluded: Excluded, allowed: Tensor | None, expected: int,
) -> Tensor:  # fmt: skip
    """Keys (R, k) of the best items, descending, from every level's z (R, d_j) and the parent labels' logits (n - 1, R)."""
    num_rows, device = projected[0].shape[0], projected[0].device
    everyone = Rows.all_of(projected[0])
    tau = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=device)
    best = torch.full((num_rows, k), EMPTY, dtype=torch.int64, device=device)
    parents = labels
    for j, (level, z) in enumerate(zip(levels, projected, strict=True)):
        parent = parents[j - 1] if j else torch.zeros_like(tau)
        rows = Rows.where(may_reach(parent, tau)) if j else everyone
        items = items_of(level)
        chunks = chunks_for(items.num_entries, expected)
        bounds = bound(items, z, rows, allowed, chunks)
        useful, floor = prune(items, bounds, rows, excluded, allowed is not None, parent, tau, k)
        del bounds
        useful_rows = Rows.where(useful)
        # The tails hang on the head's log-sum-exp, whether or not the head has items for a row.
        lse = log_sum_exp(level, z, useful_rows if j else everyone)
        if j == 0:
            parents = labels - lse
        keys = torch.empty(num_rows, k + capacity_for(items.num_entries, expected), dtype=torch.int64, device=device)
        keys[:, :k] = best
        count = torch.zeros(num_rows, dtype=torch.int32, device=device)
        append(items, z, useful_rows, allowed, floor, tau, parent, lse, count, keys, k)
        best = select(items, z, allowed, excluded, parent, lse, count, keys, k)
        tau = decode(best[:, -1])[0]
    return best
