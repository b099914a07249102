"""Modules in the manner of ``torch.nn``, and the index that serves one of them."""

from .block_embedding import BlockEmbedding
from .catalogue import CatalogueChange
from .clustered_softmax import ClusteredSoftmaxOutput, ClusteredSoftmaxWithLoss
from .reindexed import ReindexedEmbedding, ReindexedSoftmax
from .tied_blocks import TiedBlocks
from .topk_index import TopKIndex, TopKResult

__all__ = [
    "BlockEmbedding",
    "CatalogueChange",
    "ClusteredSoftmaxOutput",
    "ClusteredSoftmaxWithLoss",
    "ReindexedEmbedding",
    "ReindexedSoftmax",
    "TiedBlocks",
    "TopKIndex",
    "TopKResult",
]
