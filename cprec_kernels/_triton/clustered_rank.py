"""``cprec::clustered_rank`` and ``clustered_score`` on a GPU, without a (rows, num_items) tensor or a wait of the host.

Rows are sorted by target, so that those with a target in one cluster are a run. A first round over the levels gives every
target's score, a second one counts the items that come before it. There a tail is needed only for rows of which some item
may score as much as the target: the bounds are those of the search (clustered_topk.py), the target's score in place of tau.
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
from .clustered_softmax_plan import Level, levels_of, make_plan
from .clustered_topk_rows import (
    Rows,
    bias_pointer,
    items_of,
    log_prob_of,
    log_sum_exp,
    may_reach,
    parent_logits,
    pointer_types,
)
from .clustered_topk_scan import Cut, bound, cut_of, logits_of, tile_constants, whole_tiles
from .clustered_topk_select import prune
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
)

SCALARS = ["first", "last", "num_entries", "target_units", "min_parts", "lo"]
SCORE_WARPS = 4

# Kernels


@triton.jit(do_not_specialize=["first", "last", "num_entries"])
def clustered_rank_own_kernel(
    p_z, p_w, p_bias, p_column, p_offsets, p_lse, p_parent, p_own, first, last, num_entries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own (R,): score of the target of every row of a run, -inf if it is NaN. column (R,): targets within the level.

    The logit is the diagonal of a tile of logits, so that its bits are those that the counting pass forms.
    """
    start = tl.load(p_offsets + first)
    count = tl.load(p_offsets + last) - start
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    for i_t in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_T), tl.num_programs(0)):
        t = i_t * BLOCK_T + o_t
        m_t = t < count
        b_z = load_rows(p_z, start + t, o_d, m_t, D, BLOCK_D, True)
        column = tl.load(p_column + start + t, mask=m_t, other=0)
        s = logits_of(b_z, p_w, p_bias, column, num_entries, o_d, D, BLOCK_D, HAS_BIAS, True, PRECISION)
        s = tl.sum(tl.where(o_t[:, None] == o_t[None, :], s, 0.0), 1)
        lse = tl.load(p_lse + start + t, mask=m_t, other=0.0)
        own = log_prob_of(s, lse, tl.load(p_parent + start + t, mask=m_t, other=0.0))
        tl.store(p_own + start + t, tl.where(own == own, own, -float("inf")), mask=m_t)


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
    """Add to rank (R,) int32 the items of a level that come before the target: better ones, and equal ones of smaller id."""
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
        b_z = load_rows(p_z, start + t, o_d, m_t, D, BLOCK_D, True)
        b_own = tl.load(p_own + rows)
        b_lse = tl.load(p_lse + rows)
        b_parent = tl.load(p_parent + rows)
        # Ids are below the target's where columns are below this, negative or beyond the last one for other clusters.
        b_limit = tl.load(p_target + rows) - lo
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
        tl.atomic_add(p_rank + rows, b_count, mask=m_t & (b_count > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "width", "num_entries", "lo"])
def clustered_score_kernel(
    p_z, p_w, p_bias, p_items, p_lse, p_parent, p_out, num_rows, width, num_entries, lo,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out (R, width): scores of the items (R, width) that lie in a level; the others are left alone."""
    o_d = tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(width, BLOCK_C)
    for unit in tl.range(tl.program_id(0), num_rows.to(tl.int64) * blocks, tl.num_programs(0)):
        row = unit // blocks
        o_c = (unit % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        place = row * width + o_c
        column = tl.load(p_items + place, mask=o_c < width, other=-1) - lo
        inside = (column >= 0) & (column < num_entries)
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
    num_rows, device = input.shape[0], input.device
    if num_rows == 0:
        return torch.empty_like(target)
    levels = levels_of(weights, projections, head_bias, tail_biases)
    plan = make_plan(target, levels, ignore_index=-1)
    hidden = input.index_select(0, plan.order)
    everyone = Rows.all_of(hidden)
    own = torch.empty(num_rows, dtype=torch.float32, device=device)
    z = [level.project(hidden).contiguous() for level in levels]
    lse = [log_sum_exp(levels[0], z[0], everyone)]
    parents = [torch.zeros_like(own), *(parent_logits(levels[0], z[0]) - lse[0])]
    runs = [dataclasses.replace(everyone, offsets=plan.offsets, first=j, last=j + 1) for j in range(len(levels))]
    for j, level in enumerate(levels):
        if j > 0:
            lse.append(log_sum_exp(level, z[j], runs[j]))
        _own(level, z[j], runs[j], plan.columns[j], lse[j], parents[j], own)
    rank = torch.zeros(num_rows, dtype=torch.int32, device=device)
    for j, level in enumerate(levels):
        rows = everyone
        if j > 0:
            inside = (everyone.order >= plan.offsets[j]) & (everyone.order < plan.offsets[j + 1])
            others = Rows.where(~inside & may_reach(parents[j], own))
            useful, _ = prune(level, bound(level, z[j], others, None, 0), others, None, False, parents[j], own, 0)
            log_sum_exp(level, z[j], Rows.where(useful), lse[j])
            rows = Rows.where(inside | (useful > 0))
        _count(items_of(level), z[j], rows, plan.ids, own, parents[j], lse[j], rank)
    return torch.empty_like(target).index_copy_(0, plan.order, rank.to(target.dtype))


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
    parents: list[Tensor] = []
    for j, level in enumerate(levels):
        z = level.project(input).contiguous()
        rows = Rows.where(((items >= level.lo) & (items < level.hi)).any(1)) if j else Rows.all_of(input)
        lse = log_sum_exp(level, z, rows)
        if j == 0:
            parents = [torch.zeros_like(lse), *(parent_logits(level, z) - lse)]
        block_c = configs.tile_for("score", level.rank, z.dtype, architecture(z.device)).block_v
        launch(
            clustered_score_kernel, num_processors(z.device) * 8, z,
            z, level.weight, bias_pointer(level, z), items, lse, parents[j], out,
            items.shape[0], items.shape[1], level.hi - level.lo, level.lo,
            **_score_constants(level.rank, block_c, level.bias is not None), num_warps=SCORE_WARPS, num_stages=1,
        )  # fmt: skip
    return out


def _own(level: Level, z: Tensor, run: Rows, column: Tensor, lse: Tensor, parent: Tensor, own: Tensor) -> None:
    tile = configs.tile_for("rank_count", level.rank, z.dtype, architecture(z.device))
    launch(
        clustered_rank_own_kernel, num_processors(z.device) * tile.blocks_per_sm, z,
        z, level.weight, pointer(level.bias, z), column, run.offsets, lse, parent, own,
        run.first, run.last, level.num_entries,
        **_own_constants(level.rank, z.dtype, tile, level.bias is not None), num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def _count(
    level: Level, z: Tensor, rows: Rows, target: Tensor, own: Tensor, parent: Tensor, lse: Tensor, rank: Tensor
) -> None:
    tile = configs.tile_for("rank_count", level.rank, z.dtype, architecture(z.device))
    cut = Cut.of(tile, z.shape[0], level.num_entries, z.device)
    launch(
        clustered_rank_count_kernel, cut.num_programs, z,
        rows.pack(z), level.weight, bias_pointer(level, z), rows.order, rows.offsets, target, own, parent, lse, rank,
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
    known = {"p_column": "*i32", "p_target": "*i32", "p_rank": "*i32", "p_items": "*i64"}
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            tile = configs.tile_for("rank_count", rank, dtype, arch)
            block_c = configs.tile_for("score", rank, dtype, arch).block_v
            constants = tile_constants(rank, dtype, tile, True)
            own = _own_constants(rank, dtype, tile, True)
            for name, kernel, chosen, warps, stages in (
                ("rank_count", clustered_rank_count_kernel, constants, tile.num_warps, tile.num_stages),
                ("rank_own", clustered_rank_own_kernel, own, tile.num_warps, 1),
                ("score", clustered_score_kernel, _score_constants(rank, block_c, True), SCORE_WARPS, 1),
            ):
                types = pointer_types(kernel, dtype, known)
                yield aot_case(f"{name}/{TYPE_NAMES[dtype]}/{rank}", kernel, types, chosen, warps, stages)
