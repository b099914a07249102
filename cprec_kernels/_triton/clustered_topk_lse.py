"""Log-sum-exps of a level for packed rows, and with the head's the log-probabilities of the tails' parent labels.

One pass leaves a maximum and a sum per row and part of the entries; parts are many where rows are few, so a merge takes a
block of them at a time for a few rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import SCALARS, units_of
from .clustered_softmax_plan import Grid, Level
from .clustered_topk_rows import ROW_WARPS, Rows, bias_pointer, pointer_types
from .clustered_topk_scan import logits_of
from .common import (
    DTYPES,
    LN2,
    LOG2E,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    dot_precision,
    launch,
    load_rows,
    num_processors,
    padded_rank,
)

# Rows and parts that a program of the merge has at a time: four of each per thread.
MERGE_ROWS = 4
MERGE_PARTS = 128
# Threads that hold the same sum must hold the same bits. A product fused into the first addition across lanes is rounded in one
# lane's operand and not in the other's, so that copies differ, and which of them is stored depends on timing.
MERGE: dict[str, Any] = {"num_warps": ROW_WARPS, "num_stages": 1, "enable_fp_fusion": False}

# Kernels


@triton.jit
def _add_tile(
    b_z, m, total, p_w, p_bias, v, num_entries, o_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = logits_of(b_z, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, MASKED, PRECISION)
    if MASKED:
        s = tl.where((v < num_entries)[None, :], s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1) * LOG2E)
    return top, total * tl.exp2(m - top) + tl.sum(tl.exp2(s * LOG2E - top[:, None]), 1)


@triton.jit(do_not_specialize=SCALARS)
def clustered_topk_sum_kernel(
    p_z, p_w, p_bias, p_order, p_offsets, p_max, p_sum, first, last, num_entries, target_units,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Per unit and row (units, BLOCK_T): the largest logit in units of log 2, and the sum relative to it."""
    start, count, token_tiles, entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    for unit in tl.range(tl.program_id(0), token_tiles * parts, tl.num_programs(0)):
        part = unit // token_tiles  # programs side by side read the same entries
        t = (unit % token_tiles) * BLOCK_T + o_t
        rows = tl.load(p_order + start + t, mask=t < count, other=0)
        b_z = load_rows(p_z, rows, o_d, t < count, D, BLOCK_D, True)
        m = tl.full((BLOCK_T,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        lo = (part.to(tl.int64) * entry_tiles // parts).to(tl.int32)
        hi = ((part + 1).to(tl.int64) * entry_tiles // parts).to(tl.int32)
        full = tl.minimum(hi, num_entries // BLOCK_V)  # tiles that do not reach beyond the last entry
        for i in tl.range(lo, full, num_stages=STAGES):
            v = i * BLOCK_V + o_v
            m, total = _add_tile(
                b_z, m, total, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, False, PRECISION
            )
        for i in tl.range(full, hi, num_stages=1):
            v = i * BLOCK_V + o_v
            m, total = _add_tile(b_z, m, total, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, True, PRECISION)
        place = unit * BLOCK_T + o_t
        tl.store(p_max + place, m)
        tl.store(p_sum + place, total)


@triton.jit(do_not_specialize=[*SCALARS, "num_tails", "stride"])
def clustered_topk_lse_kernel(
    p_z, p_w, p_bias, p_order, p_offsets, p_max, p_sum, p_lse, p_parents,
    first, last, num_entries, target_units, num_tails, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_PARENTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a pass into lse (R,) at the rows of the batch.

    WITH_PARENTS: parents (n, stride) become the log-probabilities of the clusters' parent labels, the head's last entries; 0
    for the head itself.
    """
    start, count, token_tiles, _entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    o_s = tl.arange(0, BLOCK_S)
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    for i_s in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_S), tl.num_programs(0)):
        t = i_s * BLOCK_S + o_s
        m_t = t < count
        m = tl.full((BLOCK_P, BLOCK_S), -1e30, tl.float32)
        total = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
        for i_p in tl.range(0, tl.cdiv(parts, BLOCK_P)):
            part = (i_p * BLOCK_P + o_p)[:, None]
            m_p = (part < parts) & m_t[None, :]
            place = (part * token_tiles + (t // BLOCK_T)[None, :]) * BLOCK_T + (t % BLOCK_T)[None, :]
            m_part = tl.load(p_max + place, mask=m_p, other=-1e30)
            top = tl.maximum(m, m_part)
            more = tl.load(p_sum + place, mask=m_p, other=0.0)
            total = total * tl.exp2(m - top) + more * tl.exp2(m_part - top)
            m = top
        top = tl.max(m, 0)
        lse = (top + tl.log2(tl.sum(total * tl.exp2(m - top[None, :]), 0))) * LN2
        row = tl.load(p_order + start + t, mask=m_t, other=0)
        tl.store(p_lse + row, lse, mask=m_t)
        if WITH_PARENTS:
            tl.store(p_parents + row, tl.zeros((BLOCK_S,), tl.float32), mask=m_t)
            b_z = load_rows(p_z, row, o_d, m_t, D, BLOCK_D, True).to(tl.float32)
            for i in tl.range(0, num_tails):
                label = (num_entries - num_tails + i).to(tl.int64)
                b_w = tl.load(p_w + label * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                s = tl.sum(b_z * b_w[None, :], 1)
                if HAS_BIAS:
                    s += tl.load(p_bias + label).to(tl.float32)
                tl.store(p_parents + (i + 1) * stride.to(tl.int64) + row, s - lse, mask=m_t)


# Launches


def log_sum_exp(level: Level, z: Tensor, rows: Rows, lse: Tensor, parents: tuple[Tensor, int] | None = None) -> None:
    """Log-sum-exps of a level's logits for the given rows of z (R, d_j), written into lse (R,).

    With ``parents``, the first of as many fp32 arrays as there are clusters and their stride, the level is the head.
    """

    # The loss's pass has the same tile, but it is another kernel: what tuning finds for that one is not asked for here.
    tile = configs.tile_for("scan_lse", level.rank, z.dtype, architecture(z.device))
    grid, maxima, sums = _sum(tile, level, z, rows)
    to, stride = (lse, 0) if parents is None else parents
    launch(
        clustered_topk_lse_kernel, num_processors(z.device) * 8, z,
        z, level.weight, bias_pointer(level, z), rows.order, rows.offsets, maxima, sums, lse, to,
        rows.first, rows.last, level.num_entries, grid.target_units, level.num_entries - (level.hi - level.lo), stride,
        **_lse_constants(level.rank, tile, level.bias is not None, parents is not None), **MERGE,
    )  # fmt: skip


def _sum(tile: configs.Tile, level: Level, z: Tensor, rows: Rows) -> tuple[Grid, Tensor, Tensor]:
    grid = Grid.of(tile, z.shape[0], z.device)
    count = grid.max_units * tile.block_t
    maxima, sums = torch.empty(2, count, dtype=torch.float32, device=z.device).unbind(0)
    launch(
        clustered_topk_sum_kernel, grid.num_programs, z,
        z, level.weight, bias_pointer(level, z), rows.order, rows.offsets, maxima, sums,
        rows.first, rows.last, level.num_entries, grid.target_units,
        **_sum_constants(level.rank, z.dtype, tile, level.bias is not None),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return grid, maxima, sums


def _sum_constants(rank: int, dtype: torch.dtype, tile: configs.Tile, bias: bool) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "HAS_BIAS": bias,
        "PRECISION": dot_precision(dtype, rank), "STAGES": tile.num_stages,
    }  # fmt: skip


def _lse_constants(rank: int, tile: configs.Tile, bias: bool, parents: bool) -> dict[str, Any]:
    # Without labels to score, levels of all ranks share a kernel.
    width = rank if parents else 1
    return {
        "D": width, "BLOCK_D": padded_rank(width), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v,
        "BLOCK_S": MERGE_ROWS, "BLOCK_P": MERGE_PARTS, "HAS_BIAS": bias and parents, "WITH_PARENTS": parents,
    }  # fmt: skip


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture, with bias."""
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            tile = configs.tile_for("scan_lse", rank, dtype, arch)
            types = pointer_types(clustered_topk_sum_kernel, dtype, {})
            yield aot_case(
                f"topk_sum/{TYPE_NAMES[dtype]}/{rank}", clustered_topk_sum_kernel, types,
                _sum_constants(rank, dtype, tile, True), tile.num_warps, tile.num_stages,
            )  # fmt: skip
            types = pointer_types(clustered_topk_lse_kernel, dtype, {})
            yield aot_case(
                f"topk_merge/{TYPE_NAMES[dtype]}/{rank}", clustered_topk_lse_kernel, types,
                _lse_constants(rank, tile, True, True), **MERGE,
            )  # fmt: skip
    tile = configs.tile_for("scan_lse", 64, DTYPES[1], arch)
    types = pointer_types(clustered_topk_lse_kernel, DTYPES[1], {})
    yield aot_case("topk_merge", clustered_topk_lse_kernel, types, _lse_constants(64, tile, True, False), **MERGE)
