"""Adagrad with one accumulator per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.row_optimizer import state_dtype
from ._rowwise import Gradient, Group, PendingDecay, RowwiseOptimizer, check_range


class RowwiseAdagrad(RowwiseOptimizer):
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011) with one accumulator per row instead of one per element.

    With the gradient g of a row of d elements, s <- s + mean(g^2) and p <- p - lr_t g / (sqrt(s) + eps), where
    lr_t = lr / (1 + (t - 1) lr_decay). This is the row-wise Adagrad of DLRM and FBGEMM: state for a table is 1/d of
    Adagrad's, and all elements of a row share one step size. A row is everything under one index of the first
    dimension, so one-dimensional parameters, and tables of one column, get ``torch.optim.Adagrad``'s step exactly.

    Dense gradients are gradients of all rows. A sparse one (COO, sparse in the first dimension) costs time for the rows
    it names alone; nothing else of an Adagrad step concerns the others but weight decay, which is decoupled here
    (p <- (1 - lr_t weight_decay) p, not added to the gradient as in torch) and waits for the row. :meth:`prepare`,
    :meth:`catch_up` and :meth:`apply_pending_decay` are those of :class:`RowwiseAdamW`, which explains them.

    Args:
        params: parameters or groups, as in torch: dense tensors of a floating dtype.
        lr: learning rate; a float or a tensor of one element.
        lr_decay: of the learning rate with the parameter's steps.
        weight_decay: decoupled; lr * weight_decay must stay below 1.
        initial_accumulator_value: of s.
        eps: added to the denominator.
        maximize: ascend instead.

    State of a parameter: ``step`` () fp32, ``sum`` (rows,) fp32 (fp64 beside fp64 parameters), and ``log_decay`` and
    ``row_log_decay`` as in :class:`RowwiseAdamW`.

    Raises:
        TypeError: a parameter that is not dense and floating point, or is sharded (a DTensor).
        ValueError: a hyperparameter out of range.
    """

    required_state = frozenset({"step", "sum"})
    torch_is_coupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_range("lr_decay", group["lr_decay"])
        check_range("initial_accumulator_value", group["initial_accumulator_value"])

    def _new_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        kind: dict[str, Any] = {"dtype": state_dtype(param), "device": param.device}
        return {"sum": torch.full(param.shape[:1], float(group["initial_accumulator_value"]), **kind)}

    def _learning_rate(self, group: Group, step: int) -> float:
        return float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"]))

    def _apply(self, gradient: Gradient, state: dict[str, Tensor], step: int, lr: float, decay: PendingDecay) -> None:
        group = gradient.group
        torch.ops.cprec.row_adagrad_(
            gradient.param,
            gradient.values,
            gradient.rows,
            state["sum"],
            decay.rows,
            decay.log_decay,
            lr,
            decay.rate,
            group["eps"],
            group["maximize"],
        )
