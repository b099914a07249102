"""Which of the keys appended in a level are a row's best.

A key is one int64 that orders (score, id) as results are, so that a row's best are its largest keys, whatever order they
came in. A row with more keys than fit is searched in a way that has no buffer to overflow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import pointer
from .clustered_softmax_plan import Level
from .clustered_topk_prune import Excluded, excluded_range, number_of
from .clustered_topk_rows import ROW_WARPS, bias_pointer, log_prob_of, pointer_types
from .clustered_topk_scan import MAX_ID, key_of
from .common import (
    DTYPES,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    launch,
    num_processors,
    padded_rank,
    row_sums,
)

# Key of no item: score -inf and, since it is MAX_ID minus the id that is kept, id -1.
EMPTY = (-(2**31) + 0x7FFFFF) * 2**32 + 2**31
_EMPTY = tl.constexpr(EMPTY)
SCALARS = ["width", "first_row", "num_rows", "num_entries", "lo", "k", "capacity", "stride", "level", "is_last"]
# Keys of a row that are compared with one another at most, COMPARE_BLOCK of them at a time; above, torch sorts.
MAX_COMPARED = 2048
COMPARE_BLOCK = 64


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores fp32 and items int64 of keys."""
    high = (keys >> 32).to(torch.int32)
    scores = (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores, MAX_ID.value - (keys & 0xFFFFFFFF)


# Kernels


@triton.jit
def _search_row(
    p_z, p_w, p_bias, p_allowed, p_exclude, p_parent, p_lse, p_best, row, begin, end, num_entries, lo, k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Store the best k keys of a level for a row, in any order; returns how many there are.

    The items are gone through five times, in order of ids: a byte of the k-th best score is settled by a histogram in each
    of four rounds, then keys above it are stored, and as many of the first ones that tie with it as are wanted. All rounds
    run the same instructions, so that their logits have the same bits.
    """
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    digits = tl.arange(0, 256)
    b_z = tl.load(p_z + row * tl.full((), D, tl.int64) + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    lse = tl.load(p_lse + row)
    parent = tl.load(p_parent + row)
    threshold = tl.full((), 0, tl.int64)  # of scores as integers from 0 on: its bytes so far
    need = k
    written = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for step in tl.range(0, 5):
        shift = (24 - 8 * tl.minimum(step, 3)).to(tl.int64)
        histogram = tl.zeros((256,), tl.int32)
        for i in tl.range(0, tl.cdiv(num_entries, BLOCK_V)):
            v = i * BLOCK_V + o_v
            ok = v < num_entries
            rows = v.to(tl.int64)[:, None] * D + o_d[None, :]
            b_w = tl.load(p_w + rows, mask=ok[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
            s = tl.sum(b_w * b_z[None, :], 1)
            if HAS_BIAS:
                s += tl.load(p_bias + v, mask=ok, other=0.0).to(tl.float32)
            score = log_prob_of(s, lse, parent)
            ok = ok & (score > -float("inf"))
            if HAS_ALLOWED:
                ok = ok & (tl.load(p_allowed + lo + v, mask=ok, other=0) != 0)
            if EXCLUDE != "none":
                for e in tl.range(begin, end):
                    ok = ok & (tl.load(p_exclude + e) != lo + v)
            key = key_of(score, lo + v)
            value = (key >> 32) + 2147483648
            if step < 4:
                inside = ok & ((value >> (shift + 8)) == (threshold >> (shift + 8)))
                histogram += tl.histogram(((value >> shift) & 255).to(tl.int32), 256, mask=inside)
            else:
                tie = (ok & (value == threshold)).to(tl.int32)
                before = ties + tl.cumsum(tie, 0) - tie
                take = (ok & ((value > threshold) | ((tie > 0) & (before < need)))).to(tl.int32)
                o = written + tl.cumsum(take, 0) - take
                tl.store(p_best + o, key, mask=take > 0)
                ties += tl.sum(tie, 0)
                written += tl.sum(take, 0)
        if step < 4:
            reach = tl.cumsum(histogram, 0, reverse=True)  # values from a digit on
            need = tl.minimum(need, tl.max(reach, 0))
            digit = tl.sum((reach >= need).to(tl.int32), 0) - 1
            need -= tl.sum(tl.where(digits > digit, histogram, 0), 0)
            threshold += digit.to(tl.int64) << shift
    return written


@triton.jit
def _place_of(column, k, skip):
    """Where a row's candidates are: its best of before, k columns from ``skip`` on, and what was appended from 2 k on."""
    return tl.where(column < k, skip + column, column + k)


@triton.jit(do_not_specialize=SCALARS)
def clustered_topk_select_kernel(
    p_z, p_w, p_bias, p_allowed, p_exclude, p_bounds, width, first_row, p_parent, p_lse, p_count, p_keys, p_tau,
    p_scores, p_items, num_rows, num_entries, lo, k, capacity, stride, level, is_last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, EXCLUDE: tl.constexpr, MAY_OVERFLOW: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    """A row's best k keys, descending, and the score of the last one into tau (R,), which is -inf if there are fewer.

    A row of keys (R, stride) has k columns for the best after even levels, k for those after odd ones, and ``count`` appended
    keys, ``capacity`` at most. If ``is_last``, results go to scores and items (R, k) instead. Without COMPARE, keys that do
    not count become EMPTY, as do the columns that the best are meant for, and nothing else is done.
    """
    o = tl.arange(0, BLOCK)
    o_other = tl.arange(0, BLOCK // 2)
    before = ((level + 1) % 2) * k
    after = (level % 2) * k
    first = tl.where(level == 0, k, 0)  # there are no best yet
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        count = tl.load(p_count + row)
        p_row = p_keys + row * stride.to(tl.int64)
        begin, end = excluded_range(p_bounds, row, width, first_row, EXCLUDE)
        if MAY_OVERFLOW:  # noqa: SIM102 (known when the kernel is compiled)
            if count > capacity:
                count = _search_row(
                    p_z, p_w, p_bias, p_allowed, p_exclude, p_parent, p_lse, p_row + 2 * k, row, begin, end, num_entries,
                    lo, k, D, BLOCK_D, BLOCK_V, HAS_BIAS, HAS_ALLOWED, EXCLUDE,
                )  # fmt: skip
                # Threads read what others have stored.
                tl.debug_barrier()
        size = k + count
        if EXCLUDE != "none":
            for i in tl.range(0, tl.cdiv(count, BLOCK)):
                place = i * BLOCK + o + 2 * k
                keys = tl.load(p_row + place, mask=place < size + k, other=_EMPTY)
                items = (keys & 0xFFFFFFFF) ^ MAX_ID
                for e in tl.range(begin, end):
                    keys = tl.where(items == tl.load(p_exclude + e), _EMPTY, keys)
                tl.store(p_row + place, keys, mask=place < size + k)
            tl.debug_barrier()
        if COMPARE:
            found = tl.zeros((BLOCK,), tl.int32)
            for i in tl.range(first // BLOCK, tl.cdiv(size, BLOCK)):
                column = i * BLOCK + o
                m_column = (column >= first) & (column < size)
                keys = tl.load(p_row + _place_of(column, k, before), mask=m_column, other=_EMPTY)
                better = tl.zeros((BLOCK, BLOCK // 2), tl.int32)
                for i_other in tl.range(first // (BLOCK // 2), tl.cdiv(size, BLOCK // 2)):
                    other = i_other * (BLOCK // 2) + o_other
                    m_other = (other >= first) & (other < size)
                    others = tl.load(p_row + _place_of(other, k, before), mask=m_other, other=_EMPTY)
                    better += (others[None, :] > keys[:, None]).to(tl.int32)
                place = tl.sum(better, 1)
                m_item = keys > _EMPTY
                found += m_item.to(tl.int32)
                m_item = m_item & (place < k)
                score = number_of((keys >> 32).to(tl.int32))
                if is_last != 0:
                    result = row * k.to(tl.int64) + place
                    tl.store(p_scores + result, score, mask=m_item)
                    tl.store(p_items + result, 0x7FFFFFFF - (keys & 0xFFFFFFFF), mask=m_item)
                else:
                    tl.store(p_row + after + place, keys, mask=m_item)
                    tl.store(p_tau + row + 0 * place, score, mask=m_item & (place == k - 1))
            number = tl.sum(found, 0)
            for i in tl.range(0, tl.cdiv(k, BLOCK)):
                place = i * BLOCK + o
                m_empty = (place >= number) & (place < k)
                if is_last != 0:
                    result = row * k.to(tl.int64) + place
                    tl.store(p_scores + result, tl.full((BLOCK,), -float("inf"), tl.float32), mask=m_empty)
                    tl.store(p_items + result, tl.full((BLOCK,), -1, tl.int64), mask=m_empty)
                else:
                    tl.store(p_row + after + place, tl.full((BLOCK,), _EMPTY, tl.int64), mask=m_empty)
        else:
            empty = tl.full((BLOCK,), _EMPTY, tl.int64)
            for i in tl.range(0, tl.cdiv(k, BLOCK)):
                place = i * BLOCK + o
                tl.store(p_row + after + place, empty, mask=place < k)
                tl.store(p_row + before + place, empty, mask=place < first)
            for i in tl.range(0, tl.cdiv(capacity - count, BLOCK)):
                place = count + i * BLOCK + o
                tl.store(p_row + 2 * k + place, empty, mask=place < capacity)


# Launches


def select(
    level: Level, z: Tensor, allowed: Tensor | None, excluded: Excluded, parent: Tensor, lse: Tensor, count: Tensor,
    keys: Tensor, k: int, capacity: int, tau: Tensor, scores: Tensor, items: Tensor, number: int, is_last: bool,
) -> None:  # fmt: skip
    """Merge what was appended to keys (R, 2 k + ...) in level ``number`` into every row's best and tau (R,).

    The last level's best go to scores and items (R, k).
    """
    compare = k + capacity <= MAX_COMPARED
    overflow = capacity < level.num_entries
    block_v = configs.tile_for("topk_exhaustive", level.rank, z.dtype, architecture(z.device)).block_v
    launch(
        clustered_topk_select_kernel, num_processors(z.device) * 8, z,
        z, level.weight, bias_pointer(level, z), pointer(allowed, z), *excluded.args(z), parent, lse, count, keys, tau,
        scores, items, z.shape[0], level.num_entries, level.lo, k, capacity, keys.shape[1], number, int(is_last),
        **_select_constants(
            level.rank, block_v, level.bias is not None, allowed is not None, excluded.kind, overflow, compare
        ),
        num_warps=ROW_WARPS, num_stages=1, **row_sums(level.rank),
    )  # fmt: skip
    if not compare:
        best = keys[:, : 2 * k + capacity].topk(k, dim=1).values
        if is_last:
            found = decode(best)
            scores.copy_(found[0])
            items.copy_(found[1])
        else:
            after = number % 2 * k
            keys[:, after : after + k] = best
            tau[: z.shape[0]] = decode(best[:, -1])[0]


def _select_constants(
    rank: int, block_v: int, bias: bool, allowed: bool, exclude: str, overflow: bool, compare: bool
) -> dict[str, Any]:
    # Where no row overflows, levels of all ranks share a kernel.
    width, block_v = (rank, block_v) if overflow else (1, 16)
    return {
        "D": width, "BLOCK_D": padded_rank(width), "BLOCK_V": block_v, "BLOCK": COMPARE_BLOCK,
        "HAS_BIAS": bias and overflow, "HAS_ALLOWED": allowed and overflow, "EXCLUDE": exclude,
        "MAY_OVERFLOW": overflow, "COMPARE": compare,
    }  # fmt: skip


def aot_cases(arch: int) -> AotCases:
    """Both ways to a row's best, and the search of a row at every rank and dtype."""
    known = dict.fromkeys(("p_exclude", "p_bounds", "p_keys", "p_items"), "*i64")
    known["p_allowed"] = "*i8"
    for dtype in DTYPES:
        types = pointer_types(clustered_topk_select_kernel, dtype, known)
        if dtype == DTYPES[1]:
            for name, compare in (("select", True), ("filter", False)):
                constants = _select_constants(64, 64, True, True, "bounds", False, compare)
                yield aot_case(f"topk_{name}", clustered_topk_select_kernel, types, constants, ROW_WARPS, 1)
        for rank in configs.BLOCK_DS:
            block_v = configs.tile_for("topk_exhaustive", rank, dtype, arch).block_v
            yield aot_case(
                f"topk_select/{TYPE_NAMES[dtype]}/{rank}", clustered_topk_select_kernel, types,
                _select_constants(rank, block_v, True, True, "bounds", True, True), ROW_WARPS, 1,
            )  # fmt: skip
