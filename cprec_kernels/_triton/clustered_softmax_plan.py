"""The plan of a batch: tokens sorted by target, so that every level's tokens are a run; and the size of the grids.

One stable sort gives the grouping, the packed order and the offsets, because clusters are ranges of ids. It also puts
the tokens whose target lies in a tile of entries side by side: all other tiles need no comparison per logit.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import num_processors
from .configs import Tile

# Units of work per program of a persistent grid: the last round is 1/4 of the work at most, and partial results stay few.
UNITS_PER_PROGRAM = 4
IGNORED = 2**31 - 1  # sorts behind every id


@dataclasses.dataclass(frozen=True)
class Level:
    """One softmax of the tree: W_j (C, d_j), Q_j (d_j, d) or None, bias (C,) or None, ids lo..hi-1.

    ``first`` and ``last`` index the plan's offsets: the level's tokens are offsets[first]..offsets[last]-1.
    """

    weight: Tensor
    projection: Tensor | None
    bias: Tensor | None
    lo: int
    hi: int
    first: int
    last: int

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    @property
    def num_entries(self) -> int:
        return self.weight.shape[0]

    def project(self, rows: Tensor) -> Tensor:
        """Q_j h for rows (T, d). Every token is projected: how many belong to the level only the device knows."""
        return rows if self.projection is None else rows @ self.projection.T


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens sorted by target, ignored ones last.

    order (T,) int64: position in the batch of every sorted token. ids (T,) int32, sorted. offsets (n + 1,) int32: first
    token of every cluster, and the number of counted tokens. columns: per level, the target's column (T,) int32.
    """

    order: Tensor
    ids: Tensor
    offsets: Tensor
    columns: tuple[Tensor, ...]


def levels_of(
    weights: Sequence[Tensor], projections: Sequence[Tensor], head_bias: Tensor | None, tail_biases: Sequence[Tensor]
) -> list[Level]:
    """The levels of a clustered softmax, head first, with contiguous weights."""
    width = projections[0].shape[1] if len(projections) else weights[0].shape[1]
    remaining = iter(projections)
    num_tails = len(weights) - 1
    levels: list[Level] = []
    lo = 0
    for j, weight in enumerate(weights):
        size = weight.shape[0] - (num_tails if j == 0 else 0)
        bias = head_bias if j == 0 else (tail_biases[j - 1] if len(tail_biases) else None)
        levels.append(
            Level(
                weight.contiguous(),
                None if weight.shape[1] == width else next(remaining),
                None if bias is None else bias.contiguous(),
                lo,
                lo + size,
                j,
                num_tails + 1 if j == 0 else j + 1,
            )
        )
        lo += size
    return levels


def make_plan(target: Tensor, levels: Sequence[Level], ignore_index: int) -> Plan:
    """Sort a batch's targets (T,). Static shapes, nothing read by the host."""
    if levels[-1].hi >= IGNORED:
        raise ValueError(f"the Triton kernels number items in 32 bits, and there are {levels[-1].hi}")
    keys = torch.where(target == ignore_index, IGNORED, target).to(torch.int32)
    ids, order = torch.sort(keys, stable=True)
    zero = torch.zeros((), dtype=torch.int64, device=target.device)
    offsets = torch.stack([zero, *((ids < level.hi).sum() for level in levels)]).to(torch.int32)
    # The columns of the head ascend with the ids, too: parent labels follow the items, in the order of their clusters.
    head = ids
    for j, tail in enumerate(levels[1:]):
        head = torch.where(ids >= tail.lo, levels[0].hi + j, head)
    head = torch.where(ids == IGNORED, IGNORED, head)
    return Plan(order, ids, offsets, (head, *(ids - tail.lo for tail in levels[1:])))


@dataclasses.dataclass(frozen=True)
class Grid:
    """A persistent grid and its scratch: programs, units aimed at, units at most."""

    num_programs: int
    target_units: int
    max_units: int

    @staticmethod
    def of(tile: Tile, num_tokens: int, device: torch.device) -> "Grid":
        programs = num_processors(device) * tile.blocks_per_sm
        target = programs * UNITS_PER_PROGRAM
        return Grid(programs, target, max(target, -(-num_tokens // tile.block_t)))


class Upstream(NamedTuple):
    """Upstream gradients in sorted order, divided by ``scale`` (1,).

    ratio, uniform (T,): c and g2 by scale, 0 for ignored tokens. flags (2,) int32: signs of c differ; a g2 is not 0.
    """

    ratio: Tensor
    uniform: Tensor
    scale: Tensor
    flags: Tensor


def normalise(grad_log_prob: Tensor, grad_uniform: Tensor, plan: Plan, num_clusters: int) -> Upstream:
    """Upstream gradients of a batch, as the kernels take them."""
    position = torch.arange(plan.order.numel(), device=plan.order.device)
    counted = position < plan.offsets.select(0, num_clusters)
    g1 = torch.where(counted, grad_log_prob.float().index_select(0, plan.order), 0.0)
    g2 = torch.where(counted, grad_uniform.float().index_select(0, plan.order), 0.0)
    c = -(g1 + g2)
    bottom, top = torch.aminmax(c)
    size = torch.maximum(torch.maximum(top, -bottom), g2.abs().amax())
    scale = torch.where(top >= -bottom, size, -size)
    scale = torch.where(size == 0, 1.0, scale).reshape(1)
    flags = torch.stack([(bottom < 0) & (top > 0), (g2 != 0).any()]).to(torch.int32)
    return Upstream(c / scale, g2 / scale, scale, flags)
