"""Passes over a level's entries that search and rank have in common: the bound, and the logits beyond a threshold.

The bound pass finds, without an exponential per logit, a row's largest logit and a lower bound of its log-sum-exp. Items are
dealt to chunks; for n logits with largest M and sum S, Jensen's inequality on the others gives

    sum exp(s_i) >= exp(M) + (n - 1) exp((S - M) / (n - 1)),          or n exp(S / n) without naming one,

and sums over chunks add up to a bound L <= log sum exp(s_i). A level's items then score at most log p(parent) + max s - L.

A chunk is a column of BLOCK_V that a part of the entries goes through, in every ``parts``-th tile: items far apart, because
neighbours in a catalogue sorted by frequency score alike. The largest logits of chunks ("peaks") give a threshold: if m
chunks have peaks of at least x, then m different items have such logits.
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import units_of
from .clustered_softmax_plan import Grid, Level
from .clustered_topk_rows import SLACK, Rows, bias_pointer, log_prob_of, pointer_types, slack_of
from .common import (
    DTYPES,
    LOG2E,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    dot_precision,
    launch,
    load_rows,
    padded_rank,
)
from .configs import Tile

SCALARS = ["first", "last", "num_entries", "target_units", "min_parts"]
# Tiles that a chunk's mean is taken over: short enough for a tight bound, long enough for the exponentials not to count.
GROUP = 64
# Three tf32 products of split operands serve fp32 up to this rank: above, their copies spill beside the search's arrays.
MAX_SPLIT_RANK = 64
MAX_ID = tl.constexpr(2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a pass is cut into units, in a tile of rows and a part of the entries each; the device knows how many there are.

    ``min_parts``: the entries are cut into as many at least. ``max_units``: units at most.
    """

    tile: Tile
    num_programs: int
    target_units: int
    min_parts: int
    max_units: int

    @staticmethod
    def of(tile: Tile, num_rows: int, num_entries: int, device: torch.device, chunks: int = 0) -> "Cut":
        """With at least ``chunks`` chunks, or as many as there are entries."""
        grid = Grid.of(tile, num_rows, device)
        parts = min(max(1, -(-chunks // tile.block_v)), -(-num_entries // tile.block_v))
        units = max(grid.max_units, parts * -(-num_rows // tile.block_t))
        return Cut(tile, grid.num_programs, grid.target_units, parts, units)


# Kernels


@triton.jit
def cut_of(
    p_offsets, first, last, num_entries, target_units, min_parts, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A run's start, number of rows, tiles of rows, and parts. Part p has the tiles p, p + parts, p + 2 parts, ..."""
    start, count, token_tiles, entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    return start, count, token_tiles, tl.minimum(tl.maximum(parts, min_parts), entry_tiles)


@triton.jit
def whole_tiles(part, parts, num_entries, BLOCK_V: tl.constexpr):
    """A part's number of tiles that do not reach beyond the last entry, and of those that do (0 or 1)."""
    full = num_entries // BLOCK_V
    ragged = tl.where((full * BLOCK_V < num_entries) & (full % parts == part), 1, 0)
    return tl.cdiv(tl.maximum(full - part, 0), parts), ragged


@triton.jit
def logits_of(
    b_z, p_w, p_bias, v, num_entries, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (T, V) of entries v; if MASKED, v may reach beyond the last one, and logits there mean nothing."""
    b_w = load_rows(p_w, v, o_d, v < num_entries, D, BLOCK_D, MASKED)
    s = tl.dot(b_z, tl.trans(b_w), input_precision=PRECISION)
    if HAS_BIAS:
        if MASKED:
            s += tl.load(p_bias + v, mask=v < num_entries, other=0.0).to(tl.float32)[None, :]
        else:
            s += tl.load(p_bias + v).to(tl.float32)[None, :]
    return s


@triton.jit(do_not_specialize=[*SCALARS, "lo"])
def clustered_topk_bound_kernel(
    p_z, p_w, p_bias, p_allowed, p_order, p_offsets, p_top, p_reference, p_total, p_peaks,
    first, last, num_entries, target_units, min_parts, lo,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, WITH_PEAKS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Per unit and row: the largest logit, and the bound's sum relative to 2^reference; peaks (units, BLOCK_T, BLOCK_V).

    With HAS_ALLOWED, largest logits and peaks are those of allowed items, the bound is of all.
    """
    start, count, token_tiles, parts = cut_of(
        p_offsets, first, last, num_entries, target_units, min_parts, BLOCK_T, BLOCK_V
    )
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    for unit in tl.range(tl.program_id(0), token_tiles * parts, tl.num_programs(0)):
        part = unit // token_tiles
        t = (unit % token_tiles) * BLOCK_T + o_t
        rows = tl.load(p_order + start + t, mask=t < count, other=0)
        b_z = load_rows(p_z, rows, o_d, t < count, D, BLOCK_D, True)
        steps, ragged = whole_tiles(part, parts, num_entries, BLOCK_V)
        m = tl.full((BLOCK_T,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        # Without peaks to store, a maximum per row will do.
        b_peak = tl.full((BLOCK_T, BLOCK_V if WITH_PEAKS else 1), -float("inf"), tl.float32)
        for begin in tl.range(0, steps, GROUP):
            end = tl.minimum(begin + GROUP, steps)
            b_top = tl.full((BLOCK_T, BLOCK_V), -float("inf"), tl.float32)
            b_sum = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for i in tl.range(begin, end, num_stages=STAGES):
                v = (part + i * parts) * BLOCK_V + o_v
                s = logits_of(b_z, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, False, PRECISION)
                b_sum += s
                if HAS_ALLOWED:
                    s = tl.where((tl.load(p_allowed + lo + v) != 0)[None, :], s, -float("inf"))
                b_top = tl.maximum(b_top, s)
            b_peak = tl.maximum(b_peak, b_top if WITH_PEAKS else tl.max(b_top, 1)[:, None])
            size = (end - begin).to(tl.float32)
            others = tl.where(b_top > -float("inf"), size - 1.0, size)
            mean = (b_sum - tl.where(b_top > -float("inf"), b_top, 0.0)) / tl.maximum(others, 1.0) * LOG2E
            # Terms may be dropped from a lower bound: those of -inf and NaN are.
            mean = tl.where((mean > -1e30) & (others > 0.0), mean, -1e30)
            top = tl.maximum(m, tl.max(tl.maximum(b_top * LOG2E, mean), 1))
            terms = tl.exp2(b_top * LOG2E - top[:, None]) + others * tl.exp2(mean - top[:, None])
            total = total * tl.exp2(m - top) + tl.sum(terms, 1)
            m = top
        for _i in tl.range(0, ragged, num_stages=1):
            v = (num_entries // BLOCK_V) * BLOCK_V + o_v
            s = logits_of(b_z, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, True, PRECISION)
            s = tl.where((v < num_entries)[None, :], s, -float("inf"))
            top = tl.maximum(m, tl.max(s, 1) * LOG2E)
            total = total * tl.exp2(m - top) + tl.sum(tl.exp2(s * LOG2E - top[:, None]), 1)
            m = top
            if HAS_ALLOWED:
                allowed = tl.load(p_allowed + lo + v, mask=v < num_entries, other=0) != 0
                s = tl.where(allowed[None, :], s, -float("inf"))
            b_peak = tl.maximum(b_peak, s if WITH_PEAKS else tl.max(s, 1)[:, None])
        place = unit * BLOCK_T + o_t
        tl.store(p_top + place, tl.max(b_peak, 1))
        tl.store(p_reference + place, m)
        tl.store(p_total + place, total)
        if WITH_PEAKS:
            tl.store(p_peaks + place.to(tl.int64)[:, None] * BLOCK_V + o_v[None, :], b_peak)


@triton.jit
def ordered(x):
    """Bits of fp32 numbers as integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(score, item):
    """One integer that orders (score, id) as results are: a larger score first, then a smaller id. See ``decode``."""
    # 0 and -0 are one score; the exclusive or is MAX_ID - item.
    high = ordered(tl.where(score == 0.0, 0.0, score)).to(tl.int64) << 32
    return high | (item ^ MAX_ID).to(tl.int64)


@triton.jit
def _append_tile(
    b_z, b_least, b_lse, b_parent, rows, offset, p_w, p_bias, p_allowed, p_count, p_keys, v, num_entries, lo, capacity,
    stride, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = logits_of(b_z, p_w, p_bias, v, num_entries, o_d, D, BLOCK_D, HAS_BIAS, MASKED, PRECISION)
    hit = s >= b_least[:, None]
    if MASKED:
        hit = hit & (v < num_entries)[None, :]
    if HAS_ALLOWED:
        hit = hit & (tl.load(p_allowed + lo + v, mask=v < num_entries, other=0) != 0)[None, :]
    if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
        score = log_prob_of(s, b_lse[:, None], b_parent[:, None])
        hit = hit & (score > -float("inf"))
        ones = hit.to(tl.int32)
        added = tl.sum(ones, 1)
        # The order of keys in the buffer is whoever came first; what is read from it does not depend on the order.
        base = tl.atomic_add(p_count + rows, added, mask=added > 0, sem="relaxed")
        place = base[:, None] + tl.cumsum(ones, 1) - ones
        key = key_of(score, lo + v[None, :])
        first = rows * stride + offset
        tl.store(p_keys + first[:, None] + place, key, mask=hit & (place < capacity))


@triton.jit(do_not_specialize=[*SCALARS, "lo", "offset", "capacity", "stride"])
def clustered_topk_append_kernel(
    p_z, p_w, p_bias, p_allowed, p_order, p_offsets, p_floor, p_tau, p_parent, p_lse, p_count, p_keys,
    first, last, num_entries, target_units, min_parts, lo, offset, capacity, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, SLACK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Append the key of every allowed item that may be among a row's best: count (R,), keys (R, stride) from ``offset`` on.

    Logits below ``floor`` are below that of enough other items of the level, scores below ``tau`` below those of enough
    items found before. Beyond ``capacity`` keys are counted, and not stored.
    """
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
        b_lse = tl.load(p_lse + rows)
        b_parent = tl.load(p_parent + rows)
        b_floor = tl.load(p_floor + rows)
        b_tau = tl.load(p_tau + rows)
        by_floor = b_floor - slack_of(b_floor, b_lse, b_parent, SLACK)
        by_tau = (b_tau - b_parent) + b_lse - slack_of(b_tau, b_lse, b_parent, SLACK)
        b_least = tl.where(m_t, tl.maximum(by_floor, by_tau), float("inf"))
        steps, ragged = whole_tiles(part, parts, num_entries, BLOCK_V)
        for i in tl.range(0, steps, num_stages=STAGES):
            v = (part + i * parts) * BLOCK_V + o_v
            _append_tile(
                b_z, b_least, b_lse, b_parent, rows, offset, p_w, p_bias, p_allowed, p_count, p_keys, v, num_entries,
                lo, capacity, stride, o_d, D, BLOCK_D, HAS_BIAS, HAS_ALLOWED, False, PRECISION,
            )  # fmt: skip
        for _i in tl.range(0, ragged, num_stages=1):
            v = (num_entries // BLOCK_V) * BLOCK_V + o_v
            _append_tile(
                b_z, b_least, b_lse, b_parent, rows, offset, p_w, p_bias, p_allowed, p_count, p_keys, v, num_entries,
                lo, capacity, stride, o_d, D, BLOCK_D, HAS_BIAS, HAS_ALLOWED, True, PRECISION,
            )  # fmt: skip


# Launches


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the bound pass left, per unit: largest logit, reference and total (units, BLOCK_T), and peaks or nothing."""

    cut: Cut
    top: Tensor
    reference: Tensor
    total: Tensor
    peaks: Tensor


def bound(level: Level, z: Tensor, rows: Rows, allowed: Tensor | None, chunks: int) -> Bounds:
    """Launch the bound pass over a level's items for the given rows of z (R, d_j); with peaks of ``chunks`` chunks or more."""
    tile = configs.tile_for("topk_bound", level.rank, z.dtype, architecture(z.device))
    cut = Cut.of(tile, z.shape[0], level.num_entries, z.device, chunks)
    count = cut.max_units * tile.block_t
    top, reference, total = torch.empty(3, count, dtype=torch.float32, device=z.device).unbind(0)
    peaks = torch.empty(count * tile.block_v if chunks else 0, dtype=torch.float32, device=z.device)
    launch(
        clustered_topk_bound_kernel, cut.num_programs, z,
        z, level.weight, bias_pointer(level, z), z if allowed is None else allowed, rows.order, rows.offsets,
        top, reference, total, peaks,
        rows.first, rows.last, level.num_entries, cut.target_units, cut.min_parts, level.lo,
        **_bound_constants(level.rank, z.dtype, tile, level.bias is not None, allowed is not None, chunks > 0),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return Bounds(cut, top, reference, total, peaks)


def append(
    level: Level, z: Tensor, rows: Rows, allowed: Tensor | None, floor: Tensor, tau: Tensor, parent: Tensor, lse: Tensor,
    count: Tensor, keys: Tensor, offset: int, capacity: int,
) -> None:  # fmt: skip
    """Launch the append pass; ``capacity`` keys (R, stride) at most are filled in, from column ``offset`` on."""
    tile = configs.tile_for("topk_append", level.rank, z.dtype, architecture(z.device))
    cut = Cut.of(tile, z.shape[0], level.num_entries, z.device)
    launch(
        clustered_topk_append_kernel, cut.num_programs, z,
        z, level.weight, bias_pointer(level, z), z if allowed is None else allowed, rows.order, rows.offsets,
        floor, tau, parent, lse, count, keys,
        rows.first, rows.last, level.num_entries, cut.target_units, cut.min_parts, level.lo,
        offset, capacity, keys.shape[1],
        **_append_constants(level.rank, z.dtype, tile, level.bias is not None, allowed is not None),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def tile_constants(rank: int, dtype: torch.dtype, tile: Tile, bias: bool) -> dict[str, Any]:
    """Constants of every kernel with a tile of logits."""
    precision = dot_precision(dtype, rank)
    if precision == "tf32x3" and rank > MAX_SPLIT_RANK:
        precision = "ieee"
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "HAS_BIAS": bias,
        "PRECISION": precision, "STAGES": tile.num_stages,
    }  # fmt: skip


def _bound_constants(
    rank: int, dtype: torch.dtype, tile: Tile, bias: bool, allowed: bool, peaks: bool
) -> dict[str, Any]:
    own = {"HAS_ALLOWED": allowed, "WITH_PEAKS": peaks, "GROUP": GROUP}
    return tile_constants(rank, dtype, tile, bias) | own


def _append_constants(rank: int, dtype: torch.dtype, tile: Tile, bias: bool, allowed: bool) -> dict[str, Any]:
    return tile_constants(rank, dtype, tile, bias) | {"HAS_ALLOWED": allowed, "SLACK": SLACK}


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture, with bias and candidates, which need the most registers."""
    known = {"p_allowed": "*i8", "p_keys": "*i64"}
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            for name, kernel in (("bound", clustered_topk_bound_kernel), ("append", clustered_topk_append_kernel)):
                tile = configs.tile_for(f"topk_{name}", rank, dtype, arch)
                constants = (
                    _bound_constants(rank, dtype, tile, True, True, True)
                    if name == "bound"
                    else _append_constants(rank, dtype, tile, True, True)
                )
                yield aot_case(
                    f"topk_{name}/{TYPE_NAMES[dtype]}/{rank}", kernel, pointer_types(kernel, dtype, known), constants,
                    tile.num_warps, tile.num_stages,
                )  # fmt: skip
