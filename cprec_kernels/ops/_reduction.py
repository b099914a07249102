"""From log-probabilities of targets to a loss."""

from __future__ import annotations

import math

from torch import Tensor


def check_loss_options(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError for an unknown reduction or a smoothing outside [0, 1]."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def reduce_loss(
    log_prob: Tensor, uniform: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """The loss from :func:`clustered_target_log_prob`'s results; arguments as :func:`clustered_cross_entropy`."""
    check_loss_options(reduction, label_smoothing)
    # The same number, but torch.compile takes it for a constant. As an input of the graph, which it becomes once two modules
    # differ in it, it is a tensor on the CPU among those on a device: Inductor of torch 2.11 crashed over that.
    label_smoothing = math.ldexp(*math.frexp(label_smoothing))
    loss = -log_prob if label_smoothing == 0 else -(1 - label_smoothing) * log_prob - label_smoothing * uniform
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # A batch without a counted token has mean loss 0, not NaN: one empty shard must not poison a run.
    return loss.sum() / (target != ignore_index).sum().clamp(min=1)
