"""Per row, between a bound pass and the rest of a level: whether the level is still of use, and a floor of its best logits."""

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import pointer
from .clustered_softmax_plan import Level
from .clustered_topk_rows import ROW_WARPS, SLACK, Rows, pointer_types, slack_of
from .clustered_topk_scan import Bounds, cut_of, ordered
from .common import DTYPES, LN2, AotCases, aot_case, launch, num_processors

_LOWEST = tl.constexpr(-(2**31))
# Bits of a threshold that are settled: 2^-13 relative. Any number of them gives a valid one, the full 32 the largest.
THRESHOLD_BITS = 22
# Parts whose maxima, and whose peaks, a program has at a time.
PRUNE_PARTS = 128
PEAK_PARTS = 32
# Peaks are folded into the columns of PEAK_PARTS parts, and stay in registers, where these are so many times the chunks asked
# for: then few of a row's best items share one.
FOLD = 4


@dataclasses.dataclass(frozen=True)
class Excluded:
    """Items never to return: row r's are items[begin] .. items[end - 1]; negative ones are padding.

    ``width``: begin is r * width, and end follows; else bounds (rows + 1,) has them. ``first``: the batch's row of row 0.
    """

    items: Tensor | None = None
    bounds: Tensor | None = None
    width: int = 0
    first: int = 0

    @staticmethod
    def of(exclude: Tensor | None, offsets: Tensor | None) -> "Excluded":
        """From exclusions as the op takes them: padded (R, m), or flat with offsets."""
        if exclude is None:
            return Excluded()
        if offsets is None:
            return Excluded(exclude.contiguous(), width=exclude.shape[1])
        return Excluded(exclude.contiguous(), offsets.contiguous())

    def from_row(self, first: int) -> "Excluded":
        """The exclusions of the rows from one on."""
        return dataclasses.replace(self, first=first)

    @property
    def kind(self) -> str:
        return "none" if self.items is None else ("padded" if self.bounds is None else "bounds")

    def args(self, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """What kernels take: items, bounds, width and first row."""
        return pointer(self.items, stand_in), pointer(self.bounds, stand_in), self.width, self.first


# Kernels


@triton.jit
def number_of(bits):
    """The inverse of ``ordered``."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def excluded_range(p_bounds, row, width, first_row, EXCLUDE: tl.constexpr):
    """Where a row's exclusions begin and end."""
    begin = (row + first_row).to(tl.int64) * width
    end = begin + width
    if EXCLUDE == "bounds":
        begin = tl.load(p_bounds + first_row + row)
        end = tl.load(p_bounds + first_row + row + 1)
    return begin, end


@triton.jit
def _peaks_of(p_peaks, part, parts, r, token_tiles, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """A row's peaks (parts, BLOCK_V) of a block of parts, -inf beyond the last one."""
    unit = part * token_tiles + r // BLOCK_T
    place = (unit * BLOCK_T + r % BLOCK_T).to(tl.int64)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    return tl.load(p_peaks + place, mask=(part < parts)[:, None], other=-float("inf"))


@triton.jit
def _settle(p_peaks, need, r, token_tiles, parts, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
            FOLDED: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """A number that at least ``need`` of a row's peaks reach, close to the largest such; -inf if there are fewer.

    FOLDED: of the largest peaks of every BLOCK_P-th part, chunks that are fewer and larger.
    """
    o_p = tl.arange(0, BLOCK_P)
    blocks = tl.cdiv(parts, BLOCK_P)
    folded = tl.full((BLOCK_P, BLOCK_V), -float("inf"), tl.float32)
    if FOLDED:
        for i_p in tl.range(0, blocks):
            folded = tl.maximum(
                folded, _peaks_of(p_peaks, i_p * BLOCK_P + o_p, parts, r, token_tiles, BLOCK_T, BLOCK_V)
            )
    threshold = tl.full((), _LOWEST, tl.int64)
    step = tl.full((), 1 << 31, tl.int64)
    for _bit in tl.range(0, BITS):
        trial = threshold + step
        if FOLDED:
            reached = ((ordered(folded).to(tl.int64) >= trial) & (o_p < parts)[:, None]).to(tl.int32)
        else:
            reached = tl.zeros((BLOCK_P, BLOCK_V), tl.int32)
            for i_p in tl.range(0, blocks):
                part = i_p * BLOCK_P + o_p
                peak = _peaks_of(p_peaks, part, parts, r, token_tiles, BLOCK_T, BLOCK_V)
                found = (ordered(peak).to(tl.int64) >= trial) & (part < parts)[:, None]
                reached += found.to(tl.int32)
        threshold = tl.where(tl.sum(tl.sum(reached, 1), 0) >= need, trial, threshold)
        step = step >> 1
    # Numbers below -inf's are no numbers.
    return tl.where(threshold > -2139095041, number_of(threshold.to(tl.int32)), -float("inf"))


@triton.jit(
    do_not_specialize=["width", "first_row", "first", "last", "num_entries", "target_units", "min_parts", "lo", "k"]
)
def clustered_topk_prune_kernel(
    p_top, p_reference, p_total, p_peaks, p_order, p_offsets, p_exclude, p_bounds, width, first_row,
    p_parent, p_tau, p_useful, p_floor, first, last, num_entries, target_units, min_parts, lo, k,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, EXCLUDE: tl.constexpr, PEAKS: tl.constexpr, WITH_FLOOR: tl.constexpr,
    BITS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """useful, by place in the order: whether an item may score tau or more. WITH_FLOOR: a logit that k allowed items reach.

    An item's score is parent + s - lse <= parent + top - L. Of k + (exclusions in the level) items k are allowed, so
    the best k have logits from the peak on that so many chunks reach. PEAKS: "none", whence a floor of -inf, "all" or "folded".
    """
    start, count, token_tiles, parts = cut_of(
        p_offsets, first, last, num_entries, target_units, min_parts, BLOCK_T, BLOCK_V
    )
    o_q = tl.arange(0, BLOCK_Q)
    for r in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(p_order + start + r)
        top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        m = tl.full((BLOCK_Q,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        for i_q in tl.range(0, tl.cdiv(parts, BLOCK_Q)):
            part = i_q * BLOCK_Q + o_q
            m_q = part < parts
            place = (part * token_tiles + r // BLOCK_T) * BLOCK_T + r % BLOCK_T
            top = tl.maximum(top, tl.load(p_top + place, mask=m_q, other=-float("inf")))
            reference = tl.load(p_reference + place, mask=m_q, other=-1e30)
            highest = tl.maximum(m, reference)
            more = tl.load(p_total + place, mask=m_q, other=0.0)
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
        tl.store(p_useful + r, useful)
        if WITH_FLOOR:
            floor = tl.full((), -float("inf"), tl.float32)
            if PEAKS != "none":
                need = k
                if EXCLUDE != "none":
                    begin, end = excluded_range(p_bounds, row, width, first_row, EXCLUDE)
                    here = tl.zeros((BLOCK_Q,), tl.int32)
                    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_Q)):
                        o = begin + i * BLOCK_Q + o_q
                        item = tl.load(p_exclude + o, mask=o < end, other=-1)
                        here += ((item >= lo) & (item < lo + num_entries)).to(tl.int32)
                    need += tl.sum(here, 0)
                floor = _settle(
                    p_peaks, need, r, token_tiles, parts, BLOCK_T, BLOCK_V, BLOCK_P, PEAKS == "folded", BITS
                )
            tl.store(p_floor + row, floor)


# Launches


def prune(
    level: Level, bounds: Bounds, rows: Rows, parent: Tensor, tau: Tensor, useful: Tensor, floor: Tensor | None = None,
    excluded: Excluded | None = None, allowed: Tensor | None = None, k: int = 0, chunks: int = 0,
) -> None:  # fmt: skip
    """Write useful int32, by place in ``rows``, and floor (R,) fp32 at the rows: -inf without peaks, of which there are
    ``chunks`` or more."""
    excluded = excluded or Excluded()
    cut = bounds.cut
    launch(
        clustered_topk_prune_kernel, num_processors(tau.device) * 8, tau,
        bounds.top, bounds.reference, bounds.total, bounds.peaks, rows.order, rows.offsets, *excluded.args(tau),
        parent, tau, useful, pointer(floor, tau),
        rows.first, rows.last, level.num_entries, cut.target_units, cut.min_parts, level.lo, k,
        **_prune_constants(cut.tile, allowed is not None, excluded.kind, chunks, floor is not None),
        num_warps=ROW_WARPS, num_stages=1,
    )  # fmt: skip


def _prune_constants(tile: configs.Tile, allowed: bool, exclude: str, chunks: int, floor: bool) -> dict[str, Any]:
    peaks = "none" if chunks == 0 else ("folded" if FOLD * chunks <= PEAK_PARTS * tile.block_v else "all")
    return {
        "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_P": PEAK_PARTS, "BLOCK_Q": PRUNE_PARTS,
        "HAS_ALLOWED": allowed, "EXCLUDE": exclude, "PEAKS": peaks, "WITH_FLOOR": floor, "BITS": THRESHOLD_BITS,
        "SLACK": SLACK,
    }  # fmt: skip


def aot_cases(arch: int) -> AotCases:
    """Every way to find a floor."""
    known = dict.fromkeys(("p_exclude", "p_bounds"), "*i64") | {"p_useful": "*i32"}
    tile = configs.tile_for("topk_bound", 64, DTYPES[1], arch)
    types = pointer_types(clustered_topk_prune_kernel, DTYPES[1], known)
    for name, chunks in (("none", 0), ("folded", 1), ("all", PEAK_PARTS * tile.block_v)):
        constants = _prune_constants(tile, True, "bounds", chunks, True)
        yield aot_case(f"topk_prune_{name}", clustered_topk_prune_kernel, types, constants, ROW_WARPS, 1)
