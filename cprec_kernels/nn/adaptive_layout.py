"""``nn.AdaptiveLogSoftmaxWithLoss`` as tensors: its state_dict read as a clustered softmax's, and written from one.

torch's module keeps ``head.weight`` (k_0 + n - 1, d), perhaps ``head.bias``, and per tail ``tail.i.0.weight`` (h_i, d)
and ``tail.i.1.weight`` (k_i, h_i), where h_i = int(d // div_value ** (i + 1)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..partition import Partition


class ClusteredLayout(NamedTuple):
    """A clustered softmax on paper: its partition and the state_dict of a ClusteredSoftmaxWithLoss."""

    partition: Partition
    state_dict: dict[str, Tensor]


def take(state: Mapping[str, Tensor], key: str, what: str) -> Tensor:
    """``state[key]``. Raises ValueError that names the key and what was expected."""
    if key not in state:
        raise ValueError(f"this is not the state_dict of {what}: it lacks {key!r}")
    return state[key]


def matrix(state: Mapping[str, Tensor], key: str, what: str, columns: int | None = None) -> Tensor:
    """A 2-D entry of a state_dict, of ``columns`` columns where given. Raises ValueError otherwise."""
    tensor = take(state, key, what)
    if tensor.dim() != 2 or (columns is not None and tensor.shape[1] != columns):
        wanted = f"(rows, {columns})" if columns is not None else "2-D"
        raise ValueError(f"{key!r} of {what} must be {wanted}, got shape {tuple(tensor.shape)}")
    return tensor


def fresh(rows: int, width: int, like: Tensor) -> Tensor:
    """Rows of a projection that no output depends on yet, drawn as a module's: N(0, 1/d)."""
    drawn: Tensor = torch.randn(rows, width, dtype=like.dtype, device=like.device) * width**-0.5
    return drawn


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, rounded once."""
    out: Tensor = (left.double() @ right.double()).to(left.dtype)
    return out


def from_adaptive_state_dict(state: Mapping[str, Tensor], prefix: str = "") -> ClusteredLayout:
    """Read the state_dict of an ``nn.AdaptiveLogSoftmaxWithLoss`` as that of a :class:`ClusteredSoftmaxWithLoss`.

    Outputs are equal up to rounding. A tail as wide as the model, or wider (``div_value`` <= 1), has its two matrices
    multiplied together, since a cluster of rank d has no projection here. A tail that torch's formula gave no column
    (in_features < div_value ** i) is a uniform distribution that cannot learn; it becomes one of rank 1 with zero
    weights and a fresh projection: uniform too, and able to learn.

    Args:
        state: a state_dict. Tensors are shared where nothing has to be computed.
        prefix: of the module's keys, e.g. "decoder.softmax." in that of a whole model.

    Returns:
        The partition, and a state_dict with keys ``weights.j``, ``projections.i`` and, if there was one, ``head_bias``.

    Raises:
        ValueError: a key is missing, shapes do not fit together, more than 8 clusters.
    """
    what = "an nn.AdaptiveLogSoftmaxWithLoss"
    head = matrix(state, f"{prefix}head.weight", what)
    width = head.shape[1]
    tails: list[tuple[Tensor, Tensor]] = []
    while f"{prefix}tail.{len(tails)}.0.weight" in state:
        name = f"{prefix}tail.{len(tails)}"
        projection = matrix(state, f"{name}.0.weight", what, width)
        tails.append((projection, matrix(state, f"{name}.1.weight", what, projection.shape[0])))
    if not tails or head.shape[0] <= len(tails):
        raise ValueError(
            f"this is not the state_dict of {what}: {len(tails)} tails for a head of {head.shape[0]} rows under {prefix!r}"
        )
    sizes = [head.shape[0] - len(tails), *(weight.shape[0] for _, weight in tails)]
    weights, projections, ranks = [head], [], [width]
    for projection, weight in tails:
        if projection.shape[0] >= width:
            weights.append(product(weight, projection))
        elif projection.shape[0] == 0:
            weights.append(weight.new_zeros(weight.shape[0], 1))
            projections.append(fresh(1, width, weight))
        else:
            weights.append(weight)
            projections.append(projection)
        ranks.append(weights[-1].shape[1])
    cutoffs = [sum(sizes[: j + 1]) for j in range(len(sizes) - 1)]
    partition = Partition(sum(sizes), cutoffs, ranks, width)
    converted = {f"weights.{j}": weight for j, weight in enumerate(weights)}
    converted |= {f"projections.{i}": projection for i, projection in enumerate(projections)}
    if f"{prefix}head.bias" in state:
        bias = state[f"{prefix}head.bias"]
        if bias.shape != head.shape[:1]:
            raise ValueError(f"'{prefix}head.bias' must be {tuple(head.shape[:1])}, got shape {tuple(bias.shape)}")
        converted["head_bias"] = bias
    return ClusteredLayout(partition, converted)


def hidden_sizes(width: int, tails: int, div_value: float) -> list[int]:
    """Columns that torch's module gives its tails."""
    return [int(width // div_value ** (i + 1)) for i in range(tails)]


def _largest_div_value(width: int, ranks: Sequence[int]) -> float:
    """Where torch's tails are at least as wide as the ranks: v^i <= d / r_i for all i."""
    return min(math.pow(width / rank, 1 / i) for i, rank in enumerate(ranks, start=1))


def _holds(sizes: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether tails of so many columns are at least as wide as the ranks."""
    return all(size >= rank for size, rank in zip(sizes, ranks, strict=True))


def div_value_of(partition: Partition) -> float | None:
    """A div_value for which torch's module has exactly these ranks, the shortest decimal there is; None if none has."""
    width, ranks = partition.embedding_dim, list(partition.ranks[1:])
    largest = _largest_div_value(width, ranks)
    for value in (*(math.floor(largest * 10**places) / 10**places for places in range(8)), round(largest), largest):
        if value > 0 and hidden_sizes(width, len(ranks), value) == ranks:
            return float(value)
    return None


def resolve_div_value(partition: Partition, div_value: float | None) -> float:
    """The div_value of a torch module that can hold a partition's tails.

    Raises:
        ValueError: one cluster; ``div_value`` gives a tail fewer columns than its rank, or none was given and no value
            gives just the ranks.
    """
    if partition.num_clusters == 1:
        raise ValueError("nn.AdaptiveLogSoftmaxWithLoss needs at least one cutoff, the partition has one cluster")
    width, ranks = partition.embedding_dim, list(partition.ranks[1:])
    if div_value is None:
        found = div_value_of(partition)
        if found is None:
            hundredths = math.floor(100 * _largest_div_value(width, ranks))
            while not _holds(hidden_sizes(width, len(ranks), hundredths / 100), ranks):
                hundredths -= 1  # floats: 64 // 1.6 is 39
            raise ValueError(
                f"no div_value gives nn.AdaptiveLogSoftmaxWithLoss the tail ranks {ranks} at width "
                f"{width}; pass one whose sizes int(d // div_value**i) are at least as large, "
                f"such as div_value={hundredths / 100}, and they are stored padded"
            )
        return found
    sizes = hidden_sizes(width, len(ranks), div_value) if div_value > 0 else []
    if not sizes or not _holds(sizes, ranks):
        raise ValueError(f"div_value = {div_value} gives tails of {sizes} columns, the ranks are {ranks}")
    return float(div_value)


def to_adaptive_state_dict(
    state: Mapping[str, Tensor], partition: Partition, div_value: float | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Write the state_dict of a :class:`ClusteredSoftmaxWithLoss` as that of an ``nn.AdaptiveLogSoftmaxWithLoss``.

    Outputs are equal up to rounding: a projected head (d_0 < d) is multiplied out, since torch's has no projection.

    Args:
        state: keys as in ``ClusteredSoftmaxWithLoss.state_dict()``.
        partition: of that module.
        div_value: of torch's module. By default one that gives its tails just the ranks; any whose tails are at least as
            wide will do, and adds columns of zero weight on fresh projection rows.
        prefix: put before every key.

    Raises:
        ValueError: a key is missing; torch's module cannot hold the parameters: tail biases, one cluster, ranks that
            the div_value does not give.
    """
    what = "a ClusteredSoftmaxWithLoss"
    if any(key.startswith("tail_biases.") for key in state):
        raise ValueError(
            "nn.AdaptiveLogSoftmaxWithLoss has no biases in its tails (pytorch issue 37155): "
            "only a module made with tail_bias=False can become one"
        )
    sizes = hidden_sizes(partition.embedding_dim, partition.num_clusters - 1, resolve_div_value(partition, div_value))
    width = partition.embedding_dim
    projected = iter(range(len(partition.projected)))
    factors: list[tuple[Tensor, Tensor | None]] = []
    for j, rank in enumerate(partition.ranks):
        weight = matrix(state, f"weights.{j}", what, rank)
        projection = None if rank == width else matrix(state, f"projections.{next(projected)}", what, width)
        factors.append((weight, projection))
    weight, projection = factors[0]
    converted = {f"{prefix}head.weight": weight if projection is None else product(weight, projection)}
    if "head_bias" in state:
        converted[f"{prefix}head.bias"] = state["head_bias"]
    for i, ((weight, projection), size) in enumerate(zip(factors[1:], sizes, strict=True)):
        if projection is None:
            projection = torch.eye(width, dtype=weight.dtype, device=weight.device)
        missing = size - weight.shape[1]
        if missing:
            projection = torch.cat([projection, fresh(missing, width, weight)])
            weight = nn.functional.pad(weight, (0, missing))
        converted[f"{prefix}tail.{i}.0.weight"] = projection
        converted[f"{prefix}tail.{i}.1.weight"] = weight
    return converted


def converted_in_place(
    state_dict: dict[str, Tensor], prefix: str, partition: Partition, tail_bias: Sequence[Tensor]
) -> list[str]:
    """Turn torch's keys under ``prefix`` into ours, before a module of this partition loads them; what is wrong, if so.

    torch's module has no tail biases; where ours has, they are zero.
    """
    if f"{prefix}head.weight" not in state_dict:
        return []
    try:
        layout = from_adaptive_state_dict(state_dict, prefix)
    except ValueError as error:
        return [str(error)]
    if layout.partition != partition:
        return [
            f"the state_dict under {prefix!r} is that of an adaptive softmax of {layout.partition}, not {partition}"
        ]
    tails = range(partition.num_clusters - 1)
    for name in ("head.weight", "head.bias", *(f"tail.{i}.{part}.weight" for i in tails for part in (0, 1))):
        state_dict.pop(prefix + name, None)
    state_dict.update({prefix + key: value for key, value in layout.state_dict.items()})
    state_dict.update({f"{prefix}tail_biases.{i}": torch.zeros_like(bias) for i, bias in enumerate(tail_bias)})
    return []
