"""Dense tables and classifiers as factors: what :func:`cprec_kernels.compress` computes, cluster by cluster."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fitting import fitted_parent_label, log_sum_exp, parent_label, second_moments, shares_of, truncated_svd
from ..partition import Partition


class TableFit(NamedTuple):
    """A table as E_j and P_j, and the relative error of every cluster."""

    embeddings: list[Tensor]
    projections: list[Tensor]
    errors: list[float]


class SoftmaxFit(NamedTuple):
    """A classifier as W_j, Q_j and biases; ``parent_errors``: rms of each parent label over the inputs, if there were any."""

    weights: list[Tensor]
    projections: list[Tensor]
    head_bias: Tensor | None
    tail_biases: list[Tensor]
    errors: list[float]
    parent_errors: list[float]


class Dense(NamedTuple):
    """A dense table or classifier in order of frequency: rows (K, d), biases (K,) or None, counts (K,)."""

    rows: Tensor
    biases: Tensor | None
    counts: Tensor

    def cluster(self, lo: int, hi: int) -> Dense:
        """The rows of one cluster."""
        return Dense(self.rows[lo:hi], None if self.biases is None else self.biases[lo:hi], self.counts[lo:hi])


def checked_counts(counts: Tensor | Sequence[float]) -> Tensor:
    """Counts, one per item, in fp64 and on the device they were on; ValueError for others than (K,) finite ones >= 0."""
    given = torch.as_tensor(counts).detach().double()
    if given.dim() != 1:
        raise ValueError(f"counts must be 1-D, one entry per item, got shape {tuple(given.shape)}")
    bad = ~(given.isfinite() & (given >= 0))
    if bad.any():
        place = int(bad.nonzero()[0])
        raise ValueError(f"counts[{place}] = {float(given[place])} is not a count")
    return given


def weights_of(counts: Tensor) -> Tensor:
    """What an item's row counts for: its count, and at least 1, so that unseen items are fitted among themselves."""
    return counts.double().clamp(min=1.0)


def copy_all(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give parameters their values, in order."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def fit_table(dense: Dense, partition: Partition, padding_row: Tensor | None) -> TableFit:
    """Every cluster's rows by a truncated SVD weighted by frequency; a cluster of full rank is copied.

    ``padding_row`` (d,) becomes one more row of the last cluster, which weighs as much as its most frequent item.
    """
    tables, projections, errors = [], [], []
    for j, (lo, hi) in enumerate(itertools.pairwise(partition.offsets)):
        rows, weights = dense.rows[lo:hi], weights_of(dense.counts[lo:hi])
        if padding_row is not None and j == partition.num_clusters - 1:
            rows, weights = torch.cat([rows, padding_row[None]]), torch.cat([weights, weights.max()[None]])
        if j in partition.projected:
            factors = truncated_svd(rows, partition.ranks[j], weights)
            tables.append(factors.left)
            projections.append(factors.right)
            errors.append(factors.error)
        else:
            tables.append(rows.clone())
            errors.append(0.0)
    return TableFit(tables, projections, errors)


def fit_parents(
    dense: Dense, partition: Partition, inputs: Tensor | None, has_bias: bool = True
) -> tuple[Tensor, Tensor, list[float]]:
    """Parent labels (n - 1, d) fp64, their constants (n - 1,), and their errors over ``inputs``, if given."""
    labels, constants, errors = [], [], []
    for lo, hi in itertools.islice(itertools.pairwise(partition.offsets), 1, None):
        rows, biases, counts = dense.cluster(lo, hi)
        label, constant = parent_label(rows, biases, shares_of(counts))
        if inputs is not None:
            targets = log_sum_exp(inputs, rows, biases)
            label, constant, rms = fitted_parent_label(inputs, targets, label, constant, has_bias)
            errors.append(rms)
        labels.append(label)
        constants.append(constant if has_bias else 0.0)
    width = dense.rows.shape[1]
    stacked = torch.stack(labels) if labels else dense.rows.new_zeros((0, width), dtype=torch.float64)
    return stacked, stacked.new_tensor(constants), errors


def fit_softmax(dense: Dense, partition: Partition, inputs: Tensor | None, has_bias: bool = True) -> SoftmaxFit:
    """A softmax over all items as a clustered one.

    Tails are factorised around their mean row, which no softmax sees, and in the metric of the inputs where a sample is
    given. A parent label stands for the log-sum-exp of its tail's logits. Where the head has a lower rank, its labels
    weigh as much as the items they stand for.
    """
    dtype = dense.rows.dtype
    metric = None if inputs is None else second_moments(inputs)
    labels, constants, parent_errors = fit_parents(dense, partition, inputs, has_bias)
    items = dense.cluster(0, partition.sizes[0])
    weights = [torch.cat([items.rows, labels.to(dtype)])]
    masses = [dense.counts[lo:hi].double().sum() for lo, hi in itertools.pairwise(partition.offsets)][1:]
    row_weights = [weights_of(torch.cat([items.counts.double(), *(mass[None] for mass in masses)]))]
    tail_biases = []
    for lo, hi in itertools.islice(itertools.pairwise(partition.offsets), 1, None):
        rows, biases, counts = dense.cluster(lo, hi)
        shares = shares_of(counts)
        mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        mean += (shares[:, None] * rows.double()).sum(0)
        weights.append((rows.double() - mean).to(dtype))
        row_weights.append(weights_of(counts))
        if biases is not None:
            tail_biases.append((biases.double() - shares @ biases.double()).to(dtype))
    projections, errors = [], []
    for j, rank in enumerate(partition.ranks):
        if j in partition.projected:
            factors = truncated_svd(weights[j], rank, row_weights[j], metric)
            weights[j] = factors.left
            projections.append(factors.right)
            errors.append(factors.error)
        else:
            errors.append(0.0)
    head_bias = None
    if has_bias and (items.biases is not None or len(constants)):
        first = items.rows.new_zeros(items.rows.shape[0]) if items.biases is None else items.biases
        head_bias = torch.cat([first, constants.to(dtype)])
    return SoftmaxFit(weights, projections, head_bias, tail_biases, errors, parent_errors)
