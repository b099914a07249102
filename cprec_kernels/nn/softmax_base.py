"""What every clustered softmax module does with its weights: loss, log-probabilities, search."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import functional as F
from ..ops._reduction import check_loss_options, reduce_loss
from ..ops.clustered_topk import Exclude
from ..ops.levels import check_z_loss, z_penalty
from ..partition import Partition
from .block_embedding import check_partition, describe
from .pretrained import Pretrained
from .topk_index import TopKIndex

# One thread builds an index that several ask for at once.
_BUILDING = threading.Lock()


class ClusteredSoftmaxOutput(NamedTuple):
    """What a clustered softmax gives: log-probabilities of the targets and the loss."""

    output: Tensor
    loss: Tensor


class ClusteredSoftmaxBase(Pretrained, nn.Module):
    """Base of the clustered softmax modules; a subclass makes the parameters and gives :meth:`packed_weights`."""

    head_bias: nn.Parameter | None
    tail_biases: nn.ParameterList

    def __init__(
        self,
        in_features: int,
        partition: Partition,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
    ) -> None:
        super().__init__()
        check_partition(partition)
        if in_features != partition.embedding_dim:
            raise ValueError(
                f"in_features = {in_features}, but the partition's embedding_dim is {partition.embedding_dim}; "
                "they must be equal"
            )
        check_loss_options(reduction, label_smoothing)
        check_z_loss(z_loss)
        if 0 <= ignore_index < partition.num_items:
            raise ValueError(
                f"ignore_index = {ignore_index} is an item (0..{partition.num_items - 1}); choose a value outside"
            )
        self.in_features = in_features
        self.partition = partition
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self._indexes: dict[str, TopKIndex] = {}  # by storage, of topk

    def __getstate__(self) -> dict[str, Any]:
        # An index is of these parameters in this process: a copy builds its own. Module leaves out its compiled call.
        return {**super().__getstate__(), "_indexes": {}}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_indexes", {})

    def packed_weights(self) -> F.Weights:
        """The parameters as the functional API takes them."""
        raise NotImplementedError

    # Names of torch's AdaptiveLogSoftmaxWithLoss, for code that was written for it.

    @property
    def n_classes(self) -> int:
        """K."""
        return self.partition.num_items

    @property
    def cutoffs(self) -> list[int]:
        """The partition's cutoffs, with ``n_classes`` at the end."""
        return [*self.partition.cutoffs, self.partition.num_items]

    @property
    def shortlist_size(self) -> int:
        """Items of cluster 0."""
        return self.partition.sizes[0]

    @property
    def n_clusters(self) -> int:
        """Tail clusters: one less than ``partition.num_clusters``."""
        return self.partition.num_clusters - 1

    @property
    def head_size(self) -> int:
        """Items of cluster 0 and parent labels."""
        return self.partition.head_size

    def forward(self, input: Tensor, target: Tensor) -> ClusteredSoftmaxOutput:
        """Log-probabilities of the targets (...), 0 where ignored, and the reduced loss, for input (..., d).

        Raises:
            IndexError: a target out of range, with its place.
            TypeError: target not int64, input and weights of different dtypes.
            ValueError: shapes that do not fit together.
        """
        weights, ignored = self.packed_weights(), self.ignore_index
        if not self.z_loss:
            output, uniform = F.clustered_target_log_prob(
                input, target, weights, ignore_index=ignored, smooth=self.label_smoothing > 0
            )
            loss = reduce_loss(output, uniform, target, ignored, self.reduction, self.label_smoothing)
            return ClusteredSoftmaxOutput(output, loss)
        terms = F.clustered_target_terms(input, target, weights, ignore_index=ignored)
        loss = reduce_loss(terms.log_prob, terms.uniform, target, ignored, self.reduction, self.label_smoothing)
        penalty = -z_penalty(terms, self.z_loss)
        loss = loss + reduce_loss(penalty, penalty, target, ignored, self.reduction, 0.0)
        return ClusteredSoftmaxOutput(terms.log_prob, loss)

    def target_terms(self, input: Tensor, target: Tensor) -> F.TargetTerms:
        """What a loss is made of, per token and differentiable; see :func:`cprec_kernels.functional.clustered_target_terms`."""
        return F.clustered_target_terms(input, target, self.packed_weights(), ignore_index=self.ignore_index)

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
            return self._index(storage)._topk(input, k, exclude, candidates)
        return F.clustered_topk(input, k, self.packed_weights(), exclude=exclude, candidates=candidates)

    def build_index(self, storage: str = "float32", exact: bool = True, blocks: str | None = "auto") -> TopKIndex:
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

    def _options(self) -> dict[str, Any]:
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss")
        biases = {"head_bias": self.head_bias is not None, "tail_bias": len(self.tail_biases) > 0}
        return {**biases, **{name: getattr(self, name) for name in names}}

    def _describe_parts(self) -> list[str]:
        """What a repr says first."""
        return [f"in_features={self.in_features}", describe(self.partition)]

    def extra_repr(self) -> str:
        parts = self._describe_parts()
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.z_loss:
            parts.append(f"z_loss={self.z_loss}")
        return ", ".join(parts)
