"""The plan of a batch: tokens sorted by target, so that every level's tokens are a run; and the size of the grids.

One stable sort gives the grouping, the packed order and the offsets, because clusters are ranges of ids. It also puts
the tokens whose target lies in a tile of entries side by side: all other tiles need no comparison per logit.

What surrounds the sort is a handful of small kernels: a launch costs the host more than any of them costs the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AotCases, aot_case, launch, num_processors
from .configs import Tile

# Units of work per program of a persistent grid: the last round is 1/4 of the work at most, and partial results stay few.
UNITS_PER_PROGRAM = 4
IGNORED = tl.constexpr(2**31 - 1)  # sorts behind every id
BLOCK = 1024
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
# Where levels begin, and the end of the last one: plain arguments, as Triton specialises the integers of a tuple.
BEGINNINGS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8")
MAX_LEVELS = len(BEGINNINGS) - 1

# Kernels


@triton.jit(do_not_specialize=["num_tokens", "ignore_index"])
def clustered_softmax_keys_kernel(p_target, p_keys, num_tokens, ignore_index, BLOCK: tl.constexpr):
    """What tokens are sorted by (T,) int32: the target, behind all of them where it is ignored."""
    for i in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK), tl.num_programs(0)):
        t = i * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(p_target + t, mask=t < num_tokens, other=0)
        tl.store(p_keys + t, tl.where(target == ignore_index, IGNORED, target).to(tl.int32), mask=t < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "stride", "num_zeros", *BEGINNINGS])
def clustered_softmax_plan_kernel(
    p_ids, p_offsets, p_columns, p_log_prob, p_uniform, p_lse_head, p_lse_tail, p_zeros,
    num_tokens, stride, num_zeros, b0, b1, b2, b3, b4, b5, b6, b7, b8,
    LEVELS: tl.constexpr, WITH_RESULTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """offsets (LEVELS + 1,) and columns (LEVELS, stride) of :class:`Plan` from the sorted ids (T,).

    b0.. are the first ids of the levels, level LEVELS being what is ignored. Zeroed on the way: the results (T,) of a
    forward pass, to which levels add (WITH_RESULTS), and zeros (num_zeros,).
    """
    beginnings = (b0, b1, b2, b3, b4, b5, b6, b7, b8)
    # One position more than there are tokens: what no token reaches begins at the end.
    for i in tl.range(tl.program_id(0), num_tokens // BLOCK + 1, tl.num_programs(0)):
        t = i * BLOCK + tl.arange(0, BLOCK)
        m_t = t < num_tokens
        before = tl.load(p_ids + t - 1, mask=(t > 0) & (t <= num_tokens), other=-1)
        ids = tl.load(p_ids + t, mask=m_t, other=0)
        # The columns of the head ascend with the ids, too: parent labels follow the items, in the order of the clusters.
        head = ids
        for j in tl.static_range(LEVELS + 1):
            begins = (before < beginnings[j]) & ((ids >= beginnings[j]) | (t == num_tokens)) & (t <= num_tokens)
            tl.store(p_offsets + j + tl.zeros((BLOCK,), tl.int32), t, mask=begins)
            if j == LEVELS:
                head = tl.where(ids >= beginnings[j], IGNORED, head)
            elif j > 0:
                head = tl.where(ids >= beginnings[j], b1 + j - 1, head)
                tl.store(p_columns + j * stride.to(tl.int64) + t, ids - beginnings[j], mask=m_t)
        tl.store(p_columns + t, head, mask=m_t)
        if WITH_RESULTS:
            zero = tl.zeros((BLOCK,), tl.float32)
            tl.store(p_log_prob + t, zero, mask=m_t)
            tl.store(p_uniform + t, zero, mask=m_t)
            tl.store(p_lse_head + t, zero.to(tl.float64), mask=m_t)
            tl.store(p_lse_tail + t, zero.to(tl.float64), mask=m_t)
        if i == 0:
            for z in tl.range(0, num_zeros, BLOCK):
                o_z = z + tl.arange(0, BLOCK)
                tl.store(p_zeros + o_z, tl.zeros((BLOCK,), tl.float32), mask=o_z < num_zeros)


@triton.jit(do_not_specialize=["num_tokens", "stride", "last", "stride_log_prob", "stride_uniform"])
def clustered_softmax_upstream_kernel(
    p_log_prob, p_uniform, p_order, p_offsets, p_lse_head, p_lse_tail, p_ratio, p_lse, p_largest,
    num_tokens, stride, last, stride_log_prob, stride_uniform, HAS_UNIFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Upstream gradients g1, g2 of log_prob and uniform in sorted order: ratio (2, stride) is -(g1 + g2) and g2.

    Those of ignored tokens are 0. largest (3,), zero before, becomes the largest value and the largest negated value of
    -(g1 + g2), at least 0, and the largest |g2|. lse (2, stride) is both log-sum-exps in sorted order.
    """
    counted_end = tl.load(p_offsets + last)
    for i in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK), tl.num_programs(0)):
        t = i * BLOCK + tl.arange(0, BLOCK)
        m_t = t < num_tokens
        counted = t < counted_end
        place = tl.load(p_order + t, mask=m_t, other=0)
        g1 = tl.load(p_log_prob + place * stride_log_prob, mask=counted, other=0.0).to(tl.float32)
        g2 = tl.zeros((BLOCK,), tl.float32)
        if HAS_UNIFORM:
            g2 = tl.load(p_uniform + place * stride_uniform, mask=counted, other=0.0).to(tl.float32)
            tl.atomic_max(p_largest + 2, tl.max(tl.where(g2 == g2, tl.abs(g2), float("inf")), 0))
        c = -(g1 + g2)
        # Maxima do not depend on the order in which programs come. One NaN spoils all, as it does a maximum of torch's.
        tl.atomic_max(p_largest, tl.max(tl.where(c == c, c, float("inf")), 0))
        tl.atomic_max(p_largest + 1, tl.max(tl.where(c == c, -c, float("inf")), 0))
        tl.store(p_ratio + t, c, mask=m_t)
        tl.store(p_ratio + stride.to(tl.int64) + t, g2, mask=m_t)
        tl.store(p_lse + t, tl.load(p_lse_head + place, mask=m_t, other=0.0), mask=m_t)
        tl.store(p_lse + stride.to(tl.int64) + t, tl.load(p_lse_tail + place, mask=m_t, other=0.0), mask=m_t)


@triton.jit(do_not_specialize=["num_tokens", "stride"])
def clustered_softmax_normalise_kernel(
    p_ratio, p_largest, p_scale, p_flags, num_tokens, stride, HAS_UNIFORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Divide ratio (2, stride) of the last kernel by its largest value: scale (1,) and flags (2,) of :class:`Upstream`."""
    top = tl.load(p_largest)
    bottom = tl.load(p_largest + 1)
    most = tl.load(p_largest + 2)
    size = tl.maximum(tl.maximum(top, bottom), most)
    scale = tl.where(top >= bottom, size, -size)
    scale = tl.where(size == 0.0, 1.0, scale)
    divisor = tl.zeros((BLOCK,), tl.float32) + scale
    for i in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK), tl.num_programs(0)):
        t = i * BLOCK + tl.arange(0, BLOCK)
        m_t = t < num_tokens
        tl.store(p_ratio + t, tl.div_rn(tl.load(p_ratio + t, mask=m_t, other=0.0), divisor), mask=m_t)
        if HAS_UNIFORM:
            p_uniform = p_ratio + stride.to(tl.int64) + t
            tl.store(p_uniform, tl.div_rn(tl.load(p_uniform, mask=m_t, other=0.0), divisor), mask=m_t)
    if tl.program_id(0) == 0:
        tl.store(p_scale, scale)
        tl.store(p_flags, ((top > 0.0) & (bottom > 0.0)).to(tl.int32))
        tl.store(p_flags + 1, (most != 0.0).to(tl.int32))


# The batch


@dataclasses.dataclass(frozen=True)
class Level:
    """One softmax of the tree: W_j (C, d_j), Q_j (d_j, d) or None, bias (C,) or None, ids lo..hi-1.

    ``first`` and ``last`` index the plan's offsets: the level's tokens are offsets[first]..offsets[last]-1.
    """

    weight: Tensor
    projection: Tensor | None
    bias: Tensor | None
    lo: int
    hi: int
    first: int
    last: int

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    @property
    def num_entries(self) -> int:
        return self.weight.shape[0]

    def project(self, rows: Tensor) -> Tensor:
        """Q_j h for rows (T, d). Every token is projected: how many belong to the level only the device knows."""
        return rows if self.projection is None else rows @ self.projection.T


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens sorted by target, ignored ones last.

    order (T,) int64: position in the batch of every sorted token. ids (T,) int32, sorted. offsets (n + 1,) int32: first
    token of every cluster, and the number of counted tokens. columns: per level, the target's column (T,) int32.
    """

    order: Tensor
    ids: Tensor
    offsets: Tensor
    columns: tuple[Tensor, ...]


def levels_of(
    weights: Sequence[Tensor], projections: Sequence[Tensor], head_bias: Tensor | None, tail_biases: Sequence[Tensor]
) -> list[Level]:
    """The levels of a clustered softmax, head first, with contiguous weights. Raises ValueError for 2^31 - 1 items or more."""
    width = projections[0].shape[1] if len(projections) else weights[0].shape[1]
    remaining = iter(projections)
    num_tails = len(weights) - 1
    levels: list[Level] = []
    lo = 0
    for j, weight in enumerate(weights):
        size = weight.shape[0] - (num_tails if j == 0 else 0)
        bias = head_bias if j == 0 else (tail_biases[j - 1] if len(tail_biases) else None)
        levels.append(
            Level(
                weight.contiguous(),
                None if weight.shape[1] == width else next(remaining),
                None if bias is None else bias.contiguous(),
                lo,
                lo + size,
                j,
                num_tails + 1 if j == 0 else j + 1,
            )
        )
        lo += size
    if lo >= IGNORED.value:
        raise ValueError(f"the Triton kernels number items in 32 bits, and there are {lo}")
    return levels


def make_plan(
    target: Tensor,
    levels: Sequence[Level],
    ignore_index: int,
    results: Sequence[Tensor] = (),
    zeros: Tensor | None = None,
) -> Plan:
    """Sort a batch's targets (T,), T > 0. Static shapes, nothing read by the host. More arguments: :func:`plan_of`."""
    keys = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    count = target.numel()
    launch(
        clustered_softmax_keys_kernel, -(-count // BLOCK), target,
        target.contiguous(), keys, count, ignore_index, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    ids, order = torch.sort(keys, stable=True)
    return plan_of(order, ids, levels, results, zeros)


def plan_of(
    order: Tensor, ids: Tensor, levels: Sequence[Level], results: Sequence[Tensor] = (), zeros: Tensor | None = None
) -> Plan:
    """The plan of a sorted batch. On the way ``results``, four tensors (T,), and ``zeros``, fp32, are filled with zeros."""
    count = ids.numel()
    count, stride = ids.numel(), aligned(ids.numel())
    offsets = torch.empty(len(levels) + 1, dtype=torch.int32, device=ids.device)
    columns = torch.empty(len(levels), stride, dtype=torch.int32, device=ids.device)
    beginnings = [*(level.lo for level in levels), levels[-1].hi]
    filled, num_zeros = (offsets, 0) if zeros is None else (zeros, zeros.numel())
    launch(
        clustered_softmax_plan_kernel, count // BLOCK + 1, ids,
        ids, offsets, columns, *(results or (offsets,) * 4), filled, count, stride, num_zeros,
        *beginnings, *[0] * (len(BEGINNINGS) - len(beginnings)),
        LEVELS=len(levels), WITH_RESULTS=bool(results), BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    return Plan(order, ids, offsets, columns.narrow(1, 0, count).unbind(0))


def aligned(count: int) -> int:
    """Length of rows of at least ``count`` numbers of 4 bytes or more that begin at multiples of 16 bytes.

    Triton compiles a kernel again for a pointer that does not.
    """
    return -(-count // 4) * 4


@dataclasses.dataclass(frozen=True)
class Grid:
    """A persistent grid and its scratch: programs, units aimed at, units at most."""

    num_programs: int
    target_units: int
    max_units: int

    @staticmethod
    def of(tile: Tile, num_tokens: int, device: torch.device) -> "Grid":
        programs = num_processors(device) * tile.blocks_per_sm
        target = programs * UNITS_PER_PROGRAM
        return Grid(programs, target, max(target, -(-num_tokens // tile.block_t)))


class Upstream(NamedTuple):
    """Upstream gradients in sorted order, divided by ``scale`` (1,).

    ratio, uniform (T,): c and g2 by scale, 0 for ignored tokens; has_uniform: whether the caller has a g2 at all. flags
    (2,) int32: signs of c differ; a g2 is not 0. lse_head, lse_tail (T,) fp64, in sorted order as well.
    """

    ratio: Tensor
    uniform: Tensor
    has_uniform: bool
    scale: Tensor
    flags: Tensor
    lse_head: Tensor
    lse_tail: Tensor


def normalise(
    grad_log_prob: Tensor, grad_uniform: Tensor | None, lse_head: Tensor, lse_tail: Tensor, plan: Plan, largest: Tensor
) -> Upstream:
    """Upstream gradients of a batch, as the kernels take them; ``largest`` (3,) fp32 holds zeros and is written to."""
    count, device = plan.order.numel(), plan.order.device
    stride = aligned(count)
    ratio = torch.empty(2, stride, dtype=torch.float32, device=device)
    lse = torch.empty(2, stride, dtype=torch.float64, device=device)
    scale = torch.empty(1, dtype=torch.float32, device=device)
    flags = torch.empty(2, dtype=torch.int32, device=device)
    has_uniform = grad_uniform is not None
    given = grad_log_prob if grad_uniform is None else grad_uniform
    programs = -(-count // BLOCK)
    launch(
        clustered_softmax_upstream_kernel, programs, ratio,
        grad_log_prob, given, plan.order, plan.offsets, lse_head, lse_tail, ratio, lse, largest,
        count, stride, len(plan.columns), grad_log_prob.stride(0), given.stride(0),
        HAS_UNIFORM=has_uniform, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    launch(
        clustered_softmax_normalise_kernel, programs, ratio,
        ratio, largest, scale, flags, count, stride, HAS_UNIFORM=has_uniform, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    rows = [*ratio.narrow(1, 0, count).unbind(0), *lse.narrow(1, 0, count).unbind(0)]
    return Upstream(rows[0], rows[1], has_uniform, scale, flags, rows[2], rows[3])


def aot_cases(arch: int) -> AotCases:
    """What the ahead-of-time gate compiles."""
    types: dict[str, Any] = {
        **dict.fromkeys(("p_keys", "p_ids", "p_offsets", "p_columns", "p_flags"), "*i32"),
        **dict.fromkeys(("p_target", "p_order"), "*i64"),
        **dict.fromkeys(("p_lse_head", "p_lse_tail", "p_lse"), "*fp64"),
    }
    for name, kernel, constants in (
        ("keys", clustered_softmax_keys_kernel, {}),
        ("plan", clustered_softmax_plan_kernel, {"LEVELS": 3, "WITH_RESULTS": True}),
        ("upstream", clustered_softmax_upstream_kernel, {"HAS_UNIFORM": True}),
        ("normalise", clustered_softmax_normalise_kernel, {"HAS_UNIFORM": True}),
    ):
        given = {arg: types.get(arg, "*fp32" if arg.startswith("p_") else "i32") for arg in kernel.arg_names}
        yield aot_case(f"softmax_{name}", kernel, given, {**constants, "BLOCK": BLOCK}, LAUNCH["num_warps"], 1)
