"""Dense recommenders as other people write them, for the tests of cprec_kernels.compress."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cprec_kernels import Partition

ITEMS, WIDTH = 90, 16
PARTITION = Partition(ITEMS, [10, 30], [WIDTH, 6, 3], WIDTH)
FULL = Partition(ITEMS, [10, 30], [WIDTH] * 3, WIDTH)


class SASRecLike(nn.Module):
    """One attention layer; id 0 pads; scores by the item table itself."""

    def __init__(self):
        super().__init__()
        self.item_emb = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.item_emb(ids)
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.item_emb.weight.T


class GRULike(nn.Module):
    """A GRU and a linear layer of one output per id, or per item."""

    def __init__(self, outputs=ITEMS + 1, padding=0, bias=True, tied=False, width=WIDTH):
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(ITEMS + (padding is not None), WIDTH, padding_idx=padding))
        self.gru = nn.GRU(WIDTH, width, batch_first=True)
        self.out = nn.Linear(width, outputs, bias=bias)
        if tied:
            self.out.weight = self.embed[0].weight
        if bias:
            nn.init.normal_(self.out.bias, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(ids))[0])
