"""``cprec::block_embedding``: rows of a table stored as low-rank frequency clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import block_embedding as ref
from ._library import (
    ADDING_IN_PLACE,
    autocast,
    autograd,
    check_factors,
    check_ids,
    check_integers,
    check_tensor,
    define,
    fake,
    gradients_in_place,
    implement,
    not_twice_differentiable,
    refuse_tangents,
)

# Schema

FORWARD = define(
    "block_embedding(Tensor ids, Tensor[] embeddings, Tensor[] projections, int? padding_idx, bool sparse) -> Tensor"
)
BACKWARD = define(
    "block_embedding_backward(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections, int? padding_idx,"
    " bool[2] output_mask) -> (Tensor[], Tensor[])"
)
BACKWARD_SPARSE = define(
    "block_embedding_backward_sparse(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections,"
    " int? padding_idx, bool[2] output_mask) -> (Tensor[], Tensor[], Tensor[])"
)
BACKWARD_INTO = define(
    "block_embedding_backward_into(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections,"
    " int? padding_idx, Tensor(a!)[] d_embeddings, bool want_projections) -> Tensor[]"
)

# Implementations


def _check(
    ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None, sparse: bool
) -> None:
    check_integers(ids, "ids")
    check_factors(embeddings, projections, "embeddings")
    torch._check_value(
        ids.device == embeddings[0].device, lambda: f"ids are on {ids.device}, embeddings on {embeddings[0].device}"
    )
    num_items = _num_items(embeddings)
    torch._check_value(
        padding_idx is None or 0 <= padding_idx < num_items,
        lambda: f"padding_idx = {padding_idx} is outside 0..{num_items - 1}",
    )


def _check_values(
    ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None, sparse: bool
) -> None:
    check_ids(ids, _num_items(embeddings), "ids")


def _check_backward(
    grad: Tensor,
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    _output_mask: Sequence[bool],
) -> None:
    _check(ids, embeddings, projections, padding_idx, False)
    torch._check_value(
        grad.shape[:-1] == ids.shape, lambda: f"grad is {tuple(grad.shape)} for ids of shape {tuple(ids.shape)}"
    )
    torch._check_type(
        grad.dtype == embeddings[0].dtype, lambda: f"grad is {grad.dtype}, embeddings are {embeddings[0].dtype}"
    )


def _check_backward_values(grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], *args: Any) -> None:
    check_ids(ids, _num_items(embeddings), "ids")


def _num_items(embeddings: Sequence[Tensor]) -> int:
    return int(sum(table.shape[0] for table in embeddings))


def _reference(
    ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None, sparse: bool
) -> Tensor:
    return ref.block_embedding(ids, embeddings, projections)


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_backend.register(
    FORWARD,
    _backend.native(FORWARD, "cpu", NATIVE_DTYPES),
    _backend.native(FORWARD, "cuda", NATIVE_DTYPES),  # where it was compiled
    _backend.triton("block_embedding", FORWARD, NATIVE_DTYPES, _reference),
    _backend.reference(_reference),
)
_backend.register(
    BACKWARD,
    _backend.native(BACKWARD, "cpu", NATIVE_DTYPES),
    _backend.triton("block_embedding_backward", BACKWARD, NATIVE_DTYPES, ref.block_embedding_backward),
    _backend.reference(ref.block_embedding_backward),
)
_backend.register(
    BACKWARD_SPARSE,
    _backend.native(BACKWARD_SPARSE, "cpu", NATIVE_DTYPES),
    _backend.triton("block_embedding_backward", BACKWARD_SPARSE, NATIVE_DTYPES, ref.block_embedding_backward_sparse),
    _backend.reference(ref.block_embedding_backward_sparse),
)


def _native_backward_into(*args: Any) -> list[Tensor]:
    *before, d_embeddings, want_projections = args
    d_projections = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in args[3] if want_projections]
    torch.ops.cprec_native.block_embedding_backward_accumulate(*before, d_embeddings, d_projections)
    return d_projections


def _reference_backward_into(*args: Any) -> list[Tensor]:
    grad, ids, embeddings, projections, padding_idx, d_embeddings, want_projections = args
    computed, d_projections = ref.block_embedding_backward(
        grad, ids, embeddings, projections, padding_idx, [True, want_projections]
    )
    for gradient, own in zip(d_embeddings, computed, strict=True):
        gradient.add_(own)
    return d_projections


_backend.register(
    BACKWARD_INTO,
    dataclasses.replace(
        _backend.native("block_embedding_backward_accumulate", "cpu", NATIVE_DTYPES), call=_native_backward_into
    ),
    _backend.triton("block_embedding_backward", BACKWARD_INTO, NATIVE_DTYPES, _reference_backward_into),
    _backend.reference(_reference_backward_into),
)
# The tables, not the integer ids, decide the dtype that an implementation must serve.
implement(FORWARD, _check, _check_values, anchor=1)
implement(BACKWARD, _check_backward, _check_backward_values, anchor=0)
implement(
    BACKWARD_INTO,
    lambda grad, ids, embeddings, projections, padding_idx, *_: _check_backward(
        grad, ids, embeddings, projections, padding_idx, ()
    ),
    _check_backward_values,
    anchor=0,
)
implement(BACKWARD_SPARSE, _check_backward, _check_backward_values, anchor=0)

# Fake


def _fake(
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    _check(ids, embeddings, projections, padding_idx, sparse)
    width = (projections[0] if projections else embeddings[0]).shape[1]
    return embeddings[0].new_empty(*ids.shape, width)


def _fake_backward(
    grad: Tensor,
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    d_embeddings = [torch.empty_like(table, memory_format=torch.contiguous_format) for table in embeddings]
    d_projections = [torch.empty_like(projection, memory_format=torch.contiguous_format) for projection in projections]
    return d_embeddings if output_mask[0] else [], d_projections if output_mask[1] else []


def _fake_backward_sparse(
    grad: Tensor,
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    rows: list[Tensor] = []
    values: list[Tensor] = []
    if output_mask[0]:
        context = torch.library.get_ctx()
        for table in embeddings:
            touched = context.new_dynamic_size()
            rows.append(ids.new_empty(touched))
            values.append(table.new_empty(touched, table.shape[1]))
    d_projections = [torch.empty_like(projection, memory_format=torch.contiguous_format) for projection in projections]
    return rows, values, d_projections if output_mask[1] else []


def _fake_backward_into(*args: Any) -> list[Tensor]:
    grad, ids, embeddings, projections, padding_idx, _, want_projections = args
    return _fake_backward(grad, ids, embeddings, projections, padding_idx, [False, want_projections])[1]


fake(FORWARD, _fake)
fake(BACKWARD_INTO, _fake_backward_into)
fake(BACKWARD, _fake_backward)
fake(BACKWARD_SPARSE, _fake_backward_sparse)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, embeddings, projections, ctx.padding_idx, ctx.sparse = inputs
    ctx.num_tables = len(embeddings)
    ctx.save_for_backward(ids, *embeddings, *projections)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, *factors = ctx.saved_tensors
    embeddings, projections = factors[: ctx.num_tables], factors[ctx.num_tables :]
    _, need_embeddings, need_projections, _, _ = ctx.needs_input_grad
    mask = [any(need_embeddings), any(need_projections)]
    args = (grad, ids, embeddings, projections, ctx.padding_idx, mask)
    if ctx.sparse:
        rows, values, d_projections = torch.ops.cprec.block_embedding_backward_sparse(*args)
        d_embeddings = [
            torch.sparse_coo_tensor(row[None], value, table.shape, is_coalesced=True, check_invariants=False)
            for row, value, table in zip(rows, values, embeddings, strict=False)
        ]
    elif all(need_embeddings) and (in_place := gradients_in_place(embeddings)) is not None:
        with ADDING_IN_PLACE:
            d_projections = torch.ops.cprec.block_embedding_backward_into(*args[:-1], in_place, mask[1])
        d_embeddings = []
    else:
        d_embeddings, d_projections = torch.ops.cprec.block_embedding_backward(*args)
    return None, keep(d_embeddings, need_embeddings), keep(d_projections, need_projections), None, None


def keep(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that were asked for, None in the other places; ``gradients`` is empty when none were."""
    if not gradients:
        return [None] * len(needed)
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


autograd(FORWARD, _backward, _setup_context)
not_twice_differentiable(BACKWARD)
not_twice_differentiable(BACKWARD_SPARSE)

# Autocast


def _autocast(overload: Any, dtype: torch.dtype, ids: Tensor, embeddings: Sequence[Tensor], *args: Any) -> Tensor:
    # Only the result is cast: a copy of every table in the narrow type would cost more than the whole lookup.
    out: Tensor = overload(ids, embeddings, *args)
    return out if out.dtype == torch.float64 else out.to(dtype)


autocast(FORWARD, _autocast)

# Public


def block_embedding(
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor] = (),
    *,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look up items in a table stored as low-rank frequency clusters (CpRec, arXiv 2004.13139, eq. 4).

    Item x of cluster j, row g = x - offset_j, is ``embeddings[j][g] @ projections[.]``; a cluster as wide as the model
    has no projection. Sums are taken in fp32 (fp64 for fp64) and rounded once.

    Args:
        ids: (...) int64, each in 0..num_items-1.
        embeddings: E_j (k_j, d_j), one per cluster, in one floating dtype.
        projections: P_j (d_j, d) for the clusters with d_j < d, in order; d is their width, or that of
            ``embeddings[0]`` when there are none.
        padding_idx: an id whose tokens give no gradient, as in ``torch.nn.functional.embedding``.
        sparse: give the gradients of ``embeddings`` as sparse tensors of the touched rows, each once and ascending.
            Their size depends on the data, so this mode trains in eager mode only.

    Returns:
        (..., d) in the dtype of ``embeddings``; in the autocast dtype under autocast.

    Raises:
        IndexError: an id out of range, with its place.
        TypeError: ids no tensor or not int64, tables of mixed or non-floating dtype.
        RuntimeError: in forward mode, which has no rule.
        ValueError: shapes that do not fit together, tensors on several devices.
    """
    check_tensor(ids, "ids")
    refuse_tangents("block_embedding", embeddings, projections)
    out: Tensor = torch.ops.cprec.block_embedding(ids, list(embeddings), list(projections), padding_idx, sparse)
    return out
