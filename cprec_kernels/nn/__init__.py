"""Modules in the manner of ``torch.nn``."""

from .block_embedding import BlockEmbedding
from .clustered_softmax import ClusteredSoftmaxOutput, ClusteredSoftmaxWithLoss

__all__ = ["BlockEmbedding", "ClusteredSoftmaxOutput", "ClusteredSoftmaxWithLoss"]
