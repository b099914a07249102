"""Two-level softmax: log-probabilities of targets and of given items, and the gradients of the former.

Level 0 is the head over V_0 and one parent label per tail, level j >= 1 is tail j (CpRec, arXiv 2004.13139, eq. 6-8;
Grave et al., arXiv 1609.04309)::

    log p(x|h) = log_softmax(W_0 h)[x]                                              x in V_0
               = log_softmax(W_0 h)[k_0 + j - 1] + log_softmax(W_j Q_j h)[g]        x in V_j, g = x - offset_j
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulate_dtype, masked, pair_projections, row_chunks, select_tokens


@dataclasses.dataclass(frozen=True)
class Level:
    """One softmax of the tree: W_j (C, d_j), Q_j (d_j, d) or None, bias (C,) or None, and the cluster's id range."""

    index: int
    weight: Tensor
    projection: Tensor | None
    bias: Tensor | None
    lo: int
    hi: int

    def hidden(self, rows: Tensor) -> Tensor:
        """Q_j h for rows (m, d)."""
        return rows if self.projection is None else rows @ self.projection.to(rows.dtype).T

    def logits(self, hidden: Tensor) -> Tensor:
        """W_j z + b for z (m, d_j): (m, C)."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)


def levels_of(
    weights: Sequence[Tensor], projections: Sequence[Tensor], head_bias: Tensor | None, tail_biases: Sequence[Tensor]
) -> list[Level]:
    """The levels of a clustered softmax, head first."""
    levels = []
    lo = 0
    for j, (weight, projection) in enumerate(pair_projections(weights, projections)):
        size = weight.shape[0] - (len(weights) - 1 if j == 0 else 0)
        bias = head_bias if j == 0 else (tail_biases[j - 1] if tail_biases else None)
        levels.append(Level(j, weight, projection, bias, lo, lo + size))
        lo += size
    return levels


def _columns(level: Level, levels: Sequence[Level], target: Tensor) -> Tensor:
    """Column of every target in a level's logits; a tail item's head column is its parent label."""
    if level.index > 0:
        return (target - level.lo).clamp(0, level.hi - level.lo - 1)
    column = target.clamp(0, level.hi - 1)
    for tail in levels[1:]:
        column = torch.where(target >= tail.lo, level.hi + tail.index - 1, column)
    return column


def _members(level: Level, target: Tensor, ignore_index: int) -> Tensor:
    """Which tokens a level is evaluated for: all that count for the head, the cluster's own for a tail."""
    counted = target != ignore_index
    return counted if level.index == 0 else counted & (target >= level.lo) & (target < level.hi)


def clustered_softmax(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token (T,), in fp32 or wider: log_prob of the target, uniform_log_prob, head and tail log-sum-exp.

    ``uniform_log_prob`` is the sum over the token's levels of the mean log-probability of that level's entries, the
    quantity label smoothing mixes in. Ignored tokens have 0 everywhere, a head token 0 as its tail log-sum-exp.
    Differentiable.
    """
    wide = accumulate_dtype(input.dtype)
    levels = levels_of(weights, projections, head_bias, tail_biases)
    log_prob = torch.zeros(target.shape, dtype=wide, device=input.device)
    uniform, lse = log_prob.clone(), [log_prob.clone(), log_prob.clone()]
    for level in levels:
        index, mask = select_tokens(_members(level, target, ignore_index))
        column = _columns(level, levels, target[index])
        for rows in row_chunks(index.numel(), level.weight.shape[0]):
            part, keep = index[rows], None if mask is None else mask[rows]
            logits = level.logits(level.hidden(input[part].to(wide)))
            lse_part = logits.logsumexp(1)
            picked = logits.gather(1, column[rows, None]).squeeze(1)
            log_prob = log_prob.index_add(0, part, masked(picked - lse_part, keep))
            uniform = uniform.index_add(0, part, masked(logits.mean(1) - lse_part, keep))
            place = min(level.index, 1)
            lse[place] = lse[place].index_add(0, part, masked(lse_part, keep))
    return log_prob, uniform, lse[0], lse[1]


def clustered_softmax_descents(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    ignore_index: int,
) -> list[Tensor]:
    """Per level j, -d log p / dz = sum_v p_v w_v - w_target for z = Q_j h: (T, d_j) in input's dtype.

    Zero for tokens of other levels and for ignored ones.
    """
    wide = accumulate_dtype(input.dtype)
    descents = []
    for level in (levels := levels_of(weights, projections, head_bias, tail_biases)):
        index, mask = select_tokens(_members(level, target, ignore_index))
        column = _columns(level, levels, target[index])
        weight = level.weight.to(wide)
        descent = torch.zeros(target.shape[0], weight.shape[1], dtype=wide, device=input.device)
        for rows in row_chunks(index.numel(), weight.shape[0]):
            part, keep = index[rows], None if mask is None else mask[rows]
            p = level.logits(level.hidden(input[part].to(wide))).softmax(1)
            descent.index_add_(0, part, masked(p @ weight - weight[column[rows]], keep))
        descents.append(descent.to(input.dtype))
    return descents


def clustered_softmax_backward(
    grad_log_prob: Tensor,
    grad_uniform: Tensor,
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    lse_head: Tensor,
    lse_tail: Tensor,
    ignore_index: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Gradients of input, weights, projections, head bias and tail biases; empty where ``output_mask`` leaves one out.

    With g1, g2 the upstream gradients of log_prob and uniform_log_prob, and p the softmax of a level of C entries,
    d logits = g1 (onehot - p) + g2 (1/C - p).
    """
    want_input, want_weights, want_projections, want_head_bias, want_tail_biases = output_mask
    dtype = input.dtype
    wide = accumulate_dtype(dtype)
    levels = levels_of(weights, projections, head_bias, tail_biases)
    d_input = torch.zeros(input.shape if want_input else (0,), dtype=wide, device=input.device)
    d_weights: list[Tensor] = []
    d_projections: list[Tensor] = []
    d_biases: list[Tensor] = []
    for level in levels:
        lse = lse_head if level.index == 0 else lse_tail
        index, mask = select_tokens(_members(level, target, ignore_index))
        column = _columns(level, levels, target[index])
        num_columns = level.weight.shape[0]
        weight = level.weight.to(wide)
        want_bias = level.bias is not None and (want_head_bias if level.index == 0 else want_tail_biases)
        d_weight = torch.zeros(level.weight.shape, dtype=wide, device=input.device) if want_weights else None
        d_q = None
        if want_projections and level.projection is not None:
            d_q = torch.zeros(level.projection.shape, dtype=wide, device=input.device)
        d_bias = torch.zeros(num_columns, dtype=wide, device=input.device) if want_bias else None
        for rows in row_chunks(index.numel(), num_columns):
            part, keep = index[rows], None if mask is None else mask[rows]
            h = input[part].to(wide)
            z = level.hidden(h)
            g1 = masked(grad_log_prob[part].to(wide), keep)[:, None]
            g2 = masked(grad_uniform[part].to(wide), keep)[:, None]
            d_logits = level.logits(z).sub_(lse[part, None]).exp_()  # p
            d_logits = masked(d_logits.mul_(-(g1 + g2)).add_(g2 / num_columns), keep)
            # One entry per row: much cheaper than scatter_add_, which walks the whole of d_logits.
            d_logits[torch.arange(part.numel(), device=part.device), column[rows]] += g1.squeeze(1)
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, z)
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))
            if want_input or d_q is not None:
                d_z = d_logits @ weight
                if d_q is not None:
                    d_q.addmm_(d_z.T, h)
                if want_input:
                    d_h = d_z if level.projection is None else d_z @ level.projection.to(wide)
                    d_input.index_add_(0, part, d_h)
        if d_weight is not None:
            d_weights.append(d_weight.to(dtype))
        if d_q is not None:
            d_projections.append(d_q.to(dtype))
        if d_bias is not None:
            d_biases.append(d_bias.to(dtype))
    d_head_bias = d_biases.pop(0) if want_head_bias and head_bias is not None else d_input.new_zeros(0, dtype=dtype)
    return d_input.to(dtype), d_weights, d_projections, d_head_bias, d_biases


def clustered_log_prob(
    input: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Tensor:
    """Log-probabilities of every item (T, K), in fp32 or wider: the definition. Differentiable."""
    h = input.to(accumulate_dtype(input.dtype))
    levels = levels_of(weights, projections, head_bias, tail_biases)
    head = levels[0].logits(levels[0].hidden(h)).log_softmax(1)
    blocks = [head[:, : levels[0].hi]]
    for level in levels[1:]:
        parent = levels[0].hi + level.index - 1
        blocks.append(level.logits(level.hidden(h)).log_softmax(1) + head[:, parent : parent + 1])
    return torch.cat(blocks, 1)


def clustered_score(
    input: Tensor,
    items: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Tensor:
    """Log-probabilities (T, c), fp32 or wider, of items (T, c). A tail is read only for rows that name one of its items."""
    wide = accumulate_dtype(input.dtype)
    levels = levels_of(weights, projections, head_bias, tail_biases)
    out = torch.zeros(items.shape, dtype=wide, device=input.device)
    for level in levels:
        inside = (
            torch.ones_like(items, dtype=torch.bool) if level.index == 0 else (items >= level.lo) & (items < level.hi)
        )
        index, _ = select_tokens(inside.any(1))
        for rows in row_chunks(index.numel(), max(level.weight.shape[0], items.shape[1] * level.weight.shape[1])):
            part = index[rows]
            logits = level.logits(level.hidden(input[part].to(wide)))
            column = _columns(level, levels, items[part])
            value = logits.gather(1, column) - logits.logsumexp(1, keepdim=True)
            out.index_add_(0, part, value.masked_fill(~inside[part], 0))
    return out
