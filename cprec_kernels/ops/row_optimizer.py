"""``cprec::row_adamw_``, ``row_adagrad_``, ``row_decay_``: optimizer steps in place, on some rows of a table or on all.

:mod:`cprec_kernels.optim` is made of them. They are not differentiable and have no autocast rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import row_optimizer as ref
from ..reference.common import accumulate_dtype
from ._library import check_ids, check_integers, define, fake, implement

# Schema

ADAMW = define(
    "row_adamw_(Tensor(a!) param, Tensor grad, Tensor? rows, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? row_log_decay, float[] log_decay, float lr, float decay, float[] betas, float eps, int step,"
    " bool maximize) -> ()"
)
ADAGRAD = define(
    "row_adagrad_(Tensor(a!) param, Tensor grad, Tensor? rows, Tensor(b!) sum, Tensor(c!)? row_log_decay,"
    " float[] log_decay, float lr, float decay, float eps, bool maximize) -> ()"
)
DECAY = define("row_decay_(Tensor(a!) param, Tensor? rows, Tensor(b!) row_log_decay, float log_decay) -> ()")

# Implementations


def _check_rows(param: Tensor, rows: Tensor | None, row_log_decay: Tensor | None) -> None:
    if row_log_decay is not None:
        torch._check_type(
            row_log_decay.dtype == torch.float64, lambda: f"row_log_decay must be float64, got {row_log_decay.dtype}"
        )
        torch._check_value(
            param.dim() > 0 and row_log_decay.shape == param.shape[:1],
            lambda: f"row_log_decay is {tuple(row_log_decay.shape)} for a parameter {tuple(param.shape)}",
        )
    if rows is not None:
        check_integers(rows, "rows")
        torch._check_value(
            rows.dim() == 1 and param.dim() > 0,
            lambda: f"rows must be 1-D, of a parameter with dimensions, not {rows.dim()}-D",
        )


def _check_grad(param: Tensor, grad: Tensor, rows: Tensor | None, row_log_decay: Tensor | None) -> None:
    _check_rows(param, rows, row_log_decay)
    torch._check_type(
        grad.dtype == param.dtype and param.dtype.is_floating_point,
        lambda: f"the gradient is {grad.dtype}, the parameter {param.dtype}; both must be one floating dtype",
    )
    shape = param.shape if rows is None else (rows.shape[0], *param.shape[1:])
    torch._check_value(grad.shape == shape, lambda: f"the gradient is {tuple(grad.shape)}, {tuple(shape)} was expected")
    torch._check_value(
        rows is not None or row_log_decay is None, lambda: "row_log_decay is for gradients of some rows only"
    )


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of a parameter's moments: fp32, or fp64 beside fp64."""
    return accumulate_dtype(param.dtype)


def _check_state(state: Tensor, shape: Sequence[int], param: Tensor, name: str) -> None:
    torch._check_type(
        state.dtype == state_dtype(param),
        lambda: f"{name} must be {state_dtype(param)} for a parameter of {param.dtype}, got {state.dtype}",
    )
    torch._check_value(state.shape == shape, lambda: f"{name} is {tuple(state.shape)}, {tuple(shape)} was expected")


def _check_adamw(
    param: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_log_decay: Tensor | None,
    *args: Any,
) -> None:
    _check_grad(param, grad, rows, row_log_decay)
    _check_state(exp_avg, param.shape, param, "exp_avg")
    _check_state(exp_avg_sq, param.shape, param, "exp_avg_sq")


def _check_adagrad(
    param: Tensor, grad: Tensor, rows: Tensor | None, sum: Tensor, row_log_decay: Tensor | None, *args: Any
) -> None:
    _check_grad(param, grad, rows, row_log_decay)
    _check_state(sum, param.shape[:1], param, "sum")


def _check_decay(param: Tensor, rows: Tensor | None, row_log_decay: Tensor, log_decay: float) -> None:
    _check_rows(param, rows, row_log_decay)


def _check_values(param: Tensor, grad: Tensor, rows: Tensor | None, *args: Any) -> None:
    if rows is not None:
        check_ids(rows, param.shape[0], "rows")


def _check_decay_values(param: Tensor, rows: Tensor | None, *args: Any) -> None:
    _check_values(param, param, rows)


def check_rows(param: Tensor, rows: Tensor) -> None:
    """Raise unless rows (k,) are int64 (TypeError) and name rows of ``param`` (IndexError)."""
    _check_rows(param, rows, None)
    _check_values(param, param, rows)


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _native(op: str) -> _backend.Implementation:
    """The kernel of ``op``, which takes contiguous parameters; others are copied there and back."""
    kernel = _backend.native(op, "cpu", NATIVE_DTYPES)

    def call(param: Tensor, *args: Any) -> None:
        target = param.contiguous()
        kernel.call(target, *args)
        if target is param:
            # Autograd has to notice that a tensor it saved has changed; a kernel's write does not tell it.
            torch.autograd.graph.increment_version(param)
        else:
            param.copy_(target)

    return dataclasses.replace(kernel, call=call)


for _op, _reference in ((ADAMW, ref.row_adamw_), (ADAGRAD, ref.row_adagrad_), (DECAY, ref.row_decay_)):
    _backend.register(_op, _native(_op), _backend.reference(_reference))
implement(ADAMW, _check_adamw, _check_values, anchor=0)
implement(ADAGRAD, _check_adagrad, _check_values, anchor=0)
implement(DECAY, _check_decay, _check_decay_values, anchor=0)

# Fake

fake(ADAMW, _check_adamw)
fake(ADAGRAD, _check_adagrad)
fake(DECAY, _check_decay)
