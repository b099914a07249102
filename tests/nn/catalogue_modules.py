"""The modules whose catalogue the tests change, and what is compared of them."""

from __future__ import annotations

import torch
from torch import nn

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

PARTITION = Partition(60, [10, 30], [16, 6, 3], 16)
IDS = torch.arange(60)


def make_embedding(padding=False, **options):
    partition = PARTITION.with_padding() if padding else PARTITION
    return BlockEmbedding(partition, padding_idx=-1 if padding else None, dtype=torch.float64, **options)


def make_head(bias=True, partition=PARTITION):
    head = ClusteredSoftmaxWithLoss(16, partition, head_bias=bias, tail_bias=bias, dtype=torch.float64)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def logits(head, hidden):
    """Every item's logit in its level, and the parents' (N, n - 1)."""
    parts, parents, left = [], None, iter(head.projections)
    for j, weight in enumerate(head.weights):
        z = hidden if weight.shape[1] == head.in_features else hidden @ next(left).T
        part = z @ weight.T
        bias = head.head_bias if j == 0 else head.tail_biases[j - 1] if len(head.tail_biases) else None
        part = part if bias is None else part + bias
        if j == 0:
            size = head.partition.sizes[0]
            part, parents = part[:, :size], part[:, size:]
        parts.append(part)
    return torch.cat(parts, 1).detach(), parents.detach()


def assert_same(ours, theirs):
    """Equal up to the order of a product's sums, which its shape decides."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
