"""cprec::row_adamw_, row_adagrad_ and row_decay_: one step on rows, against the equations in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from cprec_kernels import available_cpu_isas, backend_of, use_backend
from cprec_kernels.ops import row_optimizer as ops
from cprec_kernels.reference import row_optimizer as ref
from cprec_kernels.testing import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(40, 1), (40, 4), (40, 16), (9, 37), (70, 3, 11), (300,)]
LOG_DECAY = (-7.25, -7.25 + math.log1p(-1e-3))


def inputs(name, shape, dtype, *, sparse=True, lagging=True):
    """Arguments of one op: parameter, gradient, rows, state, then the numbers of a tenth step."""
    generator = torch.Generator().manual_seed(1)
    num_rows = shape[0]
    rows = torch.randperm(num_rows, generator=generator)[: num_rows * 2 // 3].sort().values if sparse else None
    param = torch.randn(shape, generator=generator).to(dtype)
    grad = torch.randn((num_rows if rows is None else rows.numel(), *shape[1:]), generator=generator).to(dtype)
    wide = ops.state_dtype(param)
    # some rows are up to date, some have missed a little, some nearly everything
    lag = torch.tensor([0.0, 1e-5, 0.3, 2.0, 30.0], dtype=torch.float64).repeat(num_rows)[:num_rows]
    row_log_decay = LOG_DECAY[0] + lag if sparse and lagging else None
    if name == "row_decay_":
        return [param, rows, LOG_DECAY[0] + lag, LOG_DECAY[0]]
    if name == "row_adagrad_":
        state = [torch.rand(num_rows, generator=generator, dtype=wide)]
        return [param, grad, rows, *state, row_log_decay, LOG_DECAY, 0.1, 1e-3, 1e-10, False]
    state = [f(torch.randn(shape, generator=generator, dtype=wide)) for f in (torch.clone, torch.square)]
    return [param, grad, rows, *state, row_log_decay, LOG_DECAY, 0.1, 1e-3, (0.9, 0.999), 1e-8, 10, False]


def copies(args, dtype=None):
    def one(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.clone() if dtype is None or not value.is_floating_point() else value.to(dtype, copy=True)

    return [one(value) for value in args]


def run(name, args):
    """The tensors of ``args`` after the op, copied; None stays."""
    args = copies(args)
    getattr(torch.ops.cprec, name)(*args)
    return args


OPS = ("row_adamw_", "row_adagrad_", "row_decay_")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["rows", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(name, shape, sparse, dtype, cpu_backend, poison):
    args = inputs(name, shape, dtype, sparse=sparse)
    truth, base = copies(args, torch.float64), copies(args)
    getattr(ref, name)(*truth)
    getattr(ref, name)(*base)
    ours = run(name, args)
    for index, (a, b, t) in enumerate(zip(ours, base, truth, strict=True)):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            # state is fp32 whatever the parameter is
            assert_accurate(a, b, t, a.dtype, f"argument {index}")


@pytest.mark.parametrize("rows", [None, torch.arange(0, 40, 3)], ids=["all", "rows"])
def test_a_long_decay_is_accurate_to_the_last_digits(rows, cpu_backend):
    param, row_log_decay = torch.ones(40, 7), torch.zeros(40, dtype=torch.float64)
    torch.ops.cprec.row_decay_(param, rows, row_log_decay, -20.0)
    decayed = slice(None) if rows is None else rows
    torch.testing.assert_close(param[decayed], torch.full_like(param[decayed], math.exp(-20)), rtol=1e-5, atol=0)
    assert (row_log_decay[decayed] == -20).all()


@pytest.mark.parametrize("name", OPS)
def test_rows_that_are_not_named_keep_every_bit(name, cpu_backend):
    args = inputs(name, (40, 5), torch.float32)
    rows = next(value for value in args if isinstance(value, torch.Tensor) and value.dtype == torch.int64)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    changed = 0
    for before, after in zip(args, run(name, args), strict=True):
        if isinstance(before, torch.Tensor) and before.shape[:1] == (40,):
            assert torch.equal(before[others], after[others])
            changed += int(not torch.equal(before, after))
    assert changed >= 2


@pytest.mark.parametrize("name", OPS[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gradient_of_every_row_is_a_dense_one(name, shape, cpu_backend):
    dense = inputs(name, shape, torch.float32, sparse=False)
    rows = list(dense)
    rows[2] = torch.arange(shape[0])
    for a, b in zip(run(name, dense), run(name, rows), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS[:2])
def test_a_step_after_catching_up_gives_the_same_bits(name, dtype, cpu_backend):
    args = inputs(name, (40, 5), dtype)
    at_once = run(name, args)
    torch.ops.cprec.row_decay_(args[0], args[2], args[5 if name == "row_adamw_" else 4], LOG_DECAY[0])
    for a, b in zip(at_once, run(name, args), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_decay_takes_rows_in_any_order_and_more_than_once(cpu_backend):
    param, rows, row_log_decay, log_decay = inputs("row_decay_", (400, 3), torch.float32)
    once = run("row_decay_", [param, rows, row_log_decay, log_decay])
    repeated = rows.repeat(40)[torch.randperm(40 * rows.numel())]
    often = run("row_decay_", [param, repeated, row_log_decay, log_decay])
    assert torch.equal(often[0], once[0])
    assert torch.equal(often[2], once[2])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("sparse", [True, False], ids=["rows", "all"])
def test_any_number_of_threads_gives_the_same_bits(name, sparse, cpu_isa):
    args = inputs(name, (30_000, 3), torch.float32, sparse=sparse)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(name, args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_parameters_and_gradients_that_are_not_contiguous(name, cpu_backend):
    args = inputs(name, (40, 6), torch.float32)
    expected = run(name, args)
    wide = torch.zeros(6, 40)
    args[0] = wide.t().copy_(args[0])
    if name != "row_decay_":
        args[1] = args[1].repeat(1, 2)[:, :6]
    getattr(torch.ops.cprec, name)(*args)
    assert torch.equal(wide.t(), expected[0])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["rows", "all"])
def test_edges(name, shape, sparse, cpu_backend):
    args = inputs(name, shape, torch.float32, sparse=sparse)
    expected = copies(args)
    getattr(ref, name)(*expected)
    for a, b in zip(run(name, args), expected, strict=True):
        if isinstance(b, torch.Tensor) and shape[1] > 0:  # rows without a column have a state that means nothing
            torch.testing.assert_close(a, b)
    args = inputs(name, (5, 3), torch.float32, sparse=sparse)
    if sparse:
        args[1] = args[1][:0]  # no rows: all tensors stay
        args[2] = args[2] if name == "row_decay_" else args[2][:0]
        for a, b in zip(args, run(name, args), strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("sparse", [True, False], ids=["rows", "all"])
def test_opcheck(name, sparse):
    torch.library.opcheck(getattr(torch.ops.cprec, name).default, inputs(name, (6, 3), torch.float32, sparse=sparse))


@pytest.mark.parametrize("name", OPS)
def test_autograd_notices_the_change(name, cpu_backend):
    args = inputs(name, (6, 3), torch.float32)
    args[0].requires_grad_()
    loss = (args[0] * args[0]).sum()
    with torch.no_grad():
        getattr(torch.ops.cprec, name)(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        (2, torch.tensor([0, 6]), IndexError, r"rows\[1\] = 6 is outside 0..5"),
        (2, torch.tensor([-1, 5]), IndexError, r"rows\[0\] = -1 is outside 0..5"),
        (2, torch.tensor([0, 5], dtype=torch.int32), TypeError, "rows must be int64"),
        (2, torch.tensor([0, 1, 2]), ValueError, r"the gradient is \(2, 3\), \(3, 3\) was expected"),
        (1, torch.zeros(2, 4), ValueError, r"the gradient is \(2, 4\), \(2, 3\) was expected"),
        (1, torch.zeros(2, 3).double(), TypeError, "the gradient is torch.float64, the parameter torch.float32"),
        (3, torch.zeros(6, 2), ValueError, r"exp_avg is \(6, 2\), \(6, 3\) was expected"),
        (4, torch.zeros(6, 3).half(), TypeError, "exp_avg_sq must be torch.float32"),
        (5, torch.zeros(6), TypeError, "row_log_decay must be float64"),
        (5, torch.zeros(5).double(), ValueError, r"row_log_decay is \(5,\) for a parameter \(6, 3\)"),
    ],
)
def test_refusals_change_nothing(place, value, error, words, cpu_backend):
    args = inputs("row_adamw_", (6, 3), torch.float32)
    args[1], args[2] = torch.ones(2, 3), torch.tensor([0, 5])
    args[place] = value
    before = copies(args)
    with pytest.raises(error, match=words):
        torch.ops.cprec.row_adamw_(*args)
    for a, b in zip(args, before, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "changed", "error", "words"),
    [
        ("row_adagrad_", {3: torch.zeros(5)}, ValueError, r"sum is \(5,\), \(6,\) was expected"),
        ("row_adagrad_", {3: torch.zeros(6).half()}, TypeError, "sum must be torch.float32"),
        (
            "row_adagrad_",
            {2: None, 1: torch.zeros(6, 3)},
            ValueError,
            "row_log_decay is for gradients of some rows only",
        ),
        ("row_decay_", {1: torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "rows must be 1-D, .* not 2-D"),
        ("row_decay_", {2: torch.zeros(6)}, TypeError, "row_log_decay must be float64"),
        ("row_decay_", {1: torch.tensor([0, 6])}, IndexError, r"rows\[1\] = 6 is outside 0..5"),
    ],
)
def test_refusals_of_the_other_ops_change_nothing(name, changed, error, words, cpu_backend):
    args = inputs(name, (6, 3), torch.float32)
    for place, value in changed.items():
        args[place] = value
    before = copies(args)
    with pytest.raises(error, match=words):
        getattr(torch.ops.cprec, name)(*args)
    for a, b in zip(args, before, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_the_raw_kernel_refuses_what_the_op_would_have(cpu_isa):
    """torch.ops.cprec_native is reachable without our checks: it must still not write out of bounds or race."""
    args = inputs("row_adamw_", (6, 3), torch.float32)
    call = torch.ops.cprec_native.row_adamw_
    for rows, words in (([0, 6], r"rows\[1\] = 6 is outside 0..5"), ([1, 1], "rows must ascend strictly")):
        args[1], args[2] = torch.ones(2, 3), torch.tensor(rows)
        with pytest.raises((IndexError, ValueError), match=words):
            call(*args)
    args[2] = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="exp_avg must be contiguous with 18 elements"):
        call(*args[:3], torch.zeros(6, 2), *args[4:])
    with pytest.raises(ValueError, match="expected in dimension 0"):
        call(args[0], torch.ones(3, 3), *args[2:])
    with pytest.raises(ValueError, match="parameter must be contiguous"):
        call(torch.zeros(3, 6).t(), *args[1:])


def test_backends():
    with use_backend("auto"):
        for name in OPS:
            assert backend_of(name, torch.ones(1)) == ("native" if available_cpu_isas() else "reference")
            assert backend_of(name, torch.ones(1).double()) == "reference"
