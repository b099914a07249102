"""Dropout by a mask that its seed and the places of elements decide, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16  # that a number of 16 bits can have
_WORD = (1 << 32) - 1


def philox(seed: int, counters: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011, section 3.3): (n,) counters to their words (4, n), 0..2^32 - 1, in int64."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    words = [counters & _WORD, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]  # modulo 2^64
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    return torch.stack(words)


def mask(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """(count,) float32: 0 with probability p in multiples of 2^-16, else the factor of what is kept.

    128 elements share sixteen counters: element e has the e-th half of their words, word by word, low halves first.
    """
    kept = max(1, round((1.0 - p) * LEVELS))
    blocks = -(-count // 128)
    words = philox(seed, torch.arange(16 * blocks, device=device)).view(4, blocks, 16).transpose(0, 1)
    halves = torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten()[:count]
    return (halves < kept).float() * (LEVELS / kept)


def dropout(input: Tensor, p: float, seed: int, add: Tensor | None) -> Tensor:
    """``input`` under :func:`mask`, on top of ``add``."""
    masked = input.contiguous() * mask(input.numel(), p, seed, input.device).view(input.shape).to(input.dtype)
    return masked if add is None else masked + add
