"""Forward-mode differentiation: refused, where torch would take the results of an op without a rule for constants."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from cprec_kernels import Partition, functional
from cprec_kernels.testing import make_embedding, make_softmax

PARTITION = Partition(40, [10], [8, 4], 8)
IDS = torch.tensor([3, 12, 39])


def calls():
    """A function of one tensor, and the tensor, by what it is: every differentiable op, by each kind of its inputs."""
    tables, projections = make_embedding(PARTITION, torch.float32)
    weights = make_softmax(PARTITION)
    hidden, head = torch.randn(3, 8), weights.weights[0]
    layer = torch.tensor([[0, 3, 2]]), torch.randn(8, 8, 1), torch.randn(8), torch.ones(8), torch.zeros(8)
    embed, loss = functional.block_embedding, functional.clustered_cross_entropy
    return {
        "embeddings": (lambda table: embed(IDS, [table, *tables[1:]], projections), tables[0]),
        "projections": (lambda projection: embed(IDS, tables, [projection]), projections[0]),
        "input": (lambda given: loss(given, IDS, weights), hidden),
        "weights": (lambda given: loss(hidden, IDS, weights._replace(weights=[given, *weights.weights[1:]])), head),
        "terms": (lambda given: functional.clustered_target_terms(given, IDS, weights).lse_head, hidden),
        "layer": (lambda given: functional.conv_norm_relu(given, *layer), hidden),
        "norm": (lambda given: functional.conv_norm_relu(hidden, *layer[:3], given, layer[4]), layer[3]),
        "dropout": (lambda given: functional.dropout(given, 0.5, 0), hidden),
        "residual": (lambda given: functional.dropout(hidden, 0.5, 0, given), hidden),
        "taps": (lambda given: functional.gather_taps(given, torch.tensor([[0, 3, 2]])), hidden),
    }


@pytest.mark.parametrize("name", calls())
def test_tangents_are_refused(name):
    call, given = calls()[name]
    with forward_ad.dual_level():
        call(given)  # nothing to differentiate
        with pytest.raises(RuntimeError, match=r"has no forward-mode derivative .*: differentiate it by backward"):
            call(forward_ad.make_dual(given, torch.ones_like(given)))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(call, (given,), (torch.ones_like(given),))


def test_log_prob_is_of_torch_s_own_ops():
    weights, hidden = make_softmax(PARTITION), torch.randn(3, 8)
    tangent = torch.randn(3, 8)
    _, found = torch.func.jvp(lambda given: functional.clustered_log_prob(given, weights), (hidden,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda given: functional.clustered_log_prob(given, weights), hidden)
    torch.testing.assert_close(found, (jacobian * tangent).sum((2, 3)))
