"""Dropout whose mask does not take longer than what it masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cprec.model.packing import is_traced
from cprec_kernels import functional


def dropout(x: Tensor, p: float, training: bool, add: Tensor | None = None) -> Tensor:
    """``add`` (None: 0) plus zeros with probability p, and the rest of ``x`` divided by 1 - p, in training; ``add + x``, or
    ``x`` itself, otherwise.

    On a CPU torch draws a double for every element: with rows of 128 numbers that was a tenth of a training step. Here
    float32 goes to :func:`cprec_kernels.functional.dropout`, with a seed from torch's default generator.
    """
    if training and p > 0.0:
        eager = type(x) is Tensor and not is_traced() and not torch.compiler.is_compiling()
        if eager and x.device.type == "cpu" and x.dtype == torch.float32:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            return functional.dropout(x, p, seed, add)
        x = F.dropout(x, p, training)
    return x if add is None else add + x
