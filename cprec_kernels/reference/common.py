"""What the reference implementations share: pairing tables with projections, selecting a cluster's tokens, chunking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Logits held at a time, in elements. 4 MiB in fp32 stays in a last-level cache between the passes over it: a step of a
# 54,542-item, three-cluster softmax took 0.11 s so and 0.17 s with 16 MiB (two cores of an AMD EPYC 9004).
MAX_LOGITS = 1 << 20
# A GEMM of fewer rows reads the weights more often than it uses them; beyond this the chunk grows instead.
MIN_ROWS = 32


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type that sums are taken in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def width_of(tables: Sequence[Tensor], projections: Sequence[Tensor]) -> int:
    """Model width d: that of the projections, or of cluster 0, which is unprojected when there are none."""
    return (projections[0] if projections else tables[0]).shape[1]


def pair_projections(tables: Sequence[Tensor], projections: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Tables (k_j, d_j) with their projections (d_j, d): a table as wide as the model has none."""
    width = width_of(tables, projections)
    remaining = iter(projections)
    return [(table, None if table.shape[1] == width else next(remaining)) for table in tables]


def select_tokens(member: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions of the tokens to work on, and a mask over those positions (None: all count).

    On the CPU exactly the members. Elsewhere every token, with the mask: to know how many are members the host would
    have to wait for the device, which a training step never does.
    """
    if member.device.type == "cpu":
        return member.nonzero().squeeze(1), None
    return torch.arange(member.numel(), device=member.device), member


def row_chunks(num_rows: int, num_columns: int, min_rows: int = MIN_ROWS) -> Iterator[slice]:
    """Slices of rows such that (rows, num_columns) stays near MAX_LOGITS elements."""
    step = max(min_rows, MAX_LOGITS // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` with the rows outside ``mask`` at zero, whatever they held."""
    if mask is None:
        return values
    return values.masked_fill(~mask.reshape(-1, *[1] * (values.dim() - 1)), 0)
