"""A trained dense recommender with compressed items: found, factorised and replaced in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import ClusteredSoftmaxWithLoss
from ..partition import Partition, as_int
from ._factors import Dense, checked_counts, copy_all, fit_parents, fit_softmax, fit_table, weights_of
from ._partition import fitted_partition
from .plan import TIED, CompressionPlan, Replacement, find_classifier, find_table


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What :func:`compress` did.

    Attributes:
        plan: which modules were replaced by what; kept as JSON, it rebuilds the model for a checkpoint.
        parameters_before, parameters_after: of the whole model, shared ones counted once.
        table_before, table_after: of the item table and the classifier alone.
        table_errors: per cluster, the norm of what the embeddings lost relative to theirs, weighted by frequency.
        softmax_errors: the same of the classifier's rows, a tail's around their mean; in the metric of ``inputs`` if given.
            Those of a tied classifier are the table's.
        parent_errors: per tail, the root mean square over ``inputs`` of what its parent label is off; empty without inputs.
        softmax: the module that gives loss, top-k and ranks in the model's own ids; None without a classifier.
    """

    plan: CompressionPlan
    parameters_before: int
    parameters_after: int
    table_before: int
    table_after: int
    table_errors: tuple[float, ...]
    softmax_errors: tuple[float, ...]
    parent_errors: tuple[float, ...]
    softmax: nn.Module | None

    @property
    def compression(self) -> float:
        """How many times smaller the item table and the classifier became, together."""
        return self.table_before / self.table_after

    def __str__(self) -> str:
        lines = [
            f"items: {self.table_before:,} -> {self.table_after:,} parameters ({self.compression:.2f} times smaller)",
            f"model: {self.parameters_before:,} -> {self.parameters_after:,} parameters",
        ]
        kinds = [(self.plan.table, self.plan.partition, self.table_errors)]
        if self.softmax_errors and self.plan.output_partition is not None:
            kinds.append((self.plan.classifier or TIED, self.plan.output_partition, self.softmax_errors))
        for name, partition, errors in kinds:
            lines.append(f"{name}:")
            for j, (size, rank, error) in enumerate(zip(partition.sizes, partition.ranks, errors, strict=True)):
                lines.append(f"  cluster {j}: {size:,} items in {rank} columns, relative error {error:.4f}")
        for j, error in enumerate(self.parent_errors, start=1):
            lines.append(f"  parent label {j}: off by {error:.4f} (rms of log-probability)")
        return "\n".join(lines)


@torch.no_grad()
def compress(
    model: nn.Module,
    counts: Tensor | Sequence[float],
    *,
    compression: float | None = None,
    partition: Partition | None = None,
    output_partition: Partition | None = None,
    table: str | None = None,
    classifier: str | None = None,
    padding_idx: int | None = None,
    inputs: Tensor | None = None,
) -> CompressionReport:
    """Replace the item table and the classifier of a dense model by low-rank frequency clusters, in place.

    The model goes on taking the ids it took. Its items need not be sorted: the permutation by frequency is kept beside
    the new modules and travels with their ``state_dict``. The table becomes a :class:`ReindexedEmbedding`, the classifier
    a :class:`ReindexedSoftmax`; make the optimizer afterwards, and train for an epoch or two to win back what was lost.

    * An ``nn.Linear`` classifier that shares the table's weight stays tied (:class:`TiedBlocks`).
    * ``classifier="tied"`` is for a model without one that scores by ``hidden @ table.weight.T``. Its forward goes on
      working, since the new table has a ``weight`` too, computed anew each time; ``table.softmax`` gives loss and top-k
      without it.
    * Every cluster is the truncated SVD of its rows, weighted by frequency. Cuts and ranks for ``compression`` are those
      that lose least of the trained tables by that measure, within the budget. Parent labels are the means of their tails'
      vectors by frequency, with the constant that makes them a lower bound of the log-sum-exp they stand for; with
      ``inputs`` they are fitted to it by least squares, and classifier rows count by the logits they make.

    Args:
        model: holds the modules; nothing is changed unless all goes well. What takes the place of a frozen one is frozen.
        counts: (V,) how often each id of the table occurs in the training data, in the model's own ids.
        compression: how many times fewer parameters items should have, at least 1. Give this or ``partition``.
        partition: clusters of the items by falling frequency, padding left out.
        output_partition: clusters of the classifier; by default those of the table, where widths are equal.
        table: name of the item table, where several embeddings have V rows.
        classifier: name of the classifier, where several linear layers fit, or "tied".
        padding_idx: an id that is no item; that of the nn.Embedding by default. Code that pads with an id it never
            declared needs it here. It embeds as before, up to rounding, gets no gradient and is never recommended.
        inputs: (N, d) hidden states as the classifier gets them, a thousand or more, from training data.

    Returns:
        What was done, with the parameters saved and the error of every block.

    Raises:
        TypeError: a named module of another kind, counts that are no numbers, a partition that is no Partition.
        ValueError: nothing or too much to replace; counts, partitions or inputs that do not fit; weights that are not finite.
    """
    if (compression is None) == (partition is None):
        raise ValueError("give either compression= or partition=")
    given = checked_counts(counts)
    if not given.any():
        raise ValueError("counts are all zero: frequencies decide which items keep wide rows")
    table_name, old = find_table(model, given.numel(), table)
    padding = _checked_padding(old, padding_idx, given)
    given = given.to(old.weight.device)
    ids = torch.arange(given.numel(), device=given.device)
    if padding is not None:
        ids = ids[ids != padding]
    name, linear = None, None
    if classifier != TIED:
        name, linear = find_classifier(model, classifier, old, ids.numel())
    _check_unshared(model, old, linear)
    _check_finite(table_name, old)
    if linear is not None and name is not None:
        _check_finite(name, linear)
    tied = classifier == TIED or (linear is not None and linear.weight is old.weight)
    order = torch.argsort(given[ids], descending=True, stable=True)
    sorted_counts = given[ids[order]]
    rows = old.weight[ids[order]]
    classes = None if linear is None else _classes(linear, ids[order], padding, given.numel())
    same = linear is not None and linear.in_features == old.embedding_dim
    if partition is None:
        own = linear is not None and same and not tied
        tables = [rows, linear.weight[classes]] if linear is not None and own else [rows]
        partition = _fitted(tables, sorted_counts, compression, linear, tied or own, padding is not None)
    _check_partition(partition, ids.numel(), old.embedding_dim, "partition")
    if tied or linear is None:
        if output_partition is not None:
            raise ValueError("output_partition is for a classifier of its own: this model's is tied, or it has none")
        output_partition = partition if tied else None
    else:
        if output_partition is None:
            if not same and compression is None:
                raise ValueError(
                    f"the classifier is {linear.in_features} wide and the table {old.embedding_dim}: give output_partition="
                )
            output_partition = partition
            if not same:
                output_partition = _fitted([linear.weight[classes]], sorted_counts, compression, linear, True, False)
        _check_partition(output_partition, ids.numel(), linear.in_features, "output_partition")
    _check_inputs(inputs, output_partition)

    before = _parameters(model)
    plan = CompressionPlan(
        table=table_name,
        classifier=name,
        tied=tied,
        partition=partition,
        output_partition=output_partition,
        num_embeddings=given.numel(),
        num_classes=linear.out_features if linear is not None else given.numel(),
        padding_idx=padding,
        bias=linear is not None and linear.bias is not None,
        sparse=old.sparse and not tied,
    )
    made = plan.build(order, old.weight)
    padding_row = None if padding is None else old.weight[padding]
    dense = Dense(rows, None, sorted_counts)
    table_errors, softmax_errors, parent_errors = _fill(made, plan, dense, padding_row, linear, classes, inputs)
    removed = _parameters(nn.ModuleList([old, *([] if linear is None else [linear])]))
    made.requires_grad_(old.weight.requires_grad)
    if linear is not None and made.softmax is not None:
        if not tied:
            made.softmax.requires_grad_(linear.weight.requires_grad)
        if linear.bias is not None:
            for key, parameter in made.softmax.named_parameters():
                if "bias" in key:
                    parameter.requires_grad_(linear.bias.requires_grad)
    plan.install(model, made)
    return CompressionReport(
        plan=plan,
        parameters_before=before,
        parameters_after=_parameters(model),
        table_before=removed,
        table_after=_parameters(made),
        table_errors=tuple(table_errors),
        softmax_errors=tuple(softmax_errors),
        parent_errors=tuple(parent_errors),
        softmax=made.softmax,
    )


def _fill(
    made: Replacement,
    plan: CompressionPlan,
    dense: Dense,
    padding_row: Tensor | None,
    linear: nn.Linear | None,
    classes: Tensor | None,
    inputs: Tensor | None,
) -> tuple[list[float], list[float], list[float]]:
    """Give the new modules their values; returns the errors of the table, the softmax and the parent labels."""
    table = fit_table(dense, plan.partition, padding_row)
    copy_all(made.embedding.embedding.embeddings, table.embeddings)
    copy_all(made.embedding.embedding.projections, table.projections)
    if made.softmax is None:
        return table.errors, [], []
    biases = None if linear is None or linear.bias is None else linear.bias[classes]
    if made.blocks is not None:
        blocks = made.blocks
        labels, constants, parent_errors = fit_parents(Dense(dense.rows, biases, dense.counts), plan.partition, inputs)
        if blocks.parents is not None:
            projected = 0 in plan.partition.projected
            # the projection's rows are orthonormal, so this is the nearest label that the head's rank allows
            blocks.parents.copy_(labels @ table.projections[0].double().T if projected else labels)
        first = plan.partition.sizes[0]
        if blocks.head_bias is not None:
            blocks.head_bias[:first] = 0.0 if biases is None else biases[:first]
            blocks.head_bias[first:] = constants
        for bias, (lo, hi) in zip(blocks.tail_biases, _tails(plan.partition), strict=False):
            assert biases is not None
            bias.copy_(biases[lo:hi])
        return table.errors, table.errors, parent_errors
    assert linear is not None
    assert plan.output_partition is not None
    softmax = made.softmax.softmax
    assert isinstance(softmax, ClusteredSoftmaxWithLoss)
    fit = fit_softmax(Dense(linear.weight[classes], biases, dense.counts), plan.output_partition, inputs)
    copy_all(softmax.weights, fit.weights)
    copy_all(softmax.projections, fit.projections)
    if softmax.head_bias is not None and fit.head_bias is not None:
        softmax.head_bias.copy_(fit.head_bias)
    copy_all(softmax.tail_biases, fit.tail_biases)
    return table.errors, fit.errors, fit.parent_errors


def _tails(partition: Partition) -> list[tuple[int, int]]:
    return list(zip(partition.offsets[1:-1], partition.offsets[2:], strict=True))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _classes(linear: nn.Linear, ids: Tensor, padding: int | None, num_embeddings: int) -> Tensor:
    """The outputs of a classifier for ids; one that leaves padding out numbers the ids behind it one lower."""
    if padding is None or linear.out_features == num_embeddings:
        return ids
    return ids - (ids > padding).long()


def _fitted(
    tables: Sequence[Tensor],
    counts: Tensor,
    compression: float | None,
    linear: nn.Linear | None,
    softmax: bool,
    padding: bool,
) -> Partition:
    """The clusters that lose least of trained tables at a compression; ``softmax``: one of them is to be a classifier."""
    if compression is None or not 1.0 <= compression < float("inf"):
        raise ValueError(f"compression must be a number of at least 1, got {compression}")
    bias = softmax and linear is not None and linear.bias is not None
    return fitted_partition(tables, weights_of(counts), compression, softmax=softmax, bias=bias, padding=padding)


def _checked_padding(table: nn.Embedding, padding_idx: int | None, counts: Tensor) -> int | None:
    declared = table.padding_idx
    if padding_idx is None:
        never = (counts == 0).nonzero().squeeze(1).tolist()
        if declared is None and never in ([0], [counts.numel() - 1]):
            warnings.warn(
                f"id {never[0]} alone never occurs, and the item table declares no padding: if it pads, pass "
                f"padding_idx={never[0]}, or it will be an item",
                stacklevel=4,
            )
        return declared
    padding_idx = as_int(padding_idx, "padding_idx")
    if not 0 <= padding_idx < table.num_embeddings:
        raise ValueError(f"padding_idx = {padding_idx} is outside 0..{table.num_embeddings - 1}")
    if declared is not None and declared != padding_idx:
        raise ValueError(f"padding_idx = {padding_idx}, but the item table declares {declared}")
    return padding_idx


def _check_unshared(model: nn.Module, table: nn.Embedding, linear: nn.Linear | None) -> None:
    """Raise ValueError where a third module holds the same parameters: it would be left with dense ones of its own."""
    replaced = [table, *([] if linear is None else [linear])]
    held = {id(parameter) for module in replaced for parameter in module.parameters()}
    for name, module in model.named_modules():
        if any(module is one for one in replaced):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in held:
                raise ValueError(
                    f"{name + '.' if name else ''}{key} is the same parameter as the item table's or the classifier's, and "
                    "would be left behind: let that module use the item table itself, or untie it first"
                )


def _check_finite(name: str, module: nn.Module) -> None:
    """Raise ValueError for NaN or inf in a module that is to be factorised."""
    for key, parameter in module.named_parameters():
        bad = ~parameter.isfinite()
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}.{key}{place} = {float(parameter[tuple(place)])}: only finite weights can be factorised"
            )


def _check_partition(partition: Partition, num_items: int, width: int, name: str) -> None:
    if not isinstance(partition, Partition):
        raise TypeError(
            f"{name} must be a Partition, got {type(partition).__name__}; Partition.from_dict makes one of a dict"
        )
    if partition.num_items != num_items or partition.embedding_dim != width:
        raise ValueError(
            f"{name} is of {partition.num_items} items and width {partition.embedding_dim}, the model has {num_items} items "
            f"(padding left out) and width {width}"
        )


def _check_inputs(inputs: Tensor | None, partition: Partition | None) -> None:
    if inputs is None:
        return
    if partition is None:
        raise ValueError("inputs are those of a classifier, and the model has none")
    if inputs.dim() != 2 or inputs.shape[1] != partition.embedding_dim or inputs.shape[0] == 0:
        raise ValueError(f"inputs must be (N, {partition.embedding_dim}) with N > 0, got shape {tuple(inputs.shape)}")
    if not bool(inputs.isfinite().all()):
        raise ValueError("inputs hold NaN or inf")
