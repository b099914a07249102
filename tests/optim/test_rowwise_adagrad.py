"""RowwiseAdagrad: torch's Adagrad where a row is one element, one accumulator per row elsewhere."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels.optim import RowwiseAdagrad
from cprec_kernels.testing import assert_accurate

OPTIONS = {"lr": 0.1, "lr_decay": 0.02, "initial_accumulator_value": 0.3, "eps": 1e-6}


def steps(make, initial, gradients, dtype):
    param = initial.to(dtype).requires_grad_()
    optimizer = make([param])
    for gradient in gradients:
        param.grad = gradient.to(dtype)
        optimizer.step()
    return param


@pytest.mark.parametrize("shape", [(33,), (20, 1), ()], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_of_one_element_get_torchs_adagrad(shape, maximize, sparse, cpu_backend):
    initial, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(30)]
    if sparse and shape:
        gradients = [torch.where(torch.rand(shape) < 0.5, g, 0.0).to_sparse(1) for g in gradients]

    def theirs(params):
        return torch.optim.Adagrad(params, **OPTIONS, maximize=maximize)

    truth = steps(theirs, initial, gradients, torch.float64)
    base = steps(theirs, initial, gradients, torch.float32)
    ours = steps(lambda p: RowwiseAdagrad(p, **OPTIONS, maximize=maximize), initial, gradients, torch.float32)
    assert_accurate(ours, base, truth, torch.float32)


@pytest.mark.parametrize("shape", [(12, 5), (12, 40), (6, 3, 7)], ids=str)
def test_a_row_has_one_accumulator(shape, cpu_backend):
    """Against a loop over rows in fp64, with decay and rows that come and go."""
    initial = torch.randn(shape)
    param = initial.clone().requires_grad_()
    optimizer = RowwiseAdagrad([param], **OPTIONS, weight_decay=0.5)
    expected, sums = initial.double(), [OPTIONS["initial_accumulator_value"]] * shape[0]
    for step in range(20):
        rows = torch.randperm(shape[0])[:4].sort().values
        values = torch.randn(4, *shape[1:])
        param.grad = torch.sparse_coo_tensor(rows[None], values, shape)
        optimizer.step()
        lr = OPTIONS["lr"] / (1 + step * OPTIONS["lr_decay"])
        expected *= 1 - lr * 0.5
        for row, value in zip(rows.tolist(), values.double(), strict=True):
            sums[row] += float(value.square().mean())
            expected[row] -= lr * value / (sums[row] ** 0.5 + OPTIONS["eps"])
    optimizer.apply_pending_decay()
    assert optimizer.state[param]["sum"].shape == shape[:1]
    torch.testing.assert_close(optimizer.state[param]["sum"].double(), torch.tensor(sums).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(param.detach().double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr_decay": -1.0}, "lr_decay must be"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"lr": 1.0, "weight_decay": 1.0}, "must be below 1"),
    ],
)
def test_hyperparameters_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        RowwiseAdagrad([torch.ones(2, 2).requires_grad_()], **options)


@pytest.mark.parametrize("shape", [(40,), (40, 1)], ids=str)
def test_rows_whose_gradient_is_zero_stay_where_they_are(shape, cpu_backend):
    param = torch.nn.Parameter(torch.ones(shape))
    optimizer = RowwiseAdagrad([param], lr=0.1, eps=0.5)
    param.grad = torch.zeros(shape)
    param.grad[3] = 1
    optimizer.step()
    expected = torch.ones(shape)
    expected[3] -= 0.1 / 1.5
    torch.testing.assert_close(param.detach(), expected)
