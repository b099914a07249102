"""The registered ops: one file per op, each a contract from schema to public function."""

from . import (
    block_embedding,
    clustered_softmax,
    clustered_topk,
    conv_norm_relu,
    dropout,
    gather_taps,
    residual_stack,
    topk_index,
)

__all__ = [
    "block_embedding",
    "clustered_softmax",
    "clustered_topk",
    "conv_norm_relu",
    "dropout",
    "gather_taps",
    "residual_stack",
    "topk_index",
]
