"""Rows side by side for a dilated convolution over batches without padding, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_taps(input: Tensor, rows: Tensor) -> Tensor:
    """(N, d) and (taps, T) to (T, taps d); row N stands for zeros."""
    with_nothing = F.pad(input, (0, 0, 0, 1))
    return with_nothing.index_select(0, rows.T.flatten()).view(rows.shape[1], rows.shape[0] * input.shape[1])


def gather_taps_backward(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Gradient (N, d) of the input from that of the result; summed in fp32 at least, rounded once."""
    taps, width = rows.shape[0], grad.shape[1] // rows.shape[0]
    total = grad.new_zeros(num_rows + 1, width, dtype=torch.promote_types(grad.dtype, torch.float32))
    total.index_add_(0, rows.T.flatten(), grad.reshape(rows.shape[1] * taps, width).to(total.dtype))
    return total[:num_rows].to(grad.dtype)
