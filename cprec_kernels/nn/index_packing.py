"""Packing weights for search: groups of 32 items, number formats, blocks of neighbouring items and their bounds.

:class:`cprec_kernels.ops.topk_index.IndexArrays` says what every array holds. All bounds are taken in fp64 and rounded
away from zero: a search that trusts them must never lose an item.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.clustered_softmax import Weights
from ..ops.topk_index import GROUP, LEAF, IndexArrays

STORAGES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
# What to take instead of a storage whose range is too small.
_WIDER = {"float16": "bfloat16", "bfloat16": "float32"}
BLOCKS = ("auto", "kd", None)
# A tail of so few leaves is scored about as fast as its leaves are looked at: its order stays.
MIN_LEAVES_TO_REORDER = 4
# Items of the head that try a tail's leaves, and the share of leaves left by them above which "auto" does without. Of
# trained models, where a search gains by leaves it is 0.08 at most, and where it loses, 0.3 or more.
PROBES, MAX_LEFT = 16, 0.2
# Relative rounding of the bounds, far above that of fp64 sums and below what costs speed.
ROUND_UP = 1 + 1e-6
# Of the largest one: shorter axes of what is known of hidden states are not believed, and a basis stays well-conditioned.
MIN_EIGENVALUE = 1e-4
# Powers of two by which biases may blur a level's logits before a warning.
MAX_BLUR = 1.0
# log2(number of items) of leaves that are not there: no sum notices them.
NO_ITEMS = -1e30


class PackedLevel(NamedTuple):
    """The arrays of one level, as in :class:`IndexArrays`, and its row of the bounds (6,)."""

    groups: Tensor
    scales: Tensor
    exact: Tensor
    biases: Tensor
    projections: Tensor
    ids: Tensor
    leaves: Tensor
    leaf_stats: Tensor
    leaf_bases: Tensor
    bounds: Tensor


def pack(weights: Weights, storage: str, exact: bool, blocks: str | None) -> IndexArrays:
    """Pack the parameters of a clustered softmax, on the CPU and in a floating dtype up to fp32.

    Args:
        storage: a key of STORAGES.
        exact: keep the fp32 weights beside a narrower storage, so that ids are those of the weights.
        blocks: "kd" reorders large tails so that leaves hold neighbours, and bounds every leaf; "auto" does so where that
            promises to pay, see :func:`share_left`; None never.

    Raises:
        ValueError: NaN or inf in a parameter, a weight outside the storage's range; the message names the place.
    """
    check_finite(weights)
    _warn_of_masks(weights)
    tails = len(weights.weights) - 1
    head = weights.weights[0].shape[0] - tails
    width = (weights.projections[0] if weights.projections else weights.weights[0]).shape[1]
    remaining = iter(weights.projections)
    looked_for = _looked_for(weights, head, blocks == "auto") if blocks is not None and tails > 0 else None
    levels = []
    first = 0
    for j, table in enumerate(weights.weights):
        size = head if j == 0 else table.shape[0]
        bias = weights.head_bias if j == 0 else (weights.tail_biases[j - 1] if weights.tail_biases else None)
        projection = None if table.shape[1] == width else next(remaining).float().contiguous()
        levels.append(
            _pack_level(
                table[:size].float(),
                None if bias is None else bias[:size].float(),
                projection,
                first,
                storage,
                exact and storage != "float32",
                None if j == 0 else looked_for,
                f"weights[{j}]",
            )
        )
        first += size
    *lists, bounds = (list(arrays) for arrays in zip(*levels, strict=True))
    sizes = [head, *(table.shape[0] for table in weights.weights[1:])]
    parents = weights.weights[0][head:].to(torch.float32, copy=True)
    parent_bias = _absent() if weights.head_bias is None else weights.head_bias[head:].to(torch.float32, copy=True)
    return IndexArrays._make([sizes, *lists, torch.stack(bounds), parents.contiguous(), parent_bias.contiguous()])


def check_finite(weights: Weights) -> None:
    """Raise ValueError for NaN or inf in any parameter, naming the first row."""
    named = [(f"weights[{j}]", table) for j, table in enumerate(weights.weights)]
    named += [(f"projections[{i}]", projection) for i, projection in enumerate(weights.projections)]
    if weights.head_bias is not None:
        named.append(("head_bias", weights.head_bias))
    named += [(f"tail_biases[{j}]", bias) for j, bias in enumerate(weights.tail_biases)]
    for name, tensor in named:
        # The extremes are NaN or inf if anything is: one pass, and nothing of the tensor's size.
        if not all(value.isfinite() for value in tensor.aminmax()):
            row = int((~tensor.isfinite()).reshape(tensor.shape[0], -1).any(1).nonzero()[0])
            raise ValueError(f"{name} row {row} holds NaN or inf: scores could not be ordered; mend the weights first")


def _warn_of_masks(weights: Weights) -> None:
    """Warn of biases so large that what rounds with them, every bound of their level, proves nothing any more."""
    named = [("head_bias", weights.head_bias, weights.weights[0])]
    named += [(f"tail_biases[{j}]", bias, weights.weights[j + 1]) for j, bias in enumerate(weights.tail_biases)]
    for name, bias, table in named:
        largest = 0.0 if bias is None or bias.numel() == 0 else float(bias.abs().max())
        rank = table.shape[1]
        if 4 * (rank + 8) * math.sqrt(rank) * 2**-24 * largest / math.log(2) > MAX_BLUR:
            warnings.warn(
                f"{name} reaches {largest:g} in size: searches of this index stay exact, but can hardly leave anything out, and "
                "narrow storages keep many items to be decided in fp32. If that masks items, name them in exclude= or leave them "
                "out of candidates= instead",
                stacklevel=2,
            )


def _absent(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu")


def _pack_level(
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    first: int,
    storage: str,
    exact: bool,
    looked_for: LookedFor | None,
    name: str,
) -> PackedLevel:
    """One level from its items' weights (k_j, r_j) and biases (k_j,), both fp32; its first item has id ``first``.

    ``looked_for``: None for a level without leaves.
    """
    size = weight.shape[0]
    order = None
    basis = _absent() if looked_for is None else leaf_basis(looked_for.moment, projection)
    as_given = weight, bias
    if looked_for is not None and size > MIN_LEAVES_TO_REORDER * LEAF:
        order = kd_order(torch.cat([_in_basis(weight[rows], basis).float() for rows in _chunks(*weight.shape)]))
        weight, bias = weight[order], None if bias is None else bias[order]
    full = _groups(weight)
    groups, scales = _narrow(full, storage, name)
    counting = (groups, scales) if storage != "float32" and not exact else (full, _absent())
    leaves, leaf_stats, longest = _absent(), _absent(), 0.0
    if looked_for is not None:
        leaves, leaf_stats, longest = _leaves(*counting, bias, size, basis)
    if looked_for is not None and looked_for.probes is not None:
        z = looked_for.probes if projection is None else looked_for.probes @ projection.double().T
        if share_left(*counting, bias, size, basis, leaves, leaf_stats, z) > MAX_LEFT:
            return _pack_level(*as_given, projection, first, storage, exact, None, name)
    return PackedLevel(
        groups,
        scales,
        full if exact else _absent(),
        _absent() if bias is None else _padded(bias, GROUP),
        # A copy: an index must not change with the weights it was built from.
        _absent() if projection is None else projection.clone(),
        _absent(torch.int32) if order is None else _padded((order + first).int(), GROUP, -1),
        leaves,
        leaf_stats,
        basis,
        torch.cat(
            [
                _level_bounds(full, groups, scales, exact, bias, size),
                torch.tensor([longest], dtype=torch.float64, device="cpu") * ROUND_UP,
            ]
        ),
    )


# Groups and number formats


def _padded(rows: Tensor, multiple: int, value: float = 0) -> Tensor:
    """Rows (m, ...) in fresh memory, followed by rows of ``value`` up to a multiple."""
    out = rows.new_full((-(-rows.shape[0] // multiple) * multiple, *rows.shape[1:]), value)
    out[: rows.shape[0]] = rows
    return out


def _groups(rows: Tensor) -> Tensor:
    """(ceil(m / 32), r, 32) from rows (m, r)."""
    return _padded(rows, GROUP).reshape(-1, GROUP, rows.shape[1]).transpose(1, 2).contiguous()


def _narrow(groups: Tensor, storage: str, name: str) -> tuple[Tensor, Tensor]:
    """Groups in a storage, and the scales of int8. Raises ValueError for a weight outside its range."""
    if storage == "int8":
        largest = groups.abs().amax((1, 2))
        scales = largest / 127
        # The scale of a group of tiny weights may round to 0; so do its weights then.
        steps = groups / scales.masked_fill(scales == 0, torch.inf)[:, None, None]
        return steps.round_().clamp_(-127, 127).to(torch.int8), scales
    narrow = groups.to(STORAGES[storage])
    if storage != "float32" and not narrow.isfinite().all():
        low, high = groups.aminmax()
        worst = float(high if high > -low else low)
        raise ValueError(
            f"{name} holds {worst:g}, outside the range of {storage}; build with storage={_WIDER[storage]!r}"
        )
    return narrow, _absent()


# Blocks


class LookedFor(NamedTuple):
    """What the hidden states h of searches may look like, up to a factor.

    Nothing is known of them here but what they are trained to resemble: the head's items, in which the likeliest ones are. A
    search of a trained model had 12% of a tail's leaves left with their moment, 15% by the projections alone.
    """

    moment: Tensor  # (d, d) fp64: the mean of h h^T
    probes: Tensor | None  # (PROBES, d) fp64: some h, where leaves are tried


def _looked_for(weights: Weights, head: int, probing: bool) -> LookedFor:
    """From the first ``head`` rows of the head's weights."""
    places = torch.linspace(0, head - 1, min(PROBES, head), dtype=torch.float32, device="cpu").long()
    probes = weights.weights[0][places].double()
    if weights.projections and weights.projections[0].shape[0] == probes.shape[1] < weights.projections[0].shape[1]:
        probes = probes @ weights.projections[0].double()
    return LookedFor(_second_moment(weights, head), probes if probing else None)


def _second_moment(weights: Weights, head: int) -> Tensor:
    """(d, d) fp64: the mean of h h^T, up to a factor, were hidden states h the head's items."""
    table = weights.weights[0]
    moment: Tensor = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device="cpu")
    for part in table[:head].split(MOMENT_ROWS):
        own = part.double()
        moment += own.T @ own
    if table.shape[1] != (weights.projections[0].shape[1] if weights.projections else table.shape[1]):
        projection = weights.projections[0].double()
        moment = projection.T @ moment @ projection
    return moment


def leaf_basis(moment: Tensor, projection: Tensor | None) -> Tensor:
    """A (r, r) fp32, in whose basis rows z = Q h of such h are as long in every direction: A E[z z^T] A^T = 1.

    Spheres and boxes bound best there. The inner product of w and z is that of A^-T w and A z.
    """
    if projection is not None:
        moment = projection.double() @ moment @ projection.double().T
    values, axes = torch.linalg.eigh(moment)
    largest = float(values[-1])
    if not largest > 0:  # a head or a projection of zeros tells nothing
        return torch.eye(moment.shape[0], dtype=torch.float32, device="cpu")
    lengths = (values / largest).clamp(min=MIN_EIGENVALUE).sqrt()
    basis: Tensor = (axes / lengths).T.float().contiguous()
    return basis


def _in_basis(weights: Tensor, basis: Tensor) -> Tensor:
    """A^-T w in fp64 of weights w (m, r)."""
    turned: Tensor = weights.double() @ torch.linalg.inv(basis.double())
    return turned


def kd_order(points: Tensor) -> Tensor:
    """Positions (k,) int64 of points (k, r) fp32, such that each 64 consecutive ones are near to each other.

    Balanced kd splits: a node of 64 * 2^s items is halved at the median of its widest column, until leaves are left;
    the last node of a depth may hold fewer. Within a leaf items are in the order of their ids.
    """
    count = points.shape[0]
    order = torch.arange(count, device="cpu")
    size = LEAF
    while size < count:
        size *= 2
    while size > LEAF:
        whole = count // size * size
        if whole > 0:
            _halve(points, order[:whole].view(-1, size), size // 2)
        if count - whole > size // 2:
            _halve(points, order[whole:].view(1, -1), size // 2)
        size //= 2
    whole = count // LEAF * LEAF
    order[:whole] = order[:whole].view(-1, LEAF).sort(1).values.view(-1)
    order[whole:] = order[whole:].sort().values
    return order


# Rows of a second moment at a time: always the same, as its last bits depend on it.
MOMENT_ROWS = 1 << 14
# Numbers widened or gathered at a time: what packing holds beside the arrays themselves.
MAX_NUMBERS = 1 << 24
# Items scored at a time for probes.
PROBED_ROWS = 1 << 16


def _halve(points: Tensor, nodes: Tensor, left: int) -> None:
    """Reorder nodes (m, size) of positions so that the ``left`` smallest along the node's widest column come first."""
    for part in nodes.split(max(1, MAX_NUMBERS // (nodes.shape[1] * points.shape[1]))):
        own = points.index_select(0, part.reshape(-1)).view(*part.shape, -1)
        widest = (own.amax(1) - own.amin(1)).argmax(1)
        keys = own.gather(2, widest[:, None, None].expand(-1, part.shape[1], 1)).squeeze(2)
        part.copy_(part.gather(1, torch.from_numpy(np.argpartition(keys.numpy(), left, axis=1))))


# Bounds


def rows_of(groups: Tensor, scales: Tensor, rows: slice) -> Tensor:
    """The stored weights (m, r) of packed rows, from a multiple of 32 on, in fp64: it holds scale * int8 exactly."""
    own = slice(rows.start // GROUP, -(-rows.stop // GROUP))
    values = groups[own].double()
    if scales.numel() > 0:
        values = values * scales[own, None, None].double()
    return values.transpose(1, 2).reshape(-1, groups.shape[1])[: rows.stop - rows.start]


def _chunks(size: int, rank: int) -> Iterator[slice]:
    """Slices of rows, each of whole leaves but for the last one."""
    step = max(1, MAX_NUMBERS // (LEAF * rank)) * LEAF
    whole = size // LEAF * LEAF
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole))
    if whole < size:
        yield slice(whole, size)


def _up(values: Tensor) -> Tensor:
    """fp64 values >= 0 as fp32, never below what they were before fp64 rounded them."""
    rounded = values.float()
    above = torch.nextafter(rounded, rounded.new_full((), torch.inf))
    return torch.where((rounded.double() > values) | (values == 0), rounded, above)


def _leaves(
    groups: Tensor, scales: Tensor, bias: Tensor | None, size: int, basis: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Leaves (ceil(L / 32), 3, r, 32) and their statistics (ceil(L / 32), 4, 32) of packed items; the longest item."""
    rank, longest = groups.shape[1], 0.0
    number = -(-size // LEAF)
    boxes = _padded(torch.empty(number, 3, rank, dtype=torch.float32, device="cpu"), GROUP)
    stats = _padded(torch.empty(number, 4, dtype=torch.float32, device="cpu"), GROUP)
    stats[number:, 1] = NO_ITEMS
    for rows in _chunks(size, rank):
        leaf = slice(rows.start // LEAF, -(-rows.stop // LEAF))
        own = _in_basis(rows_of(groups, scales, rows), basis).view(leaf.stop - leaf.start, -1, rank)
        longest = max(longest, float(torch.linalg.vector_norm(own, dim=2).max()))
        mean = own.mean(1).float()
        low, high = own.amin(1), own.amax(1)
        centre = ((low + high) / 2).float()
        half = torch.maximum(high - centre, centre - low)
        # About the mean as it is stored: that is the one a search has.
        radius = torch.linalg.vector_norm(own - mean[:, None], dim=2).amax(1)
        boxes[leaf] = torch.stack([mean, centre, _up(half)], 1)
        stats[leaf, 0] = _up(radius * ROUND_UP)
        stats[leaf, 1] = math.log2(own.shape[1])
        stats[leaf, 2:] = 0
        if bias is not None:
            own_bias = bias[rows].view(leaf.stop - leaf.start, -1)
            stats[leaf, 2] = own_bias.amax(1)
            stats[leaf, 3] = own_bias.double().mean(1).float()
    return _in_lanes(boxes), _in_lanes(stats), longest


def share_left(
    groups: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    size: int,
    basis: Tensor,
    leaves: Tensor,
    leaf_stats: Tensor,
    z: Tensor,
) -> float:
    """Share of a tail's leaves whose upper bound reaches its largest logit, in the mean over ``z`` (m, r) fp64.

    The best that a threshold could do. How long these states are, beside those of searches, plays no part in it, but for
    biases.
    """
    rank = groups.shape[1]
    z = z @ basis.double().T
    largest = torch.full((len(z),), -torch.inf, dtype=torch.float64, device="cpu")
    for rows in _chunks(size, rank):
        own = _in_basis(rows_of(groups, scales, rows), basis)
        above = own.new_zeros(len(own)) if bias is None else bias[rows].double()
        for part, own_bias in zip(own.split(PROBED_ROWS), above.split(PROBED_ROWS), strict=True):
            largest = torch.maximum(largest, torch.addmm(own_bias[:, None], part, z.T).amax(0))
    number = -(-size // LEAF)
    mean, centre, half = leaves.movedim(3, 1).flatten(0, 1)[:number].double().unbind(1)
    radius, _, most, _ = leaf_stats.movedim(2, 1).flatten(0, 1)[:number].double().unbind(1)
    sphere = z @ mean.T + torch.linalg.vector_norm(z, dim=1)[:, None] * radius
    box = z @ centre.T + z.abs() @ half.T
    return float((torch.minimum(sphere, box) + most >= largest[:, None]).double().mean())


def _in_lanes(per_leaf: Tensor) -> Tensor:
    """(L / 32, ..., 32) from values per leaf (L, ...)."""
    return per_leaf.reshape(-1, GROUP, *per_leaf.shape[1:]).movedim(1, -1).contiguous()


def _level_bounds(full: Tensor, groups: Tensor, scales: Tensor, exact: bool, bias: Tensor | None, size: int) -> Tensor:
    """A level's row (5,) of the bounds, from its fp32 groups and the stored ones."""
    rank = full.shape[1]
    narrow = groups.dtype != torch.float32
    nothing = _absent()
    counting = (groups, scales) if narrow and not exact else (full, nothing)
    mean = torch.zeros(rank, dtype=torch.float64, device="cpu")
    for rows in _chunks(size, rank):
        mean += rows_of(*counting, rows).sum(0)
    mean /= size
    error, norm, radius = (torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(3))

    def longest(least: Tensor, vectors: Tensor) -> Tensor:
        return torch.maximum(least, torch.linalg.vector_norm(vectors, dim=1).max())

    for rows in _chunks(size, rank):
        own = rows_of(full, nothing, rows)
        norm = longest(norm, own)
        order_by = own
        if narrow:
            stored = rows_of(groups, scales, rows)
            norm = longest(norm, stored)
            if exact:
                error = longest(error, own - stored)
            else:
                order_by = stored
        radius = longest(radius, order_by - mean)
    above = largest = torch.zeros((), dtype=torch.float64, device="cpu")
    if bias is not None:
        wide = bias.double()
        above, largest = (wide.max() - wide.mean()).clamp(min=0), wide.abs().max()
    return torch.stack([error, norm, radius, above, largest]) * ROUND_UP
