"""A two-level softmax over a catalogue sorted by frequency, with its loss and its exact search."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops.clustered_softmax import check_loss_options, reduce_loss
from ..ops.clustered_topk import Exclude
from ..partition import Partition
from .block_embedding import check_partition, describe, make_factors
from .topk_index import TopKIndex

# Standard deviation of the initial logits when the entries of the input have variance 1 (after a LayerNorm).
INITIAL_LOGIT_STD = 0.1
# One thread builds an index that several ask for at once.
_BUILDING = threading.Lock()


class ClusteredSoftmaxOutput(NamedTuple):
    """What :meth:`ClusteredSoftmaxWithLoss.forward` gives: log-probabilities of the targets and the loss."""

    output: Tensor
    loss: Tensor


class ClusteredSoftmaxWithLoss(nn.Module):
    """Feels like ``nn.AdaptiveLogSoftmaxWithLoss``; low-rank clusters of any size and rank (CpRec, eq. 6-8).

    Args:
        in_features: width d of the input; must equal ``partition.embedding_dim``.
        partition: the clusters. One cluster (:meth:`Partition.single`) is a plain softmax.
        head_bias: a bias for the items of cluster 0 and the parent labels.
        tail_bias: a bias for the items of every tail.
        ignore_index: targets of this value count for nothing.
        reduction: "none", "mean" (over counted targets) or "sum".
        label_smoothing: applied at each level; see :func:`cprec_kernels.functional.clustered_cross_entropy`.
        device, dtype: of the parameters.

    Attributes:
        weights: W_0 (k_0 + n - 1, d_0), its last n - 1 rows the parent labels, and W_j (k_j, d_j).
        projections: Q_j (d_j, d) for the clusters with d_j < d, in order.
        head_bias: (k_0 + n - 1,) or None. tail_biases: (k_j,) per tail, or an empty list.

    Raises:
        TypeError: ``partition`` is not a Partition.
        ValueError: in_features differs from the partition's width, an unknown reduction, smoothing outside [0, 1].

    Example:
        >>> head = ClusteredSoftmaxWithLoss(64, Partition(1000, [50, 200], [64, 16, 4], 64))
        >>> hidden, target = torch.randn(8, 20, 64), torch.randint(1000, (8, 20))
        >>> head(hidden, target).loss.backward()
        >>> scores, items = head.topk(hidden[:, -1], k=10)
    """

    def __init__(
        self,
        in_features: int,
        partition: Partition,
        head_bias: bool = False,
        tail_bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_partition(partition)
        if in_features != partition.embedding_dim:
            raise ValueError(
                f"in_features = {in_features}, but the partition's embedding_dim is {partition.embedding_dim}; "
                "they must be equal"
            )
        check_loss_options(reduction, label_smoothing)
        if 0 <= ignore_index < partition.num_items:
            raise ValueError(
                f"ignore_index = {ignore_index} is an item (0..{partition.num_items - 1}); choose a value outside"
            )
        self.in_features = in_features
        self.partition = partition
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        rows = (partition.head_size, *partition.sizes[1:])
        self.weights, self.projections = make_factors(partition, rows, device, dtype)
        self.head_bias: nn.Parameter | None
        self.register_parameter(
            "head_bias", nn.Parameter(torch.empty(rows[0], device=device, dtype=dtype)) if head_bias else None
        )
        self.tail_biases = nn.ParameterList(
            [nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for size in rows[1:]] if tail_bias else []
        )
        self._indexes: dict[str, TopKIndex] = {}  # by storage, of topk
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # An index is of these parameters in this process: a copy builds its own.
        return {**self.__dict__, "_indexes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_indexes", {})

    def reset_parameters(self) -> None:
        """Q_j ~ N(0, 1/d), W_j ~ N(0, 0.01/d_j), biases 0: initial logits of every level have standard deviation 0.1.

        With an input of unit variance Q_j h has unit variance too, whatever the rank, so every cluster starts almost
        uniform, at a loss near log(k_0 + n - 1) + log k_j, and with gradients of one scale.
        """
        with torch.no_grad():
            for weight in self.weights:
                nn.init.normal_(weight, std=INITIAL_LOGIT_STD * weight.shape[1] ** -0.5)
            for projection in self.projections:
                nn.init.normal_(projection, std=self.in_features**-0.5)
            if self.head_bias is not None:
                nn.init.zeros_(self.head_bias)
            for bias in self.tail_biases:
                nn.init.zeros_(bias)

    def packed_weights(self) -> F.Weights:
        """The parameters as the functional API takes them."""
        return F.Weights(list(self.weights), list(self.projections), self.head_bias, list(self.tail_biases))

    def forward(self, input: Tensor, target: Tensor) -> ClusteredSoftmaxOutput:
        """Log-probabilities of the targets (...), 0 where ignored, and the reduced loss, for input (..., d).

        Raises:
            IndexError: a target out of range, with its place.
            TypeError: target not int64, input and weights of different dtypes.
            ValueError: shapes that do not fit together.
        """
        output, uniform = F.clustered_target_log_prob(
            input, target, self.packed_weights(), ignore_index=self.ignore_index, smooth=self.label_smoothing > 0
        )
        loss = reduce_loss(output, uniform, target, self.ignore_index, self.reduction, self.label_smoothing)
        return ClusteredSoftmaxOutput(output, loss)

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all items, (..., num_items). Materialises them: for small catalogues and tests."""
        return F.clustered_log_prob(input, self.packed_weights())

    def predict(self, input: Tensor) -> Tensor:
        """The most probable item of every row, (...) int64; ties by smaller id."""
        return self.topk(input, 1)[1].squeeze(-1)

    def topk(
        self,
        input: Tensor,
        k: int,
        exclude: Exclude | None = None,
        candidates: Tensor | None = None,
        storage: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k most probable items, exact; see :func:`cprec_kernels.functional.clustered_topk`.

        ``storage`` names a number format ("float32", "float16", "bfloat16" or "int8") and searches an index in it,
        exact too, which is built when it is first asked for and again when the parameters have changed: for a module
        that serves many queries on the CPU. See :class:`TopKIndex`, also for what it raises. None searches the
        parameters themselves.
        """
        if storage is not None:
            return self._index(storage).topk(input, k, exclude, candidates)
        return F.clustered_topk(input, k, self.packed_weights(), exclude=exclude, candidates=candidates)

    def build_index(self, storage: str = "float32", exact: bool = True, blocks: str | None = "kd") -> TopKIndex:
        """The parameters packed for search on the CPU; see :meth:`TopKIndex.build`."""
        return TopKIndex.build(self, storage, exact=exact, blocks=blocks)

    def _index(self, storage: str) -> TopKIndex:
        index = self._indexes.get(storage)
        if index is not None and not index.is_stale:
            return index
        with _BUILDING:
            # Not one that is of no use any more: they are as large as the module.
            for name, other in list(self._indexes.items()):
                if other.is_stale:
                    del self._indexes[name]
            if storage not in self._indexes:
                self._indexes[storage] = self.build_index(storage)
            return self._indexes[storage]

    def score(self, input: Tensor, items: Tensor) -> Tensor:
        """Log-probabilities of given items (..., c); see :func:`cprec_kernels.functional.clustered_score`."""
        return F.clustered_score(input, items, self.packed_weights())

    def rank(self, input: Tensor, target: Tensor) -> Tensor:
        """0-based place of every target among all items; see :func:`cprec_kernels.functional.clustered_rank`."""
        return F.clustered_rank(input, target, self.packed_weights())

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", describe(self.partition)]
        parts += [f"head_bias={self.head_bias is not None}", f"tail_bias={len(self.tail_biases) > 0}"]
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        return ", ".join(parts)
