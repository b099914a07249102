"""Steps that the tests of row-wise optimizers take, and parameters for them."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels.optim import RowwiseAdagrad, RowwiseAdamW

BOTH = pytest.mark.parametrize("kind", [RowwiseAdamW, RowwiseAdagrad])


def sparse_grad(param, rows, values=None, generator=None):
    """A gradient (not coalesced) of some rows."""
    rows = torch.as_tensor(rows, dtype=torch.int64)
    if values is None:
        values = torch.randn(rows.numel(), *param.shape[1:], generator=generator).to(param.dtype)
    return torch.sparse_coo_tensor(rows[None], values, param.shape, check_invariants=False)


def draw(num_rows, seed):
    """Some rows, ascending, and a generator for their gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator)[: num_rows // 3].sort().values, generator


def train(optimizer, params, steps):
    """Steps with gradients that depend on the step alone: sparse ones for tables, dense ones for the rest."""
    for step in steps:
        optimizer.zero_grad()
        for index, param in enumerate(params):
            rows, generator = draw(param.shape[0], 100 * step + index)
            if index % 2:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            else:
                param.grad = sparse_grad(param, rows, generator=generator)
        optimizer.step()


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 5), (7, 6), (12, 16), (9,)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
