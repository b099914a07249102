"""Block embedding: item x of cluster j, row g = x - offset_j, is ``E_j[g] @ P_j`` (CpRec, arXiv 2004.13139, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import accumulate_dtype, masked, pair_projections, select_tokens, width_of


def _clusters(
    ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], skip: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]]:
    """Per cluster: E_j, P_j, positions of its tokens, their local rows, mask. ``skip`` leaves one id out."""
    lo = 0
    for table, projection in pair_projections(embeddings, projections):
        hi = lo + table.shape[0]
        member = (ids >= lo) & (ids < hi)
        if skip is not None:
            member = member & (ids != skip)
        index, mask = select_tokens(member)
        yield table, projection, index, (ids[index] - lo).clamp(0, table.shape[0] - 1), mask
        lo = hi


def block_embedding(ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Rows of ``ids`` (any shape): (..., d), in the tables' dtype, summed in fp32 or wider. Differentiable."""
    dtype = embeddings[0].dtype
    wide = accumulate_dtype(dtype)
    flat = ids.reshape(-1)
    out = torch.zeros(flat.numel(), width_of(embeddings, projections), dtype=wide, device=ids.device)
    for table, projection, index, local, mask in _clusters(flat, embeddings, projections):
        rows = table[local].to(wide)
        out = out.index_add(0, index, masked(rows if projection is None else rows @ projection.to(wide), mask))
    return out.to(dtype).reshape(*ids.shape, out.shape[1])


def block_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """Dense gradients of the tables and of the projections; an empty list for either that the mask leaves out.

    With G the rows of ``grad`` of cluster j: dE_j[g] = sum over its tokens of G P_j^T, dP_j = E_j[g]^T G. Tokens at
    ``padding_idx`` give none.
    """
    want_tables, want_projections = output_mask
    dtype = embeddings[0].dtype
    wide = accumulate_dtype(dtype)
    flat_grad = grad.reshape(-1, grad.shape[-1])
    d_tables: list[Tensor] = []
    d_projections: list[Tensor] = []
    for table, projection, index, local, mask in _clusters(ids.reshape(-1), embeddings, projections, padding_idx):
        g = masked(flat_grad[index].to(wide), mask)
        if want_tables:
            d_rows = g if projection is None else g @ projection.to(wide).T
            d_table = torch.zeros(table.shape, dtype=wide, device=table.device)
            d_tables.append(d_table.index_add_(0, local, d_rows).to(dtype))
        if want_projections and projection is not None:
            d_projections.append((table[local].to(wide).T @ g).to(dtype))
    return d_tables, d_projections


def block_embedding_backward_sparse(
    grad: Tensor,
    ids: Tensor,
    embeddings: Sequence[Tensor],
    projections: Sequence[Tensor],
    padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As :func:`block_embedding_backward`, the tables' gradients as touched rows, ascending and unique, and values."""
    want_tables, want_projections = output_mask
    dtype = embeddings[0].dtype
    wide = accumulate_dtype(dtype)
    flat_grad = grad.reshape(-1, grad.shape[-1])
    flat = ids.reshape(-1)
    touched: list[Tensor] = []
    values: list[Tensor] = []
    d_projections: list[Tensor] = []
    lo = 0
    for table, projection in pair_projections(embeddings, projections):
        member = (flat >= lo) & (flat < lo + table.shape[0])
        if padding_idx is not None:
            member = member & (flat != padding_idx)
        index = member.nonzero().squeeze(1)
        # Segment sums first: both products then run on unique rows only.
        rows, inverse = torch.unique(flat[index] - lo, return_inverse=True)
        sums = torch.zeros(rows.numel(), grad.shape[-1], dtype=wide, device=grad.device)
        sums.index_add_(0, inverse, flat_grad[index].to(wide))
        if want_tables:
            touched.append(rows)
            values.append((sums if projection is None else sums @ projection.to(wide).T).to(dtype))
        if want_projections and projection is not None:
            d_projections.append((table[rows].to(wide).T @ sums).to(dtype))
        lo += table.shape[0]
    return touched, values, d_projections
