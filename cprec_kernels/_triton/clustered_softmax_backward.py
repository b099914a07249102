"""Gradients of the clustered softmax on a GPU. No atomics: an entry's gradient has one owner, and so has a token's.

With g1, g2 the upstream gradients of log_prob and uniform, p the softmax of a level of C entries, and c = -(g1 + g2),
a token's logits have the gradient g1 (onehot - p) + g2 (1/C - p) = c p + g1 onehot + g2 / C. So

    dz  = c d + g2 (mean_v w_v - w_target)          d = -d log p_target / dz, see clustered_softmax.py
    dW_v = sum over tokens of c p_v z               but c p + g1 = -c (1 - p) - g2 where v is the target
           + (sum over tokens of g2 z) / C          the same for every v

Upstream gradients are divided by the largest of them and multiplied back at the end, so that operands in half precision
keep their range. The size of c goes into the exponent, p |c| = exp(s - lse + log |c|); its sign costs a product per
logit and is applied only where signs differ within a batch, which a loss never gives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .clustered_softmax import SCALARS, pointer, pointer_types, scan, target_logit, units_of
from .clustered_softmax import refusal as refusal
from .clustered_softmax_plan import BLOCK, LAUNCH, Level, Plan, Upstream, levels_of, make_plan, normalise, plan_of
from .clustered_softmax_weight import level_weight
from .common import (
    DTYPES,
    LOG2E,
    TYPE_NAMES,
    AotCases,
    aot_case,
    architecture,
    cast,
    launch,
    load_rows,
    matmul_wide,
    num_processors,
    one_minus_exp,
    padded_rank,
    probability_shift,
    row_sums,
    store_rows,
)

MEAN_ROWS = 4096  # rows summed by one program; few enough to spread a head, many enough to keep partial sums few

MEAN_WARPS = 4

# Kernels


@triton.jit(do_not_specialize=SCALARS)
def clustered_softmax_bwd_token_kernel(
    p_z, p_w, p_bias, p_column, p_lse, p_ratio, p_uniform, p_offsets, p_lse2, p_factor, p_shifted, p_value, p_gap,
    first, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, HAS_BIAS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What the other kernels want to know per token, see :class:`TokenTerms`."""
    start = tl.load(p_offsets + first)
    count = tl.load(p_offsets + last) - start
    o_d = tl.arange(0, BLOCK_D)
    for i_s in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_S), tl.num_programs(0)):
        t = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
        m_t = t < count
        b_column = tl.load(p_column + start + t, mask=m_t, other=0)
        b_z = load_rows(p_z, start + t, o_d, m_t, D, BLOCK_D, True)
        b_w = load_rows(p_w, b_column, o_d, m_t, D, BLOCK_D, True)
        logit = target_logit(p_bias, b_z, b_w, b_column, m_t, HAS_BIAS)
        lse = tl.load(p_lse + start + t, mask=m_t, other=0.0)
        ratio = tl.load(p_ratio + start + t, mask=m_t, other=1.0)
        uniform = tl.load(p_uniform + start + t, mask=m_t, other=0.0)
        gap = one_minus_exp((lse - logit.to(tl.float64)).to(tl.float32))
        lse2 = lse * LOG2E
        # A log-sum-exp rounded to fp32 would put the same error into all of a token's probabilities. Its integer part is
        # exact, and the rest is a factor of their sum.
        whole = tl.floor(lse2.to(tl.float32))
        tl.store(p_lse2 + start + t, whole, mask=m_t)
        tl.store(p_factor + start + t, tl.exp2((whole.to(tl.float64) - lse2).to(tl.float32)), mask=m_t)
        shifted = (lse2 - tl.log2(tl.abs(ratio)).to(tl.float64) - SHIFT).to(tl.float32)
        tl.store(p_shifted + start + t, shifted, mask=m_t)
        unit = tl.exp2(tl.full((BLOCK_S,), SHIFT, tl.float32))
        tl.store(p_value + start + t, (-ratio * gap - uniform) * unit, mask=m_t)
        tl.store(p_gap + start + t, gap, mask=m_t)


@triton.jit(do_not_specialize=["num_tokens", *SCALARS])
def clustered_softmax_bwd_input_kernel(
    p_w, p_column, p_ratio, p_uniform, p_factor, p_gap, p_mean, p_offsets, p_order, p_rows, p_descent, p_dz,
    num_tokens, first, last, num_entries, target_units,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    FROM_ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dz (T, D) from the forward pass's descent or from the parts of sum p_v w_v (FROM_ROWS).

    ADD: a level's tokens receive it on top of what is there. Otherwise dz is written, 0 for the tokens of other levels.
    """
    start, count, token_tiles, _entry_tiles, parts = units_of(
        p_offsets, first, last, num_entries, target_units, BLOCK_T, BLOCK_V
    )
    o_d = tl.arange(0, BLOCK_D)
    b_mean = tl.load(p_mean + o_d, mask=o_d < D, other=0.0)
    for i_s in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_S), tl.num_programs(0)):
        t = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
        m_t = t < count
        b_column = tl.load(p_column + start + t, mask=m_t, other=0)
        b_w = load_rows(p_w, b_column, o_d, m_t, D, BLOCK_D, True).to(tl.float32)
        if FROM_ROWS:
            i_t = (i_s * BLOCK_S) // BLOCK_T
            descent = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            for part in tl.range(0, parts):
                place = (part * token_tiles + i_t) * BLOCK_T + (t - i_t * BLOCK_T)
                descent += tl.load(p_rows + place.to(tl.int64)[:, None] * BLOCK_D + o_d[None, :])
            descent *= tl.load(p_factor + start + t, mask=m_t, other=0.0)[:, None]
            descent -= tl.load(p_gap + start + t, mask=m_t, other=0.0)[:, None] * b_w
        else:
            place = tl.load(p_order + start + t, mask=m_t, other=0)
            descent = load_rows(p_descent, place, o_d, m_t, D, BLOCK_D, True).to(tl.float32)
        ratio = tl.load(p_ratio + start + t, mask=m_t, other=0.0)
        uniform = tl.load(p_uniform + start + t, mask=m_t, other=0.0)
        dz = ratio[:, None] * descent + uniform[:, None] * (b_mean[None, :] - b_w)
        if ADD:
            dz += load_rows(p_dz, start + t, o_d, m_t, D, BLOCK_D, True)
        store_rows(p_dz, start + t, o_d, m_t, dz, D)
    if not ADD:
        others = num_tokens - count
        for i_s in tl.range(tl.program_id(0), tl.cdiv(others, BLOCK_S), tl.num_programs(0)):
            t = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
            place = tl.where(t < start, t, t + count)
            store_rows(p_dz, place, o_d, t < others, tl.zeros((BLOCK_S, BLOCK_D), tl.float32), D)


@triton.jit(do_not_specialize=["count"])
def clustered_softmax_scatter_kernel(p_rows, p_order, p_scale, p_out, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """out (T, D): row ``order[t]`` is scale times row t of rows; count = T D."""
    scale = tl.load(p_scale)
    for i in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        o = tl.full((BLOCK,), i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = o < count
        value = tl.load(p_rows + o, mask=m, other=0.0) * scale
        place = tl.load(p_order + o // D, mask=m, other=0) * D + o % D
        tl.store(p_out + place, value.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_entries"])
def clustered_softmax_bwd_mean_kernel(
    p_w, p_flags, p_sums, num_entries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows of w (C, D) each, or 0 where no token has a g2: the host does not know whether one has."""
    o_d = tl.arange(0, BLOCK_D)
    any_uniform = tl.load(p_flags + 1) != 0
    for block in tl.range(tl.program_id(0), tl.cdiv(num_entries, ROWS), tl.num_programs(0)):
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        lo = block * ROWS
        hi = tl.where(any_uniform, tl.minimum(lo + ROWS, num_entries), lo)
        for v0 in tl.range(lo, hi, BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            b_sum += tl.sum(load_rows(p_w, v, o_d, v < num_entries, D, BLOCK_D, True).to(tl.float32), 0)
        tl.store(p_sums + block * D + o_d, b_sum, mask=o_d < D)


# Launches


class TokenTerms(NamedTuple):
    """Per token in sorted order, fp32.

    lse2, factor: lse / log 2 rounded down, and 2^-(what was lost). shifted: lse / log 2 - log2 |c|. value: c p + g1.
    gap: 1 - p. Those that multiply operands carry :func:`.common.probability_shift`.
    """

    lse2: Tensor
    factor: Tensor
    shifted: Tensor
    value: Tensor
    gap: Tensor


def _token_terms(level: Level, plan: Plan, column: Tensor, z: Tensor, lse: Tensor, upstream: Upstream) -> TokenTerms:
    token = configs.tile_for("token", level.rank, z.dtype, architecture(z.device))
    terms = TokenTerms(*(torch.empty(z.shape[0], dtype=torch.float32, device=z.device) for _ in range(5)))
    launch(
        clustered_softmax_bwd_token_kernel, num_processors(z.device) * token.blocks_per_sm, z,
        z, level.weight, pointer(level.bias, z), column, lse, upstream.ratio, upstream.uniform, plan.offsets, *terms,
        level.first, level.last, **_token_constants(level.rank, z.dtype, token, level.bias is not None),
        num_warps=token.num_warps, num_stages=token.num_stages, **row_sums(level.rank),
    )  # fmt: skip
    return terms


def _mean_row(level: Level, upstream: Upstream) -> Tensor:
    """Average row of a level's weight (D,), fp32; zero when no token has a g2."""
    weight = level.weight
    blocks = -(-level.num_entries // MEAN_ROWS)
    sums = torch.empty(blocks, level.rank, dtype=torch.float32, device=weight.device)
    launch(
        clustered_softmax_bwd_mean_kernel, min(blocks, num_processors(weight.device) * 4), weight,
        weight, upstream.flags, sums, level.num_entries, **_mean_constants(level.rank),
        num_warps=MEAN_WARPS, num_stages=2,
    )  # fmt: skip
    return sums.sum(0) / level.num_entries


def _level_input(
    level: Level,
    plan: Plan,
    column: Tensor,
    z: Tensor,
    terms: TokenTerms | None,
    upstream: Upstream,
    descent: Tensor | None,
    zeros: Tensor,
    out: Tensor,
    add: bool,
) -> None:
    """dz (T, D) by ``upstream.scale`` in sorted order, to ``out`` or, for the level's tokens, on top of it (``add``).

    Needs terms or a descent. ``zeros`` are at least D.
    """
    token = configs.tile_for("token", level.rank, z.dtype, architecture(z.device))
    rows, tile, target_units = zeros, token, 1
    factor = gap = upstream.ratio
    if descent is None:
        assert terms is not None
        factor, gap = terms.factor, terms.gap
        tile, grid, _, _, rows = scan(level, plan, column, z, terms.lse2, True)
        target_units = grid.target_units
    launch(
        clustered_softmax_bwd_input_kernel, num_processors(z.device) * token.blocks_per_sm, z,
        level.weight, column, upstream.ratio, upstream.uniform, factor, gap,
        _mean_row(level, upstream) if upstream.has_uniform else zeros, plan.offsets, plan.order,
        rows, pointer(descent, z), out, z.shape[0], level.first, level.last, level.num_entries, target_units,
        **_input_constants(level.rank, tile, token, descent is None, add),
        num_warps=token.num_warps, num_stages=token.num_stages,
    )  # fmt: skip


def backward(
    grad_log_prob: Tensor,
    grad_uniform: Tensor | None,
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    projections: Sequence[Tensor],
    head_bias: Tensor | None,
    tail_biases: Sequence[Tensor],
    lse_head: Tensor,
    lse_tail: Tensor,
    ignore_index: int,
    output_mask: Sequence[bool],
    dtype: torch.dtype,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Gradients in ``dtype`` as ``cprec::clustered_softmax_backward``; all floating operands of one dtype.

    ``kept`` is what the forward pass kept; without it the batch is sorted and the rows are computed again.
    """
    want_input, want_weights, want_projections, want_head_bias, want_tail_biases = output_mask
    levels = levels_of(weights, projections, head_bias, tail_biases)
    d_weights: list[Tensor] = []
    d_projections: list[Tensor] = []
    d_biases: list[Tensor] = []
    empty = input.new_empty(0, dtype=dtype)
    d_input = torch.empty(input.shape, dtype=dtype, device=input.device) if want_input else empty
    d_head_bias = empty
    if target.shape[0] == 0:
        d_weights = [torch.zeros_like(weight, dtype=dtype) for weight in weights] if want_weights else []
        d_projections = [torch.zeros_like(p, dtype=dtype) for p in projections] if want_projections else []
        if want_head_bias and head_bias is not None:
            d_head_bias = torch.zeros_like(head_bias, dtype=dtype)
        d_biases = [torch.zeros_like(bias, dtype=dtype) for bias in tail_biases] if want_tail_biases else []
        return d_input, d_weights, d_projections, d_head_bias, d_biases
    descents = kept[: len(levels)]
    zeros = torch.empty(4 + input.shape[1] + 1, dtype=torch.float32, device=input.device)
    if kept:
        order, ids = kept[len(levels) :]
        plan = plan_of(order, ids, levels, zeros=zeros)
    else:
        plan = make_plan(target, levels, ignore_index, zeros=zeros)
    largest, zeros = zeros.narrow(0, 0, 4), zeros.narrow(0, 4, input.shape[1] + 1)  # both aligned
    upstream = normalise(grad_log_prob, grad_uniform, lse_head, lse_tail, plan, largest)
    # Tokens that do not count stand last. Their gradients are 0, but products with them take 0 times what they hold, and a
    # hidden state without attention is NaN.
    counts = torch.arange(input.shape[0], device=input.device) < plan.offsets.select(0, -1)
    packed = torch.where(counts.unsqueeze(1), input.index_select(0, plan.order), 0.0)
    d_packed = torch.zeros(input.shape if want_input else 0, dtype=torch.float32, device=input.device)
    for j, (level, column) in enumerate(zip(levels, plan.columns, strict=True)):
        z = level.project(packed)
        want_bias = level.bias is not None and (want_head_bias if j == 0 else want_tail_biases)
        terms = None
        if want_weights or want_bias or not kept:
            terms = _token_terms(level, plan, column, z, upstream.lse_head if j == 0 else upstream.lse_tail, upstream)
        if terms is not None and (want_weights or want_bias):
            d_weight, d_bias = level_weight(level, plan, column, z, terms.shifted, terms.value, upstream, zeros, dtype)
            if want_weights:
                d_weights.append(d_weight)
            if want_bias and j == 0:
                d_head_bias = d_bias
            elif want_bias:
                d_biases.append(d_bias)
        if not want_input and (level.projection is None or not want_projections):
            continue
        whole = level.projection is None
        dz = d_packed if whole else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        _level_input(level, plan, column, z, terms, upstream, descents[j] if kept else None, zeros, dz, add=whole)
        if level.projection is None:
            continue
        if want_projections:
            d_projections.append((matmul_wide(dz.T, packed) * upstream.scale).to(dtype))
        if want_input:
            d_packed += matmul_wide(dz, level.projection)
    if want_input:
        count, width = input.numel(), input.shape[1]
        launch(
            clustered_softmax_scatter_kernel, -(-count // BLOCK), input,
            d_packed, plan.order, upstream.scale, d_input, count, D=width, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
    return d_input, d_weights, d_projections, d_head_bias, d_biases


def clustered_softmax_backward(
    grad_log_prob: Tensor, grad_uniform: Tensor | None, input: Tensor, target: Tensor, *args: Any
) -> tuple[Any, ...]:
    """The op ``cprec::clustered_softmax_backward``."""
    *factors, lse_head, lse_tail, kept, ignore_index, arithmetic, output_mask = args
    hidden, weights, projections, head_bias, tail_biases = cast([input, *factors], arithmetic or input.dtype)
    return backward(
        grad_log_prob, grad_uniform, hidden, target, weights, projections, head_bias, tail_biases, lse_head, lse_tail,
        ignore_index, output_mask, input.dtype, kept,
    )  # fmt: skip


def clustered_softmax_backward_into(*args: Any) -> tuple[Any, ...]:
    """The op ``cprec::clustered_softmax_backward_into``: the weights' gradients are added to given ones."""
    *before, d_weights, output_mask = args
    d_input, computed, *rest = clustered_softmax_backward(*before, output_mask)
    for gradient, own in zip(d_weights, computed, strict=True):
        gradient.add_(own)
    return d_input, *rest


def _token_constants(rank: int, dtype: torch.dtype, token: configs.Tile, bias: bool) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_S": token.block_t, "HAS_BIAS": bias,
        "SHIFT": probability_shift(dtype),
    }  # fmt: skip


def _input_constants(rank: int, tile: configs.Tile, token: configs.Tile, from_rows: bool, add: bool) -> dict[str, Any]:
    return {
        "D": rank, "BLOCK_D": padded_rank(rank), "BLOCK_T": tile.block_t, "BLOCK_V": max(tile.block_v, 1),
        "BLOCK_S": min(token.block_t, tile.block_t), "FROM_ROWS": from_rows, "ADD": add,
    }  # fmt: skip


def _mean_constants(rank: int) -> dict[str, Any]:
    block_d = padded_rank(rank)
    return {"D": rank, "BLOCK_D": block_d, "BLOCK_V": max(16, 4096 // block_d), "ROWS": MEAN_ROWS}


def aot_cases(arch: int) -> AotCases:
    """Every entry of the tables for an architecture (80, 90 or 100), with bias, which needs the most registers."""
    for dtype in DTYPES:
        for rank in configs.BLOCK_DS:
            token = configs.tile_for("token", rank, dtype, arch)
            rows = configs.tile_for("scan_rows", rank, dtype, arch)
            for name, kernel, constants, warps, stages in (
                ("token", clustered_softmax_bwd_token_kernel, _token_constants(rank, dtype, token, True),
                 token.num_warps, token.num_stages),
                ("input", clustered_softmax_bwd_input_kernel, _input_constants(rank, rows, token, True, False),
                 token.num_warps, token.num_stages),
                ("input_known", clustered_softmax_bwd_input_kernel, _input_constants(rank, token, token, False, True),
                 token.num_warps, token.num_stages),
                ("mean", clustered_softmax_bwd_mean_kernel, _mean_constants(rank), MEAN_WARPS, 2),
            ):  # fmt: skip
                types = pointer_types(dtype, kernel)
                yield aot_case(f"bwd_{name}/{TYPE_NAMES[dtype]}/{rank}", kernel, types, constants, warps, stages)
    kernel = clustered_softmax_scatter_kernel
    types = {"p_rows": "*fp32", "p_order": "*i64", "p_scale": "*fp32", "p_out": "*bf16", "count": "i32"}
    yield aot_case("softmax_scatter", kernel, types, {"D": 256, "BLOCK": BLOCK}, LAUNCH["num_warps"], 1)
