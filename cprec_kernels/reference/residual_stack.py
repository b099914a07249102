"""The residual blocks of NextItNet for the newest item of histories, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_embedding import block_embedding


def residual_stack(
    ids: Tensor,
    padding_id: int,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    sets: Sequence[int],
    dilations: Sequence[int],
    eps: float,
) -> Tensor:
    """Hidden states (B, d) of the last place of ids (B, L); 0 where that is padding. Layers 2 b and 2 b + 1 are block b.

    weights: (d, d, taps) per parameter set, as in ``nn.Conv1d``; biases (d,). norm_weights, norm_biases: (d,) per layer.
    sets, dilations: per layer.
    """
    x = block_embedding(ids, embeddings, projections)
    mask = (ids != padding_id).unsqueeze(-1).to(x.dtype)
    x = inner = x * mask
    for i, (index, dilation) in enumerate(zip(sets, dilations, strict=True)):
        taps = weights[index].shape[2]
        out = biases[index].expand_as(inner)
        for tap in range(taps):
            lag = (taps - 1 - tap) * dilation
            if lag < ids.shape[1]:
                shifted = F.pad(inner[:, : ids.shape[1] - lag], (0, 0, lag, 0))
                out = out + shifted @ weights[index][:, :, tap].T
        inner = torch.relu(F.layer_norm(out, out.shape[-1:], norm_weights[i], norm_biases[i], eps)) * mask
        if i % 2 == 1:
            x = inner = x + inner
    return x[:, -1].contiguous()
