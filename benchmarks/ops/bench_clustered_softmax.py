"""Loss of a clustered softmax, forward and backward: hidden states (T, d) and targets (T,) to the mean loss and all gradients.

Providers of the formula "clustered" compute the same two-level loss with the same weights, those of "uncompressed" a
linear layer over all K items and its cross entropy: what one has before compressing.

Model of work. A level has C entries of rank r and n tokens (the head all T, a tail those whose target it holds).

=================  ==========================  ==================  ====================================================
per level          matrix products             exponentials        bytes
=================  ==========================  ==================  ====================================================
forward            logits: 2 C r n             C n                 W once; hidden and projected tokens
forward+backward   logits twice (they are not  2 C n               W twice, dW once; tokens three times
("recompute")      stored), dW, dX: 8 C r n
"stored"           logits, dW, dX: 6 C r n     2 C n               as above, and the (n, C) logits seven times: product
                                                                   out, log-softmax in and out, its backward in and out,
                                                                   two products in
"chunked"          as "stored"                 2 C n               as "recompute": logits stay in a cache-sized chunk
projection         2 r d n, backward 4 r d n                       Q twice, dQ once
=================  ==========================  ==================  ====================================================

Numbers are of 4 bytes: parameters are fp32, under autocast too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import draw_items, fill_normal, normal, tokens_per_cluster
from benchmarks.registry import (
    ISAS,
    Op,
    Prepared,
    Provider,
    Results,
    Setting,
    Work,
    autocast,
    forced_isa,
    missing_isa,
    missing_package,
    never_missing,
    reference_backend,
)
from cprec_kernels import functional, use_backend
from cprec_kernels.nn import ClusteredSoftmaxWithLoss

FLOAT_BYTES = 4


class Problem:
    """Inputs of a setting, and the parameters that its providers share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.partition = setting.case.partition
        self.backward = setting.mode == "fwd_bwd"
        self.target = draw_items(setting.case.num_items, setting.case.tokens, setting.targets, seed=1)
        self.hidden = normal((setting.case.tokens, setting.case.width), 1.0, seed=2).requires_grad_(self.backward)

    @functools.cached_property
    def module(self) -> ClusteredSoftmaxWithLoss:
        """Our module with logits of standard deviation about 1, as a trained model's have at least."""
        module = ClusteredSoftmaxWithLoss(self.partition.embedding_dim, self.partition)
        fill_normal(module.weights, seed=10, fan_dim=1)
        fill_normal(module.projections, seed=20, fan_dim=1)
        return module

    @functools.cached_property
    def table(self) -> nn.Parameter:
        """(K, d), uncompressed."""
        case = self.setting.case
        return nn.Parameter(normal((case.num_items, case.width), case.width**-0.5, seed=30))

    def compressed_levels(self) -> list[tuple[int, int, int]]:
        """Entries, rank and tokens of every level."""
        counts = tokens_per_cluster(self.partition, self.target)
        tails = zip(self.partition.sizes[1:], self.partition.ranks[1:], counts[1:], strict=True)
        return [(self.partition.head_size, self.partition.ranks[0], self.setting.case.tokens), *tails]

    def uncompressed_levels(self) -> list[tuple[int, int, int]]:
        case = self.setting.case
        return [(case.num_items, case.width, case.tokens)]


def make_work(levels: list[tuple[int, int, int]], width: int, kind: str, backward: bool) -> Work:
    """The model above. ``kind`` is recompute, stored or chunked."""
    flops = exps = numbers = 0.0
    for entries, rank, tokens in levels:
        logits = float(entries) * tokens
        products = 1 if not backward else 4 if kind == "recompute" else 3
        flops += products * 2.0 * rank * logits
        exps += (2 if backward else 1) * logits
        numbers += entries * rank * (3.0 if backward else 1.0)
        numbers += tokens * (width + (rank if rank < width else 0)) * (3.0 if backward else 1.0)
        if kind == "stored":
            numbers += (7.0 if backward else 3.0) * logits
        if rank < width:
            flops += (3 if backward else 1) * 2.0 * rank * width * tokens
            numbers += rank * width * (3.0 if backward else 1.0)
    return Work(flops, exps, FLOAT_BYTES * numbers)


def compressed_work(kind: str) -> Callable[[Problem], Work]:
    return lambda problem: make_work(problem.compressed_levels(), problem.setting.case.width, kind, problem.backward)


def uncompressed_work(kind: str) -> Callable[[Problem], Work]:
    return lambda problem: make_work(problem.uncompressed_levels(), problem.setting.case.width, kind, problem.backward)


def stored_bytes(levels: list[tuple[int, int, int]], copies: int) -> int:
    """Gradients of a level's weights and ``copies`` of its logits."""
    return FLOAT_BYTES * sum(entries * rank + copies * entries * tokens for entries, rank, tokens in levels)


def gradients_only(problem: Problem) -> int:
    return stored_bytes(problem.compressed_levels(), 0)


def adaptive_bytes(problem: Problem) -> int:
    # Logits and their log-softmax of all levels wait for the backward, which adds one level's gradient at a time.
    levels = problem.compressed_levels()
    return stored_bytes(levels, 2) + FLOAT_BYTES * max(entries * tokens for entries, _, tokens in levels)


def table_bytes(problem: Problem) -> int:
    return FLOAT_BYTES * problem.setting.case.num_items * problem.setting.case.width


def linear_bytes(problem: Problem) -> int:
    return stored_bytes(problem.uncompressed_levels(), 3)


def chunked_bytes(problem: Problem) -> int:
    # The default chunk of F.linear_cross_entropy holds T d / K rows or more of logits; the table's gradient twice.
    return 2 * stored_bytes(problem.uncompressed_levels(), 0) + linear_bytes(problem) // 8


# Providers


def prepare_loss(
    problem: Problem, loss_of: Callable[[], Tensor], named: dict[str, Tensor], dtype: str, note: str = ""
) -> Prepared:
    """A call that computes a loss under autocast and, when the mode says so, the gradients of the ``named`` leaves."""
    leaves = list(named.values())
    last: list[Tensor] = []

    def call() -> None:
        with torch.set_grad_enabled(problem.backward):
            with autocast(dtype):
                loss = loss_of()
            if problem.backward:
                loss.backward()
        last[:] = [loss.detach()]

    def results() -> Results:
        found = {"loss": last[0]}
        for name, leaf in named.items():
            if leaf.grad is not None:
                found[f"d_{name}"] = leaf.grad
        return found

    def summary() -> Results:
        return {name: value for name, value in results().items() if name in ("loss", "d_input")}

    return Prepared(call, leaves, results, summary, note)


def compressed_leaves(problem: Problem) -> dict[str, Tensor]:
    module = problem.module
    named = {"input": problem.hidden}
    named |= {f"weights[{j}]": weight for j, weight in enumerate(module.weights)}
    return named | {f"projections[{j}]": projection for j, projection in enumerate(module.projections)}


def prepare_ours(problem: Problem) -> Prepared:
    module = problem.module
    return prepare_loss(
        problem, lambda: module(problem.hidden, problem.target).loss, compressed_leaves(problem), problem.setting.dtype
    )


def adaptive_module(problem: Problem) -> nn.AdaptiveLogSoftmaxWithLoss:
    """torch's module over our parameters: with ranks d, d/4, d/16 it is the same function for div_value 4."""
    return over_our_parameters(problem.module)


def over_our_parameters(ours: ClusteredSoftmaxWithLoss) -> nn.AdaptiveLogSoftmaxWithLoss:
    """See :func:`adaptive_module`."""
    partition = ours.partition
    theirs = nn.AdaptiveLogSoftmaxWithLoss(
        partition.embedding_dim, partition.num_items, list(partition.cutoffs), div_value=4.0, device="meta"
    )
    theirs.head.weight = ours.weights[0]
    for tail, projection, weight in zip(theirs.tail, ours.projections, list(ours.weights)[1:], strict=True):
        tail[0].weight, tail[1].weight = projection, weight  # type: ignore[index]
    return theirs


def prepare_adaptive(dtype: str) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        module = adaptive_module(problem)
        return prepare_loss(
            problem,
            lambda: module(problem.hidden, problem.target).loss,
            compressed_leaves(problem),
            dtype or problem.setting.dtype,
        )

    return prepare


def prepare_table(
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], problem: Problem, dtype: str = "", note: str = ""
) -> Prepared:
    named = {"input": problem.hidden, "table": problem.table}
    return prepare_loss(
        problem,
        lambda: loss_of(problem.hidden, problem.table, problem.target),
        named,
        dtype or problem.setting.dtype,
        note,
    )


def linear_loss(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, table), target)


def missing_fused(_setting: Setting) -> str:
    has = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")
    return "" if has else f"torch {torch.__version__} has no chunked F.linear_cross_entropy (torch >= 2.13 does)"


def fused_loss(chunk: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """F.linear_cross_entropy over chunks of so many tokens; None for its default."""

    def loss_of(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(hidden, table, target, options=options)

    return loss_of


def prepare_best_chunk(problem: Problem) -> Prepared:
    """The chunk, among T/16, T/8, T/4 and T/2 tokens, whose second call was fastest here."""
    tokens = problem.setting.case.tokens
    best_s, best = float("inf"), tokens
    for chunk in sorted({max(1, tokens // parts) for parts in (16, 8, 4, 2)}):
        candidate = prepare_table(fused_loss(chunk), problem)
        for _ in range(2):
            candidate.reset()
            start = time.perf_counter()
            candidate.call()
            elapsed = time.perf_counter() - start
        candidate.reset()
        if elapsed < best_s:
            best_s, best = elapsed, chunk
    return prepare_table(fused_loss(best), problem, note=f"chunks of {best} tokens")


def prepare_cut(problem: Problem) -> Prepared:
    from cut_cross_entropy import linear_cross_entropy

    def loss_of(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = linear_cross_entropy(hidden, table, target, impl="torch_compile")
        return loss

    return prepare_table(loss_of, problem)


def ours_in(isa: str) -> Provider:
    return Provider(
        f"cprec-{isa}",
        prepare_ours,
        compressed_work("recompute"),
        call_bytes=gradients_only,
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=missing_isa(isa, "clustered_softmax", "clustered_softmax_backward"),
    )


def uncompressed(
    name: str, prepare: Callable[[Problem], Prepared], kind: str, missing: Any = never_missing
) -> Provider:
    call_bytes = linear_bytes if kind == "stored" else chunked_bytes
    return Provider(
        name, prepare, uncompressed_work(kind), table_bytes, call_bytes, formula="uncompressed", missing=missing
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider(
        "reference", prepare_ours, compressed_work("recompute"), call_bytes=gradients_only, scope=reference_backend
    ),
    Provider("torch-adaptive", prepare_adaptive(""), compressed_work("stored"), call_bytes=adaptive_bytes),
    Provider(
        "torch-adaptive-fp32",
        prepare_adaptive("float32"),
        compressed_work("stored"),
        call_bytes=adaptive_bytes,
        dtype="float32",
        narrow_only=True,
    ),
    uncompressed("torch-linear-ce", functools.partial(prepare_table, linear_loss), "stored"),
    uncompressed("torch-linear-ce-fused", functools.partial(prepare_table, fused_loss(None)), "chunked", missing_fused),
    uncompressed("torch-linear-ce-fused-best", prepare_best_chunk, "chunked", missing_fused),
    uncompressed("cut-cross-entropy", prepare_cut, "stored", missing_package("cut_cross_entropy", "cut-cross-entropy")),
)


def referee(problem: Problem, rows: Tensor) -> tuple[str, Results]:
    """d_input of some tokens in fp64: at millions of entries a peer's fp32 sums may be what is off."""
    hidden = problem.hidden.detach()[rows].double().requires_grad_()
    weights = functional.Weights(
        [weight.detach().double() for weight in problem.module.weights],
        [projection.detach().double() for projection in problem.module.projections],
    )
    with use_backend("reference"):
        loss = functional.clustered_cross_entropy(hidden, problem.target[rows], weights, reduction="sum")
        (gradient,) = torch.autograd.grad(loss / len(problem.target), hidden)
    return "clustered", {"d_input": gradient}


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """The formula by plain torch on copies of the parameters: the reference, or a linear layer and its cross entropy."""
    kind = torch.float64 if dtype == "float64" else torch.float32

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(kind, copy=True).requires_grad_(problem.backward)

    if formula == "uncompressed":
        named = {"input": leaf(problem.hidden), "table": leaf(problem.table)}
        loss_of = functools.partial(linear_loss, named["input"], named["table"], problem.target)
    else:
        named = {name: leaf(tensor) for name, tensor in compressed_leaves(problem).items()}
        weights = functional.Weights(
            [named[f"weights[{j}]"] for j in range(problem.partition.num_clusters)],
            [named[f"projections[{j}]"] for j in range(len(problem.partition.projected))],
        )
        loss_of = functools.partial(functional.clustered_cross_entropy, named["input"], problem.target, weights)
    with use_backend("reference"):
        prepared = prepare_loss(problem, loss_of, named, dtype)
        prepared.call()
    return prepared.results()


OP = Op(
    "clustered_softmax",
    "loss over all items and its gradients",
    modes=("fwd_bwd", "fwd"),
    cases=tuple(
        f"{size}-d{width}-t{tokens}"
        for size in ("100k", "1m", "10m")
        for width in (64, 128, 256)
        for tokens in (512, 4096)
    ),
    baseline="torch-adaptive",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
    referee=referee,
)
