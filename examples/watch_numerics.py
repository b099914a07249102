"""Normalisers: read, kept in bounds by a z-loss, and part of a loss of one's own."""

import torch

from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss

partition = Partition(10_000, cutoffs=[500, 2_000], ranks=[64, 16, 4], embedding_dim=64)
softmax = ClusteredSoftmaxWithLoss(64, partition, z_loss=1e-4)  # adds 1e-4 (lse_head^2 + lse_tail^2) per token
hidden, target = torch.randn(256, 64), torch.randint(10_000, (256,))
softmax(hidden, target).loss.backward()

terms = softmax.target_terms(hidden, target)  # log_prob, uniform, lse_head, lse_tail: per token, differentiable
confident = (-terms.log_prob + 0.01 * terms.lse_head.abs()).mean()  # a loss of one's own
confident.backward()

try:
    softmax(hidden, target + 9_999)
except IndexError as error:
    print(error)  # ids are always checked, with the place of the first bad one
