"""AdamW whose steps touch the rows of a sparse gradient only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.row_optimizer import state_dtype
from ._rowwise import Gradient, Group, PendingDecay, RowwiseOptimizer, check_range


class RowwiseAdamW(RowwiseOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for dense gradients and for sparse rows.

    A dense gradient gets ``torch.optim.AdamW``'s step. A sparse one (COO, sparse in the first dimension, as
    ``BlockEmbedding(sparse=True)`` and ``nn.Embedding(sparse=True)`` give) costs time for the rows it names alone:

    * their moments are updated as in ``torch.optim.SparseAdam``; those of other rows stay as they are; the bias
      correction is that of the parameter's step count. (eps is added where Adam, arXiv 1412.6980, algorithm 1, and
      ``AdamW`` add it; ``SparseAdam`` adds it before the bias correction.) A sparse gradient of all rows and a dense
      one give the same step.
    * every row is decayed in every step, as in AdamW, but the multiplication waits until something is done to the row: a
      row that comes back after m steps is multiplied by the product of the (1 - lr * weight_decay) of all of them,
      with the learning rates that those steps had.

    **What a forward pass reads.** Before step t AdamW has decayed every row t - 1 times. Here a row that was not in the
    last gradients is behind. Call :meth:`prepare` (or :meth:`catch_up`) with the ids that the forward pass is about to
    read, and the parameters it sees, and hence the training, are those of the dense decay up to rounding. Without it,
    the same factors are applied and :meth:`step` gives the same step for the same gradient, but the gradient is taken
    at rows too long by the factor they have missed. Call :meth:`apply_pending_decay` before evaluating or exporting.

    Moments are fp32 (fp64 beside fp64 parameters) and a parameter is rounded once per step, and once more where decay
    was pending. As in torch, a decay smaller than half a unit in the last place of a bf16 or fp16 row is lost when it is
    applied; waiting rows lose less.

    Args:
        params: parameters or groups, as in torch: dense tensors of a floating dtype, contiguous or not (others are
            copied in every step).
        lr: learning rate; a float or a tensor of one element.
        betas: of the running averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled; lr * weight_decay must stay below 1.
        maximize: ascend instead.

    State of a parameter: ``step`` () fp32, ``exp_avg`` and ``exp_avg_sq`` of its shape; with a weight decay also
    ``log_decay`` () and ``row_log_decay`` (rows,), both fp64, which say what is pending. ``state_dict`` holds all of it:
    with the model's, saved at the same time, training goes on bit for bit.

    Raises:
        TypeError: a parameter that is not dense and floating point, or is sharded (a DTensor).
        ValueError: a hyperparameter out of range.

    Example:
        >>> optimizer = RowwiseAdamW(model.parameters(), lr=1e-3)
        >>> optimizer.prepare(model.embedding, ids)  # rows that waited are up to date before they are read
        >>> model(ids).sum().backward()
        >>> optimizer.step()
        >>> optimizer.apply_pending_decay()  # before evaluation
    """

    required_state = frozenset({"step", "exp_avg", "exp_avg_sq"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for index, beta in enumerate(group["betas"]):
            check_range(f"betas[{index}]", beta, 1)
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")

    def _new_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        kind: dict[str, Any] = {"dtype": state_dtype(param), "device": param.device}
        return {"exp_avg": torch.zeros(param.shape, **kind), "exp_avg_sq": torch.zeros(param.shape, **kind)}

    def _apply(self, gradient: Gradient, state: dict[str, Tensor], step: int, lr: float, decay: PendingDecay) -> None:
        group = gradient.group
        torch.ops.cprec.row_adamw_(
            gradient.param,
            gradient.values,
            gradient.rows,
            state["exp_avg"],
            state["exp_avg_sq"],
            decay.rows,
            decay.log_decay,
            lr,
            decay.rate,
            group["betas"],
            group["eps"],
            step,
            group["maximize"],
        )
