"""What the readers of checkpoints share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..nn.adaptive_layout import ClusteredLayout, product
from ..partition import Partition


class BlockLayout(NamedTuple):
    """A block embedding on paper: its partition and the state_dict of a BlockEmbedding."""

    partition: Partition
    state_dict: dict[str, Tensor]


Factors = Sequence[tuple[Tensor, Tensor | None]]


def _folded(factors: Factors, width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Tables (k_j, d_j) with projections (d_j, d), multiplied out where they are not narrower than the model."""
    return [
        (table if projection is None else product(table, projection), None)
        if projection is None or projection.shape[0] >= width
        else (table, projection)
        for table, projection in factors
    ]


def block_layout(factors: Factors, width: int) -> BlockLayout:
    """Tables E_j (k_j, d_j) and projections P_j (d_j, d), None for the identity, as a BlockEmbedding's."""
    folded = _folded(factors, width)
    sizes = [table.shape[0] for table, _ in folded]
    ranks = [table.shape[1] for table, _ in folded]
    partition = Partition(sum(sizes), list(itertools.accumulate(sizes))[:-1], ranks, width)
    state = {f"embeddings.{j}": table for j, (table, _) in enumerate(folded)}
    projections = [projection for _, projection in folded if projection is not None]
    return BlockLayout(partition, state | {f"projections.{i}": tensor for i, tensor in enumerate(projections)})


def clustered_layout(
    factors: Factors, width: int, head_bias: Tensor | None = None, tail_biases: Sequence[Tensor] = ()
) -> ClusteredLayout:
    """Weights W_j (head with its parent labels last) and projections Q_j (d_j, d), None for the identity."""
    folded = _folded(factors, width)
    sizes = [weight.shape[0] for weight, _ in folded]
    sizes[0] -= len(folded) - 1
    ranks = [weight.shape[1] for weight, _ in folded]
    partition = Partition(sum(sizes), list(itertools.accumulate(sizes))[:-1], ranks, width)
    state = {f"weights.{j}": weight for j, (weight, _) in enumerate(folded)}
    projections = [projection for _, projection in folded if projection is not None]
    state |= {f"projections.{i}": tensor for i, tensor in enumerate(projections)}
    if head_bias is not None:
        state["head_bias"] = head_bias
    return ClusteredLayout(partition, state | {f"tail_biases.{i}": bias for i, bias in enumerate(tail_biases)})


def numbered(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many keys ``pattern.format(0)``, ``pattern.format(1)``, ... a state_dict has, without a gap."""
    return next(i for i in itertools.count() if pattern.format(i) not in state)
