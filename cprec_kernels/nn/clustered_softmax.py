"""A two-level softmax over a catalogue sorted by frequency, with its loss and its exact search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional as F
from ..partition import Partition
from .adaptive_layout import (
    converted_in_place,
    from_adaptive_state_dict,
    resolve_div_value,
    take,
    to_adaptive_state_dict,
)
from .block_embedding import load_factors, make_factors
from .catalogue import (
    CatalogueChange,
    ChangingCatalogue,
    Optimizers,
    Reordering,
    checked_counts,
    optimizers_of,
    reordered,
)
from .catalogue_blocks import change_softmax
from .softmax_base import ClusteredSoftmaxBase, ClusteredSoftmaxOutput

__all__ = ["INITIAL_LOGIT_STD", "ClusteredSoftmaxOutput", "ClusteredSoftmaxWithLoss"]

# Standard deviation of the initial logits when the entries of the input have variance 1 (after a LayerNorm).
INITIAL_LOGIT_STD = 0.1


class ClusteredSoftmaxWithLoss(ChangingCatalogue, ClusteredSoftmaxBase):
    """Feels like ``nn.AdaptiveLogSoftmaxWithLoss``; low-rank clusters of any size and rank (CpRec, eq. 6-8).

    Args:
        in_features: width d of the input; must equal ``partition.embedding_dim``.
        partition: the clusters. One cluster (:meth:`Partition.single`) is a plain softmax.
        head_bias: a bias for the items of cluster 0 and the parent labels.
        tail_bias: a bias for the items of every tail.
        ignore_index: targets of this value count for nothing.
        reduction: "none", "mean" (over counted targets) or "sum".
        label_smoothing: applied at each level; see :func:`cprec_kernels.functional.clustered_cross_entropy`.
        z_loss: adds z_loss (lse_head^2 + lse_tail^2) to every counted token's loss, with the log-sum-exps of its levels
            (PaLM, arXiv 2204.02311, section 5). Keeps logits from drifting; one fused pass per level instead of one.
        device, dtype: of the parameters.

    Attributes:
        weights: W_0 (k_0 + n - 1, d_0), its last n - 1 rows the parent labels, and W_j (k_j, d_j).
        projections: Q_j (d_j, d) for the clusters with d_j < d, in order.
        head_bias: (k_0 + n - 1,) or None. tail_biases: (k_j,) per tail, or an empty list.

    Raises:
        TypeError: ``partition`` is not a Partition.
        ValueError: in_features differs from the partition's width, an unknown reduction, smoothing outside [0, 1], a
            negative z_loss.

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
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, partition, ignore_index, reduction, label_smoothing, z_loss)
        rows = (partition.head_size, *partition.sizes[1:])
        self.weights, self.projections = make_factors(partition, rows, device, dtype)
        self.register_parameter(
            "head_bias", nn.Parameter(torch.empty(rows[0], device=device, dtype=dtype)) if head_bias else None
        )
        self.tail_biases = nn.ParameterList(
            [nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for size in rows[1:]] if tail_bias else []
        )
        self.reset_parameters()

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

    @classmethod
    def from_factors(
        cls, partition: Partition, state_dict: Mapping[str, Tensor], **options: Any
    ) -> ClusteredSoftmaxWithLoss:
        """A module of given parameters, copied: on their device and in their dtype.

        Args:
            partition: the clusters.
            state_dict: keys ``weights.j``, ``projections.i`` and, where there are any, ``head_bias`` and
                ``tail_biases.j``, as the converters in :mod:`cprec_kernels.convert` give them.
            options: ``tail_bias`` (zero where ``state_dict`` has none), ``ignore_index``, ``reduction``,
                ``label_smoothing`` and ``z_loss``, as in the constructor.

        Raises:
            TypeError: an unknown option.
            ValueError: parameters that are missing, left over or of other shapes; options as in the constructor.
        """
        allowed = {"tail_bias", "ignore_index", "reduction", "label_smoothing", "z_loss"}
        if unknown := sorted(set(options) - allowed):
            raise TypeError(f"unknown options {', '.join(unknown)}; known are {', '.join(sorted(allowed))}")
        like = take(state_dict, "weights.0", "a ClusteredSoftmaxWithLoss")
        given_bias = "tail_biases.0" in state_dict
        options["tail_bias"] = options.get("tail_bias", given_bias) or given_bias
        head_bias = "head_bias" in state_dict
        width = partition.embedding_dim
        head = cls(width, partition, head_bias=head_bias, device=like.device, dtype=like.dtype, **options)
        zeros = {f"tail_biases.{i}": torch.zeros_like(bias) for i, bias in enumerate(head.tail_biases)}
        load_factors(head, {**zeros, **state_dict})
        return head

    @classmethod
    def from_adaptive(cls, module: nn.AdaptiveLogSoftmaxWithLoss, **options: Any) -> ClusteredSoftmaxWithLoss:
        """A copy of torch's module, with the same outputs up to rounding, on its device and in its dtype.

        Clusters, ranks and head bias are those of ``module``; see
        :func:`cprec_kernels.convert.from_adaptive_state_dict` for tails as wide as the model and tails of no column.
        :meth:`load_state_dict` takes a state_dict of torch's module too, alone or within that of a whole model, so
        checkpoints survive the change.

        Args:
            module: what to copy. What is frozen stays so, and evaluation mode does; a tail whose matrices are multiplied
                is frozen if both were.
            options: ``tail_bias``, ``ignore_index``, ``reduction``, ``label_smoothing`` and ``z_loss``, as in the
                constructor; tail biases start at zero.

        Raises:
            TypeError: ``module`` is something else, or an unknown option.
            ValueError: more than 8 clusters, or as the constructor.
        """
        if not isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            raise TypeError(f"from_adaptive takes an nn.AdaptiveLogSoftmaxWithLoss, got {type(module).__name__}")
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        partition, converted = from_adaptive_state_dict(state)
        head = cls.from_factors(partition, converted, **options)
        for ours, theirs in _matched(head, module):
            ours.requires_grad_(any(parameter.requires_grad for parameter in theirs))
        return head.train(module.training)

    def to_adaptive(self, div_value: float | None = None) -> nn.AdaptiveLogSoftmaxWithLoss:
        """A copy as torch's module, with the same outputs up to rounding, on this device and in this dtype.

        Args:
            div_value: by default one that gives torch's tails just these ranks; see
                :func:`cprec_kernels.convert.to_adaptive_state_dict`.

        Raises:
            ValueError: torch's module cannot give these outputs: tail biases, one cluster, ranks that no div_value (or
                not this one) gives, a reduction other than "mean", label smoothing or a z-loss.
        """
        for name, value, neutral in (
            ("reduction", self.reduction, "mean"),
            ("label_smoothing", self.label_smoothing, 0.0),
            ("z_loss", self.z_loss, 0.0),
        ):
            if value != neutral:
                raise ValueError(
                    f"nn.AdaptiveLogSoftmaxWithLoss has no {name}: its loss is the plain mean. Set {name} = {neutral!r} "
                    f"on this module first, it is {value!r}"
                )
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        converted = to_adaptive_state_dict(state, self.partition, div_value)
        like = self.weights[0]
        module = nn.AdaptiveLogSoftmaxWithLoss(
            self.in_features,
            self.partition.num_items,
            list(self.partition.cutoffs),
            div_value=resolve_div_value(self.partition, div_value),
            head_bias=self.head_bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        module.load_state_dict(converted)
        for ours, theirs in _matched(self, module):
            for parameter in theirs:
                parameter.requires_grad_(ours.requires_grad)
        return module.train(self.training)

    @torch.no_grad()
    def repartition(
        self,
        counts: Tensor | Sequence[float] | None = None,
        partition: Partition | None = None,
        *,
        inputs: Tensor | None = None,
        optimizer: Optimizers = None,
    ) -> CatalogueChange:
        """Sort items by new counts, cut them by a new partition, or both; see ``new_ids`` of the result for their ids.

        A tail whose items all come from one former tail of its rank keeps their rows, and its parent label if none of them
        went elsewhere. Items that change between the head and tails, or between tails, cannot be kept exactly: their
        log-probability holds the log-sum-exp of their tail, which is no linear function of the input. It is replaced by the
        nearest one, over ``inputs`` if given, otherwise by the bound that :func:`cprec_kernels.compress` uses; factors
        are then a truncated SVD. That takes biases: make the module with ``head_bias`` and ``tail_bias``, or the
        constants are lost.

        Args:
            counts: (K,) per item, in the present ids.
            partition: of the K items; by default the present one.
            inputs: (N, d), hidden states as the module gets them.
            optimizer: one or several, whose state goes along with rows that are kept.

        Raises:
            RuntimeError: the module is a part of one that has the items too, or a parameter is parametrized.
            TypeError: something that is no optimizer.
            ValueError: neither counts nor partition, or one that does not fit; inputs of another width; an optimizer whose
                state is not known.
        """
        self._check_changeable()
        if inputs is not None and (inputs.dim() != 2 or inputs.shape[1] != self.in_features or not len(inputs)):
            raise ValueError(f"inputs must be (N, {self.in_features}) with N > 0, got shape {tuple(inputs.shape)}")
        order = reordered(self.partition, counts, partition, self._device())
        given = None if counts is None else checked_counts(counts, self.partition, self._device())[order.old_ids]
        return change_softmax(self, order, given, inputs, optimizers_of(optimizer))

    def _items(self) -> Partition:
        return self.partition

    def _change(self, order: Reordering, optimizers: list[Optimizer]) -> CatalogueChange:
        return change_softmax(self, order, None, None, optimizers)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        errors += converted_in_place(state_dict, prefix, self.partition, list(self.tail_biases))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def packed_weights(self) -> F.Weights:
        """The parameters as the functional API takes them."""
        return F.Weights(list(self.weights), list(self.projections), self.head_bias, list(self.tail_biases))

    @classmethod
    def _make(cls, partition: Partition, options: Mapping[str, Any]) -> ClusteredSoftmaxWithLoss:
        return cls(partition.embedding_dim, partition, **options, device="meta")

    def _describe_parts(self) -> list[str]:
        biases = [f"head_bias={self.head_bias is not None}", f"tail_bias={len(self.tail_biases) > 0}"]
        return [*super()._describe_parts(), *biases]


def _matched(
    ours: ClusteredSoftmaxWithLoss, theirs: nn.AdaptiveLogSoftmaxWithLoss
) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
    """Our parameters, each with those of torch's module that say whether it learns."""
    projections = dict(zip(ours.partition.projected, ours.projections, strict=True))
    yield ours.weights[0], [theirs.head.weight]
    if 0 in projections:
        yield projections[0], [theirs.head.weight]
    if ours.head_bias is not None and theirs.head.bias is not None:
        yield ours.head_bias, [theirs.head.bias]
    for j in range(1, ours.partition.num_clusters):
        down, up = (theirs.get_parameter(f"tail.{j - 1}.{layer}.weight") for layer in (0, 1))
        if j in projections:
            yield projections[j], [down]
            yield ours.weights[j], [up]
        else:
            yield ours.weights[j], [down, up]
        if len(ours.tail_biases) > 0:
            yield ours.tail_biases[j - 1], [up]
