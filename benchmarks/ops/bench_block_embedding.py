"""Embedding of T ids, forward and backward: (T,) ids to (T, d), and gradients of tables and projections.

Formula "clustered": E_j[g] P_j of the id's cluster. "uncompressed": a row of a (K, d) table, as nn.Embedding has it; no
product and K d parameters, so its time is that of copying rows.

Model of work, with u_j unique and n_j all ids of cluster j, s_j the rows that count (u_j where a provider projects every
unique row once, n_j where it projects every token):

* forward: products 2 s_j d_j d; bytes: s_j rows of E_j, P_j, the output T d;
* backward: products 4 s_j d_j d (dE_j, dP_j); bytes: the upstream gradient T d, s_j rows of E_j again and of dE_j, or
  all of dE_j where the gradient is dense, P_j again and dP_j.

There are no exponentials. Numbers are of 4 bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
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
    reference_backend,
)
from cprec_kernels import functional, use_backend
from cprec_kernels.nn import BlockEmbedding

FLOAT_BYTES = 4


class Problem:
    """Inputs of a setting, and the parameters that its providers share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        case = setting.case
        self.partition = case.partition
        self.backward = setting.mode == "fwd_bwd"
        self.ids = draw_items(case.num_items, case.tokens, setting.targets, seed=1)
        self.upstream = normal((case.tokens, case.width), 1.0, seed=2)

    @functools.cached_property
    def module(self) -> BlockEmbedding:
        module = BlockEmbedding(self.partition)
        fill_normal(module.embeddings, seed=10)
        fill_normal(module.projections, seed=20, fan_dim=0)
        return module

    @functools.cached_property
    def table(self) -> nn.Parameter:
        """(K, d), uncompressed."""
        return nn.Parameter(normal((self.setting.case.num_items, self.setting.case.width), 1.0, seed=30))

    def leaves(self) -> dict[str, Tensor]:
        module = self.module
        named: dict[str, Tensor] = {f"embeddings[{j}]": table for j, table in enumerate(module.embeddings)}
        return named | {f"projections[{j}]": projection for j, projection in enumerate(module.projections)}


def adaptive_input(
    ids: Tensor, tables: Sequence[Tensor], projections: Sequence[Tensor], cutoffs: Sequence[int], sparse: bool = False
) -> Tensor:
    """The adaptive input of Baevski and Auli (arXiv 1809.10853) as libraries write it: a mask and a gather per cluster.

    Same function as :func:`cprec_kernels.functional.block_embedding` for ids (T,), out (T, d).
    """
    width = tables[0].shape[1]
    out = tables[0].new_empty(ids.shape[0], width)
    bounds = [0, *cutoffs, sum(table.shape[0] for table in tables)]
    remaining = iter(projections)
    for j, table in enumerate(tables):
        mask = (ids >= bounds[j]) & (ids < bounds[j + 1])
        positions = mask.nonzero().squeeze(1)
        projection = None if table.shape[1] == width else next(remaining)
        if positions.numel() == 0:
            continue
        rows = nn.functional.embedding(ids.index_select(0, positions) - bounds[j], table, sparse=sparse)
        vectors = rows if projection is None else nn.functional.linear(rows, projection.t())
        out = out.to(vectors.dtype).index_copy(0, positions, vectors)
    return out


class AdaptiveInput(nn.Module):
    """The adaptive input as fairseq has it: a boolean mask per cluster, and a projection for the first one as well.

    That one is the identity here, so that outputs and gradients are those of the others; its own gradient is extra work,
    which its users pay for.
    """

    def __init__(self, tables: Sequence[Tensor], projections: Sequence[Tensor], cutoffs: Sequence[int], sparse: bool):
        super().__init__()
        width, remaining = tables[0].shape[1], iter(projections)
        self.tables, self.cutoffs, self.sparse = nn.ParameterList(tables), tuple(cutoffs), sparse
        identity = nn.Parameter(torch.eye(width))
        self.projections = nn.ParameterList(
            identity if table.shape[1] == width else next(remaining) for table in tables
        )

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.tables[0].new_empty(*ids.shape, self.projections[0].shape[1])
        bounds = [0, *self.cutoffs, sum(table.shape[0] for table in self.tables)]
        for table, projection, low, high in zip(self.tables, self.projections, bounds, bounds[1:], strict=False):
            mask = (ids >= low) & (ids < high)
            if mask.any():
                rows = nn.functional.embedding(ids[mask] - low, table, sparse=self.sparse)
                out[mask] = (rows @ projection).to(out.dtype)
        return out


def embedding_work(problem: Problem, unique: bool, dense: bool, project_all: bool = False) -> Work:
    """The model above; with ``project_all`` for a table of full width that is projected all the same."""
    case, partition = problem.setting.case, problem.partition
    ids = problem.ids.unique() if unique else problem.ids
    numbers = float(case.tokens * case.width) * (2 if problem.backward else 1)
    flops = 0.0
    for size, rank, rows in zip(partition.sizes, partition.ranks, tokens_per_cluster(partition, ids), strict=True):
        numbers += rows * rank
        if problem.backward:
            numbers += rows * rank + (size if dense else rows) * rank
        if rank < case.width or project_all:
            flops += (3 if problem.backward else 1) * 2.0 * rows * rank * case.width
            numbers += rank * case.width * (3 if problem.backward else 1)
    return Work(flops, 0.0, FLOAT_BYTES * numbers)


def clustered_work(unique: bool, dense: bool, project_all: bool = False) -> Callable[[Problem], Work]:
    return lambda problem: embedding_work(problem, unique, dense, project_all)


def table_work(dense: bool) -> Callable[[Problem], Work]:
    def work(problem: Problem) -> Work:
        case = problem.setting.case
        rows = float(case.tokens * case.width)
        # A sparse gradient's values are the upstream gradient itself: nothing moves.
        backward = rows + case.num_items * case.width if dense else 0
        return Work(0.0, 0.0, FLOAT_BYTES * (2 * rows + (backward if problem.backward else 0)))

    return work


def clustered_bytes(problem: Problem) -> int:
    case = problem.setting.case
    return FLOAT_BYTES * (problem.partition.embedding_parameters + 6 * case.tokens * case.width)


def table_bytes(problem: Problem) -> int:
    return FLOAT_BYTES * problem.setting.case.num_items * problem.setting.case.width


# Providers


def to_dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def prepare_lookup(problem: Problem, lookup: Callable[[], Tensor], named: dict[str, Tensor], dtype: str) -> Prepared:
    """A call that embeds under autocast and, when the mode says so, sends the upstream gradient back."""
    last: list[Tensor] = []

    def call() -> None:
        with torch.set_grad_enabled(problem.backward):
            with autocast(dtype):
                out = lookup()
            if problem.backward:
                out.backward(problem.upstream.to(out.dtype))
        last[:] = [out.detach()]

    def results() -> Results:
        found = {"output": last[0]}
        for name, leaf in named.items():
            if problem.backward:
                # No provider owes a gradient to a cluster that no id names: None and zeros are the same.
                found[f"d_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else to_dense(leaf.grad)
        return found

    return Prepared(call, list(named.values()), results, lambda: {"output": last[0]})


def prepare_ours(sparse: bool) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        module = problem.module
        tables, projections = list(module.embeddings), list(module.projections)
        # The functional form: a sparse and a dense module would need two copies of the tables.
        return prepare_lookup(
            problem,
            lambda: functional.block_embedding(problem.ids, tables, projections, sparse=sparse),
            problem.leaves(),
            problem.setting.dtype,
        )

    return prepare


def prepare_adaptive_input(sparse: bool) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        module = problem.module
        tables, projections = list(module.embeddings), list(module.projections)
        return prepare_lookup(
            problem,
            lambda: adaptive_input(problem.ids, tables, projections, problem.partition.cutoffs, sparse),
            problem.leaves(),
            problem.setting.dtype,
        )

    return prepare


def prepare_library_form(sparse: bool) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        ours = problem.module
        module = AdaptiveInput(list(ours.embeddings), list(ours.projections), problem.partition.cutoffs, sparse)
        prepared = prepare_lookup(problem, lambda: module(problem.ids), problem.leaves(), problem.setting.dtype)
        return dataclasses.replace(
            prepared, leaves=list(module.parameters()), note="projects the first cluster too: more parameters"
        )

    return prepare


def prepare_table(sparse: bool) -> Callable[[Problem], Prepared]:
    return lambda problem: prepare_lookup(
        problem,
        lambda: nn.functional.embedding(problem.ids, problem.table, sparse=sparse),
        {"table": problem.table},
        problem.setting.dtype,
    )


def ours_in(isa: str, sparse: bool) -> Provider:
    return Provider(
        f"cprec-{isa}-{'sparse' if sparse else 'dense'}",
        prepare_ours(sparse),
        clustered_work(unique=True, dense=not sparse),
        call_bytes=clustered_bytes,
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=missing_isa(isa, "block_embedding"),
        baseline="torch-adaptive-input-sparse" if sparse else "",
    )


PROVIDERS = (
    *(ours_in(isa, sparse) for isa in ISAS for sparse in (False, True)),
    Provider(
        "reference",
        prepare_ours(sparse=False),
        clustered_work(unique=False, dense=True),
        call_bytes=clustered_bytes,
        scope=reference_backend,
    ),
    *(
        Provider(
            f"torch-adaptive-input-{'sparse' if sparse else 'dense'}",
            prepare_adaptive_input(sparse),
            clustered_work(unique=False, dense=not sparse),
            call_bytes=clustered_bytes,
            baseline="torch-adaptive-input-sparse" if sparse else "",
        )
        for sparse in (False, True)
    ),
    *(
        Provider(
            f"fairseq-adaptive-input-{'sparse' if sparse else 'dense'}",
            prepare_library_form(sparse),
            clustered_work(unique=False, dense=not sparse, project_all=True),
            call_bytes=clustered_bytes,
            baseline="torch-adaptive-input-sparse" if sparse else "",
        )
        for sparse in (False, True)
    ),
    *(
        Provider(
            f"torch-embedding-{'sparse' if sparse else 'dense'}",
            prepare_table(sparse),
            table_work(dense=not sparse),
            resident_bytes=table_bytes,
            call_bytes=table_bytes,
            formula="uncompressed",
            baseline="torch-adaptive-input-sparse" if sparse else "",
        )
        for sparse in (False, True)
    ),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """The formula by plain torch on copies of the parameters."""
    kind = torch.float64 if dtype == "float64" else torch.float32

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(kind, copy=True).requires_grad_(problem.backward)

    if formula == "uncompressed":
        named = {"table": leaf(problem.table)}
        lookup = functools.partial(nn.functional.embedding, problem.ids, named["table"])
    else:
        named = {name: leaf(tensor) for name, tensor in problem.leaves().items()}
        tables = [value for name, value in named.items() if name.startswith("emb")]
        projections = [value for name, value in named.items() if name.startswith("proj")]
        lookup = functools.partial(functional.block_embedding, problem.ids, tables, projections)
    with use_backend("reference"):
        prepared = prepare_lookup(problem, lookup, named, dtype)
        prepared.call()
    return prepared.results()


OP = Op(
    "block_embedding",
    "embeddings of many ids and the gradients of the tables",
    modes=("fwd_bwd", "fwd"),
    cases=tuple(f"{size}-d{width}-t25600" for size in ("100k", "1m", "10m") for width in (64, 128, 256)),
    baseline="torch-adaptive-input-dense",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
)
