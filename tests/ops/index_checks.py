"""What the tests of cprec::topk_index search, and how they tell whether what was found is the best there is."""

from __future__ import annotations

import math

import torch

from cprec_kernels import Partition, functional
from cprec_kernels.testing import assert_same_items, copy_weights

BAND = 2e-5
# More than 32 leaves in one tail, a last leaf and a last group that are not full, more items than a head scan pads to.
LARGE = Partition(3_017, [101, 700], [24, 9, 4], 24)
SMALL = Partition(100, [10, 50], [8, 4, 2], 8)


def truth(hidden, weights):
    """All log-probabilities in fp64."""
    return functional.clustered_log_prob(hidden.double(), copy_weights(weights, torch.float64))


def rounding(hidden, weights, arrays):
    """What storing the items more narrowly may change a row's scores by: twice |Q h| error, for the head and a tail."""
    head, *tails = [
        (hidden if projection.numel() == 0 else hidden @ projection.T).double().norm(dim=1) * error
        for projection, error in zip(arrays.projections, arrays.bounds[:, 0], strict=True)
    ]
    return 2 * (head + (torch.stack(tails).amax(0) if tails else 0))


def assert_best(result, log_prob, band, slack=0.0):
    """Items are the best of ``log_prob`` up to ``band``; their scores may be off by the rows' ``slack`` as well."""
    scores, items, _ = result
    left = items >= 0
    own = log_prob.gather(1, items.clamp(min=0)).masked_fill(~left, -math.inf)
    assert_same_items(items, own, log_prob, band)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.isfinite(), left)
    allowed = (torch.as_tensor(slack, dtype=torch.float64).reshape(-1, 1) + band).expand(own.shape)
    assert ((scores.double() - own).abs()[left] <= allowed[left]).all()
