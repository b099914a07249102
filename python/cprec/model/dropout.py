"""Dropout whose mask does not take longer than what it masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cprec.model.packing import is_traced

LEVELS = 1 << 16  # that a number of 16 bits can have


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeros with probability p, and the rest divided by 1 - p, in training; ``x`` itself otherwise.

    On a CPU torch draws a double for every element: with rows of 128 numbers that was a tenth of a training step. Here an
    element gets 16 bits of a random word, so p is rounded to a multiple of 2^-16, and what is kept is divided by the
    probability that this leaves. The stream is that of torch's default generator.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or is_traced() or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    kept = max(1, round((1.0 - p) * LEVELS))
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(-(1 << 63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    # Straight to floating point: a mask of booleans is one more pass.
    mask = torch.lt(lanes, kept - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype, device="cpu"))
    return x * mask.mul_(LEVELS / kept)
