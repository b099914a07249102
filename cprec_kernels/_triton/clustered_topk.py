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

A level is seven to nine launches, and a call on few rows waits for these: torch multiplies and allocates, and does no more.

A row that finds more items than its buffer holds, because they tie, is searched exhaustively. "Exact" is meant for logits of
the operands' dtype, the projected hidden state rounded to it, summed in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .clustered_softmax import refusal as refusal
from .clustered_softmax_plan import Level, levels_of
from .clustered_topk_lse import log_sum_exp
from .clustered_topk_prune import Excluded, prune
from .clustered_topk_rows import Scratch, items_of, pack
from .clustered_topk_scan import append, bound
from .clustered_topk_select import select

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
    excluded = Excluded.of(exclude, exclude_offsets)
    # What a row is expected to find: a guess, which only memory and time depend on.
    expected = k + (0 if exclude is None else -(-2 * exclude.numel() // num_rows))
    allowed = None
    if candidates is not None:
        allowed = torch.zeros(levels[-1].hi, dtype=torch.int8, device=device).index_fill_(0, candidates, 1)
    at_a_time = max(1, MAX_BYTES // max(bytes_per_row(level.hi - level.lo, expected, k) for level in levels))
    # Slices begin at multiples of 16 bytes, as far as there is room, or kernels would be compiled for other pointers.
    at_a_time = at_a_time // 16 * 16 or at_a_time
    # Multiplied before rows are sliced: the bits of torch's products may depend on how many rows there are.
    projected = [level.project(input).contiguous() for level in levels]
    if num_rows <= at_a_time:
        _search(projected, k, levels, excluded, allowed, expected, scores, items)
        return scores, items
    for start in range(0, num_rows, at_a_time):
        rows = slice(start, min(start + at_a_time, num_rows))
        here = [z[rows] for z in projected]
        _search(here, k, levels, excluded.from_row(start), allowed, expected, scores[rows], items[rows])
    return scores, items


def chunks_for(num_items: int, expected: int) -> int:
    """Chunks that the floor of a level's logits comes from: 0 where all of the level's items have room."""
    return 0 if num_items <= FEW_ITEMS * expected + SPARE_KEYS else 2 * expected


def capacity_for(num_items: int, expected: int) -> int:
    """Keys that a row has room for in a level."""
    return num_items if chunks_for(num_items, expected) == 0 else 2 * expected + SPARE_KEYS


def bytes_per_row(num_items: int, expected: int, k: int) -> int:
    """Memory of a row while a level is searched."""
    return 8 * (2 * k + capacity_for(num_items, expected)) + 4 * chunks_for(num_items, expected)


def _search(
    projected: Sequence[Tensor], k: int, levels: Sequence[Level], excluded: Excluded, allowed: Tensor | None,
    expected: int, scores: Tensor, items: Tensor,
) -> None:  # fmt: skip
    """Fill in scores and items (R, k) from every level's z (R, d_j)."""
    num_rows, device, num_levels = scores.shape[0], scores.device, len(levels)
    capacities = [capacity_for(level.hi - level.lo, expected) for level in levels]
    keys = torch.empty(num_rows, 2 * k + max(capacities), dtype=torch.int64, device=device)
    scratch = Scratch(num_rows, low=2, floats=1 + num_levels, zero=num_levels, integers=7, device=device)
    tau, floor, lse = (scratch.floats() for _ in range(3))
    parents = [scratch.floats() for _ in levels]
    counts = [scratch.integers() for _ in levels]
    everyone, hopeful, useful = (scratch.rows() for _ in range(3))
    flag = scratch.integers()
    scratch.start(everyone)
    for j, (level, z, parent) in enumerate(zip(levels, projected, parents, strict=True)):
        entries = items_of(level)
        chunks = chunks_for(entries.num_entries, expected)
        rows = everyone
        if j == 0:
            # The tails hang on the head's log-sum-exp, whether or not the head has items for a row.
            log_sum_exp(level, z, everyone, lse, (parent, scratch.stride))
            if chunks > 0:
                bounds = bound(entries, z, everyone, allowed, chunks)
                prune(entries, bounds, everyone, parent, tau, flag, floor, excluded, allowed, k, chunks)
        else:
            pack(everyone, hopeful, "reach", parent=parent, score=tau)
            bounds = bound(entries, z, hopeful, allowed, chunks)
            prune(entries, bounds, hopeful, parent, tau, flag, floor, excluded, allowed, k, chunks)
            rows = pack(hopeful, useful, "flag", flag=flag)
            log_sum_exp(level, z, rows, lse)
        append(entries, z, rows, allowed, floor, tau, parent, lse, counts[j], keys, 2 * k, capacities[j])
        select(
            entries, z, allowed, excluded, parent, lse, counts[j], keys, k, capacities[j], tau, scores, items,
            number=j, is_last=j == num_levels - 1,
        )  # fmt: skip
