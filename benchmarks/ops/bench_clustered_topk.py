"""The ten best items of B rows, exact: hidden states (B, d) to (B, 10) scores and items.

Formula "clustered" ranks by the two-level log-probability, "uncompressed" by the inner product with a (K, d) table.

Model of work: every level for every row, products 2 C r B and projections 2 r d B, C B exponentials ("clustered" only:
a level has to be normalised); bytes: all weights once, the rows, and for providers that hold all scores the (B, K)
scores three times. A search that skips tails may therefore pass a fraction of 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops import bench_clustered_softmax as softmax_op
from benchmarks.registry import (
    ISAS,
    Op,
    Prepared,
    Provider,
    Results,
    Work,
    autocast,
    forced_isa,
    missing_isa,
    missing_package,
    reference_backend,
)
from cprec_kernels import functional, use_backend
from cprec_kernels.testing import EPS, assert_same_items

K_BEST = 10
FLOAT_BYTES = 4
Problem = softmax_op.Problem


def prepare_search(search: Callable[[], tuple[Tensor, Tensor]], dtype: str) -> Prepared:
    last: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), autocast(dtype):
            last[:] = search()

    def results() -> Results:
        return {"scores": last[0], "items": last[1]}

    return Prepared(call, (), results, lambda: {"scores": last[0]})


def prepare_ours(problem: Problem) -> Prepared:
    module = problem.module
    return prepare_search(lambda: module.topk(problem.hidden, K_BEST), problem.setting.dtype)


def prepare_adaptive(problem: Problem) -> Prepared:
    module = softmax_op.adaptive_module(problem)

    def search() -> tuple[Tensor, Tensor]:
        best = module.log_prob(problem.hidden).topk(K_BEST, dim=1)
        return best.values, best.indices

    return prepare_search(search, problem.setting.dtype)


def prepare_linear(problem: Problem) -> Prepared:
    table = problem.table

    def search() -> tuple[Tensor, Tensor]:
        best = torch.nn.functional.linear(problem.hidden, table).topk(K_BEST, dim=1)
        return best.values, best.indices

    return prepare_search(search, problem.setting.dtype)


def prepare_faiss(problem: Problem) -> Prepared:
    import faiss

    index = faiss.IndexFlatIP(problem.setting.case.width)
    index.add(problem.table.detach().numpy())
    rows = problem.hidden.detach().numpy()

    def search() -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(problem.setting.threads)  # within one OpenMP runtime this is torch's number as well
        scores, items = index.search(rows, K_BEST)
        return torch.from_numpy(scores), torch.from_numpy(items)

    return prepare_search(search, "float32")


def search_work(compressed: bool, holds_scores: bool) -> Callable[[Problem], Work]:
    def work(problem: Problem) -> Work:
        case, partition = problem.setting.case, problem.partition
        levels = [(case.num_items, case.width)]
        if compressed:
            levels = list(zip((partition.head_size, *partition.sizes[1:]), partition.ranks, strict=True))
        flops = numbers = 0.0
        for entries, rank in levels:
            flops += 2.0 * entries * rank * case.tokens
            numbers += entries * rank
            if rank < case.width:
                flops += 2.0 * rank * case.width * case.tokens
                numbers += rank * case.width
        exps = float(sum(entries for entries, _ in levels)) * case.tokens if compressed else 0.0
        numbers += case.tokens * case.width + (3.0 * case.tokens * case.num_items if holds_scores else 0.0)
        return Work(flops, exps, FLOAT_BYTES * numbers)

    return work


def scores_bytes(problem: Problem) -> int:
    return 2 * FLOAT_BYTES * problem.setting.case.tokens * problem.setting.case.num_items


def index_bytes(problem: Problem) -> int:
    return 2 * softmax_op.table_bytes(problem)  # the table and faiss's copy of it


def ours_in(isa: str) -> Provider:
    return Provider(
        f"cprec-{isa}",
        prepare_ours,
        search_work(compressed=True, holds_scores=False),
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=missing_isa(isa, "clustered_topk"),
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider("reference", prepare_ours, search_work(True, False), call_bytes=scores_bytes, scope=reference_backend),
    Provider("torch-adaptive", prepare_adaptive, search_work(True, True), call_bytes=scores_bytes),
    Provider(
        "torch-linear-topk",
        prepare_linear,
        search_work(False, True),
        softmax_op.table_bytes,
        scores_bytes,
        formula="uncompressed",
    ),
    Provider(
        "faiss-flat-ip",
        prepare_faiss,
        search_work(False, False),
        index_bytes,
        formula="uncompressed",
        missing=missing_package("faiss", "faiss-cpu"),
        dtype="float32",
    ),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """Scores of all items, (B, K) as "all"."""
    kind = torch.float64 if dtype == "float64" else torch.float32
    hidden = problem.hidden.detach().to(kind)
    with torch.no_grad(), autocast(dtype), use_backend("reference"):
        if formula == "uncompressed":
            return {"all": hidden @ problem.table.detach().to(kind).t()}
        weights, projections, _, _ = problem.module.packed_weights().args()
        packed = functional.Weights([w.detach().to(kind) for w in weights], [p.detach().to(kind) for p in projections])
        return {"all": functional.clustered_log_prob(hidden, packed)}


def compare(ours: Results, base: Results, exact: Results, dtype: torch.dtype, slack: float) -> None:
    """Items are the best ones up to ties within ``slack`` times twice the base's own largest error."""
    band = 2 * float((base["all"].double() - exact["all"]).abs().max())
    band += EPS[dtype] * float(exact["all"].abs().max())
    band *= slack
    assert_same_items(ours["items"], ours["scores"], exact["all"], band)


OP = Op(
    "clustered_topk",
    "the ten best items, exact",
    modes=("fwd",),
    cases=tuple(
        f"{size}-d{width}-b{rows}"
        for size in ("100k", "1m", "10m")
        for width in (64, 128, 256)
        for rows in (1, 32, 256)
    ),
    baseline="torch-adaptive",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
    compare=compare,
)
