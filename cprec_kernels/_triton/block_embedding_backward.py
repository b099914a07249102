"""Block embedding in Triton, backward: sums over runs of sorted tokens in two levels, without atomics.

Tokens are sorted by id, so a row's tokens are one run and a cluster's tokens one range. For dE_j every row of G is first multiplied by P_j^T, where there is one; then runs are
summed in two levels. Level 1: each aligned chunk of CHUNK sorted tokens writes the runs that it holds whole, one partial sum
for a run that began before it and one for a run that goes on after it. Level 2: the chunk in which such a run begins adds the
run's partial sums in order. A sum's order depends on the ids alone, so bits repeat; a row is written by one program.

The host reads nothing from the device but, for the sparse form, the number of touched rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_embedding import LAUNCH, MAX_CLUSTERS, OFFSETS, Plan, aot_plans, refusal, spread, with_integers
from .block_embedding_projection import projection_gradients
from .common import AotCases, aot_case, launch, padded_rank

__all__ = [
    "aot_cases",
    "block_embedding_backward",
    "block_embedding_backward_into",
    "block_embedding_backward_sparse",
    "refusal",
]


@dataclasses.dataclass(frozen=True)
class RunBlocks:
    """Sizes beyond those of the forward. Untimed: from ahead-of-time compilation alone, to be settled on a GPU.

    Attributes:
        chunk: sorted tokens per program of level 1, one after another; columns: at most, four per lane of its one warp.
        walk: chunks whose partial sums level 2 adds at a time.
    """

    chunk: int = 32
    columns: int = 128
    walk: int = 8


RUNS = RunBlocks()
ONE_WARP: dict[str, Any] = LAUNCH | {"num_warps": 1}
BASES = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")  # plain arguments, as OFFSETS

# Kernels


@triton.jit(do_not_specialize=["num_tokens", *OFFSETS])
def block_embedding_bounds_kernel(
    p_keys,  # (T,) ascending
    p_bounds,  # (n + 1,) int64: first sorted token of every cluster, then the number of tokens with a gradient
    num_tokens, c1, c2, c3, c4, c5, c6, c7, c8, CLUSTERS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offsets = (0, c1, c2, c3, c4, c5, c6, c7, c8)
    # One position more than there are tokens: what no token reaches begins at the end.
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    before = tl.load(p_keys + o_t - 1, mask=(o_t > 0) & (o_t <= num_tokens), other=-1)
    here = tl.load(p_keys + o_t, mask=o_t < num_tokens, other=0)
    for j in tl.static_range(CLUSTERS + 1):
        reached = (here >= offsets[j]) | (o_t == num_tokens)
        begins = (before < offsets[j]) & reached & (o_t <= num_tokens)
        tl.store(p_bounds + j + tl.zeros((BLOCK_T,), tl.int64), o_t, mask=begins)


@triton.jit
def block_embedding_bwd_rows_kernel(
    p_grad,  # (T, d)
    p_perm,  # (T,) token at every sorted position
    p_bounds,
    p_projections,
    p_rows,  # (T, STRIDE) fp32: G P_j^T at the sorted positions of projected clusters
    WIDTH: tl.constexpr, RANKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    o_t = start + tl.arange(0, BLOCK_T)
    for j in tl.static_range(len(RANKS)):
        if RANKS[j] != WIDTH:
            lo = tl.load(p_bounds + j)
            hi = tl.load(p_bounds + j + 1)
            if (lo < start + BLOCK_T) & (hi > start):
                member = (o_t >= lo) & (o_t < hi)
                token = tl.load(p_perm + o_t, mask=member, other=0)
                for r0 in range(0, RANKS[j], BLOCK_R[j]):
                    o_r = r0 + tl.arange(0, BLOCK_R[j])
                    acc = tl.full((BLOCK_T, BLOCK_R[j]), 0.0, tl.float32)
                    for k0 in range(0, WIDTH, BLOCK_K):
                        o_k = k0 + tl.arange(0, BLOCK_K)
                        b_grad = tl.load(
                            p_grad + token[:, None] * WIDTH + o_k[None, :],
                            mask=member[:, None] & (o_k < WIDTH)[None, :],
                            other=0.0,
                        )
                        b_projection = tl.load(
                            p_projections[j] + o_r[None, :] * WIDTH + o_k[:, None],
                            mask=(o_r < RANKS[j])[None, :] & (o_k < WIDTH)[:, None],
                            other=0.0,
                        )
                        acc = tl.dot(b_grad, b_projection, acc, input_precision=PRECISION)
                    tl.store(
                        p_rows + o_t[:, None] * STRIDE + o_r[None, :],
                        acc,
                        mask=member[:, None] & (o_r < RANKS[j])[None, :],
                    )


@triton.jit
def _put(p_table, row, rank: tl.constexpr, o_c, value, mask, ACCUMULATE: tl.constexpr):
    """Store a row's gradient, or add it to the one there."""
    place = p_table + row * rank + o_c
    if ACCUMULATE:
        value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, value.to(p_table.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*BASES])
def block_embedding_bwd_runs_kernel(
    p_grad,  # (T, d)
    p_rows,  # (T, STRIDE) fp32
    p_perm,
    p_keys,
    p_slots,  # (T,) where a token's row lies; minus the base of its cluster, the row in its table
    p_bounds,
    p_tables,  # n of (rows of cluster j, d_j): the gradients
    p_partials,  # (chunks, 2, PARTIAL) fp32: of the run that began before a chunk, of the run that goes on after it
    b0, b1, b2, b3, b4, b5, b6, b7,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, STRIDE: tl.constexpr, PARTIAL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    bases = (b0, b1, b2, b3, b4, b5, b6, b7)
    i_chunk = tl.program_id(0).to(tl.int64)
    start = i_chunk * CHUNK
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_before = p_partials + i_chunk * 2 * PARTIAL + o_c
    for j in tl.static_range(len(RANKS)):
        cluster_lo = tl.load(p_bounds + j)
        cluster_hi = tl.load(p_bounds + j + 1)
        lo = tl.maximum(cluster_lo, start)
        hi = tl.minimum(cluster_hi, start + CHUNK)
        if (lo < hi) & (tl.program_id(1) * BLOCK_C < RANKS[j]):
            m_c = o_c < RANKS[j]
            key = tl.load(p_keys + lo)
            began_before = tl.load(p_keys + lo - 1, mask=lo > cluster_lo, other=-1) == key
            ends = key < 0
            acc = tl.zeros((BLOCK_C,), tl.float32)
            for t in tl.range(lo, hi):
                after = tl.load(p_keys + t + 1, mask=t + 1 < cluster_hi, other=-1)
                if RANKS[j] == WIDTH:
                    acc += tl.load(p_grad + tl.load(p_perm + t) * WIDTH + o_c, mask=m_c, other=0.0).to(tl.float32)
                else:
                    acc += tl.load(p_rows + t * STRIDE + o_c, mask=m_c, other=0.0)
                ends = after != key
                row = tl.load(p_slots + t).to(tl.int64) - bases[j]
                _put(
                    p_tables[j], row, RANKS[j], o_c, acc, o_c < tl.where(ends & ~began_before, RANKS[j], 0), ACCUMULATE
                )
                tl.store(p_before, acc, mask=o_c < tl.where(ends & began_before, RANKS[j], 0))
                acc = tl.where(ends, 0.0, acc)
                began_before = began_before & ~ends
                key = after
            tl.store(p_before, acc, mask=o_c < tl.where(~ends & began_before, RANKS[j], 0))
            tl.store(p_before + PARTIAL, acc, mask=o_c < tl.where(~ends & ~began_before, RANKS[j], 0))


@triton.jit(do_not_specialize=[*BASES])
def block_embedding_bwd_crossing_kernel(
    p_keys, p_slots, p_bounds, p_tables, p_partials,
    b0, b1, b2, b3, b4, b5, b6, b7,
    RANKS: tl.constexpr, PARTIAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, WALK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    bases = (b0, b1, b2, b3, b4, b5, b6, b7)
    i_chunk = tl.program_id(0).to(tl.int64)
    start = i_chunk * CHUNK
    end = start + CHUNK
    counted = tl.load(p_bounds + len(RANKS))
    # The run of a chunk's last token is this program's when it goes on and did not begin before the chunk.
    goes_on = end < counted
    key = tl.load(p_keys + end - 1, mask=goes_on, other=-1)
    after = tl.load(p_keys + end, mask=goes_on, other=-2)
    before = tl.load(p_keys + start - 1, mask=goes_on & (start > 0), other=-3)
    if (after == key) & (before != key):
        o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        for j in tl.static_range(len(RANKS)):
            if (
                (tl.load(p_bounds + j) < end)
                & (tl.load(p_bounds + j + 1) >= end)
                & (tl.program_id(1) * BLOCK_C < RANKS[j])
            ):
                m_c = o_c < RANKS[j]
                acc = tl.load(p_partials + (i_chunk * 2 + 1) * PARTIAL + o_c, mask=m_c, other=0.0)
                o_w = i_chunk + 1 + tl.arange(0, WALK)
                more = after == key
                while more:
                    inside = o_w * CHUNK < counted
                    same = tl.load(p_keys + o_w * CHUNK, mask=inside, other=-1) == key
                    b_partials = tl.load(
                        p_partials + (o_w * 2 * PARTIAL)[:, None] + o_c[None, :],
                        mask=same[:, None] & m_c[None, :],
                        other=0.0,
                    )
                    acc += tl.sum(b_partials, 0)
                    o_w += WALK
                    more = tl.min(same.to(tl.int32), 0) == 1
                row = tl.load(p_slots + end - 1).to(tl.int64) - bases[j]
                _put(p_tables[j], row, RANKS[j], o_c, acc, m_c, ACCUMULATE)


# Launches


def stride_of(plan: Plan) -> int:
    """Columns of the buffer of rows of G P_j^T."""
    return max((plan.ranks[j] for j in plan.projected), default=1)


def rows_constexprs(plan: Plan) -> dict[str, Any]:
    return {
        "WIDTH": plan.width, "RANKS": plan.ranks, "STRIDE": stride_of(plan), "BLOCK_T": plan.blocks.tokens,
        "BLOCK_R": plan.block_r, "BLOCK_K": min(plan.blocks.k, padded_rank(plan.width)), "PRECISION": plan.precision,
    }  # fmt: skip


def runs_constexprs(plan: Plan, accumulate: bool) -> dict[str, Any]:
    return {
        "WIDTH": plan.width, "RANKS": plan.ranks, "STRIDE": stride_of(plan), "PARTIAL": max(plan.ranks),
        "CHUNK": RUNS.chunk, "BLOCK_C": min(RUNS.columns, padded_rank(max(plan.ranks))), "ACCUMULATE": accumulate,
    }  # fmt: skip


def crossing_constexprs(plan: Plan, accumulate: bool) -> dict[str, Any]:
    shared = runs_constexprs(plan, accumulate)
    names = ("RANKS", "PARTIAL", "CHUNK", "BLOCK_C", "ACCUMULATE")
    return {name: shared[name] for name in names} | {"WALK": RUNS.walk}


class SortedBatch:
    """A batch in the order of its ids, and the sums over its runs."""

    def __init__(self, grad: Tensor, ids: Tensor, plan: Plan, padding_idx: int | None) -> None:
        self.plan = plan
        self.grad = grad.reshape(-1, plan.width).contiguous()
        # A radix sort's time goes with the width of its keys. The padding id's tokens go behind all others.
        narrow = torch.int32 if plan.num_items < 2**31 else torch.int64
        keys = ids.reshape(-1).to(narrow)
        if padding_idx is not None:
            keys = keys.masked_fill(keys == padding_idx, plan.num_items)
        self.keys, self.perm = torch.sort(keys, stable=True)
        self.count = ids.numel()
        self.bounds = torch.empty(len(plan.ranks) + 1, dtype=torch.int64, device=ids.device)
        launch(
            block_embedding_bounds_kernel, triton.cdiv(self.count + 1, 1024), ids,
            self.keys, self.bounds, self.count, *plan.offsets, CLUSTERS=len(plan.ranks), BLOCK_T=1024, **LAUNCH
        )  # fmt: skip

    def slots(self) -> tuple[Tensor, Tensor]:
        """Which sorted tokens begin a run, and the number of every token's run, from 0."""
        begins = self.keys.diff(prepend=self.keys.new_full((1,), -1)) != 0
        return begins, begins.cumsum(0) - 1

    def sum_runs(
        self, projections: Sequence[Tensor], gradients: Sequence[Tensor], slots: Tensor, bases: Sequence[int],
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """Write, or add, the gradient of every touched row to row ``slots - bases[j]`` of ``gradients[j]``."""
        plan, count = self.plan, self.count
        rows = self.grad.new_empty(count if plan.projected else 1, stride_of(plan), dtype=torch.float32)
        if plan.projected:
            launch(
                block_embedding_bwd_rows_kernel, triton.cdiv(count, plan.blocks.tokens), rows,
                self.grad, self.perm, self.bounds, spread(plan, projections, self.grad), rows,
                **rows_constexprs(plan), **LAUNCH,
            )  # fmt: skip
        constexprs = runs_constexprs(plan, accumulate)
        chunks = triton.cdiv(count, RUNS.chunk)
        grid = (chunks, triton.cdiv(max(plan.ranks), constexprs["BLOCK_C"]))
        partials = rows.new_empty(chunks, 2, max(plan.ranks))
        tables = tuple(gradients)
        bases = (*bases, *[0] * (MAX_CLUSTERS - len(bases)))
        launch(
            block_embedding_bwd_runs_kernel, grid, rows,
            self.grad, rows, self.perm, self.keys, slots, self.bounds, tables, partials, *bases,
            **constexprs, **ONE_WARP,
        )  # fmt: skip
        if chunks > 1:
            launch(
                block_embedding_bwd_crossing_kernel, grid, rows,
                self.keys, slots, self.bounds, tables, partials, *bases,
                **crossing_constexprs(plan, accumulate), **ONE_WARP,
            )  # fmt: skip

    def d_projections(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """dP_j of every projected cluster."""
        return projection_gradients(self.plan, self.grad, self.perm, self.keys, self.bounds, embeddings)


def block_embedding_backward(
    grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """``cprec::block_embedding_backward``."""
    want_tables, want_projections = output_mask
    d_embeddings = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in embeddings if want_tables]
    return d_embeddings, _backward_onto(
        grad, ids, embeddings, projections, padding_idx, d_embeddings, want_projections, accumulate=False
    )


def block_embedding_backward_into(
    grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None,
    d_embeddings: Sequence[Tensor], want_projections: bool,
) -> list[Tensor]:  # fmt: skip
    """``cprec::block_embedding_backward_into``: adds to ``d_embeddings``, each touched row once."""
    return _backward_onto(
        grad, ids, embeddings, projections, padding_idx, d_embeddings, want_projections, accumulate=True
    )


def _backward_onto(
    grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None,
    d_embeddings: Sequence[Tensor], want_projections: bool, accumulate: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the projections; those of the tables go to ``d_embeddings``, unless it is empty."""
    if ids.numel() == 0 or not (d_embeddings or (want_projections and projections)):
        return _zeros(projections) if want_projections else []
    batch = SortedBatch(grad, ids, Plan.of(embeddings, projections), padding_idx)
    if d_embeddings:
        starts = (0, *batch.plan.offsets)[: len(embeddings)]
        batch.sum_runs(projections, d_embeddings, batch.keys, starts, accumulate)
    return batch.d_projections(embeddings) if want_projections else []


def block_embedding_backward_sparse(
    grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None,
    output_mask: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """``cprec::block_embedding_backward_sparse``. Waits for the device: how many rows were touched decides the shapes."""
    want_tables, want_projections = output_mask
    if ids.numel() == 0:
        rows = [ids.new_empty(0) for _ in embeddings if want_tables]
        values = [table.new_empty(0, table.shape[1]) for table in embeddings if want_tables]
        return rows, values, _zeros(projections) if want_projections else []
    plan = Plan.of(embeddings, projections)
    batch = SortedBatch(grad, ids, plan, padding_idx)
    rows, values = [], []
    if want_tables:
        begins, slots = batch.slots()
        # Slots before every cluster's first token: the last one closes the last cluster.
        before = torch.cat([slots.new_zeros(1), slots + 1])[batch.bounds]
        edges = before.tolist()
        touched = batch.keys[begins].long()
        starts = (0, *plan.offsets)
        for j, table in enumerate(embeddings):
            rows.append(touched[edges[j] : edges[j + 1]] - starts[j])
            values.append(table.new_empty(edges[j + 1] - edges[j], table.shape[1]))
        batch.sum_runs(projections, values, slots, edges[:-1])
    return rows, values, batch.d_projections(embeddings) if want_projections else []


def rehearse_sparse(
    grad: Tensor, ids: Tensor, embeddings: Sequence[Tensor], projections: Sequence[Tensor], padding_idx: int | None,
    output_mask: Sequence[bool],
) -> None:  # fmt: skip
    """The launches of :func:`block_embedding_backward_sparse` without its wait for the device; see common.rehearse."""
    want_tables, want_projections = output_mask
    batch = SortedBatch(grad, ids, Plan.of(embeddings, projections), padding_idx)
    if want_tables:
        batch.sum_runs(projections, [torch.empty_like(table) for table in embeddings], batch.slots()[1], ())
    if want_projections:
        batch.d_projections(embeddings)


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


# Ahead-of-time compilation


def aot_cases(arch: int) -> AotCases:
    """What the ahead-of-time gate compiles."""
    warps, stages = LAUNCH["num_warps"], LAUNCH["num_stages"]
    for name, dtype, plan in aot_plans():
        many = (f"*{dtype}",) * len(plan.ranks)
        types = {
            "p_grad": f"*{dtype}", "p_perm": "*i64", "p_keys": "*i32", "p_slots": "*i32", "p_bounds": "*i64",
            "p_rows": "*fp32", "p_partials": "*fp32", "p_projections": many, "p_tables": many,
        }  # fmt: skip
        for stage, kernel, constexprs, num_warps in (
            ("rows", block_embedding_bwd_rows_kernel, rows_constexprs(plan), warps),
            ("runs", block_embedding_bwd_runs_kernel, runs_constexprs(plan, False), 1),
            ("crossing", block_embedding_bwd_crossing_kernel, crossing_constexprs(plan, False), 1),
        ):
            given = with_integers(kernel, types)
            yield aot_case(f"block_embedding_bwd_{stage}/{name}", kernel, given, constexprs, num_warps, stages)
    kernel = block_embedding_bounds_kernel
    given = with_integers(kernel, {"p_keys": "*i32", "p_bounds": "*i64"})
    yield aot_case("block_embedding_bounds", kernel, given, {"CLUSTERS": 3, "BLOCK_T": 1024}, warps, stages)
