"""Rows that a level is evaluated for, packed without the host knowing how many, and their log-sum-exps."""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import SCALARS, pointer, scan, units_of
from .clustered_softmax_plan import Level, Plan
from .common import DTYPES, LN2, TYPE_NAMES, AotCases, aot_case, architecture, launch, matmul_wide, num_processors

# Score bounds are compared with this much slack, relative to the numbers they are made of. Rounding is a few units of 2^-24
# per operation, and a logit that is computed again need not have the same last bits; slack costs some work, never an item.
SLACK = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Rows:
    """A run of rows: order[offsets[first]] .. order[offsets[last] - 1], which only the device can count.

    order (R,) int64: rows of the batch; offsets int32. ``identity``: order is 0, 1, 2, ...
    """

    order: Tensor
    offsets: Tensor
    first: int = 0
    last: int = 1
    identity: bool = False

    @staticmethod
    def all_of(input: Tensor) -> "Rows":
        """Every row of a batch (R, d)."""
        num_rows = input.shape[0]
        order = torch.arange(num_rows, device=input.device)
        offsets = torch.arange(0, 2 * num_rows, num_rows, dtype=torch.int32, device=input.device)
        return Rows(order, offsets, identity=True)

    @staticmethod
    def where(active: Tensor) -> "Rows":
        """The rows where ``active`` (R,) is not 0, in order."""
        idle = (active == 0).to(torch.int32)
        count = active.numel() - idle.sum(dtype=torch.int32)
        return Rows(torch.sort(idle, stable=True).indices, torch.stack([torch.zeros_like(count), count]))

    def pack(self, z: Tensor) -> Tensor:
        """Rows of z (R, d) in this order."""
        return z if self.identity else z.index_select(0, self.order)


@triton.jit
def log_prob_of(s, lse, parent):
    """Score of an item from its logit: one rounding wherever it is formed, so that search and rank agree on ties."""
    return (s - lse) + parent


@triton.jit
def slack_of(a, b, c, SLACK: tl.constexpr):
    """Slack of a comparison of quantities made of a, b and c."""
    return SLACK * tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), 1.0))


def may_reach(bound: Tensor, score: Tensor) -> Tensor:
    """Where something bounded from above may reach a score; also where either is NaN."""
    slack = SLACK * torch.maximum(bound.abs(), score.abs()).clamp(min=1.0)
    return ~(bound + slack < score)


@triton.jit(do_not_specialize=SCALARS)
def clustered_topk_lse_kernel(
    p_order, p_offsets, p_max, p_sum, p_lse, first, last, num_entries, target_units,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a scan, in order, into lse (R,) at the rows of the batch."""
    start, count, token_tiles, _entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    for i_s in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_S), tl.num_programs(0)):
        t = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
        m_t = t < count
        m = tl.full((BLOCK_S,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_S,), tl.float32)
        for part in tl.range(0, parts):
            place = (part * token_tiles + t // BLOCK_T) * BLOCK_T + t % BLOCK_T
            m_part = tl.load(p_max + place, mask=m_t, other=0.0)
            top = tl.maximum(m, m_part)
            total = total * tl.exp2(m - top) + tl.load(p_sum + place, mask=m_t, other=1.0) * tl.exp2(m_part - top)
            m = top
        row = tl.load(p_order + start + t, mask=m_t, other=0)
        tl.store(p_lse + row, (m + tl.log2(total)) * LN2, mask=m_t)


def log_sum_exp(level: Level, z: Tensor, rows: Rows, lse: Tensor | None = None) -> Tensor:
    """Log-sum-exp (R,) of a level's logits for the given rows of z (R, d_j), written into ``lse`` if that is given."""
    if lse is None:
        lse = torch.zeros(z.shape[0], dtype=torch.float32, device=z.device)
    run = dataclasses.replace(level, first=rows.first, last=rows.last)
    no_target = torch.full((z.shape[0],), -1, dtype=torch.int32, device=z.device)
    plan = Plan(rows.order, no_target, rows.offsets, ())
    tile, grid, maxima, sums, _ = scan(run, plan, no_target, rows.pack(z), None, False)
    token = configs.tile_for("token", level.rank, z.dtype, architecture(z.device))
    launch(
        clustered_topk_lse_kernel, num_processors(z.device) * token.blocks_per_sm, z,
        rows.order, rows.offsets, maxima, sums, lse, rows.first, rows.last, level.num_entries, grid.target_units,
        **_lse_constants(tile), num_warps=1, num_stages=1,
    )  # fmt: skip
    return lse


def parent_logits(head: Level, z: Tensor) -> Tensor:
    """Logits (n - 1, R) fp32 of the tails' parent labels, from the head's z (R, d_0)."""
    size = head.hi - head.lo
    if size == head.num_entries:
        return z.new_empty(0, z.shape[0], dtype=torch.float32)
    logits = matmul_wide(head.weight[size:], z.T.contiguous())
    return logits if head.bias is None else logits + head.bias[size:, None].float()


def items_of(level: Level) -> Level:
    """A level without the parent labels."""
    size = level.hi - level.lo
    bias = None if level.bias is None else level.bias[:size]
    return dataclasses.replace(level, weight=level.weight[:size], bias=bias)


def bias_pointer(level: Level, z: Tensor) -> Tensor:
    """The level's bias, or anything."""
    return pointer(level.bias, z)


def pointer_types(kernel: Any, dtype: torch.dtype, known: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments: operands of a dtype, fp32 pointers and i32 scalars unless ``known`` has others."""
    operands = dict.fromkeys(("p_z", "p_w", "p_bias"), f"*{TYPE_NAMES[dtype]}")
    indices = {"p_order": "*i64", "p_offsets": "*i32", "p_count": "*i32"}
    return {
        name: (operands | indices | known).get(name, "*fp32" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
    }


def _lse_constants(tile: configs.Tile) -> dict[str, Any]:
    return {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_S": min(32, tile.block_t)}


def aot_cases(arch: int) -> AotCases:
    """The merge after one tile's scan: it has no operands of its own."""
    tile = configs.tile_for("scan_lse", 64, DTYPES[1], arch)
    types = pointer_types(clustered_topk_lse_kernel, DTYPES[1], {})
    yield aot_case("topk_lse", clustered_topk_lse_kernel, types, _lse_constants(tile), 1, 1)
