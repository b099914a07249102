"""``cprec::conv_norm_relu``: a layer of a convolutional recommender over batches that hold items without their padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backend
from ..reference import conv_norm_relu as ref
from ..reference.common import accumulate_dtype
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
    without_autocast,
)

# Schema

FORWARD = define(
    "conv_norm_relu(Tensor input, Tensor rows, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = define(
    "conv_norm_relu_backward(Tensor grad, Tensor rows, Tensor weight, Tensor norm_weight, Tensor out,"
    " Tensor side_by_side, Tensor conv, Tensor stats, SymInt num_rows, bool want_input, bool want_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
NATIVE_DTYPES = (torch.float32,)

# Implementations


def _check(
    input: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> None:
    if input.dim() != 2 or input.shape[1] < 1:
        raise ValueError(f"input must be (N, d), d at least 1, got {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if weight.dim() != 3 or weight.shape[0] < 1:
        raise ValueError(f"weight must be (channels, d, kernel size), got {tuple(weight.shape)}")
    _check_rows(rows, weight, input)
    if not eps >= 0:
        raise ValueError(f"eps = {eps} is negative or NaN")
    channels = weight.shape[0]
    shapes = {
        "weight": (weight, (channels, input.shape[1], weight.shape[2])),
        "bias": (bias, (channels,)),
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
    }
    _check_kind(shapes, input, "input")


def _check_rows(rows: Tensor, weight: Tensor, beside: Tensor) -> None:
    check_integers(rows, "rows")
    if rows.dim() != 2 or rows.shape[0] < 1:
        raise ValueError(f"rows must be (taps, T), at least one tap, got {tuple(rows.shape)}")
    if rows.shape[0] > weight.shape[2]:
        raise ValueError(f"rows name {rows.shape[0]} taps, weight of shape {tuple(weight.shape)} has {weight.shape[2]}")
    if rows.device != beside.device:
        raise ValueError(f"rows are on {rows.device}, the rows that they name on {beside.device}")


def _check_kind(shapes: Mapping[str, tuple[Tensor, tuple[int, ...]]], beside: Tensor, name: str) -> None:
    for own, (tensor, shape) in shapes.items():
        if tensor.dtype != beside.dtype:
            raise TypeError(f"{own} is {tensor.dtype}, {name} is {beside.dtype}")
        if tensor.device != beside.device or tuple(tensor.shape) != shape:
            raise ValueError(f"{own} must be {shape} on {beside.device}, got {tuple(tensor.shape)} on {tensor.device}")


def _check_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    side_by_side: Tensor,
    conv: Tensor,
    stats: Tensor,
    num_rows: int,
    want_input: bool,
    want_weight: bool,
) -> None:
    if weight.dim() != 3 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels, d, kernel size), got {tuple(weight.shape)}")
    _check_rows(rows, weight, grad)
    (taps, tokens), (channels, width, _) = rows.shape, weight.shape
    rows_of = {"grad": grad, "out": out, "conv": conv}
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]]
    shapes = {name: (tensor, (tokens, channels)) for name, tensor in rows_of.items()}
    shapes["norm_weight"] = norm_weight, (channels,)
    if want_weight:
        shapes["side_by_side"] = side_by_side, (tokens, taps * width)
    _check_kind(shapes, weight, "weight")
    _check_kind({"stats": (stats, (tokens, 2))}, weight.new_empty(0, dtype=accumulate_dtype(weight.dtype)), "the norm")


def _reference(input: Tensor, rows: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(input, rows, *args)
    check_ids(rows, input.shape[0] + 1, "rows")  # one more: none
    return ref.conv_norm_relu(input, rows, *args)


def _reference_backward(grad: Tensor, rows: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, rows, *args)
    check_ids(rows, args[-3] + 1, "rows")
    return ref.conv_norm_relu_backward(grad, rows, *args)


# Native kernels check everything themselves, in less time than Python takes.
_backend.register(FORWARD, _backend.native(FORWARD, "cpu", NATIVE_DTYPES), _backend.reference(_reference))
_backend.register(BACKWARD, _backend.native(BACKWARD, "cpu", NATIVE_DTYPES), _backend.reference(_reference_backward))
implement(FORWARD, lambda *args: None, lambda *args: None, anchor=0)
implement(BACKWARD, lambda *args: None, lambda *args: None, anchor=0)

# Fake


def _fake(input: Tensor, rows: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(input, rows, weight, *args)
    (taps, tokens), channels = rows.shape, weight.shape[0]
    out, conv = input.new_empty(tokens, channels), input.new_empty(tokens, channels)
    stats = input.new_empty(tokens, 2, dtype=accumulate_dtype(input.dtype))
    return out, input.new_empty(tokens, taps * input.shape[1]), conv, stats


def _fake_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, rows, weight, *args)
    (channels, width, _), (num_rows, want_input, want_weight) = weight.shape, args[-3:]
    bias, norm_weight, norm_bias = (grad.new_empty(channels) for _ in range(3))
    input = grad.new_empty((num_rows, width) if want_input else 0)
    return input, grad.new_empty(weight.shape if want_weight else 0), bias, norm_weight, norm_bias


fake(FORWARD, _fake)
fake(BACKWARD, _fake_backward)

# Autograd


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    input, rows, weight, _, norm_weight, *_ = inputs
    out, side_by_side, conv, stats = output
    if not ctx.needs_input_grad[2]:  # the largest by far, and for the weight's gradient alone
        side_by_side = side_by_side.new_empty(0)
    ctx.num_rows = input.shape[0]
    ctx.set_materialize_grads(False)  # zeros for what is kept would be written for nobody
    ctx.save_for_backward(rows, weight, norm_weight, out, side_by_side, conv, stats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _gradients(backward: Any, ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    want_input, _, want_weight, *_ = ctx.needs_input_grad
    input, weight, *vectors = backward(grad, *saved, ctx.num_rows, want_input, want_weight)
    return (input if want_input else None, None, weight if want_weight else None, *vectors, None)


def _backward(ctx: Any, grad: Tensor | None, *kept: None) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.cprec.conv_norm_relu_backward, ctx, ctx.saved_tensors, grad)


autograd(FORWARD, _backward, _setup_context)
not_twice_differentiable(BACKWARD)


class _Direct(torch.autograd.Function):
    """The same without the way through the registered op: a layer of a small model takes not much longer itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with without_autocast():
            output = _backend.dispatch(FORWARD, inputs[0])(*inputs)
        _keep(ctx, inputs, output)
        out: Tensor = output[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: whoever packs them, such as a checkpoint, may not unpack them again
        with without_autocast():
            return _gradients(_backend.dispatch(BACKWARD, saved[1]), ctx, saved, grad)


# Public


def conv_norm_relu(
    input: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(layer_norm(conv(input)))`` over rows named one by one: half of NextItNet's residual block (WSDM 2019, figure
    3b) where a batch holds items without their padding.

    The convolution is ``torch.nn.functional.linear`` of :func:`gather_taps` with the last taps of ``weight``. On the CPU in
    float32 what surrounds torch's matrix products is one pass forward and one backward. Kept for the gradient are the
    rows side by side, the product, the result and two numbers a row. Other dtypes and devices take torch's own ops. Differentiable once, in reverse. It has no
    autocast rule: it computes in the dtype that it is given.

    Args:
        input: (N, d), of any floating dtype.
        rows: (taps, T) int64; row ``rows[k, t]`` of ``input`` is what tap k of output t meets. N stands for none, zeros.
        weight: (channels, d, kernel size) as in ``nn.Conv1d``; with fewer taps than the kernel has, its last ones.
        bias, norm_weight, norm_bias: (channels,).
        eps: of the layer norm, added to the variance.

    Returns:
        (T, channels) in the dtype of ``input``.

    Raises:
        IndexError: a row outside 0..N, with its place.
        RuntimeError: in forward mode. TypeError: rows not int64, mixed dtypes, input not floating point.
        ValueError: shapes that do not fit, tensors on several devices, more taps than the kernel has, eps below 0.
    """
    args = (input, rows, weight, bias, norm_weight, norm_bias, eps)
    refuse_tangents("conv_norm_relu", *args[:1], *args[2:6])
    direct = is_eager(*args[:6])
    out: Tensor = _Direct.apply(*args) if direct else torch.ops.cprec.conv_norm_relu(*args)[0]  # type: ignore[no-untyped-call]
    return out
