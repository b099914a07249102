"""Rows that a level is evaluated for, packed without the host knowing how many.

A call on few rows waits for the host, not for the device: every array that a search keeps per row is a row of one of two
allocations, one kernel gives all of them their first values, and one kernel tests, counts and packs.
"""

import dataclasses
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clustered_softmax import pointer
from .clustered_softmax_plan import Level
from .common import DTYPES, TYPE_NAMES, AotCases, aot_case, launch, num_processors

# Score bounds are compared with this much slack, relative to the numbers they are made of. Rounding is a few units of 2^-24
# per operation, and a logit that is computed again need not have the same last bits; slack costs some work, never an item.
SLACK = 2.0**-12
ROW_WARPS = 4
# Rows per block of the kernels that fill and pack. A block counts what is in all blocks before it.
FILL_BLOCK = 1024
PACK_BLOCK = 1024

Reason = Literal["flag", "inside", "reach", "reach_outside"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """A run of rows: order[offsets[first]] .. order[offsets[last] - 1], which only the device can count.

    order (R,) int32: rows of the batch; offsets int32.
    """

    order: Tensor
    offsets: Tensor
    first: int = 0
    last: int = 1


class Scratch:
    """What a call keeps per row of a batch (R,): fp32 arrays and int32 arrays, handed out one after another.

    ``low`` fp32 and ``zero`` int32 arrays are the first ones, which :meth:`start` sets to -inf and to 0.
    """

    def __init__(self, num_rows: int, low: int, floats: int, zero: int, integers: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.stride = -(-num_rows // 4) * 4  # every array begins at a multiple of 16 bytes
        self.low, self.zero = low, zero
        self._floats = torch.empty(low + floats, self.stride, dtype=torch.float32, device=device)
        self._integers = torch.empty(zero + integers, self.stride, dtype=torch.int32, device=device)
        self._next_floats = iter(self._floats.unbind(0))
        self._next_integers = iter(self._integers.unbind(0))

    def floats(self) -> Tensor:
        """The next fp32 array."""
        return next(self._next_floats)

    def integers(self) -> Tensor:
        """The next int32 array."""
        return next(self._next_integers)

    def rows(self, first: int = 0, last: int = 1) -> Rows:
        """Room for an order and its offsets, of which there are four at most."""
        return Rows(self.integers(), self.integers(), first, last)

    def start(self, rows: Rows, zeros: Tensor | None = None) -> None:
        """Make ``rows`` all rows, and set the first arrays, and ``zeros`` (R,) int64 if given, to -inf and to 0."""
        launch(
            clustered_topk_start_kernel, num_processors(self._floats.device) * 4, self._floats,
            rows.order, rows.offsets, self._floats, self._integers, pointer(zeros, self._integers),
            self.num_rows, self.low * self.stride, self.zero * self.stride,
            HAS_ZEROS=zeros is not None, BLOCK=FILL_BLOCK, num_warps=ROW_WARPS, num_stages=1,
        )  # fmt: skip


# Kernels


@triton.jit
def log_prob_of(s, lse, parent):
    """Score of an item from its logit: one rounding wherever it is formed, so that search and rank agree on ties."""
    return (s - lse) + parent


@triton.jit
def slack_of(a, b, c, SLACK: tl.constexpr):
    """Slack of a comparison of quantities made of a, b and c."""
    return SLACK * tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), 1.0))


@triton.jit(do_not_specialize=["num_rows", "num_low", "num_zero"])
def clustered_topk_start_kernel(
    p_order, p_offsets, p_low, p_zero, p_zeros, num_rows, num_low, num_zero, HAS_ZEROS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """order (R,) = 0, 1, 2, ..., offsets = (0, R); low fp32 to -inf, zero int32 and zeros (R,) int64 to 0."""
    size = tl.maximum(num_rows, tl.maximum(num_low, num_zero))
    for i in tl.range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_order + o, o, mask=o < num_rows)
        tl.store(p_low + o, tl.full((BLOCK,), -float("inf"), tl.float32), mask=o < num_low)
        tl.store(p_zero + o, tl.zeros((BLOCK,), tl.int32), mask=o < num_zero)
        if HAS_ZEROS:
            tl.store(p_zeros + o, tl.zeros((BLOCK,), tl.int64), mask=o < num_rows)
        if i == 0:
            tl.store(p_offsets, 0)
            tl.store(p_offsets + 1, num_rows)


@triton.jit
def _are_wanted(p_flag, p_target, p_parent, p_score, r, m_r, lo, hi, REASON: tl.constexpr, SLACK: tl.constexpr):
    """Whether places r of a list are packed. "reach": where a parent, bound of its items' scores, may reach a score or is NaN."""
    wanted = m_r
    if REASON == "flag":
        wanted = wanted & (tl.load(p_flag + r, mask=m_r, other=0) != 0)
    if (REASON == "inside") or (REASON == "reach_outside"):
        target = tl.load(p_target + r, mask=m_r, other=-1)
        inside = (target >= lo) & (target < hi)
        wanted = wanted & (inside if REASON == "inside" else inside == 0)
    if (REASON == "reach") or (REASON == "reach_outside"):
        parent = tl.load(p_parent + r, mask=m_r, other=0.0)
        score = tl.load(p_score + r, mask=m_r, other=0.0)
        below = parent + slack_of(parent, score, 1.0, SLACK) < score
        wanted = wanted & (below == 0)
    return wanted


@triton.jit(do_not_specialize=["lo", "hi", "at"])
def clustered_topk_pack_kernel(
    p_flag, p_target, p_parent, p_score, p_from, p_bounds, p_order, p_offsets, lo, hi, at,
    REASON: tl.constexpr, SLACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack the wanted ones of a list of rows, in its order, into order from offsets[at] on, and set offsets[at + 1].

    The list is from[0] .. from[bounds[1] - 1]. Flags are by place in the list; target, parent and score (R,) go with a list
    of all rows. With at = 0, offsets[0] is set, too.
    """
    count = tl.load(p_bounds + 1)
    blocks = tl.maximum(tl.cdiv(count, BLOCK), 1)
    o = tl.arange(0, BLOCK)
    for i in tl.range(tl.program_id(0), blocks, tl.num_programs(0)):
        before = tl.zeros((BLOCK,), tl.int32)
        for i_before in tl.range(0, i):
            r = i_before * BLOCK + o
            before += _are_wanted(
                p_flag, p_target, p_parent, p_score, r, r < count, lo, hi, REASON, SLACK
            ).to(tl.int32)  # fmt: skip
        base = tl.sum(before, 0)
        if at > 0:
            base += tl.load(p_offsets + at)
        elif i == 0:
            tl.store(p_offsets, 0)
        r = i * BLOCK + o
        wanted = _are_wanted(p_flag, p_target, p_parent, p_score, r, r < count, lo, hi, REASON, SLACK)
        ones = wanted.to(tl.int32)
        rows = tl.load(p_from + r, mask=wanted, other=0)
        tl.store(p_order + base + tl.cumsum(ones, 0) - ones, rows, mask=wanted)
        if i == blocks - 1:
            tl.store(p_offsets + at + 1, base + tl.sum(ones, 0))


# Launches


def pack(
    source: Rows, into: Rows, reason: Reason, *, flag: Tensor | None = None, target: Tensor | None = None,
    parent: Tensor | None = None, score: Tensor | None = None, lo: int = 0, hi: int = 0,
) -> Rows:  # fmt: skip
    """``into``, filled with rows of ``source``: those with a ``flag``, with a target in lo..hi-1, or whose parent may reach a
    score ("reach_outside": and whose target is elsewhere). ``source`` begins at offset 0."""
    some = source.order
    launch(
        clustered_topk_pack_kernel, num_processors(some.device), some,
        pointer(flag, some), pointer(target, some), pointer(parent, some), pointer(score, some),
        some, source.offsets, into.order, into.offsets, lo, hi, into.last - 1,
        REASON=reason, SLACK=SLACK, BLOCK=PACK_BLOCK, num_warps=ROW_WARPS, num_stages=1,
    )  # fmt: skip
    return into


def items_of(level: Level) -> Level:
    """A level without the parent labels."""
    size = level.hi - level.lo
    if size == level.num_entries:
        return level
    bias = None if level.bias is None else level.bias[:size]
    return dataclasses.replace(level, weight=level.weight[:size], bias=bias)


def bias_pointer(level: Level, z: Tensor) -> Tensor:
    """The level's bias, or anything."""
    return pointer(level.bias, z)


def pointer_types(kernel: Any, dtype: torch.dtype, known: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments: operands of a dtype, fp32 pointers and i32 scalars unless ``known`` has others."""
    operands = dict.fromkeys(("p_z", "p_w", "p_bias"), f"*{TYPE_NAMES[dtype]}")
    indices = dict.fromkeys(("p_order", "p_offsets", "p_count"), "*i32")
    return {
        name: (operands | indices | known).get(name, "*fp32" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
    }


def aot_cases(arch: int) -> AotCases:
    """Both kernels, which have no tile of operands, and every reason to pack."""
    known = dict.fromkeys(("p_zero", "p_flag", "p_from", "p_bounds"), "*i32") | {"p_zeros": "*i64", "p_target": "*i64"}
    types = pointer_types(clustered_topk_start_kernel, DTYPES[1], known)
    fill = {"HAS_ZEROS": True, "BLOCK": FILL_BLOCK}
    yield aot_case("topk_start", clustered_topk_start_kernel, types, fill, ROW_WARPS, 1)
    types = pointer_types(clustered_topk_pack_kernel, DTYPES[1], known)
    for reason in ("flag", "inside", "reach", "reach_outside"):
        constants = {"REASON": reason, "SLACK": SLACK, "BLOCK": PACK_BLOCK}
        yield aot_case(f"topk_pack_{reason}", clustered_topk_pack_kernel, types, constants, ROW_WARPS, 1)
