"""``cprec::gather_taps``: the rows that a dilated convolution meets, side by side, where batches hold no padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backend
from ..reference import gather_taps as ref
from ._library import (
    autograd,
    check_ids,
    check_integers,
    define,
    fake,
    implement,
    is_eager,
    not_twice_differentiable,
    refuse_tangents,
)

# Schema

FORWARD = define("gather_taps(Tensor input, Tensor rows) -> Tensor")
BACKWARD = define("gather_taps_backward(Tensor grad, Tensor rows, SymInt num_rows) -> Tensor")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Implementations


def _check(input: Tensor, rows: Tensor) -> None:
    torch._check_value(input.dim() == 2, lambda: f"input must be (N, d), got {tuple(input.shape)}")
    torch._check_type(input.is_floating_point(), lambda: f"input must be floating point, got {input.dtype}")
    _check_rows(rows, input, "input")


def _check_rows(rows: Tensor, beside: Tensor, name: str) -> None:
    check_integers(rows, "rows")
    torch._check_value(
        rows.dim() == 2 and rows.shape[0] >= 1,
        lambda: f"rows must be (taps, T), at least one tap, got {tuple(rows.shape)}",
    )
    torch._check_value(rows.device == beside.device, lambda: f"rows are on {rows.device}, {name} is on {beside.device}")


def _check_backward(grad: Tensor, rows: Tensor, num_rows: int) -> None:
    _check_rows(rows, grad, "grad")
    torch._check_value(
        grad.dim() == 2 and grad.shape[0] == rows.shape[1] and grad.shape[1] % rows.shape[0] == 0,
        lambda: f"grad of shape {tuple(grad.shape)} does not fit rows of shape {tuple(rows.shape)}",
    )


def _reference(input: Tensor, rows: Tensor) -> Tensor:
    _check(input, rows)
    check_ids(rows, input.shape[0] + 1, "rows")  # one more: none
    return ref.gather_taps(input, rows)


def _reference_backward(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    _check_backward(grad, rows, num_rows)
    check_ids(rows, num_rows + 1, "rows")
    return ref.gather_taps_backward(grad, rows, num_rows)


# Native kernels check everything themselves, in less time than Python takes.
_backend.register(FORWARD, _backend.native(FORWARD, "cpu", NATIVE_DTYPES), _backend.reference(_reference))
_backend.register(BACKWARD, _backend.native(BACKWARD, "cpu", NATIVE_DTYPES), _backend.reference(_reference_backward))
implement(FORWARD, lambda *args: None, lambda *args: None, anchor=0)
implement(BACKWARD, lambda *args: None, lambda *args: None, anchor=0)

# Fake


def _fake(input: Tensor, rows: Tensor) -> Tensor:
    _check(input, rows)
    return input.new_empty(rows.shape[1], rows.shape[0] * input.shape[1])


def _fake_backward(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    _check_backward(grad, rows, num_rows)
    return grad.new_empty(num_rows, grad.shape[1] // rows.shape[0])


fake(FORWARD, _fake)
fake(BACKWARD, _fake_backward)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rows = inputs
    ctx.num_rows = input.shape[0]
    ctx.save_for_backward(rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    return torch.ops.cprec.gather_taps_backward(grad, rows, ctx.num_rows), None


autograd(FORWARD, _backward, _setup_context)
not_twice_differentiable(BACKWARD)


class _Direct(torch.autograd.Function):
    """The same without the way through the registered op: a layer of a small model takes not much longer itself."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rows: Tensor) -> Tensor:
        _setup_context(ctx, (input, rows), input)
        out: Tensor = _backend.dispatch(FORWARD, input)(input, rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _backend.dispatch(BACKWARD, grad)(grad, rows, ctx.num_rows), None


# Public


def gather_taps(input: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``input`` side by side: what a dilated convolution meets where a batch holds items without their padding.

    ``torch.nn.functional.linear`` of the result with a kernel (out, taps d) is the convolution. On the CPU forward and
    backward are one pass each, and results do not depend on the number of threads; float64 and other devices take torch's
    own ops. Gradients are summed in fp32 (fp64 for fp64) and rounded once. Differentiable once, in reverse.

    Args:
        input: (N, d), of any floating dtype.
        rows: (taps, T) int64; row ``rows[k, t]`` of ``input`` is what tap k of output t meets. N stands for none, zeros.

    Returns:
        (T, taps d) in the dtype of ``input``.

    Raises:
        IndexError: a row outside 0..N, with its place.
        RuntimeError: in forward mode. TypeError: rows not int64, input not floating point.
        ValueError: shapes that do not fit, tensors on several devices.
    """
    refuse_tangents("gather_taps", input)
    direct = is_eager(input, rows)
    out: Tensor = _Direct.apply(input, rows) if direct else torch.ops.cprec.gather_taps(input, rows)  # type: ignore[no-untyped-call]
    return out
