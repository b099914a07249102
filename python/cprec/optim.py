"""Optimisers of the recommender: AdamW, row by row where block-embedding tables have sparse gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cprec_kernels.nn import BlockEmbedding
from cprec_kernels.optim import RowwiseAdamW

NO_DECAY_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)


def sparse_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with sparse COO gradients: the tables of block embeddings made with ``sparse=True``."""
    return [
        table
        for module in model.modules()
        if isinstance(module, BlockEmbedding) and module.sparse
        for table in module.embeddings
    ]


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters, each exactly once, into (decayed, not decayed, sparse).

    Weight decay skips biases and normalisation layers, told by their module and by having fewer than two dimensions:
    they set offsets and scales, which need not be small. Sparse tables are decayed like dense ones.
    """
    sparse = sparse_parameters(model)
    taken = {id(parameter) for parameter in sparse}
    normalisation = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NO_DECAY_MODULES)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():  # shared parameters appear once
        if id(parameter) in taken or not parameter.requires_grad:
            continue
        (plain if parameter.ndim < 2 or id(parameter) in normalisation else decayed).append(parameter)
    return decayed, plain, [parameter for parameter in sparse if parameter.requires_grad]


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019) over the model: torch's, or with sparse tables :class:`RowwiseAdamW`.

    With the latter, call :func:`prepare_step` before every training step and :func:`finish_steps` before the model is
    evaluated or saved.

    Args:
        model: parameters already on their device.
        learning_rate: of all parameters.
        weight_decay: of matrices and tables only, see :func:`parameter_groups`.

    Raises:
        ValueError: with sparse tables, learning_rate * weight_decay of 1 or more.
    """
    decayed, plain, sparse = parameter_groups(model)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0), (sparse, weight_decay))
        if parameters
    ]
    if sparse:
        return RowwiseAdamW(groups, lr=learning_rate)
    devices = {parameter.device.type for parameter in (*decayed, *plain)}
    fused = devices <= {"cpu", "cuda"} and all(parameter.is_floating_point() for parameter in (*decayed, *plain))
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def prepare_step(optimizer: torch.optim.Optimizer, embedding: BlockEmbedding, ids: Tensor) -> None:
    """Have the rows that ``embedding(ids)`` reads decayed as often as a dense AdamW would have."""
    if isinstance(optimizer, RowwiseAdamW):
        optimizer.prepare(embedding, ids)


def finish_steps(optimizer: torch.optim.Optimizer) -> None:
    """Have all rows decayed as often as a dense AdamW would have."""
    if isinstance(optimizer, RowwiseAdamW):
        optimizer.apply_pending_decay()


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Learning-rate factor of optimiser step ``step`` (0-based): linear up to 1 over ``warmup_steps``, then 1.

    The first step already moves (factor 1 / warmup_steps), and no warm-up means 1 throughout.
    """
    return 1.0 if step + 1 >= warmup_steps else (step + 1) / warmup_steps


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, dense and sparse, so that their joint 2-norm is at most ``max_norm``; no host sync.

    Sparse gradients are coalesced first: rows drawn twice have to be added before they are squared.

    Returns:
        The norm before clipping, a scalar.
    """
    dense: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            dense.append(parameter.grad._values())
        else:
            dense.append(parameter.grad)
    if not dense:
        return torch.zeros(())
    norms = torch._foreach_norm(dense)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(dense, scale)
    return norm
