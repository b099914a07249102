"""The place of a target among all items: hidden states (B, d) and targets (B,) to ranks (B,), as HR, NDCG and MRR need it.

0-based: items that score higher, and those of the same score with a smaller id. Model of work: that of a search by
"clustered" scores in :mod:`benchmarks.ops.bench_clustered_topk`; what scans a tail only for rows that it matters to may pass
a fraction of 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops import bench_clustered_softmax as softmax_op
from benchmarks.ops import bench_clustered_topk as topk_op
from benchmarks.registry import (
    ISAS,
    Op,
    Prepared,
    Provider,
    Results,
    autocast,
    forced_isa,
    missing_isa,
    reference_backend,
)

Problem = softmax_op.Problem


def prepare_rank(rank: Callable[[], Tensor], dtype: str) -> Prepared:
    last: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), autocast(dtype):
            last[:] = [rank()]

    def results() -> Results:
        return {"rank": last[0]}

    def summary() -> Results:
        # NDCG's gains: near ties, of which 10^7 items have many, move a rank by a few places and its gain hardly.
        return {"gain": 1 / torch.log2(last[0].double() + 2)}

    return Prepared(call, (), results, summary)


def prepare_ours(problem: Problem) -> Prepared:
    module = problem.module
    return prepare_rank(lambda: module.rank(problem.hidden, problem.target), problem.setting.dtype)


def prepare_adaptive(problem: Problem) -> Prepared:
    """All scores, compared with the target's own."""
    module = softmax_op.adaptive_module(problem)
    target = problem.target.unsqueeze(1)
    ids = torch.arange(problem.setting.case.num_items)

    def rank() -> Tensor:
        scores = module.log_prob(problem.hidden)
        own = scores.gather(1, target)
        return ((scores > own) | ((scores == own) & (ids < target))).sum(1)

    return prepare_rank(rank, problem.setting.dtype)


def compared_bytes(problem: Problem) -> int:
    # The scores as log_prob makes them, and four masks of one byte.
    return topk_op.scores_bytes(problem) + 4 * problem.setting.case.tokens * problem.setting.case.num_items


def ours_in(isa: str) -> Provider:
    return Provider(
        f"cprec-{isa}",
        prepare_ours,
        topk_op.search_work(compressed=True, holds_scores=False),
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=missing_isa(isa, "clustered_rank"),
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider("reference", prepare_ours, topk_op.search_work(True, False), scope=reference_backend),
    Provider("torch-adaptive-compare", prepare_adaptive, topk_op.search_work(True, True), call_bytes=compared_bytes),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """Scores of all items, (B, K) as "all", and the targets."""
    return topk_op.truth(problem, formula, dtype) | {"target": problem.target}


def compare(ours: Results, base: Results, exact: Results, dtype: torch.dtype, slack: float) -> None:
    """A rank may count or leave out the items that tie with its target, within the band of a search's ties."""
    band = topk_op.tie_band(base, exact, dtype, slack)
    scores, ranks = exact["all"], ours["rank"]
    own = scores.gather(1, exact["target"].unsqueeze(1))
    least = (scores > own + band).sum(1)
    most = (scores >= own - band).sum(1) - 1  # the target itself is not above itself
    if ranks.shape != least.shape or ranks.dtype != torch.int64:
        raise AssertionError(f"ranks are {tuple(ranks.shape)} {ranks.dtype}, expected {tuple(least.shape)} torch.int64")
    wrong = (ranks < least) | (ranks > most)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise AssertionError(f"row {row}: rank {int(ranks[row])}, expected {int(least[row])}..{int(most[row])}")


OP = Op(
    "clustered_rank",
    "the target's place among all items",
    modes=("fwd",),
    cases=tuple(
        f"{size}-d{width}-b{rows}"
        for size in ("100k", "1m", "10m")
        for width in (64, 128, 256)
        for rows in (256, 1, 32)
    ),
    baseline="torch-adaptive-compare",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
    compare=compare,
)
