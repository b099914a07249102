"""Item vectors that exist already, put into block embeddings and clustered softmaxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fitting import parent_label, shares_of, truncated_svd
from ..nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks
from ..partition import Partition
from ._factors import checked_counts, copy_all, weights_of


@torch.no_grad()
def set_item_vectors(
    module: BlockEmbedding | ClusteredSoftmaxWithLoss | TiedBlocks,
    counts: Tensor | Sequence[float],
    *,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[float, ...]:
    """Have a module start from item vectors: of a matrix factorisation, of texts or images, of another model.

    A cluster becomes the truncated SVD of its vectors, weighted by frequency; one of full rank is a copy. A tail whose rows
    serve in both roles, with projections of its own for each, is the SVD of both kinds of vectors side by side, scaled to
    weigh the same. Rows of projected clusters get a mean square norm of 1, as fresh ones have. A parent label is the mean of
    its tail's output vectors by frequency, which bounds the tail's log-sum-exp from below up to a constant; output vectors
    of a tail stand around it. Padding embeds to 0.

    Args:
        module: a BlockEmbedding takes ``inputs``, a ClusteredSoftmaxWithLoss ``outputs``. A TiedBlocks takes ``inputs`` where
            it shares head and projections, and both where it shares neither; one that shares only head or only
            projections is refused.
        counts: (K,) how often each item occurs, the most frequent first: what vectors weigh. K leaves a padding id out that
            is the last one; any other counts as an item here.
        inputs: (K, d), what items embed to. outputs: (K, d), whose products with hidden states are logits.

    Returns:
        Per cluster, the norm of what was lost relative to that of the vectors, weighted by frequency; of a TiedBlocks' head
        that of the embedding.

    Raises:
        TypeError: another module; vectors that are missing, superfluous or not of floating point.
        ValueError: shapes that do not fit, numbers that are not finite, negative counts, a TiedBlocks that shares head or
            projections alone. Nothing has been changed then.
    """
    given = {name: vectors for name, vectors in (("inputs", inputs), ("outputs", outputs)) if vectors is not None}
    needed = _needed(module)
    if set(given) != set(needed):
        raise TypeError(
            f"this {type(module).__name__} takes {' and '.join(needed)}, got {' and '.join(given) or 'neither'}"
        )
    partition = module.partition
    padding = isinstance(module, BlockEmbedding) and module.padding_idx == partition.num_items - 1
    for name, vectors in given.items():
        _check_vectors(name, vectors, partition.num_items - padding, partition.embedding_dim)
    any_vectors = next(iter(given.values()))
    weights = checked_counts(counts).to(any_vectors.device)
    if len(weights) != len(any_vectors):
        raise ValueError(f"counts must have shape ({len(any_vectors)},), got {tuple(weights.shape)}")

    if isinstance(module, BlockEmbedding):
        fits = _fit_clusters(partition, [given["inputs"]], weights)
        _set_embedding(module, fits)
        return tuple(fit.error for fit in fits)
    # Both kinds of softmax: the head has its parent labels, and tails with rows of their own stand around them.
    logits = given.get("outputs", given.get("inputs"))
    assert logits is not None
    labels, constants, around = _around_parents(partition, logits, weights)
    tails = slice(partition.sizes[0], None)
    if isinstance(module, ClusteredSoftmaxWithLoss):
        fits = [_fit_head(partition, logits, labels, weights), *_fit_clusters(partition, [around], weights)[1:]]
        copy_all(module.weights, (fit.rows for fit in fits))
        copy_all(module.projections, (fit.projections[0] for fit in fits if fit.projections))
    elif module.tie_head:
        fits = [_fit_head(partition, logits, labels, weights), *_fit_clusters(partition, [logits], weights)[1:]]
        if module.parents is not None:
            module.parents.copy_(fits[0].rows[tails])
        _set_embedding(module.embedding, [fits[0]._replace(rows=fits[0].rows[: tails.start]), *fits[1:]])
    else:
        fits = _fit_clusters(partition, [given["inputs"]], weights)[:1]
        fits += _fit_clusters(partition, [given["inputs"], around], weights)[1:]
        head = _fit_head(partition, logits, labels, weights)
        assert module.head is not None
        module.head.copy_(head.rows)
        copy_all(module.projections, (fit.projections[-1] for fit in [head, *fits[1:]] if fit.projections))
        _set_embedding(module.embedding, fits)
    if module.head_bias is not None:
        module.head_bias.zero_()
        module.head_bias[tails] = constants.to(module.head_bias)
    for bias in module.tail_biases:
        bias.zero_()
    return tuple(fit.error for fit in fits)


class _Fit(NamedTuple):
    """A cluster's rows (k, r), and for each role a projection (r, d); none where the cluster has full rank."""

    rows: Tensor
    projections: tuple[Tensor, ...]
    error: float


def _fit(roles: Sequence[Tensor], rank: int, projected: bool, weights: Tensor) -> _Fit:
    """``roles``: vectors (k, d) of the same items, which are to share their rows."""
    if not projected:
        return _Fit(roles[0], (), 0.0)
    if not len(roles[0]):  # a cluster of nothing but the padding
        nothing = roles[0].new_zeros
        return _Fit(nothing(0, rank), tuple(nothing(rank, vectors.shape[1]) for vectors in roles), 0.0)
    norms = [max(float(vectors.norm()), torch.finfo(torch.float32).tiny) for vectors in roles]
    both = torch.cat([vectors / norm for vectors, norm in zip(roles, norms, strict=True)], dim=1)
    svd = truncated_svd(both, rank, weights_of(weights))
    scale = float(svd.left.square().sum(1).mean().sqrt()) or 1.0
    parts = svd.right.chunk(len(roles), dim=1)
    return _Fit(
        svd.left / scale, tuple(part * (scale * norm) for part, norm in zip(parts, norms, strict=True)), svd.error
    )


def _fit_clusters(partition: Partition, roles: Sequence[Tensor], weights: Tensor) -> list[_Fit]:
    return [
        _fit([vectors[lo:hi] for vectors in roles], rank, j in partition.projected, weights[lo:hi])
        for j, (rank, (lo, hi)) in enumerate(zip(partition.ranks, itertools.pairwise(partition.offsets), strict=True))
    ]


def _fit_head(partition: Partition, vectors: Tensor, labels: Tensor, weights: Tensor) -> _Fit:
    """The head's items and the parent labels, each of which weighs as much as the items it stands for."""
    masses = [weights[lo:hi].sum() for lo, hi in itertools.pairwise(partition.offsets)][1:]
    first = partition.sizes[0]
    return _fit(
        [torch.cat([vectors[:first], labels])],
        partition.ranks[0],
        0 in partition.projected,
        torch.cat([weights[:first], torch.stack(masses)]) if masses else weights,
    )


def _around_parents(partition: Partition, vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parent labels (n - 1, d), their constants (n - 1,), and the vectors (K, d), those of tails less their labels."""
    labels, constants, around = [], [], vectors.clone()
    for lo, hi in itertools.pairwise(partition.offsets[1:]):
        label, constant = parent_label(vectors[lo:hi], None, shares_of(weights[lo:hi]))
        labels.append(label.to(vectors.dtype))
        constants.append(constant)
        around[lo:hi] -= labels[-1]
    stacked = torch.stack(labels) if labels else vectors.new_zeros(0, vectors.shape[1])
    return stacked, vectors.new_tensor(constants), around


def _set_embedding(embedding: BlockEmbedding, fits: Sequence[_Fit]) -> None:
    for table, fit in zip(embedding.embeddings, fits, strict=True):
        table[: len(fit.rows)] = fit.rows.to(table)  # the last one has a row more where the last id pads
    copy_all(embedding.projections, (fit.projections[0] for fit in fits if fit.projections))
    if embedding.padding_idx is not None:
        cluster = embedding.partition.cluster_of(embedding.padding_idx)
        embedding.embeddings[cluster][embedding.padding_idx - embedding.partition.offsets[cluster]] = 0.0


def _needed(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, BlockEmbedding):
        return ("inputs",)
    if isinstance(module, ClusteredSoftmaxWithLoss):
        return ("outputs",)
    if not isinstance(module, TiedBlocks):
        raise TypeError(
            f"module must be a BlockEmbedding, a ClusteredSoftmaxWithLoss or a TiedBlocks, got {type(module).__name__}"
        )
    if module.tie_head != module.tie_projections:
        raise ValueError(
            f"a TiedBlocks with tie_head={module.tie_head} and tie_projections={module.tie_projections} cannot start from "
            "item vectors: make both true (one vector per item) or both false (two)"
        )
    return ("inputs",) if module.tie_head else ("inputs", "outputs")


def _check_vectors(name: str, vectors: Tensor, num_items: int, width: int) -> None:
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
        raise TypeError(f"{name} must be a tensor of floating point, got {kind}")
    if vectors.shape != (num_items, width):
        raise ValueError(f"{name} must have shape ({num_items}, {width}), got {tuple(vectors.shape)}")
    bad = ~vectors.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{name}[{int(bad.nonzero()[0])}] is not finite")
