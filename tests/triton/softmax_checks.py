"""Runs of the Triton kernels of the clustered softmax, and their check against the reference in fp64."""

from __future__ import annotations

import torch

from cprec_kernels import Partition
from cprec_kernels._triton import (
    clustered_softmax as kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_backward as backward_kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_plan as plan_kernels,
)
from cprec_kernels._triton import (
    clustered_softmax_weight as weight_kernels,
)
from cprec_kernels._triton.configs import Tile
from cprec_kernels.reference import clustered_softmax as ref
from cprec_kernels.testing import assert_accurate, copy_weights, make_hidden, make_targets

MODULES = (kernels, backward_kernels, plan_kernels, weight_kernels)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100
ALL = [True] * 5
COUNT = 41
TINY = {
    "scan_lse": Tile(16, 16, 4, 1),
    "scan_rows": Tile(16, 16, 4, 1),
    "weight": Tile(16, 16, 4, 1),
    "weight_unbiased": Tile(16, 16, 4, 1),
    "token": Tile(16, 0, 4, 1),
}
SMALL = Partition(100, [10, 50], [8, 4, 2], 8)


def inputs(partition, dtype=torch.float32, count=COUNT):
    return make_hidden(partition, (count,), dtype), make_targets(partition, (count,))


def flat(gradients):
    d_input, d_weights, d_projections, d_head_bias, d_tail_biases = gradients
    return [d_input, *d_weights, *d_projections, d_head_bias, *d_tail_biases]


def run(hidden, target, weights, g1, g2, with_rows=False, mask=ALL, ignore=IGNORE):
    """log_prob, uniform and the log-sum-exps; all gradients."""
    *results, kept = kernels.forward(hidden, target, *weights, ignore, True, with_rows)
    gradients = backward_kernels.backward(
        g1, g2, hidden, target, *weights, *results[2:], ignore, mask, hidden.dtype, kept
    )
    return results, flat(gradients)


def run_reference(hidden, target, weights, g1, g2, dtype=None):
    dtype = dtype or hidden.dtype
    h, w = hidden.to(dtype), copy_weights(weights, dtype)
    results = ref.clustered_softmax(h, target, *w, IGNORE)
    g1, g2 = (g.double() if dtype == torch.float64 else g for g in (g1, g2))
    return results, flat(ref.clustered_softmax_backward(g1, g2, h, target, *w, *results[2:], IGNORE, ALL))


def check(hidden, target, weights, g1, g2, **options):
    ours = run(hidden, target, weights, g1, g2, **options)
    base = run_reference(hidden, target, weights, g1, g2)
    truth = run_reference(hidden, target, weights, g1, g2, torch.float64)
    for kind, a, b, t in zip(("result", "gradient"), ours, base, truth, strict=True):
        for i, (x, y, z) in enumerate(zip(a, b, t, strict=True)):
            assert_accurate(x, y, z, hidden.dtype, f"{kind} {i}")
    assert [g.dtype for g in ours[1]] == [hidden.dtype] * len(ours[1])
    assert [r.dtype for r in ours[0]] == [torch.float32] * 2 + [torch.float64] * 2
    ignored = target == IGNORE
    assert all(torch.count_nonzero(result[ignored]) == 0 for result in ours[0])


def upstream(count, kind="plain"):
    """Gradients of log_prob and uniform, as a loss gives them or with every sign there is."""
    g1, g2 = torch.rand(count) + 0.5, torch.rand(count) * 0.3
    if kind == "plain":
        return -g1, torch.zeros(count)
    if kind == "smooth":
        return -g1, -g2
    sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    g1, g2 = g1 * sign, g2 * sign.flip(0)
    g1[::5] = 0.0
    g2[::5] = 0.0
    g2[1::5] = -g1[1::5]  # c = 0, and yet a gradient
    return g1, g2
