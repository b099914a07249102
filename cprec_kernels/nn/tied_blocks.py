"""An input table and a softmax that share their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..partition import Partition
from .block_embedding import BlockEmbedding, check_partition, make_projections
from .clustered_softmax import INITIAL_LOGIT_STD
from .softmax_base import ClusteredSoftmaxBase


class TiedBlocks(ClusteredSoftmaxBase):
    """A :class:`BlockEmbedding` and a clustered softmax over one set of blocks: the tied weights of a compressed model.

    ``blocks.embedding(ids)`` looks items up; ``blocks(hidden, target)``, ``log_prob``, ``topk`` and the rest are those of
    :class:`ClusteredSoftmaxWithLoss`. Item x of cluster j, row g, embeds to e_x = E_j[g] P_j and has the logit
    E_j[g] (P_j h) = e_x . h in its level (Press and Wolf, arXiv 1608.05859, per block): what a dense model does with
    ``hidden @ embedding.weight.T``. The parent labels, and the biases, belong to the softmax alone.

    Every parameter is there once: in ``parameters()``, in ``state_dict()`` and for the optimizer, and its gradient is
    the sum of those of both uses. The softmax reads every row, so the tables' gradients are dense.

    Args:
        partition: the clusters of the items, K = ``partition.num_items``.
        padding: one more input id, K, that embeds to zero, gets no gradient and is absent from the softmax.
        tie_projections: the softmax projects by the input's P_j; otherwise by Q_j of its own, as fairseq does by default.
        tie_head: False gives the softmax rows of its own for the items of cluster 0, and shares the tails alone: frequent
            items have enough data for two roles, rare ones do not.
        head_bias, tail_bias, ignore_index, reduction, label_smoothing, z_loss, device, dtype: as in
            :class:`ClusteredSoftmaxWithLoss`.

    Attributes:
        embedding: the :class:`BlockEmbedding`, over K items, or K + 1 with ``padding``.
        parents: (n - 1, d_0), the head's rows that are no items'; None for one cluster, and without ``tie_head``.
        head: W_0 (k_0 + n - 1, d_0), its last n - 1 rows the parent labels; None with ``tie_head``.
        projections: Q_j (d_j, d), empty with ``tie_projections``.
        head_bias: (k_0 + n - 1,) or None. tail_biases: (k_j,) per tail, or an empty list.

    Raises:
        TypeError: ``partition`` is not a Partition.
        ValueError: as :class:`ClusteredSoftmaxWithLoss`.

    Example:
        >>> blocks = TiedBlocks(Partition(1000, [50, 200], [64, 16, 4], 64), padding=True)
        >>> items = torch.tensor([[7, 3, 1000], [999, 50, 0]])  # 1000 pads
        >>> hidden = blocks.embedding(items)
        >>> blocks(hidden[:, :-1], items[:, 1:].masked_fill(items[:, 1:] == 1000, -100)).loss.backward()
    """

    def __init__(
        self,
        partition: Partition,
        padding: bool = False,
        tie_projections: bool = True,
        tie_head: bool = True,
        head_bias: bool = False,
        tail_bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_partition(partition)
        super().__init__(partition.embedding_dim, partition, ignore_index, reduction, label_smoothing, z_loss)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = BlockEmbedding(
            partition.with_padding() if padding else partition, padding_idx=-1 if padding else None, **kind
        )
        self.embedding.owner = "a TiedBlocks"
        self.parents: nn.Parameter | None
        self.head: nn.Parameter | None
        num_tails = partition.num_clusters - 1
        rows = {"parents": num_tails if tie_head else 0, "head": 0 if tie_head else partition.head_size}
        for name, count in rows.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(count, partition.ranks[0], **kind)) if count else None
            )
        self.projections = nn.ParameterList() if tie_projections else make_projections(partition, **kind)
        self.register_parameter(
            "head_bias", nn.Parameter(torch.empty(partition.head_size, **kind)) if head_bias else None
        )
        self.tail_biases = nn.ParameterList(
            [nn.Parameter(torch.empty(size, **kind)) for size in partition.sizes[1:]] if tail_bias else []
        )
        self.reset_parameters()

    @property
    def tie_projections(self) -> bool:
        """Whether the softmax projects by the input's P_j."""
        return len(self.projections) == 0

    @property
    def tie_head(self) -> bool:
        """Whether cluster 0 is shared too."""
        return self.head is None

    def reset_parameters(self) -> None:
        """As :class:`BlockEmbedding`; Q_j ~ N(0, 1/d), parents ~ N(0, 0.01/d_0), biases 0.

        An item's vector has an expected squared norm of 1, so for inputs of unit variance its logits start with standard
        deviation 1, as in a dense model whose tied table has entries of variance 1/d. Without ``tie_head`` all logits start
        with standard deviation 0.1, as those of :class:`ClusteredSoftmaxWithLoss`: W_0 ~ N(0, 0.01/d_0), Q_j ~ N(0, 0.01/d_j).
        """
        self.embedding.reset_parameters()
        with torch.no_grad():
            if self.parents is not None:
                nn.init.normal_(self.parents, std=INITIAL_LOGIT_STD * self.parents.shape[1] ** -0.5)
            if self.head is not None:
                nn.init.normal_(self.head, std=INITIAL_LOGIT_STD * self.head.shape[1] ** -0.5)
            for projection in self.projections:
                std = self.in_features**-0.5 if self.tie_head else INITIAL_LOGIT_STD * projection.shape[0] ** -0.5
                nn.init.normal_(projection, std=std)
            if self.head_bias is not None:
                nn.init.zeros_(self.head_bias)
            for bias in self.tail_biases:
                nn.init.zeros_(bias)

    def packed_weights(self) -> F.Weights:
        """The softmax's parameters as the functional API takes them: views of the tables, and with ``tie_head`` a copy of
        the head's."""
        tables: list[Tensor] = list(self.embedding.embeddings)
        if self.embedding.padding_idx is not None:
            tables[-1] = tables[-1][:-1]
        if self.head is not None:
            tables[0] = self.head
        elif self.parents is not None:
            tables[0] = torch.cat([tables[0], self.parents])
        projections = self.embedding.projections if self.tie_projections else self.projections
        return F.Weights(tables, list(projections), self.head_bias, list(self.tail_biases))

    def _options(self) -> dict[str, Any]:
        padding = self.embedding.padding_idx is not None
        tied = {"tie_projections": self.tie_projections, "tie_head": self.tie_head}
        return {"padding": padding, **tied, **super()._options()}

    @classmethod
    def _make(cls, partition: Partition, options: Mapping[str, Any]) -> TiedBlocks:
        return cls(partition, **options, device="meta")

    def _describe_parts(self) -> list[str]:
        flags = {
            "padding": self.embedding.padding_idx is not None,
            "tie_projections": self.tie_projections,
            "tie_head": self.tie_head,
            "head_bias": self.head_bias is not None,
            "tail_bias": len(self.tail_biases) > 0,
        }
        return [*super()._describe_parts(), *(f"{name}={value}" for name, value in flags.items())]
