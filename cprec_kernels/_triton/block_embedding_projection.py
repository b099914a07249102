"""Block embedding in Triton, gradients of the projections: dP_j = sum of E_j[g]^T G over the cluster's tokens.

The tokens are sorted by id, so a cluster's are one range. It is cut into a number of parts that depends on the batch's size
alone; each is summed by one program, and the parts are added in order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_embedding import LAUNCH, OFFSETS, Plan, aot_plans, with_integers
from .common import AotCases, aot_case, launch

# One part per so many tokens of the batch, up to so many parts. Untimed.
SPLIT_TOKENS, SPLITS = 512, 64

# Kernel


@triton.jit(do_not_specialize=["num_splits", *OFFSETS])
def block_embedding_bwd_projections_kernel(
    p_grad, p_perm, p_keys, p_bounds, p_tables,
    p_sums,  # (num_splits, sum of projected d_j, d) fp32
    num_splits, c1, c2, c3, c4, c5, c6, c7, c8,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, TOTAL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offsets = (0, c1, c2, c3, c4, c5, c6, c7, c8)
    i_split = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < WIDTH
    first = 0
    unit = 0
    for j in tl.static_range(len(RANKS)):
        if RANKS[j] != WIDTH:
            # Third grid axis: the blocks of block_r rows of every P_j, one after another.
            units = (RANKS[j] + BLOCK_R[j] - 1) // BLOCK_R[j]
            i_block = tl.program_id(2) - unit
            if (i_block >= 0) & (i_block < units):
                o_r = i_block * BLOCK_R[j] + tl.arange(0, BLOCK_R[j])
                m_r = o_r < RANKS[j]
                lo = tl.load(p_bounds + j)
                hi = tl.load(p_bounds + j + 1)
                per_split = tl.cdiv(tl.cdiv(hi - lo, BLOCK_T), num_splits) * BLOCK_T
                begin = tl.minimum(lo + i_split * per_split, hi)
                end = tl.minimum(begin + per_split, hi)
                acc = tl.full((BLOCK_R[j], BLOCK_N), 0.0, tl.float32)
                for t in tl.range(begin, end, BLOCK_T):
                    o_t = t + tl.arange(0, BLOCK_T)
                    m_t = o_t < end
                    row = tl.load(p_keys + o_t, mask=m_t, other=0).to(tl.int64) - offsets[j]
                    token = tl.load(p_perm + o_t, mask=m_t, other=0)
                    b_rows = tl.load(
                        p_tables[j] + row[:, None] * RANKS[j] + o_r[None, :],
                        mask=m_t[:, None] & m_r[None, :],
                        other=0.0,
                    )
                    b_grad = tl.load(
                        p_grad + token[:, None] * WIDTH + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0
                    )
                    acc = tl.dot(tl.trans(b_rows), b_grad, acc, input_precision=PRECISION)
                tl.store(
                    p_sums + (i_split * TOTAL + first + o_r)[:, None] * WIDTH + o_n[None, :],
                    acc,
                    mask=m_r[:, None] & m_n[None, :],
                )
            unit += units
            first += RANKS[j]


# Launch


def projections_constexprs(plan: Plan) -> dict[str, Any]:
    return {
        "WIDTH": plan.width, "RANKS": plan.ranks, "TOTAL": sum(plan.ranks[j] for j in plan.projected),
        "BLOCK_T": plan.blocks.tokens, "BLOCK_N": plan.block_n, "BLOCK_R": plan.block_r, "PRECISION": plan.precision,
    }  # fmt: skip


def projection_gradients(
    plan: Plan, grad: Tensor, perm: Tensor, keys: Tensor, bounds: Tensor, embeddings: Sequence[Tensor]
) -> list[Tensor]:
    """dP_j of every projected cluster."""
    if not plan.projected:
        return []
    count = keys.numel()
    # By the shape alone: the number of parts decides the bits.
    splits = min(SPLITS, triton.cdiv(count, SPLIT_TOKENS))
    ranks = [plan.ranks[j] for j in plan.projected]
    units = sum(triton.cdiv(plan.ranks[j], plan.block_r[j]) for j in plan.projected)
    sums = grad.new_empty(splits, sum(ranks), plan.width, dtype=torch.float32)
    launch(
        block_embedding_bwd_projections_kernel, (splits, triton.cdiv(plan.width, plan.block_n), units), grad,
        grad, perm, keys, bounds, tuple(table.contiguous() for table in embeddings), sums,
        splits, *plan.offsets, **projections_constexprs(plan), **LAUNCH,
    )  # fmt: skip
    dtype = embeddings[0].dtype
    # Results of their own: the slices of one sum would share memory, which an op's results must not.
    return [part.to(dtype, copy=True) for part in sums.sum(0).split(ranks)]


# Ahead-of-time compilation


def aot_cases(arch: int) -> AotCases:
    """What the ahead-of-time gate compiles."""
    kernel = block_embedding_bwd_projections_kernel
    for name, dtype, plan in aot_plans():
        types = {
            "p_grad": f"*{dtype}", "p_perm": "*i64", "p_keys": "*i32", "p_bounds": "*i64", "p_sums": "*fp32",
            "p_tables": (f"*{dtype}",) * len(plan.ranks),
        }  # fmt: skip
        yield aot_case(
            f"block_embedding_bwd_projections/{name}",
            kernel,
            with_integers(kernel, types),
            projections_constexprs(plan),
            LAUNCH["num_warps"],
            LAUNCH["num_stages"],
        )
