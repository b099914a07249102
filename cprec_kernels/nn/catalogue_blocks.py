"""Changes of the catalogue on the parameters of a block embedding and of a clustered softmax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fitting import fitted_parent_label, log_sum_exp, parent_label, shares_of, truncated_svd
from ..partition import Partition
from .catalogue import CatalogueChange, NewParameter, Reordering, carry_state, check_state, settle

if TYPE_CHECKING:
    from .block_embedding import BlockEmbedding
    from .clustered_softmax import ClusteredSoftmaxWithLoss


class Block(NamedTuple):
    """One cluster's factors as they were: table (rows, r), projection (r, d) or None."""

    table: nn.Parameter
    projection: nn.Parameter | None

    def dense(self, rows: Tensor) -> Tensor:
        """Rows (m, d) in fp64."""
        chosen = self.table[rows].double()
        return chosen if self.projection is None else chosen @ self.projection.double()


class Rebuilt(NamedTuple):
    """One cluster's factors as they are to be; ``origin`` says where kept rows come from, None if none was kept as it is."""

    table: Tensor
    projection: Tensor | None
    source: int | None
    origin: Tensor | None
    error: float


def _blocks(tables: Sequence[nn.Parameter], projections: Sequence[nn.Parameter], partition: Partition) -> list[Block]:
    left = iter(projections)
    return [Block(table, next(left) if j in partition.projected else None) for j, table in enumerate(tables)]


def _source(ids: Tensor, old: Partition) -> int | None:
    """The one former cluster that all old items among ``ids`` come from, or None."""
    known = ids[ids >= 0]
    if known.numel() == 0:
        return None
    first, last = old.cluster_of(int(known.min())), old.cluster_of(int(known.max()))
    return first if first == last else None


def _filled(rows: Tensor, known: Tensor) -> Tensor:
    """``rows`` with the mean of the known ones in the places of the others."""
    if bool(known.all()):
        return rows
    mean = rows[known].double().mean(0) if bool(known.any()) else torch.zeros_like(rows[0], dtype=torch.float64)
    return torch.where(known[:, None], rows, mean.to(rows.dtype))


def _kept(block: Block, source: int, index: Tensor) -> Rebuilt:
    """Rows of one former cluster, bit for bit; new ones start as their mean."""
    known = index >= 0
    return Rebuilt(_filled(block.table[index.clamp(min=0)], known), block.projection, source, index, 0.0)


def _refitted(dense: Tensor, rank: int, weights: Tensor | None, dtype: torch.dtype) -> Rebuilt:
    """Rows of several clusters, or for another rank, by a truncated SVD."""
    if rank == dense.shape[1]:
        return Rebuilt(dense.to(dtype), None, None, None, 0.0)
    factors = truncated_svd(dense, rank, weights)
    return Rebuilt(factors.left.to(dtype), factors.right.to(dtype), None, None, factors.error)


def _dense_rows(blocks: Sequence[Block], old: Partition, ids: Tensor) -> Tensor:
    """Dense rows (m, d) fp64 of old items, and the mean of all for new ones."""
    out = torch.zeros(ids.numel(), old.embedding_dim, dtype=torch.float64, device=ids.device)
    for block, (lo, hi) in zip(blocks, itertools.pairwise(old.offsets), strict=True):
        inside = (ids >= lo) & (ids < hi)
        out[inside] = block.dense(ids[inside] - lo)
    return _filled(out, ids >= 0)


def _weights(counts: Tensor | None, lo: int, hi: int) -> Tensor | None:
    return None if counts is None else counts[lo:hi].clamp(min=1.0)


class _Parameters:
    """Turns rebuilt values into parameters, and lets those that did not change be the objects they were."""

    def __init__(self) -> None:
        self.replaced: list[NewParameter] = []
        self.used: set[int] = set()

    def add(self, value: Tensor, like: nn.Parameter, source: tuple[nn.Parameter, Tensor] | None = None) -> nn.Parameter:
        if value is like and id(like) not in self.used:
            new = like
        else:
            new = nn.Parameter(value.detach().to(like.dtype, copy=True).contiguous(), requires_grad=like.requires_grad)
            vars(new).update(vars(like))  # what accumulate_in_place asked for
            if value is like:
                source = (like, torch.arange(like.shape[0], device=like.device))
        self.used.add(id(new))
        self.replaced.append(NewParameter(new, like, source))
        return new

    def table(self, rebuilt: Rebuilt, blocks: Sequence[Block], place: int) -> nn.Parameter:
        like = blocks[min(place, len(blocks) - 1) if rebuilt.source is None else rebuilt.source].table
        if rebuilt.origin is None:
            return self.add(rebuilt.table, like)
        everything = torch.arange(like.shape[0], device=like.device)
        value = like if torch.equal(rebuilt.origin, everything) else rebuilt.table
        return self.add(value, like, (like, rebuilt.origin))

    def bias(self, value: Tensor, like: nn.Parameter, index: Tensor | None) -> nn.Parameter:
        if index is None:
            return self.add(value, like)
        everything = torch.arange(like.numel(), device=index.device)
        return self.add(like if torch.equal(index, everything) else value, like, (like, index))

    def projection(self, rebuilt: Rebuilt, blocks: Sequence[Block]) -> nn.Parameter | None:
        if rebuilt.projection is None:
            return None
        if isinstance(rebuilt.projection, nn.Parameter):
            return self.add(rebuilt.projection, rebuilt.projection)
        likes = [block.projection for block in blocks if block.projection is not None]
        return self.add(rebuilt.projection, likes[-1] if likes else blocks[0].table)


def change_embedding(
    module: BlockEmbedding, old: Partition, order: Reordering, counts: Tensor | None, optimizers: list[Optimizer]
) -> CatalogueChange:
    """Give an embedding the clusters and items of ``order``; ``old`` and ``order`` leave the padding out."""
    former = list(module.parameters())
    check_state(optimizers, former)
    settle(optimizers)
    new, old_ids = order
    blocks = _blocks(list(module.embeddings), list(module.projections), old)
    padded = module.padding_idx is not None
    pad_row = torch.tensor([old.sizes[-1]], device=old_ids.device)
    rebuilt = []
    for j, (lo, hi) in enumerate(itertools.pairwise(new.offsets)):
        ids, rank = old_ids[lo:hi], new.ranks[j]
        with_pad = padded and j == new.num_clusters - 1
        source = _source(ids, old)
        same = source is not None and old.ranks[source] == rank
        at_home = source == old.num_clusters - 1
        if source is not None and same and (not with_pad or at_home or not bool(blocks[-1].table[pad_row].any())):
            index = torch.where(ids >= 0, ids - old.offsets[source], -1)
            part = _kept(blocks[source], source, index)
            if with_pad:  # the padding's row goes along, and is no item to take a mean of
                row = blocks[-1].table[pad_row] if at_home else torch.zeros_like(part.table[:1])
                origin = torch.cat([index, pad_row if at_home else torch.full_like(pad_row, -1)])
                part = part._replace(table=torch.cat([part.table, row]), origin=origin)
            rebuilt.append(part)
            continue
        dense, weights = _dense_rows(blocks, old, ids), _weights(counts, lo, hi)
        if with_pad:
            dense = torch.cat([dense, blocks[-1].dense(pad_row)])
            weights = None if weights is None else torch.cat([weights, weights.max()[None]])
        rebuilt.append(_refitted(dense, rank, weights, blocks[0].table.dtype))
    parameters = _Parameters()
    tables = [parameters.table(part, blocks, j) for j, part in enumerate(rebuilt)]
    projections = [parameters.projection(part, blocks) for part in rebuilt]
    module.embeddings = nn.ParameterList(tables)
    module.projections = nn.ParameterList([projection for projection in projections if projection is not None])
    module.partition = new.with_padding() if padded else new
    module.padding_idx = new.num_items if padded else None
    carry_state(optimizers, former, parameters.replaced)
    return CatalogueChange(new, old_ids, order.new_ids(old.num_items), tuple(part.error for part in rebuilt))


class _Logits(NamedTuple):
    """Items' logits as linear functions of the input, up to what all of a level share: (m, d) and (m,) fp64."""

    vectors: Tensor
    constants: Tensor


class _FormerSoftmax:
    """What is needed of a softmax's parameters before they change."""

    def __init__(self, module: ClusteredSoftmaxWithLoss, inputs: Tensor | None) -> None:
        self.partition, self.inputs = module.partition, inputs
        self.blocks = _blocks(list(module.weights), list(module.projections), module.partition)
        self.head_bias, self.tail_biases = module.head_bias, list(module.tail_biases)
        self.device = module.weights[0].device

    def parent(self, tail: int) -> tuple[Tensor, float]:
        """Parent label of a tail (d,) and its bias."""
        row = self.partition.sizes[0] + tail - 1
        label = self.blocks[0].dense(torch.tensor([row], device=self.device))[0]
        return label, 0.0 if self.head_bias is None else float(self.head_bias[row])

    def own(self, level: int, rows: Tensor) -> _Logits:
        """Logits of rows within their level."""
        bias = self.head_bias if level == 0 else self.tail_biases[level - 1] if self.tail_biases else None
        constants = rows.new_zeros(rows.shape, dtype=torch.float64) if bias is None else bias[rows].double()
        return _Logits(self.blocks[level].dense(rows), constants)

    def overall(self, ids: Tensor, shares: Tensor | None) -> _Logits:
        """Log-probabilities of items, up to the head's log-sum-exp; a tail's own is taken as its label would be fitted."""
        vectors = torch.zeros(ids.numel(), self.partition.embedding_dim, dtype=torch.float64, device=self.device)
        constants = torch.zeros(ids.numel(), dtype=torch.float64, device=self.device)
        for level, (lo, hi) in enumerate(itertools.pairwise(self.partition.offsets)):
            inside = (ids >= lo) & (ids < hi)
            if not bool(inside.any()):
                continue
            part = self.own(level, ids[inside] - lo)
            if level:
                everything = self.own(level, torch.arange(hi - lo, device=self.device))
                weights = torch.ones(hi - lo, device=self.device) if shares is None else shares[lo:hi]
                mean, constant = parent_label(*everything, shares_of(weights))
                if self.inputs is not None:
                    targets = log_sum_exp(self.inputs, *everything)
                    mean, constant, _ = fitted_parent_label(self.inputs, targets, mean, constant, True)
                label, bias = self.parent(level)
                part = _Logits(part.vectors + label - mean, part.constants + bias - constant)
            vectors[inside], constants[inside] = part
        known = ids >= 0
        return _Logits(_filled(vectors, known), _filled(constants[:, None], known)[:, 0])


def change_softmax(
    module: ClusteredSoftmaxWithLoss,
    order: Reordering,
    counts: Tensor | None,
    inputs: Tensor | None,
    optimizers: list[Optimizer],
) -> CatalogueChange:
    """Give a softmax the clusters and items of ``order``; ``counts`` are in the new order."""
    former_parameters = list(module.parameters())
    check_state(optimizers, former_parameters)
    settle(optimizers)
    former, old = _FormerSoftmax(module, inputs), module.partition
    new, old_ids = order
    old_counts = None
    if counts is not None:
        old_counts = counts.new_zeros(old.num_items)
        known = old_ids >= 0
        old_counts[old_ids[known]] = counts[known]
    bounds = list(itertools.pairwise(new.offsets))
    survivors = [int(((old_ids >= lo) & (old_ids < hi)).sum()) for lo, hi in itertools.pairwise(old.offsets)]

    tails, labels, label_rows, parent_errors = [], [], [], []
    tail_biases: list[tuple[Tensor, int | None, Tensor | None]] = []
    for j, (lo, hi) in enumerate(bounds[1:], start=1):
        ids, shares = old_ids[lo:hi], None if counts is None else counts[lo:hi]
        source = _source(ids, old)
        inside = source if source else None  # a former tail
        index = None if inside is None else torch.where(ids >= 0, ids - old.offsets[inside], -1)
        if inside is not None and index is not None and old.ranks[inside] == new.ranks[j]:
            tails.append(_kept(former.blocks[inside], inside, index))
        else:
            logits = former.overall(ids, old_counts)
            if inside is not None and index is not None:
                known = index >= 0
                logits = former.own(inside, index.clamp(min=0))
                logits = _Logits(_filled(logits.vectors, known), logits.constants)
            mean = shares_of(torch.ones_like(logits.constants) if shares is None else shares) @ logits.vectors
            dtype = module.weights[0].dtype
            tails.append(_refitted(logits.vectors - mean, new.ranks[j], _weights(counts, lo, hi), dtype))
        if module.tail_biases:
            if inside is not None and index is not None:
                bias = _filled(former.tail_biases[inside - 1][index.clamp(min=0)][:, None], index >= 0)[:, 0]
                tail_biases.append((bias, inside, index))
            else:
                constants = former.overall(ids, old_counts).constants
                tail_biases.append((constants - constants.mean(), None, None))
        if inside is not None and int((ids >= 0).sum()) == survivors[inside]:
            labels.append(former.parent(inside))
            label_rows.append(old.sizes[0] + inside - 1)
            parent_errors.append(0.0)
            continue
        logits = former.overall(ids, old_counts)
        uniform = torch.ones_like(logits.constants)
        label, constant = parent_label(*logits, shares_of(uniform if shares is None else shares))
        error = math.nan
        if inputs is not None:
            targets = log_sum_exp(inputs, *logits)
            label, constant, error = fitted_parent_label(inputs, targets, label, constant, module.head_bias is not None)
        labels.append((label, constant))
        label_rows.append(-1)
        parent_errors.append(error)

    head, head_index, head_bias = _new_head(former, order, old_counts, labels, label_rows, counts)
    parameters = _Parameters()
    weights = [parameters.table(part, former.blocks, j) for j, part in enumerate([head, *tails])]
    projections = [parameters.projection(part, former.blocks) for part in (head, *tails)]
    new_head_bias = None
    if module.head_bias is not None:
        new_head_bias = parameters.bias(head_bias, module.head_bias, head_index)
    biases = []
    for bias, inside, index in tail_biases:
        like = former.tail_biases[0 if inside is None else inside - 1]
        biases.append(parameters.bias(bias, like, index))
    module.head_bias = new_head_bias
    module.tail_biases = nn.ParameterList(biases)
    module.weights = nn.ParameterList(weights)
    module.projections = nn.ParameterList([projection for projection in projections if projection is not None])
    module.partition = new
    carry_state(optimizers, former_parameters, parameters.replaced)
    errors = tuple(part.error for part in (head, *tails))
    return CatalogueChange(new, old_ids, order.new_ids(old.num_items), errors, tuple(parent_errors))


def _new_head(
    former: _FormerSoftmax,
    order: Reordering,
    old_counts: Tensor | None,
    labels: Sequence[tuple[Tensor, float]],
    label_rows: Sequence[int],
    counts: Tensor | None,
) -> tuple[Rebuilt, Tensor, Tensor]:
    """The head's factors, where its rows come from (-1: new), and its bias."""
    new, old = order.partition, former.partition
    ids, block = order.old_ids[: new.sizes[0]], former.blocks[0]
    dtype, device = block.table.dtype, former.device
    rows = torch.tensor(label_rows, dtype=torch.int64, device=device)
    logits = former.overall(ids, old_counts)
    stacked = [torch.stack([label for label, _ in labels])] if labels else []
    constants = logits.constants.new_tensor([constant for _, constant in labels])
    bias = torch.cat([logits.constants, constants])
    same = new.ranks[0] == old.ranks[0]
    if same and _source(ids, old) == 0 and (block.projection is None or bool((rows >= 0).all())):
        index = torch.cat([ids, rows])
        part = _kept(block, 0, index)
        if stacked and bool((rows < 0).any()):
            part.table[len(ids) :][rows < 0] = stacked[0][rows < 0].to(dtype)
        return part, index, bias.to(dtype)
    weights = None
    if counts is not None:
        masses = [counts[lo:hi].sum()[None] for lo, hi in itertools.islice(itertools.pairwise(new.offsets), 1, None)]
        weights = torch.cat([counts[: new.sizes[0]], *masses]).clamp(min=1.0)
    part = _refitted(torch.cat([logits.vectors, *stacked]), new.ranks[0], weights, dtype)
    index = torch.cat([torch.where(ids < old.sizes[0], ids, -1), rows])
    if block.projection is None and part.projection is None:
        # the same coordinates: rows of the former head keep their moments, beside those that come from elsewhere
        kept = part.table.clone()
        kept[index >= 0] = block.table[index[index >= 0]]
        part = Rebuilt(kept, None, 0, index, part.error)
    return part, index, bias.to(dtype)
