"""An embedding table stored as low-rank frequency clusters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ..partition import Partition


class BlockEmbedding(nn.Module):
    """Feels like ``nn.Embedding``; stores sum_j (k_j d_j + d_j d) numbers instead of K d (CpRec, eq. 4).

    Args:
        partition: the clusters; ``partition.num_items`` ids of width ``partition.embedding_dim``.
        padding_idx: an id (negative counts from the end, as in torch) that embeds to zero and gets no gradient.
        sparse: sparse gradients for the tables, for optimizers that touch only the rows of a batch. Eager mode only.
        device, dtype: of the parameters.

    Attributes:
        embeddings: E_j (k_j, d_j), one per cluster.
        projections: P_j (d_j, d) for the clusters with d_j < d, in order.

    Raises:
        TypeError: ``partition`` is not a Partition.
        ValueError: ``padding_idx`` out of range.

    Example:
        >>> embedding = BlockEmbedding(Partition(1000, cutoffs=[50, 200], ranks=[64, 16, 4], embedding_dim=64))
        >>> embedding(torch.tensor([[0, 60, 999]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        partition: Partition,
        padding_idx: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_partition(partition)
        if padding_idx is not None:
            if not -partition.num_items <= padding_idx < partition.num_items:
                raise ValueError(f"padding_idx = {padding_idx} is outside 0..{partition.num_items - 1}")
            padding_idx %= partition.num_items
        self.partition = partition
        self.padding_idx = padding_idx
        self.sparse = sparse
        self.embeddings, self.projections = make_factors(partition, partition.sizes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of E_j ~ N(0, 1/d) and of P_j ~ N(0, 1/d_j): every item of every cluster starts with entries of variance 1/d.

        An embedding then has an expected squared norm of 1 whatever its rank, so that no cluster dominates the first
        steps; a rank-4 row under ``nn.Linear``'s default would start 1/3 as strong as a full one, and fairseq's
        adaptive input, which scales by d_j, stronger.
        """
        width = self.partition.embedding_dim
        with torch.no_grad():
            for table in self.embeddings:
                nn.init.normal_(table, std=width**-0.5)
            for projection in self.projections:
                nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
            if self.padding_idx is not None:
                j = self.partition.cluster_of(self.padding_idx)
                self.embeddings[j][self.padding_idx - self.partition.offsets[j]].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """(..., d) for ids (...) int64. Raises IndexError for an id out of range, TypeError for other dtypes."""
        return F.block_embedding(
            ids, list(self.embeddings), list(self.projections), padding_idx=self.padding_idx, sparse=self.sparse
        )

    def extra_repr(self) -> str:
        parts = [describe(self.partition)]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.sparse:
            parts.append("sparse=True")
        return ", ".join(parts)


def check_partition(partition: Partition) -> None:
    """Raise TypeError unless a module was given a Partition."""
    if not isinstance(partition, Partition):
        raise TypeError(
            f"partition must be a cprec_kernels.Partition, got {type(partition).__name__}; "
            "Partition.single(num_items, embedding_dim) makes an uncompressed table"
        )


def describe(partition: Partition) -> str:
    """The partition as it appears in a module's repr."""
    return (
        f"num_items={partition.num_items}, embedding_dim={partition.embedding_dim}, "
        f"cutoffs={list(partition.cutoffs)}, ranks={list(partition.ranks)}"
    )


def make_factors(
    partition: Partition,
    rows: tuple[int, ...],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Empty tables (rows[j], d_j) and projections (d_j, d) of a partition, as parameters."""
    width = partition.embedding_dim
    tables = [
        nn.Parameter(torch.empty(count, rank, device=device, dtype=dtype))
        for count, rank in zip(rows, partition.ranks, strict=True)
    ]
    projections = [
        nn.Parameter(torch.empty(partition.ranks[j], width, device=device, dtype=dtype)) for j in partition.projected
    ]
    return nn.ParameterList(tables), nn.ParameterList(projections)
