"""Modules in the manner of ``torch.nn``, and the index that serves one of them."""

from .block_embedding import BlockEmbedding
from .clustered_softmax import ClusteredSoftmaxOutput, ClusteredSoftmaxWithLoss
from .topk_index import TopKIndex, TopKResult

__all__ = ["BlockEmbedding", "ClusteredSoftmaxOutput", "ClusteredSoftmaxWithLoss", "TopKIndex", "TopKResult"]
