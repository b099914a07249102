"""RowwiseAdamW against torch's optimizers, and what every optimizer has to do: groups, schedules, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from cprec_kernels.optim import RowwiseAdamW
from cprec_kernels.testing import assert_accurate
from tests.optim.steps import BOTH, draw, make_params, sparse_grad, train


def reference_steps(make, initial, gradients, dtype):
    param = initial.to(dtype).requires_grad_()
    optimizer = make([param])
    for gradient in gradients:
        param.grad = gradient.to(dtype)
        optimizer.step()
    return param


# Against torch


@pytest.mark.parametrize("shape", [(20, 6), (33,), (), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_dense_gradients_get_adamw(shape, maximize, cpu_backend):
    initial, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(30)]
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3, "maximize": maximize}

    def theirs(params):
        return torch.optim.AdamW(params, **options)

    truth = reference_steps(theirs, initial, gradients, torch.float64)
    base = reference_steps(theirs, initial, gradients, torch.float32)
    ours = reference_steps(lambda params: RowwiseAdamW(params, **options), initial, gradients, torch.float32)
    assert_accurate(ours, base, truth, torch.float32)


@pytest.mark.parametrize("shape", [(20, 6), (33,), (9, 3, 5)], ids=str)
def test_sparse_gradients_without_decay_get_sparse_adam(shape, cpu_backend):
    initial = torch.randn(shape)
    gradients = []
    for seed in range(30):
        rows, generator = draw(shape[0], seed)
        gradients.append(sparse_grad(initial, rows, generator=generator))
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-14}  # where eps is added differs

    def theirs(params):
        return torch.optim.SparseAdam(params, **options)

    truth = reference_steps(theirs, initial, gradients, torch.float64)
    base = reference_steps(theirs, initial, gradients, torch.float32)
    ours = reference_steps(
        lambda params: RowwiseAdamW(params, **options, weight_decay=0.0), initial, gradients, torch.float32
    )
    assert_accurate(ours, base, truth, torch.float32)


def test_fp64_parameters_are_computed_in_fp64():
    initial, gradients = torch.randn(5, 3, dtype=torch.float64), [torch.randn(5, 3) for _ in range(5)]
    ours = reference_steps(RowwiseAdamW, initial, gradients, torch.float64)
    torch.testing.assert_close(
        ours, reference_steps(torch.optim.AdamW, initial, gradients, torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH
def test_narrow_parameters_have_wide_state_and_are_rounded_once(kind, dtype, cpu_backend):
    """A step from the same state is the fp32 step, rounded."""
    narrow = make_params(dtype)
    optimizer = kind(narrow, lr=0.01, weight_decay=0.1)
    train(optimizer, narrow, range(3))
    assert all(
        value.dtype == torch.float32 for p in narrow for n, value in optimizer.state[p].items() if "log" not in n
    )
    optimizer.apply_pending_decay()
    wide = [p.detach().float().requires_grad_() for p in narrow]
    twin = kind(wide, lr=0.01, weight_decay=0.1)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    generator = torch.Generator().manual_seed(9)
    for p, q in zip(narrow, wide, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        q.grad = p.grad.float()
    optimizer.step()
    twin.step()
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(p, q.to(dtype))


# Gradients in all their forms


@BOTH
def test_rows_named_twice_are_added_first(kind, cpu_backend):
    results = []
    for rows, values in (
        ([5, 2, 5], torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.5, -1.0]])),
        ([2, 5, 5], torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.5, -1.0]])),
        ([2, 5], torch.tensor([[3.0, 4.0], [1.5, 1.0]])),
    ):
        param = torch.ones(8, 2).requires_grad_()
        param.grad = sparse_grad(param, rows, values)
        optimizer = kind([param], lr=0.1)
        optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert (results[0] != 1).any(1).nonzero().flatten().tolist() == [2, 5]


def test_a_coalesced_flag_that_lies_is_not_believed(cpu_backend):
    param, twin = torch.ones(8, 2).requires_grad_(), torch.ones(8, 2).requires_grad_()
    values = torch.randn(3, 2)
    param.grad = sparse_grad(param, [5, 2, 5], values)._coalesced_(True)
    twin.grad = sparse_grad(twin, [5, 2, 5], values)
    for p in (param, twin):
        RowwiseAdamW([p]).step()
    assert torch.equal(param, twin)


def test_ascending_rows_without_the_flag_are_not_copied(monkeypatch):
    param = torch.ones(8, 2).requires_grad_()
    param.grad = sparse_grad(param, [1, 2, 7])
    assert not param.grad.is_coalesced()
    monkeypatch.setattr(torch.Tensor, "coalesce", None)
    RowwiseAdamW([param]).step()


@BOTH
def test_an_empty_gradient_counts_as_a_step_and_moves_no_row(kind, cpu_backend):
    param = torch.ones(8, 2).requires_grad_()
    optimizer = kind([param], lr=0.1, weight_decay=0.5)
    param.grad = sparse_grad(param, [])
    optimizer.step()
    assert torch.equal(param, torch.ones(8, 2))
    assert optimizer.state[param]["step"] == 1
    optimizer.apply_pending_decay()
    torch.testing.assert_close(param.detach(), torch.full((8, 2), 0.95))


@BOTH
def test_a_parameter_without_gradient_is_left_alone(kind):
    param = torch.ones(3, 2).requires_grad_()
    optimizer = kind([param])
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))
    assert param not in optimizer.state
    param.grad = torch.ones(3, 2)
    optimizer.zero_grad()
    assert param.grad is None


@BOTH
def test_a_real_loop_learns(kind, cpu_backend):
    table = torch.nn.Embedding(50, 8, sparse=True)
    head = torch.nn.Linear(8, 50)
    optimizer = kind([*table.parameters(), *head.parameters()], lr=0.05)
    ids = torch.arange(50)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(table(ids)), (ids + 1) % 50)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# Groups and schedules


@BOTH
def test_groups_have_their_own_numbers(kind, cpu_backend):
    one, two = torch.ones(4, 2).requires_grad_(), torch.ones(4, 2).requires_grad_()
    optimizer = kind([one], lr=0.1, weight_decay=0.0)
    optimizer.add_param_group({"params": [two], "lr": 0.5, "weight_decay": 1.0})
    for p in (one, two):
        p.grad = torch.zeros(4, 2)
    optimizer.step()
    assert torch.equal(one, torch.ones(4, 2))
    assert torch.equal(two, torch.full((4, 2), 0.5))


@BOTH
def test_a_group_that_is_refused_is_not_added(kind):
    optimizer = kind([torch.ones(4, 2).requires_grad_()])
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.add_param_group({"params": [torch.ones(2).requires_grad_()], "lr": -1.0})
    with pytest.raises(TypeError, match=r"dense and floating point, got torch\.strided of torch\.complex64"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.complex64).requires_grad_()]})
    assert len(optimizer.param_groups) == 1


def test_a_schedule_and_a_tensor_learning_rate_act(cpu_backend):
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = make_params()
        optimizer = RowwiseAdamW(params, lr=lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            train(optimizer, params, [step])
            scheduler.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    constant = make_params()
    train(RowwiseAdamW(constant, lr=0.1, weight_decay=0.1), constant, range(4))
    assert not torch.equal(constant[0], results[0][0])


def test_the_closure_runs_once_with_gradients():
    param = torch.ones(3, 2).requires_grad_()
    optimizer = RowwiseAdamW([param])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    assert calls == [True]


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1e-3}, r"lr must be at least 0 and finite, got -0.001"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": float("inf")}, "lr must be"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be"),
        ({"betas": (0.9, 0.9, 0.9)}, "two numbers"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"lr": 0.5, "weight_decay": 2.0}, r"lr \* weight_decay = 0.5 \* 2.0 must be below 1"),
    ],
)
def test_hyperparameters_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        RowwiseAdamW([torch.ones(2, 2).requires_grad_()], **options)


def bad_gradient(param, kind):
    if kind == "row too large":
        return sparse_grad(param, [0, 12])
    if kind == "row negative":
        return sparse_grad(param, [-1, 3])
    if kind == "two sparse dimensions":
        return torch.eye(12, 16).to_sparse()
    if kind == "csr":
        return torch.eye(12, 16).to_sparse_csr()
    return torch.ones(3, 16) if kind == "shape" else torch.ones(12, 16, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ("row too large", IndexError, r"rows\[1\] = 12 is outside 0..11"),
        ("row negative", IndexError, r"rows\[0\] = -1 is outside 0..11"),
        ("two sparse dimensions", ValueError, "sparse in 2 dimensions"),
        ("csr", ValueError, "torch.sparse_csr; dense and sparse_coo are taken"),
        ("shape", ValueError, r"the gradient of a parameter \(12, 16\) is \(3, 16\)"),
        ("dtype", TypeError, "is torch.float64, the parameter torch.float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_bad_gradients_change_nothing(kind, bad, error, words, monkeypatch, cpu_backend):
    params = make_params()
    optimizer = kind(params, weight_decay=0.1)
    train(optimizer, params, range(2))
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
    # torch refuses most of these when they are assigned; what sits in .grad may still have been made by other means
    broken = params[2]
    gradient = bad_gradient(broken, bad)
    grads = {id(p): torch.ones_like(p) for p in params} | {id(broken): gradient}
    monkeypatch.setattr(torch.Tensor, "grad", property(lambda self: grads.get(id(self))))
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before[0], strict=True))
    assert str(optimizer.state_dict()) == str(before[1])


@BOTH
def test_a_schedule_that_leaves_the_range_is_refused_before_anything_changes(kind):
    param = torch.ones(3, 2).requires_grad_()
    optimizer = kind([param], lr=0.1, weight_decay=2.0)
    param.grad = torch.ones(3, 2)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match="must be below 1"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))
    assert param not in optimizer.state
