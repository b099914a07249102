"""Search of a packed index by its definition: unpack the weights, and order all items by log-probability.

The ids are those of the fp32 weights where the index keeps them, else of the stored ones; see ``ops/topk_index.py`` for
the layout. Leaves, bounds and early termination serve speed alone and have no part in the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .clustered_topk import clustered_topk

# Items whose weights stand side by side, column by column, and items that are bounded together.
GROUP = 32
LEAF = 64


def unpack_weights(groups: Tensor, scales: Tensor, size: int) -> Tensor:
    """Weights (size, r) fp32 in packed order, from groups (G, r, 32) and, for int8, scales (G,)."""
    values = groups.float()
    if scales.numel() > 0:
        values = values * scales[:, None, None]
    return values.transpose(1, 2).reshape(-1, groups.shape[1])[:size]


def in_id_order(packed: Tensor, ids: Tensor, first: int) -> Tensor:
    """Rows (k_j, ...) of a level in the order of the ids, from the packed order; ``first`` is the level's first id."""
    if ids.numel() == 0:
        return packed
    return torch.empty_like(packed).index_copy_(0, ids[: packed.shape[0]].long() - first, packed)


def topk_index(
    input: Tensor,
    k: int,
    sizes: Sequence[int],
    groups: Sequence[Tensor],
    scales: Sequence[Tensor],
    exact: Sequence[Tensor],
    biases: Sequence[Tensor],
    projections: Sequence[Tensor],
    ids: Sequence[Tensor],
    leaves: Sequence[Tensor],
    leaf_stats: Sequence[Tensor],
    leaf_bases: Sequence[Tensor],
    bounds: Tensor,
    parents: Tensor,
    parent_bias: Tensor,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    candidates: Tensor | None,
    early_termination: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (T, k) fp32, items (T, k) int64 and counters (T, 3) int64, those of a full scan of every level.

    Raises:
        ValueError: a score is NaN (CPU only), with the row.
    """
    weights: list[Tensor] = []
    level_biases: list[Tensor | None] = []
    first = 0
    for j, size in enumerate(sizes):
        source = exact[j] if exact[j].numel() > 0 else groups[j]
        weight = unpack_weights(source, scales[j] if source is groups[j] else scales[j][:0], size)
        weights.append(in_id_order(weight, ids[j], first))
        level_biases.append(in_id_order(biases[j][:size], ids[j], first) if biases[j].numel() > 0 else None)
        first += size
    weights[0] = torch.cat([weights[0], parents])
    head_bias = level_biases[0]
    if head_bias is not None or parent_bias.numel() > 0:
        head = torch.zeros(sizes[0], device=input.device) if head_bias is None else head_bias
        labels = parent_bias if parent_bias.numel() > 0 else torch.zeros(len(sizes) - 1, device=input.device)
        head_bias = torch.cat([head, labels])
    tails = list(zip(weights, level_biases, strict=True))[1:]
    tail_biases: list[Tensor] = []
    if any(bias is not None for _, bias in tails):
        tail_biases = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in tails]
    scores, items = clustered_topk(
        input.float(),
        k,
        weights,
        [projection for projection in projections if projection.numel() > 0],
        head_bias,
        tail_biases,
        exclude,
        exclude_offsets,
        candidates,
    )
    num_leaves = sum((size + LEAF - 1) // LEAF for size in sizes)
    scanned = [len(sizes), num_leaves, sum(sizes)] if k > 0 else [0, 0, 0]
    counters = torch.tensor(scanned, device=input.device).expand(input.shape[0], 3).contiguous()
    return scores, items, counters
