"""Dense tables as low-rank ones, and tails as parent labels: the linear algebra of every conversion.

All sums are fp64. Tables are walked in chunks of rows, so that nothing as large as a table is made beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 1 << 16
MAX_LOGITS = 1 << 22
# Of the correction to a parent label, relative to the inputs' mean square: keeps directions that a sample does not show.
RIDGE = 1e-3


class LowRank(NamedTuple):
    """rows (k, d) as left (k, r) @ right (r, d), and the norm of what is left relative to that of the rows."""

    left: Tensor
    right: Tensor
    error: float


def chunks(rows: int, size: int = CHUNK_ROWS) -> Iterator[slice]:
    """Slices that cover ``rows`` rows."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def truncated_svd(rows: Tensor, rank: int, row_weights: Tensor | None = None, metric: Tensor | None = None) -> LowRank:
    """The best rows of rank r in a weighted norm (Eckart and Young, 1936).

    Minimises sum_x w_x (a_x - b_x)^T M (a_x - b_x) over tables b of rank ``rank``. With row weights the subspace is that
    of the heavy rows, and every row is then the best one in it, whatever its own weight. With the second moments of
    the inputs as M, differences count as much as the logits they make.

    Args:
        rows: (k, d) in any floating dtype.
        rank: 1..d.
        row_weights: (k,), not negative and not all zero; 1 by default.
        metric: M (d, d), symmetric and positive definite; the identity by default.

    Returns:
        left (k, r) and right (r, d) in the dtype of ``rows``; right has orthonormal rows where there is no metric. The
        error is relative, in the same norm; exactly rows of rank <= r have one of rounding.
    """
    width = rows.shape[1]
    root = torch.eye(width, dtype=torch.float64, device=rows.device)
    if metric is not None:
        root = torch.linalg.cholesky(metric.double())
    weights = torch.ones(rows.shape[0], dtype=torch.float64, device=rows.device)
    if row_weights is not None:
        weights = row_weights.double().sqrt()
    # Only the right singular vectors are wanted, and the triangular factor has them; unlike a Gram matrix it does not
    # square what is small.
    triangle = rows.new_zeros((0, width), dtype=torch.float64)
    for part in chunks(rows.shape[0]):
        scaled = weights[part, None] * (rows[part].double() @ root)
        triangle = torch.linalg.qr(torch.cat([triangle, scaled]), mode="r").R
    _, values, vectors = torch.linalg.svd(triangle, full_matrices=True)
    basis = vectors[:rank].T  # (d, r)
    right = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    left = torch.empty(rows.shape[0], rank, dtype=rows.dtype, device=rows.device)
    for part in chunks(rows.shape[0]):
        left[part] = (rows[part].double() @ (root @ basis)).to(rows.dtype)
    norm = float(values.norm())
    return LowRank(left, right.to(rows.dtype), float(values[rank:].norm()) / norm if norm > 0 else 0.0)


def shares_of(counts: Tensor) -> Tensor:
    """Counts of a cluster's items as shares that sum to 1; equal ones where nothing was counted."""
    counts = counts.double()
    total = float(counts.sum())
    return counts / total if total > 0 else torch.full_like(counts, 1 / counts.numel())


def parent_label(vectors: Tensor, biases: Tensor | None, shares: Tensor) -> tuple[Tensor, float]:
    """A linear function of h below log sum_x exp(vectors_x h + biases_x): (d,) fp64 and a constant.

    For shares q, log sum_x exp(u_x) >= sum_x q_x u_x + H(q), with equality where the softmax of u is q (Gibbs). So the
    label is the mean of its items' vectors by frequency, and right for inputs that draw them as often as the data do.
    """
    label = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for part in chunks(vectors.shape[0]):
        label += shares[part] @ vectors[part].double()
    constant = -float(torch.xlogy(shares, shares).sum())
    if biases is not None:
        constant += float(shares @ biases.double())
    return label, constant


def log_sum_exp(inputs: Tensor, vectors: Tensor, biases: Tensor | None) -> Tensor:
    """log sum_x exp(vectors_x h + biases_x) for inputs h (N, d): (N,) fp64."""
    out = torch.full((inputs.shape[0],), -math.inf, dtype=torch.float64, device=inputs.device)
    for part in chunks(vectors.shape[0], max(1, MAX_LOGITS // max(1, inputs.shape[0]))):
        logits = inputs.double() @ vectors[part].double().T
        if biases is not None:
            logits += biases[part].double()
        out = torch.logaddexp(out, logits.logsumexp(1))
    return out


def fitted_parent_label(
    inputs: Tensor, targets: Tensor, label: Tensor, constant: float, has_bias: bool
) -> tuple[Tensor, float, float]:
    """The linear function nearest to ``targets`` over a sample of inputs, by ridge regression from a first guess.

    Args:
        inputs: (N, d), as the softmax gets them.
        targets: (N,), the log-sum-exps to be met.
        label, constant: the first guess, which stays where the sample says nothing.
        has_bias: whether the constant may be stored; without, it is 0 and the label makes up for it as it can.

    Returns:
        The label (d,), the constant, and the root mean square of what is left.
    """
    h = inputs.double()
    if has_bias:
        h = torch.cat([h, h.new_ones(h.shape[0], 1)], dim=1)
    start = torch.cat([label, label.new_tensor([constant])]) if has_bias else label
    gram = h.T @ h / h.shape[0]
    penalty = torch.full_like(start, RIDGE * float(gram.diagonal()[: label.numel()].mean()))
    if has_bias:
        penalty[-1] = 0.0
    residual = targets - h @ start
    correction = torch.linalg.lstsq(gram + penalty.diag(), (h.T @ residual / h.shape[0])[:, None]).solution[:, 0]
    fitted = start + correction
    rms = float((targets - h @ fitted).square().mean().sqrt())
    return (fitted[:-1], float(fitted[-1]), rms) if has_bias else (fitted, 0.0, rms)


def second_moments(inputs: Tensor) -> Tensor:
    """E[h h^T] (d, d) of a sample, with enough of the identity to be positive definite whatever the sample."""
    h = inputs.double()
    moments = h.T @ h / h.shape[0]
    scale = float(moments.diagonal().mean())
    return moments + max(RIDGE * scale, 1e-12) * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
