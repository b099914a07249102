"""Inputs shared by the tests of cprec::clustered_softmax."""

from __future__ import annotations

import torch

from cprec_kernels.testing import make_hidden, make_targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE = -100


def inputs(partition, dtype=torch.float32, shape=(7, 9)):
    return make_hidden(partition, shape, dtype), make_targets(partition, shape)
