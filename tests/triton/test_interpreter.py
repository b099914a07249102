"""The interpreter as the suite repairs it: it computes what it did, and still refuses what it refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as of_triton


@triton.jit
def twice(x):
    return x + x


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, operation: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if operation == "add":
        out = x + y
    elif operation == "sub":
        out = x - y
    elif operation == "mul":
        out = x * y
    else:
        out = twice(x)
    tl.store(out_ptr + i, out)


CASES = {  # operation: operands that just fit, operands of which one does not
    "add": ((2**31 - 2, -(2**31) + 1), (1, -1), (2, -2)),
    "sub": ((2**31 - 2, -(2**31) + 1), (-1, 1), (-2, 2)),
    "mul": ((2**30, -(2**30)), (-2, 2), (2, -3)),
    "twice": ((2**30 - 1, -(2**30)), (0, 0), None),
}


def run(operation, x, y):
    x, y = (torch.tensor(values, dtype=torch.int32) for values in (x, y))
    out = torch.full_like(x, 7)
    arithmetic_kernel[(1,)](x, y, out, operation, 2)
    return out.long()


@pytest.mark.parametrize("operation", CASES)
def test_integers_that_overflow_are_noticed_and_no_others(operation):
    x, fits, overflows = CASES[operation]
    a, b = torch.tensor(x), torch.tensor(fits)
    expected = {"add": a + b, "sub": a - b, "mul": a * b, "twice": 2 * a}[operation]
    assert torch.equal(run(operation, x, fits), expected)
    for i in range(2):
        one = list(fits)
        start = list(x)
        if overflows is None:
            start[i] = (2**30, -(2**30) - 1)[i]
        else:
            one[i] = overflows[i]
        with pytest.raises(of_triton.InterpreterError, match="int32 overflow detected for operation"):
            run(operation, start, one)


def test_the_language_is_as_it_was_after_a_launch_even_a_failed_one():
    before = {name: getattr(tl, name) for name in ("load", "range", "reduce", "sum")} | {"add": tl.tensor.__add__}

    def now():
        return {name: getattr(tl, name) for name in ("load", "range", "reduce", "sum")} | {"add": tl.tensor.__add__}

    run("twice", [1, 2], [0, 0])
    assert now() == before
    with pytest.raises(of_triton.InterpreterError):
        run("mul", [2**30, 1], [4, 1])
    assert now() == before
    assert run("twice", [1, 2], [0, 0]).tolist() == [2, 4]


@pytest.mark.parametrize(
    "dtype", [tl.int1, tl.int32, tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64], ids=str
)
def test_remembered_dtypes_are_the_interpreters(dtype):
    wanted = {"int1": "bool", "bf16": "uint16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    name = wanted.get(dtype.name, dtype.name)
    for kind in (dtype, tl.block_type(dtype, [4])):
        assert of_triton._get_np_dtype(kind) == name
    for kind in (tl.pointer_type(dtype), tl.block_type(tl.pointer_type(dtype), [4])):
        assert of_triton._get_np_dtype(kind) == "uint64"
