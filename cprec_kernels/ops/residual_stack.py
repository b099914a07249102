"""``cprec::residual_stack``: from histories of item ids to the hidden state of the newest item, for serving.

It has no derivative and no autocast rule: training runs a layer at a time, see :mod:`.conv_norm_relu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import residual_stack as ref
from ._library import check_factors, check_ids, check_integers, define, fake, implement

# Schema

STACK = define(
    "residual_stack(Tensor ids, int padding_id, Tensor[] embeddings, Tensor[] projections, Tensor[] weights,"
    " Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, int[] sets, int[] dilations, float eps) -> Tensor"
)
NATIVE_DTYPES = (torch.float32,)

# Implementations


def _check(
    ids: Tensor,
    padding_id: int,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    sets: Sequence[int],
    dilations: Sequence[int],
    eps: float,
) -> None:
    check_integers(ids, "ids")
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"ids must be (B, length), length at least 1, got {tuple(ids.shape)}")
    width = check_factors(embeddings, projections, "embeddings")
    layers = len(sets)
    if layers < 2 or layers % 2:
        raise ValueError(f"sets names {layers} layers: a block has two, and one block is the least")
    if not len(dilations) == len(norm_weights) == len(norm_biases) == layers:
        raise ValueError(
            f"{layers} layers need as many dilations and norms, got {len(dilations)}, {len(norm_weights)} and "
            f"{len(norm_biases)}"
        )
    if not weights or len(biases) != len(weights):
        raise ValueError(f"weights and biases must be as many, got {len(weights)} and {len(biases)}")
    taps = weights[0].shape[2] if weights[0].dim() == 3 else 0
    shapes = {"weights": (weights, (width, width, taps)), "biases": (biases, (width,))}
    shapes |= {"norm_weights": (norm_weights, (width,)), "norm_biases": (norm_biases, (width,))}
    if taps < 1:
        raise ValueError(f"weights must be (d, d, taps) with at least one tap, got {tuple(weights[0].shape)}")
    num_ids = sum(table.shape[0] for table in embeddings)
    if not 0 <= padding_id < num_ids:
        raise ValueError(f"padding_id = {padding_id} is outside 0..{num_ids - 1}")
    for name, (tensors, shape) in shapes.items():
        for i, tensor in enumerate(tensors):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}[{i}] must be {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != embeddings[0].dtype:
                raise TypeError(f"{name}[{i}] is {tensor.dtype}, embeddings are {embeddings[0].dtype}")
            if tensor.device != embeddings[0].device:
                raise ValueError(f"{name}[{i}] is on {tensor.device}, embeddings are on {embeddings[0].device}")
    for i, (index, dilation) in enumerate(zip(sets, dilations, strict=True)):
        if not 0 <= index < len(weights):
            raise ValueError(f"sets[{i}] = {index} is outside 0..{len(weights) - 1}")
        if dilation < 1:
            raise ValueError(f"dilations[{i}] must be at least 1, got {dilation}")


def _reference(*args: Any) -> Tensor:
    _check(*args)
    check_ids(args[0], sum(table.shape[0] for table in args[2]), "ids")
    return ref.residual_stack(*args)


_backend.register(STACK, _backend.native(STACK, "cpu", NATIVE_DTYPES), _backend.reference(_reference))
# The native kernel checks everything itself: a call of 20 us has no time for it here.
implement(STACK, lambda *args: None, lambda *args: None, anchor=2)

# Fake


def _fake(ids: Tensor, padding_id: int, embeddings: Sequence[Tensor], *args: Any) -> Tensor:
    _check(ids, padding_id, embeddings, *args)
    return embeddings[0].new_empty(ids.shape[0], (args[0] or embeddings)[0].shape[1])


fake(STACK, _fake)

# Public


def residual_stack(
    ids: Tensor,
    padding_id: int,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    sets: Sequence[int],
    dilations: Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    """Hidden state of the newest item after NextItNet's residual blocks (WSDM 2019, figure 3b), for serving.

    A block of two layers is ``x + f(f(x, l1), l2)`` with ``f(x, l) = relu(layer_norm(conv(x, l)))`` and causal
    convolutions of dilation l. On the CPU in float32 one kernel does it all, and leaves out padding and every place that
    the newest one does not depend on. It has no derivative.

    Args:
        ids: (B, L) int64, the newest item last, each in 0..num_items-1.
        padding_id: the id that stands for no item, itself in that range; it reaches no other place.
        embeddings, projections: a block embedding of width d, see :func:`block_embedding`.
        weights: (d, d, taps) per parameter set, as in ``nn.Conv1d``, the last tap for the current place.
        biases: (d,) per parameter set. norm_weights, norm_biases: (d,) per layer.
        sets: the parameter set of every layer; layers may share one. dilations: of every layer.
        eps: of the layer norms.

    Returns:
        (B, d); a row of zeros where the last id is padding.

    Raises:
        IndexError: an id out of range. TypeError: mixed dtypes, ids not int64. ValueError: shapes or counts that do not fit.
    """
    args = (
        ids, padding_id, list(embeddings), list(projections), list(weights), list(biases), list(norm_weights),
        list(norm_biases), list(sets), list(dilations), eps,
    )  # fmt: skip
    if not args[2]:
        raise ValueError("embeddings must hold at least one table")
    if ids.device != args[2][0].device:
        raise ValueError(f"ids are on {ids.device}, embeddings on {args[2][0].device}")
    # To go through the registered op takes half as long again as to compute one history.
    direct = type(ids) is Tensor and not torch.compiler.is_compiling()
    with torch.no_grad():
        out: Tensor = (_backend.dispatch(STACK, args[2][0]) if direct else torch.ops.cprec.residual_stack)(*args)
    return out
