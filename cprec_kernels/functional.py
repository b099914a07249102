"""Stateless API: every op as a function of tensors."""

from .ops.block_embedding import block_embedding
from .ops.clustered_softmax import (
    Weights,
    clustered_cross_entropy,
    clustered_log_prob,
    clustered_score,
    clustered_target_log_prob,
)
from .ops.clustered_topk import clustered_rank, clustered_topk
from .ops.conv_norm_relu import conv_norm_relu
from .ops.dropout import dropout
from .ops.gather_taps import gather_taps
from .ops.levels import TargetTerms, clustered_target_terms
from .ops.residual_stack import residual_stack

__all__ = [
    "TargetTerms",
    "Weights",
    "block_embedding",
    "clustered_cross_entropy",
    "clustered_log_prob",
    "clustered_rank",
    "clustered_score",
    "clustered_target_log_prob",
    "clustered_target_terms",
    "clustered_topk",
    "conv_norm_relu",
    "dropout",
    "gather_taps",
    "residual_stack",
]
