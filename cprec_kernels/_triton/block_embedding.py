"""Block embedding in Triton, forward: one launch.

A program owns BLOCK_T tokens and BLOCK_N columns. For every cluster it gathers the rows of its own tokens (no byte moves
for the others), multiplies them by P_j and keeps the product where the token belongs: no sort, no grouping.

What is compiled depends on the ranks, the width and the dtype, never on the catalogue or the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AotCases, aot_case, dot_precision, launch, padded_rank

MAX_CLUSTERS = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes. Untimed: from ahead-of-time compilation alone (docs/gpu-kernels.md), to be settled on a GPU.

    Attributes:
        tokens, columns: a tile of the result; its sum and one cluster's product lie in registers.
        rank: columns of E_j per step of a product, at most. k: columns of G per step of the product with P_j^T.
    """

    tokens: int = 64
    columns: int = 128
    rank: int = 64
    k: int = 64


BLOCKS = Blocks()
# Products of fp32 keep both operands of a step in registers: the tiles above spill thousands of them.
FP32_BLOCKS = Blocks(tokens=32, columns=64, rank=16, k=32)
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

# Cluster offsets are plain arguments, not a tuple: Triton specialises the integers of a tuple, and would compile again for
# a catalogue with an offset that is 1 or divides by 16.
OFFSETS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")

# Kernels


@triton.jit(do_not_specialize=["num_tokens", *OFFSETS])
def block_embedding_fwd_kernel(
    p_ids,  # (T,)
    p_tables,  # n of (k_j, d_j)
    p_projections,  # n of (d_j, d); anything where there is none
    p_out,  # (T, d)
    num_tokens, c1, c2, c3, c4, c5, c6, c7, c8,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offsets = (0, c1, c2, c3, c4, c5, c6, c7, c8)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < WIDTH
    ids = tl.load(p_ids + o_t, mask=o_t < num_tokens, other=-1)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for j in tl.static_range(len(RANKS)):
        member = (ids >= offsets[j]) & (ids < offsets[j + 1])
        row = (ids - offsets[j]).to(tl.int64)
        if RANKS[j] == WIDTH:
            part = tl.load(
                p_tables[j] + row[:, None] * RANKS[j] + o_n[None, :], mask=member[:, None] & m_n[None, :], other=0.0
            ).to(tl.float32)
        else:
            part = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for r0 in range(0, RANKS[j], BLOCK_R[j]):
                o_r = r0 + tl.arange(0, BLOCK_R[j])
                m_r = o_r < RANKS[j]
                b_rows = tl.load(
                    p_tables[j] + row[:, None] * RANKS[j] + o_r[None, :], mask=member[:, None] & m_r[None, :], other=0.0
                )
                b_projection = tl.load(
                    p_projections[j] + o_r[:, None] * WIDTH + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0
                )
                part = tl.dot(b_rows, b_projection, part, input_precision=PRECISION)
        # A choice, not a sum: a token owes nothing to the other clusters, not even 0 times their infinities.
        acc = tl.where(member[:, None], part, acc)
    tl.store(
        p_out + o_t[:, None] * WIDTH + o_n[None, :],
        acc.to(p_out.dtype.element_ty),
        mask=(o_t < num_tokens)[:, None] & m_n[None, :],
    )


# Launches


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels are compiled for, and the offsets that they are called with."""

    width: int
    ranks: tuple[int, ...]
    offsets: tuple[int, ...]  # c1..c8, the last one repeated
    precision: str
    blocks: Blocks = BLOCKS

    @staticmethod
    def of(embeddings: Sequence[Tensor], projections: Sequence[Tensor]) -> Plan:
        ends, end = [], 0
        for table in embeddings:
            end += table.shape[0]
            ends.append(end)
        if len(ends) > MAX_CLUSTERS:
            raise ValueError(f"at most {MAX_CLUSTERS} clusters are supported, got {len(ends)} embeddings")
        ranks = tuple(int(table.shape[1]) for table in embeddings)
        width = int((projections[0] if projections else embeddings[0]).shape[1])
        offsets = (*ends, *[end] * (MAX_CLUSTERS - len(ends)))
        dtype = embeddings[0].dtype
        blocks = FP32_BLOCKS if dtype == torch.float32 else BLOCKS
        return Plan(width, ranks, offsets, dot_precision(dtype), blocks)

    @property
    def num_items(self) -> int:
        return self.offsets[-1]

    @property
    def projected(self) -> tuple[int, ...]:
        return tuple(j for j, rank in enumerate(self.ranks) if rank != self.width)

    @property
    def block_r(self) -> tuple[int, ...]:
        return tuple(min(self.blocks.rank, padded_rank(rank)) for rank in self.ranks)

    @property
    def block_n(self) -> int:
        return min(self.blocks.columns, padded_rank(self.width))

    def forward_constexprs(self) -> dict[str, Any]:
        return {
            "WIDTH": self.width, "RANKS": self.ranks, "BLOCK_T": self.blocks.tokens, "BLOCK_N": self.block_n,
            "BLOCK_R": self.block_r, "PRECISION": self.precision,
        }  # fmt: skip


def spread(plan: Plan, projections: Sequence[Tensor], stand_in: Tensor) -> tuple[Tensor, ...]:
    """A projection per cluster; ``stand_in`` where there is none."""
    remaining = iter(projections)
    return tuple(stand_in if rank == plan.width else next(remaining).contiguous() for rank in plan.ranks)


def refusal(*args: Any) -> str:
    """Why these kernels cannot take a call's shapes: never. Any rank, width and number of tokens is served."""
    return ""


def block_embedding(
    ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None, sparse: bool
) -> Tensor:
    """``cprec::block_embedding``."""
    plan = Plan.of(embeddings, projections)
    out = embeddings[0].new_empty(*ids.shape, plan.width)
    count = ids.numel()
    if count == 0:
        return out
    tables = tuple(table.contiguous() for table in embeddings)
    grid = (triton.cdiv(count, plan.blocks.tokens), triton.cdiv(plan.width, plan.block_n))
    launch(
        block_embedding_fwd_kernel, grid, ids,
        ids.contiguous(), tables, spread(plan, projections, tables[0]), out, count, *plan.offsets,
        **plan.forward_constexprs(), **LAUNCH,
    )  # fmt: skip
    return out


# Ahead-of-time compilation

# Plans of the sizes that kernels are measured at: widths 256 and 128, three clusters.
AOT_RANKS = ((256, 64, 16), (128, 32, 8))
AOT_DTYPES = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32x3"))


def aot_plans() -> Iterator[tuple[str, str, Plan]]:
    """End of the case's name, Triton's name of the dtype, plan."""
    for ranks in AOT_RANKS:
        for dtype, precision in AOT_DTYPES:
            name, blocks = (f"fp32-{precision}", FP32_BLOCKS) if dtype == "fp32" else (dtype, BLOCKS)
            yield f"{name}/{ranks[0]}", dtype, Plan(ranks[0], ranks, (0,) * MAX_CLUSTERS, precision, blocks)


def with_integers(kernel: Any, types: dict[str, Any]) -> dict[str, Any]:
    """Types of all arguments: those not given are 32-bit integers."""
    return dict.fromkeys(kernel.arg_names, "i32") | types


def aot_cases(arch: int) -> AotCases:
    """What the ahead-of-time gate compiles."""
    for name, dtype, plan in aot_plans():
        many = (f"*{dtype}",) * len(plan.ranks)
        types = {"p_ids": "*i64", "p_tables": many, "p_projections": many, "p_out": f"*{dtype}"}
        yield aot_case(
            f"block_embedding_fwd/{name}",
            block_embedding_fwd_kernel,
            with_integers(block_embedding_fwd_kernel, types),
            plan.forward_constexprs(),
            LAUNCH["num_warps"],
            LAUNCH["num_stages"],
        )
