"""``cprec::dropout``: a mask that is computed where it is needed, forward and backward, and never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import dropout as ref
from ._library import autograd, define, fake, implement, is_eager, refuse_tangents

# Schema

DROPOUT = define("dropout(Tensor input, float p, SymInt seed, Tensor? add=None) -> Tensor")
NATIVE_DTYPES = (torch.float32,)

# Implementations


def _check(input: Tensor, p: float, seed: int, add: Tensor | None = None) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p = {p} is outside 0 <= p < 1")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if add is None:
        return
    if add.dtype != input.dtype:
        raise TypeError(f"add is {add.dtype}, input is {input.dtype}")
    if add.shape != input.shape or add.device != input.device:
        raise ValueError(f"add must be {tuple(input.shape)} on {input.device}, got {tuple(add.shape)} on {add.device}")


def _reference(input: Tensor, p: float, seed: int, add: Tensor | None = None) -> Tensor:
    _check(input, p, seed, add)
    return ref.dropout(input, p, seed, add)


# The native kernel checks everything itself.
_backend.register(DROPOUT, _backend.native(DROPOUT, "cpu", NATIVE_DTYPES), _backend.reference(_reference))
implement(DROPOUT, lambda *args: None, lambda *args: None, anchor=0)

# Fake


def _fake(input: Tensor, p: float, seed: int, add: Tensor | None = None) -> Tensor:
    _check(input, p, seed, add)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


fake(DROPOUT, _fake)

# Autograd: the op is linear, so its derivative is itself.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.seed, *_ = inputs  # torch leaves an add of None out


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    wanted, add = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
    return torch.ops.cprec.dropout(grad, ctx.p, ctx.seed, None) if wanted else None, None, None, grad if add else None


autograd(DROPOUT, _backward, _setup_context)


class _Direct(torch.autograd.Function):
    """The same without the way through the registered op, unless the gradient is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, seed: int, add: Tensor | None) -> Tensor:
        _setup_context(ctx, (input, p, seed, add), input)
        out: Tensor = _backend.dispatch(DROPOUT, input)(input, p, seed, add)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        wanted, _, _, add = ctx.needs_input_grad
        return dropout(grad, ctx.p, ctx.seed) if wanted else None, None, None, grad if add else None


# Public


def dropout(input: Tensor, p: float, seed: int, add: Tensor | None = None) -> Tensor:
    """``add + torch.nn.functional.dropout(input, p)`` by a mask that ``seed`` and the places of elements decide.

    On the CPU in float32 it is one pass that draws 16 bits an element and keeps no mask: the backward pass draws them
    again. An element's bits come from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011),
    so a mask depends on neither threads nor instruction set. Give every call a seed of its own, for example
    ``int(torch.empty((), dtype=torch.int64).random_())``.

    Args:
        input: of any shape and floating dtype.
        p: probability of a zero, 0 <= p < 1, rounded to a multiple of 2^-16; what is kept is divided by the probability
            that this leaves.
        seed: an int of 64 bits, signed.
        add: None, or what to add the result to, of the shape, dtype and device of ``input``.

    Returns:
        A tensor like ``input``, contiguous. Differentiable any number of times, in reverse.

    Raises:
        RuntimeError: in forward mode. TypeError: mixed or integer dtypes. ValueError: p out of range, shapes or devices
            that differ.
    """
    refuse_tangents("dropout", input, add)
    tensors = (input,) if add is None else (input, add)
    run = _Direct.apply if is_eager(*tensors) else torch.ops.cprec.dropout
    out: Tensor = run(input, p, seed, add)  # type: ignore[no-untyped-call]
    return out
