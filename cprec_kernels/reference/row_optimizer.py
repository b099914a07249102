"""Optimizer steps on some rows of a table: AdamW, row-wise Adagrad, and the weight decay that rows have missed.

Everything is computed in fp32 or wider and a row is rounded once; ``rows`` of None means all. Parameters and state may
have any strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .common import accumulate_dtype


def _take(table: Tensor, rows: Tensor | None) -> Tensor:
    return table if rows is None else table[rows]


def _put(table: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        table.copy_(values)
    else:
        table.index_copy_(0, rows, values.to(table.dtype))


def row_decay_(param: Tensor, rows: Tensor | None, row_log_decay: Tensor, log_decay: float) -> None:
    """Multiply each row by exp(log_decay - row_log_decay[row]), once, and set row_log_decay[row] = log_decay."""
    wide = accumulate_dtype(param.dtype)
    old = _take(param, rows).to(wide)
    pending = (log_decay - _take(row_log_decay, rows)).reshape(_row_shape(old))
    # Near 1 a factor in fp32 has lost the digits that its distance from 1 still has.
    new = torch.where(pending > math.log(0.5), old + pending.expm1().to(wide) * old, pending.exp().to(wide) * old)
    _put(param, rows, new)
    _put(row_log_decay, rows, torch.full_like(_take(row_log_decay, rows), log_decay))


def row_adamw_(
    param: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_log_decay: Tensor | None,
    log_decay: Sequence[float],
    lr: float,
    decay: float,
    betas: Sequence[float],
    eps: float,
    step: int,
    maximize: bool,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2, with Adam's moments, arXiv 1412.6980, algorithm 1) for the rows given.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    p = (1 - decay) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    """
    if row_log_decay is not None:
        row_decay_(param, rows, row_log_decay, log_decay[0])
    beta1, beta2 = betas
    g = grad.to(exp_avg.dtype)
    g = -g if maximize else g
    m = _take(exp_avg, rows)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * _take(exp_avg_sq, rows) + (1 - beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    p = _take(param, rows).to(m.dtype)
    _put(param, rows, p - decay * p - lr / (1 - beta1**step) * (m / denominator))
    _put(exp_avg, rows, m)
    _put(exp_avg_sq, rows, v)
    if row_log_decay is not None:
        _put(row_log_decay, rows, torch.full_like(_take(row_log_decay, rows), log_decay[1]))


def row_adagrad_(
    param: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    sum: Tensor,
    row_log_decay: Tensor | None,
    log_decay: Sequence[float],
    lr: float,
    decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """Adagrad (Duchi et al., JMLR 2011) with one accumulator per row, which takes the mean of the squares.

    s = s + mean(g^2), p = (1 - decay) p - lr g / (sqrt(s) + eps).
    """
    if row_log_decay is not None:
        row_decay_(param, rows, row_log_decay, log_decay[0])
    g = grad.to(sum.dtype)
    g = -g if maximize else g
    s = _take(sum, rows) + (g * g if g.dim() <= 1 else (g * g).flatten(1).mean(1))
    rate = lr / (s.sqrt() + eps)
    p = _take(param, rows).to(sum.dtype)
    _put(param, rows, p - decay * p - rate.reshape(_row_shape(g)) * g)
    _put(sum, rows, s)
    if row_log_decay is not None:
        _put(row_log_decay, rows, torch.full_like(_take(row_log_decay, rows), log_decay[1]))


def _row_shape(values: Tensor) -> tuple[int, ...]:
    """Shape of one number per row that broadcasts over ``values``."""
    return (*values.shape[:1], *[1] * (values.dim() - 1))
