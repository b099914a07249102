"""Per row: which rows a level is still of use to, and which of the appended keys are the best.

A key is one int64 that orders (score, id) as results are, so that a row's best are its largest keys, whatever order they
came in. Rows with more keys than fit are searched by a kernel that has no buffer to overflow; it ends at once if there are none.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax_plan import Level
from .clustered_topk_rows import SLACK, Rows, bias_pointer, log_prob_of, pointer_types, slack_of
from .clustered_topk_scan import MAX_ID, Bounds, cut_of, key_of, ordered
from .common import (
    DTYPES,
    LN2,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    launch,
    num_processors,
    padded_rank,
)

# Key of no item: score -inf and, since it is MAX_ID minus the id that is kept, id -1.
EMPTY = (-(2**31) + 0x7FFFFF) * 2**32 + 2**31
_EMPTY = tl.constexpr(EMPTY)
_LOWEST = tl.constexpr(-(2**31))
# Bits of a threshold that are settled: 2^-13 relative. Any number of them gives a valid one, the full 32 the largest.
THRESHOLD_BITS = 22
ROW_WARPS = 4


class Excluded(NamedTuple):
    """Items never to return: row r's are items[bounds[r]] .. items[bounds[r + 1] - 1]; negative ones are padding."""

    items: Tensor
    bounds: Tensor

    @staticmethod
    def of(exclude: Tensor | None, offsets: Tensor | None, num_rows: int, device: torch.device) -> "Excluded":
        """From exclusions as the op takes them: padded (R, m), or flat with offsets."""
        if exclude is None:
            none = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
            return Excluded(none, none)
        if offsets is not None:
            return Excluded(exclude.contiguous(), offsets.contiguous())
        return Excluded(exclude.reshape(-1), torch.arange(num_rows + 1, device=device) * exclude.shape[1])

    def of_rows(self, rows: slice) -> "Excluded":
        """The exclusions of a slice of the rows."""
        return Excluded(self.items, self.bounds[rows.start : rows.stop + 1].clone())


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores fp32 and items int64 of keys."""
    high = (keys >> 32).to(torch.int32)
    scores = (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores, MAX_ID.value - (keys & 0xFFFFFFFF)


# Kernels


@triton.jit
def _settle(p_peaks, need, r, token_tiles, parts, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
            BITS: tl.constexpr):  # fmt: skip
    """A number that at least ``need`` of a row's peaks reach, close to the largest such; -inf if there are fewer."""
    o_p = tl.arange(0, BLOCK_P)
    o_v = tl.arange(0, BLOCK_V)
    threshold = tl.full((), _LOWEST, tl.int64)
    step = tl.full((), 1 << 31, tl.int64)
    for _bit in tl.range(0, BITS):
        trial = threshold + step
        reached = tl.zeros((BLOCK_P, BLOCK_V), tl.int32)
        for i_p in tl.range(0, tl.cdiv(parts, BLOCK_P)):
            part = i_p * BLOCK_P + o_p
            unit = part * token_tiles + r // BLOCK_T
            place = (unit * BLOCK_T + r % BLOCK_T).to(tl.int64)[:, None] * BLOCK_V + o_v[None, :]
            peak = tl.load(p_peaks + place, mask=(part < parts)[:, None], other=-float("inf"))
            found = (ordered(peak).to(tl.int64) >= trial) & (part < parts)[:, None]
            reached += found.to(tl.int32)
        threshold = tl.where(tl.sum(tl.sum(reached, 1), 0) >= need, trial, threshold)
        step = step >> 1
    # The inverse of ``ordered``; numbers below -inf's are no numbers.
    bits = threshold.to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(threshold > -2139095041, value, -float("inf"))


@triton.jit(do_not_specialize=["first", "last", "num_entries", "target_units", "min_parts", "lo", "k"])
def clustered_topk_prune_kernel(
    p_top, p_reference, p_total, p_peaks, p_order, p_offsets, p_exclude, p_bounds, p_parent, p_tau, p_useful, p_floor,
    first, last, num_entries, target_units, min_parts, lo, k,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    WITH_PEAKS: tl.constexpr, BITS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Per row of the bound pass: useful, whether an item may score tau or more; floor, a logit that k allowed items reach.

    An item's score is parent + s - lse <= parent + top - L. Of k + (exclusions in the level) items k are allowed, so
    the best k have logits from the peak on that so many chunks reach.
    """
    start, count, token_tiles, parts = cut_of(
        p_offsets, first, last, num_entries, target_units, min_parts, BLOCK_T, BLOCK_V
    )
    o_p = tl.arange(0, BLOCK_P)
    for r in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(p_order + start + r)
        top = tl.full((BLOCK_P,), -float("inf"), tl.float32)
        m = tl.full((BLOCK_P,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_P,), tl.float32)
        for i_p in tl.range(0, tl.cdiv(parts, BLOCK_P)):
            part = i_p * BLOCK_P + o_p
            m_p = part < parts
            place = (part * token_tiles + r // BLOCK_T) * BLOCK_T + r % BLOCK_T
            top = tl.maximum(top, tl.load(p_top + place, mask=m_p, other=-float("inf")))
            reference = tl.load(p_reference + place, mask=m_p, other=-1e30)
            highest = tl.maximum(m, reference)
            more = tl.load(p_total + place, mask=m_p, other=0.0)
            total = total * tl.exp2(m - highest) + more * tl.exp2(reference - highest)
            m = highest
        best = tl.max(top, 0)
        highest = tl.max(m, 0)
        least_lse = (highest + tl.log2(tl.sum(total * tl.exp2(m - highest), 0))) * LN2
        parent = tl.load(p_parent + row)
        tau = tl.load(p_tau + row)
        slack = tl.maximum(slack_of(best, least_lse, parent, SLACK), slack_of(tau, 0.0, 0.0, SLACK))
        # Where something is NaN the answer is yes.
        useful = tl.where(((best - least_lse) + parent) + slack < tau, 0, 1)
        if HAS_ALLOWED:
            useful = tl.where(best > -float("inf"), useful, 0)
        tl.store(p_useful + row, useful)
        if WITH_PEAKS:
            begin = tl.load(p_bounds + row)
            end = tl.load(p_bounds + row + 1)
            here = tl.zeros((BLOCK_V,), tl.int32)
            for i in tl.range(0, tl.cdiv(end - begin, BLOCK_V)):
                o = begin + i * BLOCK_V + tl.arange(0, BLOCK_V)
                item = tl.load(p_exclude + o, mask=o < end, other=-1)
                here += ((item >= lo) & (item < lo + num_entries)).to(tl.int32)
            need = k + tl.sum(here, 0)
            tl.store(p_floor + row, _settle(p_peaks, need, r, token_tiles, parts, BLOCK_T, BLOCK_V, BLOCK_P, BITS))


@triton.jit(do_not_specialize=["num_rows", "offset", "capacity"])
def clustered_topk_filter_kernel(p_exclude, p_bounds, p_count, p_keys, num_rows, offset, capacity, BLOCK: tl.constexpr):
    """Make keys (R, offset + capacity) from column ``offset`` on EMPTY where none was stored or the item is excluded."""
    stride = (offset + capacity).to(tl.int64)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        count = tl.minimum(tl.load(p_count + row), capacity)
        begin = tl.load(p_bounds + row)
        end = tl.load(p_bounds + row + 1)
        for i in tl.range(0, tl.cdiv(capacity, BLOCK)):
            o = i * BLOCK + tl.arange(0, BLOCK)
            place = row * stride + offset + o
            keys = tl.load(p_keys + place, mask=o < count, other=_EMPTY)
            items = (keys & 0xFFFFFFFF) ^ MAX_ID
            for e in tl.range(begin, tl.where(i * BLOCK < count, end, begin)):
                keys = tl.where(items == tl.load(p_exclude + e), _EMPTY, keys)
            tl.store(p_keys + place, keys, mask=o < capacity)


@triton.jit(do_not_specialize=["num_rows", "num_entries", "lo", "k", "offset", "capacity"])
def clustered_topk_exhaustive_kernel(
    p_z, p_w, p_bias, p_allowed, p_exclude, p_bounds, p_parent, p_lse, p_count, p_keys,
    num_rows, num_entries, lo, k, offset, capacity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    """For rows of which too many keys were found, the best k of the level in place of what was stored.

    A program has one row at a time and goes through the items five times, in order of ids: a byte of the k-th best
    score is settled by a histogram in each of four rounds, then keys above it are stored, and as many of the first ones
    that tie with it as are wanted. All rounds run the same instructions, so that their logits have the same bits.
    """
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    digits = tl.arange(0, 256)
    width = tl.full((), D, tl.int64)
    stride = (offset + capacity).to(tl.int64)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        if tl.load(p_count + row) > capacity:
            b_z = tl.load(p_z + row * width + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            lse = tl.load(p_lse + row)
            parent = tl.load(p_parent + row)
            begin = tl.load(p_bounds + row)
            end = tl.load(p_bounds + row + 1)
            place = row * stride + offset
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
                        tl.store(p_keys + place + o, key, mask=take > 0)
                        ties += tl.sum(tie, 0)
                        written += tl.sum(take, 0)
                if step < 4:
                    reach = tl.cumsum(histogram, 0, reverse=True)  # values from a digit on
                    need = tl.minimum(need, tl.max(reach, 0))
                    digit = tl.sum((reach >= need).to(tl.int32), 0) - 1
                    need -= tl.sum(tl.where(digits > digit, histogram, 0), 0)
                    threshold += digit.to(tl.int64) << shift
            tl.store(p_count + row, written)


# Launches


def prune(
    level: Level, bounds: Bounds, rows: Rows, excluded: Excluded | None, allowed: bool, parent: Tensor, tau: Tensor, k: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """useful (R,) int32, 0 for rows outside ``rows``, and floor (R,) fp32, -inf without peaks or exclusions."""
    useful = torch.zeros(tau.shape[0], dtype=torch.int32, device=tau.device)
    floor = torch.full_like(tau, -torch.inf)
    peaks = bounds.peaks.numel() > 0 and excluded is not None
    items, begins = (bounds.top, bounds.top) if excluded is None else excluded
    cut = bounds.cut
    launch(
        clustered_topk_prune_kernel, num_processors(tau.device) * 8, tau,
        bounds.top, bounds.reference, bounds.total, bounds.peaks, rows.order, rows.offsets, items, begins, parent, tau,
        useful, floor, rows.first, rows.last, level.num_entries, cut.target_units, cut.min_parts, level.lo, k,
        **_prune_constants(cut.tile, allowed, peaks), num_warps=ROW_WARPS, num_stages=1,
    )  # fmt: skip
    return useful, floor


def select(
    level: Level, z: Tensor, allowed: Tensor | None, excluded: Excluded, parent: Tensor, lse: Tensor, count: Tensor,
    keys: Tensor, k: int,
) -> Tensor:  # fmt: skip
    """The k largest allowed keys of every row, descending, from the best of before (columns 0..k-1) and what was appended."""
    num_rows, capacity = keys.shape[0], keys.shape[1] - k
    block_v = configs.tile_for("topk_exhaustive", level.rank, z.dtype, architecture(z.device)).block_v
    launch(
        clustered_topk_exhaustive_kernel, num_processors(z.device) * 2, z,
        z, level.weight, bias_pointer(level, z), z if allowed is None else allowed, *excluded, parent, lse, count, keys,
        num_rows, level.num_entries, level.lo, k, k, capacity,
        **_exhaustive_constants(level.rank, block_v, level.bias is not None, allowed is not None),
        num_warps=ROW_WARPS, num_stages=1,
    )  # fmt: skip
    launch(
        clustered_topk_filter_kernel, num_processors(z.device) * 8, z,
        *excluded, count, keys, num_rows, k, capacity, BLOCK=FILTER_BLOCK, num_warps=ROW_WARPS, num_stages=1,
    )  # fmt: skip
    return keys.topk(k, dim=1).values


FILTER_BLOCK = 512
_PARTS = 16


def _prune_constants(tile: configs.Tile, allowed: bool, peaks: bool) -> dict[str, Any]:
    return {
        "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_P": _PARTS, "HAS_ALLOWED": allowed, "WITH_PEAKS": peaks,
        "BITS": THRESHOLD_BITS, "SLACK": SLACK,
    }  # fmt: skip


def _exhaustive_constants(rank: int, block_v: int, bias: bool, allowed: bool) -> dict[str, Any]:
    return {"D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_V": block_v, "HAS_BIAS": bias, "HAS_ALLOWED": allowed}


def aot_cases(arch: int) -> AotCases:
    """Per-row kernels, and the exhaustive one at every rank and dtype."""
    known = dict.fromkeys(("p_exclude", "p_bounds", "p_keys"), "*i64") | {"p_allowed": "*i8", "p_useful": "*i32"}
    tile = configs.tile_for("topk_bound", 64, DTYPES[1], arch)
    types = pointer_types(clustered_topk_prune_kernel, DTYPES[1], known)
    yield aot_case("topk_prune", clustered_topk_prune_kernel, types, _prune_constants(tile, True, True), ROW_WARPS, 1)
    types = pointer_types(clustered_topk_filter_kernel, DTYPES[1], known)
    yield aot_case("topk_filter", clustered_topk_filter_kernel, types, {"BLOCK": FILTER_BLOCK}, ROW_WARPS, 1)
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            block_v = configs.tile_for("topk_exhaustive", rank, dtype, arch).block_v
            yield aot_case(
                f"topk_exhaustive/{TYPE_NAMES[dtype]}/{rank}", clustered_topk_exhaustive_kernel,
                pointer_types(clustered_topk_exhaustive_kernel, dtype, known),
                _exhaustive_constants(rank, block_v, True, True), ROW_WARPS, 1,
            )  # fmt: skip
