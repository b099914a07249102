"""TopKIndex of a module whose parameters are views of a storage that others share."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss


def test_an_index_is_stale_when_a_parameter_has_moved_within_its_storage():
    head = ClusteredSoftmaxWithLoss(16, Partition(200, [50], [16, 8], 16))
    weight = head.weights[1]
    storage = torch.randn(weight.shape[0] + 1, weight.shape[1])
    weight.data = storage[:-1]
    index, version = head.build_index(), weight._version
    assert not index.is_stale
    weight.data = storage[1:]
    assert weight._version == version
    assert index.is_stale
    with pytest.raises(RuntimeError, match="build it again"):
        index.topk(torch.randn(1, 16), 3)
