"""An embedding table stored as low-rank frequency clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional as F
from ..partition import Partition, as_int
from .catalogue import (
    CatalogueChange,
    ChangingCatalogue,
    Optimizers,
    Reordering,
    checked_counts,
    optimizers_of,
    reordered,
)
from .catalogue_blocks import change_embedding
from .pretrained import Pretrained


class BlockEmbedding(ChangingCatalogue, Pretrained, nn.Module):
    """Feels like ``nn.Embedding``; stores sum_j (k_j d_j + d_j d) numbers instead of K d (CpRec, eq. 4).

    Args:
        partition: the clusters; ``partition.num_items`` ids of width ``partition.embedding_dim``.
        padding_idx: an id (negative counts from the end, as in torch) that embeds to zero and gets no gradient.
        sparse: sparse gradients for the tables, for optimizers that touch only the rows of a batch. Eager mode only, and
            not under DistributedDataParallel, which takes sparse gradients from ``nn.Embedding`` alone.
        device, dtype: of the parameters.

    Attributes:
        embeddings: E_j (k_j, d_j), one per cluster.
        projections: P_j (d_j, d) for the clusters with d_j < d, in order.

    Raises:
        TypeError: ``partition`` is not a Partition, or ``padding_idx`` no integer.
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
            padding_idx = as_int(padding_idx, "padding_idx")
            if not -partition.num_items <= padding_idx < partition.num_items:
                raise ValueError(f"padding_idx = {padding_idx} is outside 0..{partition.num_items - 1}")
            padding_idx %= partition.num_items
        self.partition = partition
        self.padding_idx = padding_idx
        self.sparse = sparse
        self.embeddings, self.projections = make_factors(partition, partition.sizes, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_factors(cls, partition: Partition, state_dict: Mapping[str, Tensor], **options: Any) -> BlockEmbedding:
        """A module of given parameters, copied: on their device and in their dtype.

        Args:
            partition: the clusters.
            state_dict: keys ``embeddings.j`` and ``projections.i``, as the converters in :mod:`cprec_kernels.convert`
                give them.
            options: ``padding_idx`` and ``sparse``, as in the constructor. The row of ``padding_idx`` is kept as given.

        Raises:
            ValueError: parameters that are missing, left over or of other shapes; options as in the constructor.
        """
        if "embeddings.0" not in state_dict:
            raise ValueError("this is not the state_dict of a BlockEmbedding: it lacks 'embeddings.0'")
        like = state_dict["embeddings.0"]
        module = cls(partition, device=like.device, dtype=like.dtype, **options)
        load_factors(module, state_dict)
        return module

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

    @torch.no_grad()
    def repartition(
        self,
        counts: Tensor | Sequence[float] | None = None,
        partition: Partition | None = None,
        *,
        optimizer: Optimizers = None,
    ) -> CatalogueChange:
        """Sort items by new counts, cut them by a new partition, or both; see ``new_ids`` of the result for their ids.

        A cluster whose items all come from one former cluster of its rank keeps their rows; any other is the truncated SVD
        of its items' embeddings, weighted by ``counts``: exact to rounding where its rank allows, otherwise the best there
        is, and its error is reported.

        Args:
            counts: (K,) per item, in the present ids; padding left out.
            partition: of the K items, padding left out; by default the present one.
            optimizer: one or several, whose state goes along with rows that are kept.

        Raises:
            RuntimeError: the module is a part of one that has the items too, or a parameter is parametrized.
            TypeError: something that is no optimizer.
            ValueError: neither counts nor partition, or one that does not fit; a padding id that is not the last; an
                optimizer whose state is not known.
        """
        self._check_changeable()
        items = self._items()
        order = reordered(items, counts, partition, self._device())
        given = None if counts is None else checked_counts(counts, items, self._device())[order.old_ids]
        return change_embedding(self, items, order, given, optimizers_of(optimizer))

    def _items(self) -> Partition:
        p = self.partition
        if self.padding_idx is None:
            return p
        if self.padding_idx != p.num_items - 1:
            raise ValueError(
                f"the padding id is {self.padding_idx} among {p.num_items}: only with the last id as padding "
                "(Partition.with_padding) are the others items that can change"
            )
        return Partition(p.num_items - 1, p.cutoffs, p.ranks, p.embedding_dim)

    def _change(self, order: Reordering, optimizers: list[Optimizer]) -> CatalogueChange:
        return change_embedding(self, self._items(), order, None, optimizers)

    def _options(self) -> dict[str, Any]:
        return {"padding_idx": self.padding_idx, "sparse": self.sparse}

    @classmethod
    def _make(cls, partition: Partition, options: Mapping[str, Any]) -> BlockEmbedding:
        return cls(partition, **options, device="meta")

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


def load_factors(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy parameters into a module. Raises ValueError that names what is missing, left over or mis-shaped."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"the parameters do not fit the partition: {error}") from None


def make_factors(
    partition: Partition,
    rows: tuple[int, ...],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Empty tables (rows[j], d_j) and projections (d_j, d) of a partition, as parameters."""
    tables = [
        nn.Parameter(torch.empty(count, rank, device=device, dtype=dtype))
        for count, rank in zip(rows, partition.ranks, strict=True)
    ]
    return nn.ParameterList(tables), make_projections(partition, device, dtype)


def make_projections(
    partition: Partition, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.ParameterList:
    """Empty projections (d_j, d) of a partition's narrow clusters, as parameters."""
    width = partition.embedding_dim
    return nn.ParameterList(
        [nn.Parameter(torch.empty(partition.ranks[j], width, device=device, dtype=dtype)) for j in partition.projected]
    )
