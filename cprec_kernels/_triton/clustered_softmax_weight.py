"""The weight's gradient of the clustered softmax on a GPU: a program owns a tile of entries and goes over the tokens.

clustered_softmax_backward.py has the formulas. Probabilities are computed again from the log-sum-exps: at the ranks of a
compressed model that is less work than to write and read a number per logit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import SCALARS, pointer, pointer_types
from .clustered_softmax_plan import BLOCK, LAUNCH, Level, Plan, Upstream
from .common import (
    DTYPES,
    LOG2E,
    TYPE_NAMES,
    AotCases,
    aot_case,
    dot_precision,
    launch,
    load_rows,
    matmul_wide,
    num_processors,
    padded_rank,
    probability_shift,
    store_rows,
)
from .tuning import best_tile

MAX_SPLITS = 8

# Kernels


@triton.jit
def _weight_tile(
    b_w, b_bias2, b_dw, b_db, p_z, p_column, p_shifted, p_value, p_ratio, start, count, i_t, v, o_t, o_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SPECIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of tokens. SPECIAL: some have their target among the entries v, or coefficients differ in sign."""
    t = i_t * BLOCK_T + o_t
    m_t = t < count
    b_z = load_rows(p_z, start + t, o_d, m_t, D, BLOCK_D, True)  # (T, D)
    shifted = tl.load(p_shifted + start + t, mask=m_t, other=float("inf"))
    if SPECIAL:
        b_column = tl.load(p_column + start + t, mask=m_t, other=-1)
        value = tl.load(p_value + start + t, mask=m_t, other=0.0)
        ratio = tl.load(p_ratio + start + t, mask=m_t, other=0.0)
        sign = tl.where(ratio < 0.0, -1.0, 1.0)
    if TRANSPOSED:  # logits (V, T): probabilities are the left operand as they leave the registers
        x = tl.dot(b_w, tl.trans(b_z), input_precision=PRECISION) * LOG2E - shifted[None, :]
        if HAS_BIAS:
            x += b_bias2[:, None]
        p = tl.exp2(x)
        if SPECIAL:
            p = tl.where(v[:, None] == b_column[None, :], value[None, :], p * sign[None, :])
        if HAS_BIAS:
            b_db += tl.sum(p, 1)
        b_dw = tl.dot(p.to(b_z.dtype), b_z, b_dw, input_precision=PRECISION)
    else:  # logits (T, V)
        x = tl.dot(b_z, tl.trans(b_w), input_precision=PRECISION) * LOG2E - shifted[:, None]
        if HAS_BIAS:
            x += b_bias2[None, :]
        p = tl.exp2(x)
        if SPECIAL:
            p = tl.where(v[None, :] == b_column[:, None], value[:, None], p * sign[:, None])
        if HAS_BIAS:
            b_db += tl.sum(p, 0)
        b_dw = tl.dot(tl.trans(p.to(b_z.dtype)), b_z, b_dw, input_precision=PRECISION)
    return b_dw, b_db


@triton.jit(do_not_specialize=[*SCALARS, "splits"])
def clustered_softmax_bwd_weight_kernel(
    p_z, p_w, p_bias, p_column, p_shifted, p_value, p_ratio, p_offsets, p_bounds, p_flags, p_common, p_scale,
    p_weight_grad, p_bias_grad,
    first, last, num_entries, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr, FINAL: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dW (C, D) and db (C,): a program owns a tile of entries and goes over the level's tokens, or one of ``splits`` parts.

    bounds (tiles + 1,): first token whose target is in the tile or after it. common (D + 1,): what every row, and every
    bias, receives besides. FINAL: scaled results; otherwise sums per part, (splits, C, D) and (splits, C).
    """
    start = tl.load(p_offsets + first)
    count = tl.load(p_offsets + last) - start
    token_tiles = tl.cdiv(count, BLOCK_T)
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    signs_differ = tl.load(p_flags) != 0
    for unit in tl.range(tl.program_id(0), tl.cdiv(num_entries, BLOCK_V) * splits, tl.num_programs(0)):
        i_v = unit // splits
        part = unit % splits
        v = i_v * BLOCK_V + o_v
        m_v = v < num_entries
        b_w = load_rows(p_w, v, o_d, m_v, D, BLOCK_D, True)
        b_bias2 = tl.zeros((BLOCK_V,), tl.float32)
        if HAS_BIAS:
            b_bias2 = tl.load(p_bias + v, mask=m_v, other=0.0).to(tl.float32) * LOG2E
        b_dw = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        b_db = tl.zeros((BLOCK_V,), tl.float32)
        lo = part * token_tiles // splits
        hi = (part + 1) * token_tiles // splits
        # Tiles [skip, resume) of tokens hold all whose target is among these entries.
        run = tl.load(p_bounds + i_v) - start
        run_end = tl.load(p_bounds + i_v + 1) - start
        skip = tl.minimum(tl.maximum(run // BLOCK_T, lo), hi)
        resume = tl.minimum(tl.maximum(tl.cdiv(run_end, BLOCK_T), skip), hi)
        resume = tl.where(run_end > run, resume, skip)
        skip = tl.where(signs_differ, lo, skip)
        resume = tl.where(signs_differ, hi, resume)
        for i in tl.range(0, (hi - lo) - (resume - skip), num_stages=STAGES):
            i_t = lo + i
            i_t += tl.where(i_t >= skip, resume - skip, 0)
            b_dw, b_db = _weight_tile(
                b_w, b_bias2, b_dw, b_db, p_z, p_column, p_shifted, p_value, p_ratio, start, count, i_t, v, o_t, o_d,
                D, BLOCK_D, BLOCK_T, HAS_BIAS, TRANSPOSED, False, PRECISION,
            )  # fmt: skip
        for i_t in tl.range(skip, resume, num_stages=1):
            b_dw, b_db = _weight_tile(
                b_w, b_bias2, b_dw, b_db, p_z, p_column, p_shifted, p_value, p_ratio, start, count, i_t, v, o_t, o_d,
                D, BLOCK_D, BLOCK_T, HAS_BIAS, TRANSPOSED, True, PRECISION,
            )  # fmt: skip
        unshift = tl.exp2(tl.full((BLOCK_V,), -SHIFT, tl.float32))
        b_dw = b_dw * unshift[:, None]
        b_db = b_db * unshift
        if FINAL:
            scale = tl.load(p_scale)
            b_dw = (b_dw + tl.load(p_common + o_d, mask=o_d < D, other=0.0)[None, :]) * scale
            b_db = (b_db + tl.load(p_common + D)) * scale
        place = part.to(tl.int64) * num_entries + v
        store_rows(p_weight_grad, place, o_d, m_v, b_dw, D)
        if HAS_BIAS:
            tl.store(p_bias_grad + place, b_db.to(p_bias_grad.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "lowest", "tiles", "steps"])
def clustered_softmax_bounds_kernel(
    p_keys, p_bounds, num_tokens, num_entries, lowest, tiles, steps, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr
):
    """bounds (tiles + 1,): how many of the ascending keys (T,) lie before ``lowest`` + the first entry of every tile."""
    for i in tl.range(tl.program_id(0), tiles // BLOCK + 1, tl.num_programs(0)):
        tile = i * BLOCK + tl.arange(0, BLOCK)
        goal = tl.minimum(tile * BLOCK_V, num_entries) + lowest
        lo = tl.zeros((BLOCK,), tl.int32)
        hi = tl.zeros((BLOCK,), tl.int32) + num_tokens
        for _ in tl.range(0, steps):  # bisection: as many as num_tokens has binary digits
            middle = (lo + hi) // 2
            between = lo < hi
            before = tl.load(p_keys + middle, mask=between, other=0) < goal
            lo = tl.where(between & before, middle + 1, lo)
            hi = tl.where(between & ~before, middle, hi)
        tl.store(p_bounds + tile, lo, mask=tile <= tiles)


@triton.jit(do_not_specialize=["count", "splits", "offset"])
def clustered_softmax_finish_kernel(
    p_parts, p_common, p_scale, p_out, count, splits, offset, D: tl.constexpr, BLOCK: tl.constexpr
):
    """out (count,) = scale (sum of parts (splits, count) + common), common (D,) from ``offset`` on, repeating."""
    scale = tl.load(p_scale)
    for i in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        m = o < count
        total = tl.zeros((BLOCK,), tl.float32)
        for part in tl.range(0, splits):
            total += tl.load(p_parts + part * count.to(tl.int64) + o, mask=m, other=0.0)
        total = (total + tl.load(p_common + offset + o % D, mask=m, other=0.0)) * scale
        tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=m)


# Launches


def _common(level: Level, plan: Plan, z: Tensor, upstream: Upstream) -> Tensor:
    """What every row (D,), and every bias, of a level receives from g2: (D + 1,) fp32."""
    position = torch.arange(z.shape[0], device=z.device)
    member = (position >= plan.offsets.select(0, level.first)) & (position < plan.offsets.select(0, level.last))
    g2 = torch.where(member, upstream.uniform, 0.0)
    rows = matmul_wide(g2.unsqueeze(0).to(z.dtype), z).squeeze(0)
    return torch.cat([rows, g2.sum(0, keepdim=True)]) / level.num_entries


def level_weight(
    level: Level,
    plan: Plan,
    column: Tensor,
    z: Tensor,
    shifted: Tensor,
    value: Tensor,
    upstream: Upstream,
    zeros: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dW (C, D) and db (C,), or an empty db where there is no bias. ``zeros`` are at least D + 1."""

    def run(tile: configs.Tile) -> tuple[Tensor, Tensor]:
        return _level_weight_with(tile, level, plan, column, z, shifted, value, upstream, zeros, dtype)

    return run(best_tile("weight_unbiased" if level.bias is None else "weight", level.rank, z, run))


def _level_weight_with(
    tile: configs.Tile,
    level: Level,
    plan: Plan,
    column: Tensor,
    z: Tensor,
    shifted: Tensor,
    value: Tensor,
    upstream: Upstream,
    zeros: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    device, num_entries = z.device, level.num_entries
    entry_tiles = -(-num_entries // tile.block_v)
    programs = num_processors(device) * tile.blocks_per_sm
    # A head of few tiles would leave most of the device idle: its tokens are cut, too, and the parts summed in order.
    splits = max(1, min(programs // max(1, entry_tiles), MAX_SPLITS, -(-z.shape[0] // tile.block_t)))
    final = splits == 1
    common = _common(level, plan, z, upstream) if upstream.has_uniform else zeros
    keys, lowest = (column, 0) if level.lo == 0 else (plan.ids, level.lo)
    bounds = torch.empty(entry_tiles + 1, dtype=torch.int32, device=device)
    launch(
        clustered_softmax_bounds_kernel, entry_tiles // BLOCK + 1, z,
        keys, bounds, z.shape[0], num_entries, lowest, entry_tiles, z.shape[0].bit_length(),
        BLOCK_V=tile.block_v, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip
    has_bias = level.bias is not None
    out = dtype if final else torch.float32
    d_weight = torch.empty(splits, num_entries, level.rank, dtype=out, device=device)
    d_bias = torch.empty(splits, num_entries if has_bias else 0, dtype=out, device=device)
    launch(
        clustered_softmax_bwd_weight_kernel, programs, z,
        z, level.weight, pointer(level.bias, z), column, shifted, value, upstream.ratio, plan.offsets, bounds,
        upstream.flags, common, upstream.scale, d_weight, d_bias, level.first, level.last, num_entries, splits,
        **_weight_constants(level.rank, z.dtype, tile, has_bias, final),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if final:
        return d_weight.squeeze(0), d_bias.squeeze(0)
    return (
        _finish(d_weight, common, 0, level.rank, upstream.scale, dtype),
        _finish(d_bias, common, level.rank, 1, upstream.scale, dtype),
    )


def _finish(parts: Tensor, common: Tensor, offset: int, width: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale (sum of parts over their first dimension + ``width`` numbers of common along the last)."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    count = out.numel()
    if count > 0:
        launch(
            clustered_softmax_finish_kernel, -(-count // BLOCK), parts,
            parts, common, scale, out, count, parts.shape[0], offset, D=width, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
    return out


def _weight_constants(rank: int, dtype: torch.dtype, tile: configs.Tile, bias: bool, final: bool) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "HAS_BIAS": bias,
        "TRANSPOSED": tile.transposed, "FINAL": final, "SHIFT": probability_shift(dtype),
        "PRECISION": dot_precision(dtype, rank), "STAGES": tile.num_stages,
    }  # fmt: skip


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture (80, 90 or 100)."""
    kernel = clustered_softmax_bwd_weight_kernel
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            for name in ("weight", "weight_unbiased"):
                tile = configs.tile_for(name, rank, dtype, arch)
                constants = _weight_constants(rank, dtype, tile, name == "weight", True)
                types = pointer_types(dtype, kernel)
                case = f"{name}/{TYPE_NAMES[dtype]}/{rank}"
                yield aot_case(case, kernel, types, constants, tile.num_warps, tile.num_stages)
    for name, kernel, types, constants in (
        ("bounds", clustered_softmax_bounds_kernel, {"p_keys": "*i32", "p_bounds": "*i32"}, {"BLOCK_V": 64}),
        ("finish", clustered_softmax_finish_kernel, {"p_out": "*bf16"}, {"D": 256}),
    ):
        given = {arg: types.get(arg, "*fp32" if arg.startswith("p_") else "i32") for arg in kernel.arg_names}
        yield aot_case(f"softmax_{name}", kernel, given, {**constants, "BLOCK": BLOCK}, LAUNCH["num_warps"], 1)
