"""Modules that speak other ids than their blocks: what cannot be one is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, ReindexedEmbedding, ReindexedSoftmax

PARTITION = Partition(6, [2], [4, 2], 4)


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (ids(0, 1, 2, 3, 4, 5, dtype=torch.int32), TypeError, "items must be int64, got torch.int32"),
        (ids(0, 1, 2, 3, 4, 5)[None], ValueError, r"items must be 1-D, got shape \(1, 6\)"),
        (ids(0, 1, 2, 3, 4, 6), ValueError, "items must be in 0..5, got 0..6"),
        (ids(0, 1, 2, 3, 4, 4), ValueError, "items names a row twice"),
    ],
)
def test_items_that_are_none(items, error, message):
    with pytest.raises(error, match=message):
        ReindexedEmbedding(BlockEmbedding(PARTITION), items)


def test_an_embedding_leaves_items_out_and_a_softmax_none():
    embedding = ReindexedEmbedding(BlockEmbedding(PARTITION), ids(5, 0))
    assert torch.equal(embedding(ids(0, 1)), embedding.embedding(ids(5, 0)))
    softmax = ClusteredSoftmaxWithLoss(4, PARTITION)
    with pytest.raises(ValueError, match="items names 2 of the softmax's 6 items: all are needed"):
        ReindexedSoftmax(softmax, ids(5, -1, 0))
    with pytest.raises(TypeError, match="embedding must be a BlockEmbedding, got Linear"):
        ReindexedEmbedding(nn.Linear(2, 2), ids(0))
    with pytest.raises(TypeError, match="softmax must be a ClusteredSoftmaxWithLoss or TiedBlocks, got Linear"):
        ReindexedSoftmax(nn.Linear(2, 2), ids(0))
