"""``cprec::clustered_rank`` and ``clustered_score`` on a GPU, without a (rows, num_items) tensor or a wait of the host.

A first round over the levels gives every target's score, where a tail is evaluated for the rows with a target in it. A second
one counts the items that come before the target. There a tail is needed only for rows of which some item may score as much as
the target, too: the bounds are those of the search (clustered_topk.py), the target's score in place of tau.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import pointer
from .clustered_softmax import refusal as refusal
from .clustered_softmax_plan import IGNORED, Level, levels_of
from .clustered_topk_lse import log_sum_exp
from .clustered_topk_prune import prune
from .clustered_topk_rows import ROW_WARPS, Rows, Scratch, bias_pointer, items_of, log_prob_of, pack, pointer_types
from .clustered_topk_scan import Cut, bound, cut_of, logits_of, tile_constants, whole_tiles
from .common import (
    DTYPES,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    launch,
    load_rows,
    num_processors,
    padded_rank,
    row_sums,
)

SCALARS = ["first", "last", "num_entries", "target_units", "min_parts", "lo"]

# Kernels


@triton.jit(do_not_specialize=["first", "last", "num_entries", "lo"])
def clustered_rank_own_kernel(
    p_z, p_w, p_bias, p_order, p_offsets, p_target, p_lse, p_parent, p_own, first, last, num_entries, lo,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own (R,): scores of the targets (R,) that lie in a level, for a run of rows; -inf where it is NaN.

    The logit is the diagonal of a tile of logits, so that its bits are those that the counting pass forms.
    """
    start = tl.load(p_offsets + first)
    count = tl.load(p_offsets + last) - start
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    for i_t in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_T), tl.num_programs(0)):
        t = i_t * BLOCK_T + o_t
        m_t = t < count
        rows = tl.load(p_order + start + t, mask=m_t, other=0)
        b_z = load_rows(p_z, rows, o_d, m_t, D, BLOCK_D, True)
        column = tl.load(p_target + rows).to(tl.int32) - lo
        m_own = m_t & (column >= 0) & (column < num_entries)
        column = tl.where(m_own, column, 0)
        s = logits_of(b_z, p_w, p_bias, column, num_entries, o_d, D, BLOCK_D, HAS_BIAS, True, PRECISION)
        s = tl.sum(tl.where(o_t[:, None] == o_t[None, :], s, 0.0), 1)
        own = log_prob_of(s, tl.load(p_lse + rows), tl.load(p_parent + rows))
        tl.store(p_own + rows, tl.where(own == own, own, -float("inf")), mask=m_own)


@triton.jit
def _count_tile(
    b_z, b_own, b_lse, b_parent, b_limit, b_count, p_w, p_bias, v, num_entries, o_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = logits_of(b_z, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, MASKED, PRECISION)
    score = log_prob_of(s, b_lse[:, None], b_parent[:, None])
    own = b_own[:, None]
    i_first = tl.min(v, 0)
    # Almost everywhere, all entries of a tile have smaller ids than a row's target or all have larger ones.
    special = (b_own == -float("inf")) | ((b_limit >= i_first) & (b_limit <= tl.max(v, 0)))
    if tl.max(special.to(tl.int32), 0) > 0:
        limit = b_limit[:, None]
        score = tl.where(score == score, score, -float("inf"))
        before = ((score > own) & (v[None, :] != limit)) | ((score == own) & (v[None, :] < limit))
        if MASKED:
            before = before & (v < num_entries)[None, :]
        b_count += tl.sum(before.to(tl.int32), 1)
    else:
        before = (score > own) | ((score == own) & (b_limit > i_first)[:, None])
        if MASKED:
            before = before & (v < num_entries)[None, :]
        b_count += tl.sum(before.to(tl.int32), 1)
    return b_count


@triton.jit(do_not_specialize=SCALARS)
def clustered_rank_count_kernel(
    p_z, p_w, p_bias, p_order, p_offsets, p_target, p_own, p_parent, p_lse, p_rank,
    first, last, num_entries, target_units, min_parts, lo,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to rank (R,) int64 the items of a level that come before the target: better ones, and equal ones of smaller id."""
    start, count, token_tiles, parts = cut_of(
        p_offsets, first, last, num_entries, target_units, min_parts, BLOCK_T, BLOCK_V
    )
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    for unit in tl.range(tl.program_id(0), token_tiles * parts, tl.num_programs(0)):
        part = unit // token_tiles
        t = (unit % token_tiles) * BLOCK_T + o_t
        m_t = t < count
        rows = tl.load(p_order + start + t, mask=m_t, other=0)
        b_z = load_rows(p_z, rows, o_d, m_t, D, BLOCK_D, True)
        b_own = tl.load(p_own + rows)
        b_lse = tl.load(p_lse + rows)
        b_parent = tl.load(p_parent + rows)
        # Ids are below the target's where columns are below this, negative or beyond the last one for other clusters.
        b_limit = tl.load(p_target + rows).to(tl.int32) - lo
        b_count = tl.zeros((BLOCK_T,), tl.int32)
        steps, ragged = whole_tiles(part, parts, num_entries, BLOCK_V)
        for i in tl.range(0, steps, num_stages=STAGES):
            v = (part + i * parts) * BLOCK_V + o_v
            b_count = _count_tile(
                b_z, b_own, b_lse, b_parent, b_limit, b_count, p_w, p_bias, v, num_entries, o_d,
                D, BLOCK_D, HAS_BIAS, False, PRECISION,
            )  # fmt: skip
        for _i in tl.range(0, ragged, num_stages=1):
            v = (num_entries // BLOCK_V) * BLOCK_V + o_v
            b_count = _count_tile(
                b_z, b_own, b_lse, b_parent, b_limit, b_count, p_w, p_bias, v, num_entries, o_d,
                D, BLOCK_D, HAS_BIAS, True, PRECISION,
            )  # fmt: skip
        # Sums of integers are the same in any order.
        tl.atomic_add(p_rank + rows, b_count.to(tl.int64), mask=m_t & (b_count > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "width", "num_entries", "lo", "next_hi"])
def clustered_score_kernel(
    p_z, p_w, p_bias, p_items, p_lse, p_parent, p_out, p_next, num_rows, width, num_entries, lo, next_hi,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out (R, width): scores of the items (R, width) that lie in a level; the others are left alone.

    next (R,) int32 becomes 1 where an item lies in the level after it, which ends at ``next_hi``.
    """
    o_d = tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(width, BLOCK_C)
    for unit in tl.range(tl.program_id(0), num_rows.to(tl.int64) * blocks, tl.num_programs(0)):
        row = unit // blocks
        o_c = (unit % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        place = row * width + o_c
        column = tl.load(p_items + place, mask=o_c < width, other=-1).to(tl.int32) - lo
        inside = (column >= 0) & (column < num_entries)
        after = (column >= num_entries) & (column < next_hi - lo)
        tl.store(p_next + row + 0 * o_c, 1, mask=after)
        b_w = load_rows(p_w, column, o_d, inside, D, BLOCK_D, True).to(tl.float32)
        b_z = tl.load(p_z + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        s = tl.sum(b_w * b_z[None, :], 1)
        if HAS_BIAS:
            s += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)
        score = log_prob_of(s, tl.load(p_lse + row), tl.load(p_parent + row))
        tl.store(p_out + place, score, mask=inside)


# Launches


def clustered_rank(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Tensor:
    """The op ``cprec::clustered_rank``: places (R,) int64."""
    num_rows = input.shape[0]
    ranks = torch.empty_like(target, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return ranks
    levels = levels_of(weights, projections, head_bias, tail_biases)
    if levels[-1].hi >= IGNORED:
        raise ValueError(f"the Triton kernels number items in 32 bits, and there are {levels[-1].hi}")
    num_tails = len(levels) - 1
    target = target.contiguous()
    scratch = Scratch(num_rows, low=1, floats=2 * len(levels), zero=0, integers=5 + 2 * num_tails, device=input.device)
    own = scratch.floats()
    lse = [scratch.floats() for _ in levels]
    parents = [scratch.floats() for _ in levels]
    everyone, others, flag = scratch.rows(), scratch.rows(), scratch.integers()
    z = [level.project(input).contiguous() for level in levels]
    scratch.start(everyone, zeros=ranks)
    log_sum_exp(levels[0], z[0], everyone, lse[0], (parents[0], scratch.stride))
    _own(items_of(levels[0]), z[0], everyone, target, lse[0], parents[0], own)
    # A tail's rows: those with a target in it, and after them those of which another item may come before the target.
    inside = [scratch.rows() for _ in range(num_tails)]
    for j, rows in enumerate(inside, 1):
        pack(everyone, rows, "inside", target=target, lo=levels[j].lo, hi=levels[j].hi)
        log_sum_exp(levels[j], z[j], rows, lse[j])
        _own(levels[j], z[j], rows, target, lse[j], parents[j], own)
    _count(items_of(levels[0]), z[0], everyone, target, own, parents[0], lse[0], ranks)
    for j, rows in enumerate(inside, 1):
        level = levels[j]
        pack(everyone, others, "reach_outside", target=target, lo=level.lo, hi=level.hi, parent=parents[j], score=own)
        prune(level, bound(level, z[j], others, None, 0), others, parents[j], own, flag)
        useful = pack(others, dataclasses.replace(rows, first=1, last=2), "flag", flag=flag)
        log_sum_exp(level, z[j], useful, lse[j])
        _count(level, z[j], dataclasses.replace(rows, last=2), target, own, parents[j], lse[j], ranks)
    return ranks


def clustered_score(
    input: Tensor,
    items: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
) -> Tensor:
    """The op ``cprec::clustered_score``: log-probabilities (R, c) fp32 of items (R, c)."""
    out = torch.zeros(items.shape, dtype=torch.float32, device=input.device)
    if items.numel() == 0:
        return out
    levels = levels_of(weights, projections, head_bias, tail_biases)
    items = items.contiguous()
    num_rows, width = items.shape
    num_levels = len(levels)
    scratch = Scratch(num_rows, low=0, floats=1 + num_levels, zero=num_levels, integers=4, device=input.device)
    lse = scratch.floats()
    parents = [scratch.floats() for _ in levels]
    flags = [scratch.integers() for _ in levels]  # of the level after each
    everyone, asked = scratch.rows(), scratch.rows()
    scratch.start(everyone)
    for j, level in enumerate(levels):
        z = level.project(input).contiguous()
        if j == 0:
            log_sum_exp(level, z, everyone, lse, (parents[0], scratch.stride))
        else:
            log_sum_exp(level, z, pack(everyone, asked, "flag", flag=flags[j - 1]), lse)
        block_c = configs.tile_for("score", level.rank, z.dtype, architecture(z.device)).block_v
        launch(
            clustered_score_kernel, num_processors(z.device) * 8, z,
            z, level.weight, bias_pointer(level, z), items, lse, parents[j], out, flags[j],
            num_rows, width, level.hi - level.lo, level.lo, levels[min(j + 1, num_levels - 1)].hi,
            **_score_constants(level.rank, block_c, level.bias is not None), num_warps=ROW_WARPS, num_stages=1,
            **row_sums(level.rank),
        )  # fmt: skip
    return out


def _own(level: Level, z: Tensor, rows: Rows, target: Tensor, lse: Tensor, parent: Tensor, own: Tensor) -> None:
    tile = configs.tile_for("rank_count", level.rank, z.dtype, architecture(z.device))
    launch(
        clustered_rank_own_kernel, num_processors(z.device) * tile.blocks_per_sm, z,
        z, level.weight, pointer(level.bias, z), rows.order, rows.offsets, target, lse, parent, own,
        rows.first, rows.last, level.num_entries, level.lo,
        **_own_constants(level.rank, z.dtype, tile, level.bias is not None), num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def _count(
    level: Level, z: Tensor, rows: Rows, target: Tensor, own: Tensor, parent: Tensor, lse: Tensor, rank: Tensor
) -> None:
    tile = configs.tile_for("rank_count", level.rank, z.dtype, architecture(z.device))
    cut = Cut.of(tile, z.shape[0], level.num_entries, z.device)
    launch(
        clustered_rank_count_kernel, cut.num_programs, z,
        z, level.weight, bias_pointer(level, z), rows.order, rows.offsets, target, own, parent, lse, rank,
        rows.first, rows.last, level.num_entries, cut.target_units, cut.min_parts, level.lo,
        **tile_constants(level.rank, z.dtype, tile, level.bias is not None),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _own_constants(rank: int, dtype: torch.dtype, tile: configs.Tile, bias: bool) -> dict[str, Any]:
    constants = tile_constants(rank, dtype, tile, bias)
    return {name: constants[name] for name in ("D", "BLOCK_D", "BLOCK_T", "HAS_BIAS", "PRECISION")}


def _score_constants(rank: int, block_c: int, bias: bool) -> dict[str, Any]:
    return {"D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_C": block_c, "HAS_BIAS": bias}


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture, with bias."""
    known = dict.fromkeys(("p_target", "p_rank", "p_items"), "*i64") | {"p_next": "*i32"}
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            tile = configs.tile_for("rank_count", rank, dtype, arch)
            block_c = configs.tile_for("score", rank, dtype, arch).block_v
            constants = tile_constants(rank, dtype, tile, True)
            own = _own_constants(rank, dtype, tile, True)
            for name, kernel, chosen, warps, stages in (
                ("rank_count", clustered_rank_count_kernel, constants, tile.num_warps, tile.num_stages),
                ("rank_own", clustered_rank_own_kernel, own, tile.num_warps, 1),
                ("score", clustered_score_kernel, _score_constants(rank, block_c, True), ROW_WARPS, 1),
            ):
                types = pointer_types(kernel, dtype, known)
                yield aot_case(f"{name}/{TYPE_NAMES[dtype]}/{rank}", kernel, types, chosen, warps, stages)
