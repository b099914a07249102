"""Partitions and inputs with names, small enough for every check and odd enough to find mistakes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..functional import Weights
from ..partition import Partition


@dataclasses.dataclass(frozen=True)
class Case:
    """A partition with a name that says what is special about it."""

    name: str
    partition: Partition


def _case(name: str, num_items: int, cutoffs: list[int], ranks: list[int], width: int) -> Case:
    return Case(name, Partition(num_items, cutoffs, ranks, width))


CASES = (
    _case("typical", 500, [30, 120], [32, 8, 4], 32),
    _case("one-cluster", 90, [], [16], 16),
    _case("one-projected-cluster", 90, [], [5], 16),
    _case("odd-widths", 211, [17, 74], [19, 7, 3], 27),
    _case("projected-head", 150, [40], [12, 6], 24),
    _case("full-rank-tail", 80, [20], [16, 16], 16),
    _case("clusters-of-one-item", 40, [1, 2, 39], [8, 8, 3, 1], 8),
    _case("eight-clusters", 130, [3, 7, 15, 31, 50, 80, 127], [33, 32, 16, 9, 8, 4, 2, 1], 33),
)


def make_embedding(
    partition: Partition, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Random E_j and P_j whose embeddings have entries of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    tables = [
        torch.randn(size, rank, generator=generator, dtype=torch.float64)
        for size, rank in zip(partition.sizes, partition.ranks, strict=True)
    ]
    return [table.to(dtype) for table in tables], _projections(partition, dtype, generator)


def make_softmax(
    partition: Partition,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = True,
    logit_std: float = 1.0,
) -> Weights:
    """Random parameters of a clustered softmax whose logits have about ``logit_std`` for unit-variance inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows = (partition.head_size, *partition.sizes[1:])
    weights = [
        torch.randn(count, rank, generator=generator, dtype=torch.float64) * logit_std * rank**-0.5
        for count, rank in zip(rows, partition.ranks, strict=True)
    ]
    projections = _projections(partition, dtype, generator, scale=partition.embedding_dim**-0.5)
    biases = [torch.randn(count, generator=generator, dtype=torch.float64).to(dtype) for count in rows]
    return Weights(
        [weight.to(dtype) for weight in weights],
        projections,
        biases[0] if bias else None,
        biases[1:] if bias else [],
    )


def _projections(
    partition: Partition, dtype: torch.dtype, generator: torch.Generator, scale: float | None = None
) -> list[Tensor]:
    width = partition.embedding_dim
    return [
        (torch.randn(rank, width, generator=generator, dtype=torch.float64) * (scale or rank**-0.5)).to(dtype)
        for rank in (partition.ranks[j] for j in partition.projected)
    ]


def make_ids(partition: Partition, shape: tuple[int, ...] = (7, 9), seed: int = 0) -> Tensor:
    """Random ids that include the first and last item of every cluster and many duplicates."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    # A third uniform, the rest squeezed towards the frequent end.
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    skewed = torch.where(torch.arange(count) % 3 == 0, uniform, uniform**4)
    ids = (skewed * partition.num_items).long()
    edges = [edge for lo, hi in zip(partition.offsets, partition.offsets[1:], strict=False) for edge in (lo, hi - 1)]
    edges = edges[-count:]
    ids[: len(edges)] = torch.tensor(edges)
    return ids[torch.randperm(count, generator=generator)].reshape(shape)


def make_targets(
    partition: Partition, shape: tuple[int, ...] = (7, 9), seed: int = 0, ignore_index: int = -100
) -> Tensor:
    """As :func:`make_ids`, with every seventh target ignored."""
    targets = make_ids(partition, shape, seed + 1).flatten()
    targets[3::7] = ignore_index
    return targets.reshape(shape)


def make_hidden(
    partition: Partition, shape: tuple[int, ...] = (7, 9), dtype: torch.dtype = torch.float32, seed: int = 5
) -> Tensor:
    """Hidden states (*shape, d) with entries of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, partition.embedding_dim, generator=generator, dtype=torch.float64).to(dtype)


def copy_weights(
    weights: Weights,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    requires_grad: bool = False,
) -> Weights:
    """A copy of the weights, in another dtype or on another device if given, as leaves if wanted."""

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.detach().to(device or tensor.device, dtype or tensor.dtype, copy=True)
        return copy.requires_grad_(requires_grad)

    tables, projections, head_bias, tail_biases = weights
    return Weights(
        [leaf(table) for table in tables],
        [leaf(projection) for projection in projections],
        None if head_bias is None else leaf(head_bias),
        [leaf(bias) for bias in tail_biases],
    )


def weight_tensors(weights: Weights) -> list[Tensor]:
    """All tensors of the weights, in order."""
    head_bias = [] if weights.head_bias is None else [weights.head_bias]
    return [*weights.weights, *weights.projections, *head_bias, *weights.tail_biases]
