"""Clustered softmax on a GPU: the plan of a batch, and the forward pass (clustered_softmax_backward.py has the rest).

Tokens are sorted by target, once per batch. Clusters are ranges of ids, so this groups every level's tokens, and the
tokens whose target lies in a tile of entries are one run: all other tiles go without a comparison per logit. Counts stay
on the device: grids are persistent and read them there, and every buffer's size follows from shapes alone.

The forward pass is that of flash attention with the weight as keys and values. Over the entries v of a level, with
s_v = w_v . z + b_v, one pass over tiles keeps per token a running maximum, l = sum exp(s_v) and, for training,
o = sum exp(s_v) w_v, rescaled whenever the maximum moves. Both leave the target out, so that with x = exp(s_target)

    1 - p = l / (l + x)         -log p = log(1 + l / x)         -d log p / dz = o / (l + x) - (1 - p) w_target

have no cancellation where the target's probability p goes to 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax_plan import MAX_LEVELS, Grid, Level, Plan, levels_of, make_plan
from .common import (
    DTYPES,
    LN2,
    LOG2E,
    MAX_RANK,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    cast,
    dot_precision,
    launch,
    load_rows,
    num_processors,
    padded_rank,
    probability_shift,
    row_sums,
    store_rows,
)
from .tuning import best_tile

SCALARS = ["first", "last", "num_entries", "target_units"]

# Kernels


@triton.jit
def units_of(p_offsets, first, last, num_entries, target_units, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """A level's first token, number of tokens, tiles of tokens, tiles of entries, and parts the entries are cut into."""
    start = tl.load(p_offsets + first)
    count = tl.load(p_offsets + last) - start
    token_tiles = tl.cdiv(count, BLOCK_T)
    entry_tiles = tl.cdiv(num_entries, BLOCK_V)
    parts = tl.minimum(tl.maximum(target_units // tl.maximum(token_tiles, 1), 1), entry_tiles)
    return start, count, token_tiles, entry_tiles, parts


@triton.jit
def _scan_tile(
    b_z, b_column, b_lse2, m, total, b_rows, p_w, p_bias, i_v, num_entries, o_v, o_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, SPECIAL: tl.constexpr,
    WITH_LSE: tl.constexpr, WITH_ROWS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of entries. SPECIAL: it may hold a target, which is left out, or reach beyond the last entry."""
    v = i_v * BLOCK_V + o_v
    b_w = load_rows(p_w, v, o_d, v < num_entries, D, BLOCK_D, SPECIAL)  # (V, D)
    s = tl.dot(b_z, tl.trans(b_w), input_precision=PRECISION)  # (T, V)
    if SPECIAL:
        if HAS_BIAS:
            s += tl.load(p_bias + v, mask=v < num_entries, other=0.0).to(tl.float32)[None, :]
        s = tl.where((v < num_entries)[None, :] & (v[None, :] != b_column[:, None]), s, -float("inf"))
    elif HAS_BIAS:
        s += tl.load(p_bias + v).to(tl.float32)[None, :]
    if WITH_LSE:
        top = tl.maximum(m, tl.max(s, 1) * LOG2E)
        p = tl.exp2(s * LOG2E - (top - SHIFT)[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        m = top
        if WITH_ROWS:
            b_rows = tl.dot(p.to(b_w.dtype), b_w, b_rows * shrink[:, None], input_precision=PRECISION)
    else:
        p = tl.exp2(s * LOG2E - b_lse2[:, None])
        b_rows = tl.dot(p.to(b_w.dtype), b_w, b_rows, input_precision=PRECISION)
    return m, total, b_rows


@triton.jit(do_not_specialize=SCALARS)
def clustered_softmax_scan_kernel(
    p_z, p_w, p_bias, p_column, p_lse2, p_offsets, p_max, p_sum, p_rows,
    first, last, num_entries, target_units,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    WITH_LSE: tl.constexpr, WITH_ROWS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Per unit, a tile of tokens and a part of the entries: maximum m and total (WITH_LSE), o or sum p_v w_v (WITH_ROWS).

    z (T, D) in sorted order, w (C, D), column (T,) the targets. Without WITH_LSE the log-sum-exps lse2 (T,) are known.
    Results go to max, sum (units, BLOCK_T) and rows (units, BLOCK_T, BLOCK_D), the maximum in units of log 2.
    """
    start, count, token_tiles, entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    for unit in tl.range(tl.program_id(0), token_tiles * parts, tl.num_programs(0)):
        part = unit // token_tiles  # programs side by side read the same entries
        i_t = unit % token_tiles
        t = i_t * BLOCK_T + o_t
        b_z = load_rows(p_z, start + t, o_d, t < count, D, BLOCK_D, True)
        b_column = tl.load(p_column + start + t, mask=t < count, other=-1)
        b_lse2 = tl.zeros((BLOCK_T,), tl.float32)
        if not WITH_LSE:
            b_lse2 = tl.load(p_lse2 + start + t, mask=t < count, other=float("inf")) - SHIFT
        lo = (part.to(tl.int64) * entry_tiles // parts).to(tl.int32)
        hi = ((part + 1).to(tl.int64) * entry_tiles // parts).to(tl.int32)
        full = tl.minimum(hi, num_entries // BLOCK_V)  # tiles that do not reach beyond the last entry
        # Targets ascend along the sorted tokens, so those of this tile of tokens lie in the tiles [skip, resume).
        i_first = tl.load(p_column + start + i_t * BLOCK_T) // BLOCK_V
        i_last = tl.load(p_column + start + tl.minimum(i_t * BLOCK_T + BLOCK_T, count) - 1) // BLOCK_V
        skip = tl.minimum(tl.maximum(i_first, lo), full)
        resume = tl.minimum(tl.maximum(i_last + 1, skip), full)
        m = tl.full((BLOCK_T,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        b_rows = tl.zeros((BLOCK_T, BLOCK_D if WITH_ROWS else 1), tl.float32)
        for i in tl.range(0, (full - lo) - (resume - skip), num_stages=STAGES):
            i_v = lo + i
            i_v += tl.where(i_v >= skip, resume - skip, 0)
            m, total, b_rows = _scan_tile(
                b_z, b_column, b_lse2, m, total, b_rows, p_w, p_bias, i_v, num_entries, o_v, o_d,
                D, BLOCK_D, BLOCK_V, HAS_BIAS, False, WITH_LSE, WITH_ROWS, SHIFT, PRECISION,
            )  # fmt: skip
        for i in tl.range(0, (resume - skip) + (hi - full), num_stages=1):
            i_v = tl.where(i < resume - skip, skip + i, full)
            m, total, b_rows = _scan_tile(
                b_z, b_column, b_lse2, m, total, b_rows, p_w, p_bias, i_v, num_entries, o_v, o_d,
                D, BLOCK_D, BLOCK_V, HAS_BIAS, True, WITH_LSE, WITH_ROWS, SHIFT, PRECISION,
            )  # fmt: skip
        place = unit * BLOCK_T + o_t
        unshift = tl.exp2(tl.full((BLOCK_T,), -SHIFT, tl.float32))
        if WITH_LSE:
            tl.store(p_max + place, m)
            tl.store(p_sum + place, total * unshift)
        if WITH_ROWS:
            tl.store(p_rows + place.to(tl.int64)[:, None] * BLOCK_D + o_d[None, :], b_rows * unshift[:, None])


@triton.jit
def target_logit(p_bias, b_z, b_w, b_column, m_t, HAS_BIAS: tl.constexpr):
    """s_target = w_target . z + b_target in fp32, by the same instructions wherever it is needed."""
    logit = tl.sum(b_z.to(tl.float32) * b_w.to(tl.float32), 1)
    if HAS_BIAS:
        logit += tl.load(p_bias + b_column, mask=m_t, other=0.0).to(tl.float32)
    return logit


@triton.jit(do_not_specialize=SCALARS)
def clustered_softmax_fwd_kernel(
    p_z, p_w, p_bias, p_column, p_offsets, p_order, p_max, p_sum, p_rows, p_mean, p_mean_bias,
    p_log_prob, p_uniform, p_lse, p_descent,
    first, last, num_entries, target_units,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, SMOOTH: tl.constexpr, WITH_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge a level's parts in order and add its terms to log_prob, uniform (T,) and lse (T,), in the batch's order.

    With SMOOTH, mean (D,) and mean_bias (1,) are averages over the entries. With WITH_ROWS, descent (T, D) becomes
    -d log p / dz, in the batch's order, too.
    """
    start, count, token_tiles, _entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    o_d = tl.arange(0, BLOCK_D)
    for i_s in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_S), tl.num_programs(0)):
        t = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
        m_t = t < count
        i_t = (i_s * BLOCK_S) // BLOCK_T
        m = tl.full((BLOCK_S,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_S,), tl.float32)
        b_rows = tl.zeros((BLOCK_S, BLOCK_D if WITH_ROWS else 1), tl.float32)
        for part in tl.range(0, parts):
            place = (part * token_tiles + i_t) * BLOCK_T + (t - i_t * BLOCK_T)
            m_part = tl.load(p_max + place)
            top = tl.maximum(m, m_part)
            shrink = tl.exp2(m - top)
            shrink_part = tl.exp2(m_part - top)
            total = total * shrink + tl.load(p_sum + place) * shrink_part
            if WITH_ROWS:
                more = tl.load(p_rows + place.to(tl.int64)[:, None] * BLOCK_D + o_d[None, :])
                b_rows = b_rows * shrink[:, None] + more * shrink_part[:, None]
            m = top
        b_column = tl.load(p_column + start + t, mask=m_t, other=0)
        b_z = load_rows(p_z, start + t, o_d, m_t, D, BLOCK_D, True)
        b_w = load_rows(p_w, b_column, o_d, m_t, D, BLOCK_D, True)
        logit = target_logit(p_bias, b_z, b_w, b_column, m_t, HAS_BIAS)
        logit2 = logit * LOG2E
        top = tl.maximum(m, logit2)
        shrink = tl.exp2(m - top)
        rest = total * shrink
        own = tl.exp2(logit2 - top)
        whole = rest + own
        # -log p. Where the target dominates, top is its own logit and the series of log(1 + x) keeps every digit.
        x = rest / tl.maximum(own, 1e-30)
        series = x * (1.0 - x * (0.5 - x * 0.33333334))
        nll = tl.where(x < 1e-3, series, ((top - logit2) + tl.log2(whole)) * LN2)
        place = tl.load(p_order + start + t, mask=m_t, other=0)
        before = tl.load(p_log_prob + place, mask=m_t, other=0.0)
        tl.store(p_log_prob + place, before - nll, mask=m_t)
        # In fp64, lse - s_target is -log p again, to the last digit. A target that a bias of -inf rules out has neither.
        possible = logit > float("-inf")
        lse = tl.where(
            possible, logit.to(tl.float64) + nll.to(tl.float64), ((top + tl.log2(whole)) * LN2).to(tl.float64)
        )
        tl.store(p_lse + place, lse, mask=m_t)
        if SMOOTH:
            b_mean = tl.load(p_mean + o_d, mask=o_d < D, other=0.0)
            mean = tl.sum(b_z.to(tl.float32) * b_mean[None, :], 1) + tl.load(p_mean_bias)
            before = tl.load(p_uniform + place, mask=m_t, other=0.0)
            tl.store(p_uniform + place, before + ((mean - logit) - nll), mask=m_t)
        if WITH_ROWS:
            descent = b_rows * (shrink / whole)[:, None] - (rest / whole)[:, None] * b_w.to(tl.float32)
            store_rows(p_descent, place, o_d, m_t, descent, D)


# Launches


def scan(
    level: Level, plan: Plan, column: Tensor, z: Tensor, lse2: Tensor | None, with_rows: bool
) -> tuple[configs.Tile, Grid, Tensor, Tensor, Tensor]:
    """Launch the scan of a level: its tile and grid, and per unit the maxima, sums and rows."""

    def run(tile: configs.Tile) -> tuple[configs.Tile, Grid, Tensor, Tensor, Tensor]:
        return _scan_with(tile, level, plan, column, z, lse2, with_rows)

    return run(best_tile("scan_rows" if with_rows else "scan_lse", level.rank, z, run))


def _scan_with(
    tile: configs.Tile, level: Level, plan: Plan, column: Tensor, z: Tensor, lse2: Tensor | None, with_rows: bool
) -> tuple[configs.Tile, Grid, Tensor, Tensor, Tensor]:
    grid = Grid.of(tile, z.shape[0], z.device)
    block_d = padded_rank(level.rank)
    options: dict[str, Any] = {"dtype": torch.float32, "device": z.device}
    count = grid.max_units * tile.block_t
    maxima, sums = (torch.empty(count if lse2 is None else 0, **options) for _ in range(2))
    rows = torch.empty(count * block_d if with_rows else 0, **options)
    launch(
        clustered_softmax_scan_kernel, grid.num_programs, z,
        z, level.weight, pointer(level.bias, z), column, pointer(lse2, z), plan.offsets, maxima, sums, rows,
        level.first, level.last, level.num_entries, grid.target_units,
        **_scan_constants(level.rank, z.dtype, tile, level.bias is not None, lse2 is None, with_rows),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return tile, grid, maxima, sums, rows


def forward(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    ignore_index: int,
    smooth: bool,
    with_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """What ``cprec::clustered_softmax`` gives; all floating tensors of one dtype, ``with_rows`` its ``keep``."""
    num_tokens = target.shape[0]
    options: dict[str, Any] = {"device": input.device}
    log_prob, uniform = (torch.empty(num_tokens, dtype=torch.float32, **options) for _ in range(2))
    lse = [torch.empty(num_tokens, dtype=torch.float64, **options) for _ in range(2)]
    kept: list[Tensor] = []
    levels = levels_of(weights, projections, head_bias, tail_biases)
    if num_tokens == 0:
        if with_rows:
            kept = [input.new_zeros(0, level.rank) for level in levels]
            kept += [torch.empty(0, dtype=dtype, **options) for dtype in (torch.int64, torch.int32)]
        return log_prob, uniform, lse[0], lse[1], kept
    plan = make_plan(target, levels, ignore_index, (log_prob, uniform, *lse))
    packed = input.index_select(0, plan.order)
    for j, (level, column) in enumerate(zip(levels, plan.columns, strict=True)):
        z = level.project(packed)
        tile, grid, maxima, sums, rows = scan(level, plan, column, z, None, with_rows)
        token = configs.tile_for("token", level.rank, z.dtype, architecture(z.device))
        mean, mean_bias = sums, sums
        if smooth:
            mean = level.weight.mean(0, dtype=torch.float32)
            mean_bias = torch.zeros(1, **options)
            if level.bias is not None:
                mean_bias = level.bias.mean(0, keepdim=True, dtype=torch.float32)
        descent = z.new_zeros(z.shape if with_rows else 0)
        launch(
            clustered_softmax_fwd_kernel, num_processors(z.device) * token.blocks_per_sm, z,
            z, level.weight, pointer(level.bias, z), column, plan.offsets, plan.order, maxima, sums, rows, mean, mean_bias,
            log_prob, uniform, lse[min(j, 1)], descent,
            level.first, level.last, level.num_entries, grid.target_units,
            **_fwd_constants(level.rank, tile, token, level.bias is not None, smooth, with_rows),
            num_warps=token.num_warps, num_stages=token.num_stages, **row_sums(level.rank),
        )  # fmt: skip
        if with_rows:
            kept.append(descent)
    return log_prob, uniform, lse[0], lse[1], kept + [plan.order, plan.ids] if with_rows else kept


def refusal(*args: Any) -> str:
    """Why the kernels cannot take these shapes, "" if they can. Weights are the first list among the arguments."""
    weights = next(arg for arg in args if isinstance(arg, (list, tuple)))
    if len(weights) > MAX_LEVELS:
        return f"{len(weights)} clusters are more than {MAX_LEVELS}"
    rank = max(weight.shape[1] for weight in weights)
    return f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else ""


def clustered_softmax(input: Tensor, target: Tensor, *args: Any) -> tuple[Any, ...]:
    """The op ``cprec::clustered_softmax``."""
    *factors, ignore_index, smooth, arithmetic, keep = args
    hidden, weights, projections, head_bias, tail_biases = cast([input, *factors], arithmetic or input.dtype)
    return forward(hidden, target, weights, projections, head_bias, tail_biases, ignore_index, smooth, keep)


def pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read."""
    return stand_in if tensor is None else tensor


def _scan_constants(
    rank: int, dtype: torch.dtype, tile: configs.Tile, bias: bool, with_lse: bool, with_rows: bool
) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "HAS_BIAS": bias,
        "WITH_LSE": with_lse, "WITH_ROWS": with_rows, "SHIFT": probability_shift(dtype) if with_rows else 0,
        "PRECISION": dot_precision(dtype, rank), "STAGES": tile.num_stages,
    }  # fmt: skip


def _fwd_constants(
    rank: int, tile: configs.Tile, token: configs.Tile, bias: bool, smooth: bool, with_rows: bool
) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v,
        "BLOCK_S": min(token.block_t, tile.block_t), "HAS_BIAS": bias, "SMOOTH": smooth, "WITH_ROWS": with_rows,
    }  # fmt: skip


def pointer_types(dtype: torch.dtype, kernel: Any) -> dict[str, str]:
    """Types of a kernel's arguments for operands of a dtype."""
    operand = f"*{TYPE_NAMES[dtype]}"
    known = {
        **dict.fromkeys(("p_z", "p_w", "p_bias", "p_descent", "p_weight_grad", "p_bias_grad"), operand),
        **dict.fromkeys(("p_column", "p_offsets", "p_bounds", "p_flags"), "*i32"),
        **dict.fromkeys((*SCALARS, "num_tokens", "splits"), "i32"),
        "p_order": "*i64",
        "p_lse": "*fp64",
    }
    return {name: known.get(name, "*fp32") for name in kernel.arg_names}


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture (80, 90 or 100), with bias, which needs the most registers."""
    for dtype in DTYPES:
        scan_types = pointer_types(dtype, clustered_softmax_scan_kernel)
        fwd_types = pointer_types(dtype, clustered_softmax_fwd_kernel)
        for rank in configs.BLOCK_DS:
            token = configs.tile_for("token", rank, dtype, arch)
            suffix = f"{TYPE_NAMES[dtype]}/{rank}"
            for name, with_lse, with_rows in (
                ("scan_lse", True, False), ("scan_rows", True, True), ("scan_rows_known", False, True),
            ):  # fmt: skip
                tile = configs.tile_for("scan_rows" if with_rows else "scan_lse", rank, dtype, arch)
                yield aot_case(
                    f"{name}/{suffix}", clustered_softmax_scan_kernel, scan_types,
                    _scan_constants(rank, dtype, tile, True, with_lse, with_rows), tile.num_warps, tile.num_stages,
                )  # fmt: skip
                if with_lse:
                    yield aot_case(
                        f"fwd_{name}/{suffix}", clustered_softmax_fwd_kernel, fwd_types,
                        _fwd_constants(rank, tile, token, True, True, with_rows), token.num_warps, token.num_stages,
                    )  # fmt: skip
