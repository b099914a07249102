"""The check of ids on a device, in the interpreter, where an assertion is an exception."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from cprec_kernels._triton import common, ids


@pytest.fixture(autouse=True)
def _with_assertions(monkeypatch):
    """The interpreter does not hear a kernel's own wish for them."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


@pytest.mark.parametrize("count", [1, 1023, 1024, 2500])
@pytest.mark.parametrize("allowed", [None, -100, 2**40])
def test_ids_in_range_pass(count, allowed):
    given = torch.randint(7, (count,))
    given[0], given[-1] = 6, 0 if allowed is None else allowed
    ids.check(given, 7, "ids", allowed)


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -100])
@pytest.mark.parametrize("place", [0, 1023, 2499])
def test_an_id_out_of_range_is_named(bad, place):
    given = torch.randint(7, (50, 50)).T
    given[place % 50, place // 50] = bad
    with pytest.raises((AssertionError, InterpreterError), match=r"target holds an id outside 0\.\.num_items - 1"):
        ids.check(given, 7, "target", -2)


def test_warm_up_lists_it():
    with common.rehearse() as launches:
        ids.check(torch.zeros(3, dtype=torch.int64), 7, "ids", None)
    assert [launch.kernel for launch in launches] == [ids.ids_kernel]


def test_assertions_are_compiled_in():
    assert ids.ids_kernel.kwargs["debug"]
