"""A clustered softmax one level at a time: log-sum-exps that can be differentiated, and the z-loss made of them.

``cprec::clustered_softmax`` gives log-sum-exps without a derivative. A level alone is a softmax of one cluster, for which
the same op serves, and lse = (the target's logit) - (its log-probability): both sides of the difference have gradients.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.common import accumulate_dtype, pair_projections
from ._library import as_rows, cast_floating, check_ids, check_leading, check_rows, refuse_tangents
from .clustered_softmax import Weights, check_weights, wants_kept

_IGNORED = -100


class TargetTerms(NamedTuple):
    """Per token (...), in fp32 or wider, differentiable, 0 where ignored.

    log_prob: log-probability of the target.
    uniform: sum over the token's levels of the mean log-probability of the level's entries.
    lse_head: log-sum-exp of the head's logits. lse_tail: of those of the target's tail, 0 for an item of the head.
    """

    log_prob: Tensor
    uniform: Tensor
    lse_head: Tensor
    lse_tail: Tensor


def clustered_target_terms(input: Tensor, target: Tensor, weights: Weights, *, ignore_index: int = -100) -> TargetTerms:
    """Log-probability, smoothing term and log-sum-exps of every target, all differentiable.

    One call of the fused op per level, so that a level's log-sum-exp has a gradient of its own; the work is that of
    :func:`clustered_target_log_prob` and one more row of every level's weights per token. 16-bit weights are copied in fp32
    for it. Arguments as :func:`clustered_cross_entropy`.

    Raises:
        IndexError: a target out of range, with its place.
        TypeError: target not int64, mixed dtypes.
        ValueError: shapes that do not fit together.
    """
    check_leading(target, input, "target", 0)
    rows, flat = as_rows(input), target.reshape(-1)
    if not input.is_meta and torch.is_autocast_enabled(
        input.device.type
    ):  # any mix of dtypes then, and the ops do as here
        kept = weights.weights[0].dtype
        rows, weights = rows.to(kept), Weights(*cast_floating(weights.args(), kept))
    # Under a compiler the ops check, level by level; here there are no values to look at.
    if not torch.compiler.is_compiling():
        check_weights(rows, weights)
        check_rows(flat, rows, "target", dim=1)
        if not target.is_meta and type(target).__name__ != "FakeTensor":  # whose module takes seconds to import
            check_ids(flat, weights.num_items, "target", allowed=ignore_index)
    # A gradient is the sum of several here, and should be rounded once.
    wide = accumulate_dtype(rows.dtype)
    rows, weights = rows.to(wide), Weights(*cast_floating(weights.args(), wide))
    counted = flat != ignore_index
    num_tails = len(weights.weights) - 1
    biases: list[Tensor | None] = [weights.head_bias, *weights.tail_biases]
    biases += [None] * (len(weights.weights) - len(biases))
    column, low = flat, weights.weights[0].shape[0] - num_tails
    members = [counted]
    columns = []
    for j, weight in enumerate(weights.weights[1:], start=1):
        inside = counted & (flat >= low) & (flat < low + weight.shape[0])
        members.append(inside)
        columns.append(flat - low)
        column = torch.where(inside, weights.weights[0].shape[0] - num_tails + j - 1, column)
        low += weight.shape[0]
    terms: list[Tensor] | None = None
    pairs = pair_projections(weights.weights, weights.projections)
    for (weight, projection), bias, member, own in zip(pairs, biases, members, [column, *columns], strict=True):
        log_prob, uniform, lse = _level(rows, own, member, weight, projection, bias)
        zero = torch.zeros_like(lse)
        parts = [log_prob, uniform, lse, zero] if terms is None else [log_prob, uniform, zero, lse]
        terms = parts if terms is None else [total + part for total, part in zip(terms, parts, strict=True)]
    assert terms is not None
    return TargetTerms(*(term.reshape(target.shape) for term in terms))


def _level(
    rows: Tensor, column: Tensor, member: Tensor, weight: Tensor, projection: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of a level's entry, mean log-probability and log-sum-exp, 0 for tokens outside ``member``."""
    level = Weights([weight], [] if projection is None else [projection], bias)
    own = torch.where(member, column, _IGNORED)
    refuse_tangents("clustered_softmax", rows, *level.args())
    log_prob, uniform, lse, *_ = torch.ops.cprec.clustered_softmax(
        rows, own, *level.args(), _IGNORED, True, None, wants_kept(rows, level)
    )
    place = torch.where(member, column, 0)
    with contextlib.nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False):
        # Not 0 times what a token outside may hold: NaN, where attention had nothing to look at.
        own_rows = rows.masked_fill(~member[:, None], 0.0)
        hidden = own_rows if projection is None else own_rows @ projection.T
        logit = (hidden * weight[place]).sum(1)
        if bias is not None:
            logit = logit + bias[place]
        difference = torch.where(member, logit, 0.0) - log_prob
        # The value is the op's own, which has more digits; the difference brings the gradient.
        return log_prob, uniform, lse.to(rows.dtype) + (difference - difference.detach())


def check_z_loss(z_loss: float) -> None:
    """Raise ValueError unless 0 <= z_loss < inf."""
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")


def z_penalty(terms: TargetTerms, z_loss: float) -> Tensor:
    """z_loss (lse_head^2 + lse_tail^2) per token: what keeps every level's normaliser near 1.

    The auxiliary loss of PaLM (arXiv 2204.02311, section 5), here per level, as label smoothing is.
    """
    return z_loss * (terms.lse_head.square() + terms.lse_tail.square())
