"""The ten best items of B rows, exact: hidden states (B, d) to (B, 10) scores and items.

Formula "clustered" ranks by the two-level log-probability, "uncompressed" by the inner product with a (K, d) table, "pq"
by the sums of partial scores of :mod:`benchmarks.ops.pqtopk`.

Model of work: every level for every row, products 2 C r B and projections 2 r d B, C B exponentials ("clustered" only:
a level has to be normalised); bytes: all weights once, in the format they are searched in, the rows, and for providers
that hold all scores the (B, K) scores three times. A search that skips tails may therefore pass a fraction of 1.

Providers ``cprec-index-STORAGE`` search the module's packed index, whose building is not timed. Their ids are held to the
same rule as those of all others; a narrow storage's scores may be off by its unit roundoff, by norm. Random weights let
a search leave out more than trained ones do: ``-full`` scans every level whole, ``python -m benchmarks trained`` measures
a trained model. ``-approx`` promises no exact ids: its formula is one of its own, and its row says how many ids agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import bench_clustered_softmax as softmax_op
from benchmarks.ops import pqtopk
from benchmarks.registry import (
    ISAS,
    Compare,
    Op,
    Prepared,
    Provider,
    Results,
    Setting,
    Work,
    autocast,
    forced_isa,
    missing_isa,
    missing_kernels,
    missing_package,
    reference_backend,
)
from cprec_kernels import functional, use_backend
from cprec_kernels.nn import ClusteredSoftmaxWithLoss, TiedBlocks
from cprec_kernels.testing import EPS, assert_same_items, relative_error

K_BEST = 10
FLOAT_BYTES = 4
STORAGE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# Half the distance between neighbours, relative to the number, or to the largest of a group of int8.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 254}
LEAST_AGREEMENT = 0.9
Problem = softmax_op.Problem


def prepare_search(
    search: Callable[[], tuple[Tensor, Tensor]],
    dtype: str,
    note: str = "",
    own: Callable[[Tensor], Tensor] | None = None,
) -> Prepared:
    """``own``: items (B, k) -> their scores, so that right scores of wrong items do not pass at full size."""
    last: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), autocast(dtype):
            last[:] = search()

    def results() -> Results:
        return {"scores": last[0], "items": last[1]}

    def summary() -> Results:
        found = {"scores": last[0]}
        if own is not None:
            with torch.no_grad():
                found["scores of the items"] = own(last[1])
        return found

    return Prepared(call, (), results, summary, note)


def own_log_prob(problem: Problem) -> Callable[[Tensor], Tensor]:
    return lambda items: problem.module.score(problem.hidden.detach(), items)


def own_product(problem: Problem) -> Callable[[Tensor], Tensor]:
    return lambda items: torch.einsum("bkd,bd->bk", problem.table.detach()[items], problem.hidden.detach())


def prepare_ours(problem: Problem) -> Prepared:
    module = problem.module
    return prepare_search(lambda: module.topk(problem.hidden, K_BEST), problem.setting.dtype, own=own_log_prob(problem))


def prepare_adaptive(problem: Problem) -> Prepared:
    module = softmax_op.adaptive_module(problem)

    def search() -> tuple[Tensor, Tensor]:
        best = module.log_prob(problem.hidden).topk(K_BEST, dim=1)
        return best.values, best.indices

    return prepare_search(search, problem.setting.dtype, own=own_log_prob(problem))


def prepare_linear(problem: Problem) -> Prepared:
    table = problem.table

    def search() -> tuple[Tensor, Tensor]:
        best = torch.nn.functional.linear(problem.hidden, table).topk(K_BEST, dim=1)
        return best.values, best.indices

    return prepare_search(search, problem.setting.dtype, own=own_product(problem))


def prepare_faiss(problem: Problem) -> Prepared:
    import faiss

    index = faiss.IndexFlatIP(problem.setting.case.width)
    index.add(problem.table.detach().numpy())
    rows = problem.hidden.detach().numpy()

    def search() -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(problem.setting.threads)  # within one OpenMP runtime this is torch's number as well
        scores, items = index.search(rows, K_BEST)
        return torch.from_numpy(scores), torch.from_numpy(items)

    return prepare_search(search, "float32", own=own_product(problem))


def prepare_pq(problem: Problem) -> Prepared:
    search, note = pqtopk.make_search(problem, K_BEST)
    return prepare_search(search, "float32", note)


# The packed index


def build_index(module: ClusteredSoftmaxWithLoss | TiedBlocks, storage: str, exact: bool) -> Any:
    build: Any = module.build_index
    return build(storage=storage, exact=exact)


def missing_index(_setting: Setting | None = None) -> str:
    """Reason why packed indexes cannot be measured."""
    return missing_kernels("topk_index")


def agreement(items: Tensor, best: Tensor) -> float:
    """Share of the ``best`` (B, k) ids that are among the ``items`` (B, k) of their row."""
    return float((best.unsqueeze(2) == items.unsqueeze(1)).any(2).double().mean()) if best.numel() else 1.0


def judge_agreement(share: float) -> str:
    """A remark. Raises AssertionError where too few ids agree for the search to be called approximate."""
    rounded = math.floor(1000 * share) / 1000  # downwards: 100% means all
    if not share >= LEAST_AGREEMENT:
        raise AssertionError(f"only {rounded:.1%} of ids agree with the exact ones, fewer than {LEAST_AGREEMENT:.0%}")
    return f"{rounded:.1%} of ids agree"


def prepare_index(storage: str, exact: bool, early_termination: bool) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        module, rows = problem.module, problem.hidden.detach()
        index = build_index(module, storage, exact)

        def search() -> Any:
            return index.topk(rows, K_BEST, early_termination=early_termination)

        first = search()
        products = float(first.counters[:, 2].double().mean())
        notes = [f"meets {products / problem.setting.case.num_items:.1%} of the items"]
        if not exact:
            notes.append(judge_agreement(agreement(first[1], module.topk(rows, K_BEST)[1])))
        prepared = prepare_search(search, "float32", "; ".join(notes))

        def summary() -> Results:
            # A narrow storage's own scores are rounded; those of the items found tell whether they are the best.
            found = module.score(rows, prepared.results()["items"])
            return {"scores": found, "scores of the items": found}

        return dataclasses.replace(prepared, summary=summary)

    return prepare


def compare_index(storage: str, exact: bool) -> Compare:
    def compare_stored(ours: Results, base: Results, truth: Results, dtype: torch.dtype, slack: float) -> None:
        items = ours["items"]
        own = truth["all"].gather(1, items.clamp(min=0))
        if exact:
            compare(ours if storage == "float32" else ours | {"scores": own}, base, truth, dtype, slack)
        else:
            judge_agreement(agreement(items, truth["all"].topk(K_BEST, dim=1).indices))
        error = relative_error(ours["scores"], own)
        if storage != "float32" and not error <= UNIT_ROUNDOFF[storage]:
            raise AssertionError(f"scores are off by {error:.1e}, {storage} rounds by {UNIT_ROUNDOFF[storage]:.1e}")

    return compare_stored


def stored_bytes(storage: str, exact: bool) -> Callable[[Problem], int]:
    """The packed weights, and the fp32 ones beside them that an exact narrow index keeps."""
    per_number = STORAGE_BYTES[storage] + (FLOAT_BYTES if exact and storage != "float32" else 0)

    def resident_bytes(problem: Problem) -> int:
        partition = problem.partition
        return per_number * sum(size * rank for size, rank in zip(partition.sizes, partition.ranks, strict=True))

    return resident_bytes


def index_in(storage: str, *, exact: bool = True, early_termination: bool = True) -> Provider:
    return Provider(
        f"cprec-index-{storage}{'' if exact else '-approx'}{'' if early_termination else '-full'}",
        prepare_index(storage, exact, early_termination),
        search_work(True, False, STORAGE_BYTES[storage]),
        stored_bytes(storage, exact),
        formula="clustered" if exact else "approximate",
        missing=missing_index,
        dtype="float32",
        compare=compare_index(storage, exact),
    )


# Models


def search_work(compressed: bool, holds_scores: bool, weight_bytes: int = FLOAT_BYTES) -> Callable[[Problem], Work]:
    def work(problem: Problem) -> Work:
        case, partition = problem.setting.case, problem.partition
        levels = [(case.num_items, case.width)]
        if compressed:
            levels = list(zip((partition.head_size, *partition.sizes[1:]), partition.ranks, strict=True))
        flops = weights = numbers = 0.0
        for entries, rank in levels:
            flops += 2.0 * entries * rank * case.tokens
            weights += entries * rank
            if rank < case.width:
                flops += 2.0 * rank * case.width * case.tokens
                numbers += rank * case.width
        exps = float(sum(entries for entries, _ in levels)) * case.tokens if compressed else 0.0
        numbers += case.tokens * case.width + (3.0 * case.tokens * case.num_items if holds_scores else 0.0)
        return Work(flops, exps, weight_bytes * weights + FLOAT_BYTES * numbers)

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
    index_in("float32"),
    index_in("float32", early_termination=False),
    index_in("float16"),
    index_in("float16", early_termination=False),
    index_in("bfloat16"),
    index_in("int8"),
    index_in("int8", exact=False),
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
    Provider(
        "pqtopk",
        prepare_pq,
        pqtopk.work,
        pqtopk.resident_bytes,
        pqtopk.call_bytes,
        formula="pq",
        missing=pqtopk.missing_width,
        dtype="float32",
    ),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """Scores of all items, (B, K) as "all"."""
    kind = torch.float64 if dtype == "float64" else torch.float32
    if formula == "pq":
        return {"all": pqtopk.all_scores(problem, kind)}
    hidden = problem.hidden.detach().to(kind)
    with torch.no_grad(), autocast(dtype), use_backend("reference"):
        if formula == "uncompressed":
            return {"all": hidden @ problem.table.detach().to(kind).t()}
        weights, projections, _, _ = problem.module.packed_weights().args()
        packed = functional.Weights([w.detach().to(kind) for w in weights], [p.detach().to(kind) for p in projections])
        return {"all": functional.clustered_log_prob(hidden, packed)}


def tie_band(base: Results, exact: Results, dtype: torch.dtype, slack: float) -> float:
    """``slack`` times twice the base's own largest error: closer scores are ties."""
    band = 2 * float((base["all"].double() - exact["all"]).abs().max())
    return slack * (band + EPS[dtype] * float(exact["all"].abs().max()))


def compare(ours: Results, base: Results, exact: Results, dtype: torch.dtype, slack: float) -> None:
    """Items are the best ones, up to ties."""
    assert_same_items(ours["items"], ours["scores"], exact["all"], tie_band(base, exact, dtype, slack))


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
