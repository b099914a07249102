"""One training step without a backbone: embedding of T ids, clustered loss on T targets, backward, optimizer.

Ours has sparse row gradients for the embedding and a lazy optimizer for them (SparseAdam's semantics: rows that a step
does not name keep their moments); the softmax's gradients are dense. Torch's is what one writes without this package:
the mask-and-index adaptive input, nn.AdaptiveLogSoftmaxWithLoss and Adam over everything. From fresh states both make
the same first step, which is what the gate compares, by the loss before it, its gradients and the loss after it.

Model of work: those of ``clustered_softmax`` and ``block_embedding`` for forward and backward, plus 7 numbers per updated
parameter (read weight, gradient and two moments; write weight and moments).

Peak memory is that of a first step, in which optimizers allocate their states: it includes them.

A provider owns its parameters: every call moves them. The learning rate is small enough for all calls to see the same
problem.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import draw_items, fill_normal, tokens_per_cluster
from benchmarks.ops import bench_block_embedding as embedding_op
from benchmarks.ops import bench_clustered_softmax as softmax_op
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
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

LEARNING_RATE = 1e-4
FLOAT_BYTES = 4


class Problem:
    """Ids and targets of a step, and how its parameters start."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        case = setting.case
        self.partition = case.partition
        self.ids = draw_items(case.num_items, case.tokens, setting.targets, seed=1)
        self.target = draw_items(case.num_items, case.tokens, setting.targets, seed=2)

    def modules(self, sparse: bool) -> tuple[BlockEmbedding, ClusteredSoftmaxWithLoss]:
        """Fresh modules, the same at every call; embeddings have entries of unit variance, logits about the same."""
        embedding = BlockEmbedding(self.partition, sparse=sparse)
        softmax = ClusteredSoftmaxWithLoss(self.partition.embedding_dim, self.partition)
        fill_normal(embedding.embeddings, seed=10)
        fill_normal(embedding.projections, seed=20, fan_dim=0)
        fill_normal(softmax.weights, seed=30, fan_dim=1)
        fill_normal(softmax.projections, seed=40, fan_dim=1)
        return embedding, softmax

    def fwd_bwd(self) -> Setting:
        return dataclasses.replace(self.setting, mode="fwd_bwd")


def leaves_of(embedding: BlockEmbedding, softmax: ClusteredSoftmaxWithLoss) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {f"embedding.{name}": parameter for name, parameter in embedding.named_parameters()}
    return named | {f"softmax.{name}": parameter for name, parameter in softmax.named_parameters()}


def prepare_step(
    problem: Problem,
    loss_of: Callable[[], Tensor],
    named: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    dtype: str,
    note: str = "",
) -> Prepared:
    """A call that makes one whole step."""
    last: list[Tensor] = []

    def call() -> None:
        with autocast(dtype):
            loss = loss_of()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        last[:] = [loss.detach()]

    def losses() -> Results:
        with torch.no_grad(), autocast(dtype):
            return {"loss": last[0], "loss_after": loss_of()}

    def results() -> Results:
        found = losses()
        for name, leaf in named.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            found[f"d_{name}"] = embedding_op.to_dense(gradient)
        return found

    def summary() -> Results:
        """What is cheap at full size, of the first step alone: rows with a gradient of 0 move from the second step on in
        one optimizer and not in another."""
        found = losses()
        for name, leaf in named.items():
            if leaf.grad is not None:
                values = leaf.grad.coalesce().values() if leaf.grad.is_sparse else leaf.grad
                found[f"norm of d_{name}"] = torch.linalg.vector_norm(values, dtype=torch.float64)
        return found

    leaves = list(named.values())
    return Prepared(call, leaves, results, summary, note)


def make_row_optimizer(tables: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The lazy optimizer for sparse row gradients: ours where this version has it, else torch's."""
    if importlib.util.find_spec("cprec_kernels.optim") is None:
        return torch.optim.SparseAdam(list(tables), lr=LEARNING_RATE)
    optimizers = importlib.import_module("cprec_kernels.optim")
    found: torch.optim.Optimizer = optimizers.RowwiseAdamW(list(tables), lr=LEARNING_RATE, weight_decay=0.0)
    return found


def prepare_ours(problem: Problem) -> Prepared:
    embedding, softmax = problem.modules(sparse=True)
    dense = [*embedding.projections, *softmax.parameters()]
    optimizers = [
        make_row_optimizer(list(embedding.embeddings)),
        torch.optim.AdamW(dense, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    ]
    return prepare_step(
        problem,
        lambda: softmax(embedding(problem.ids), problem.target).loss,
        leaves_of(embedding, softmax),
        optimizers,
        problem.setting.dtype,
        f"{type(optimizers[0]).__name__} for rows, fused AdamW",
    )


def prepare_torch(fused: bool, dtype: str) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        embedding, softmax = problem.modules(sparse=False)
        partition = problem.partition
        loss = softmax_op.over_our_parameters(softmax)
        tables, projections = list(embedding.embeddings), list(embedding.projections)

        def loss_of() -> Tensor:
            hidden = embedding_op.adaptive_input(problem.ids, tables, projections, partition.cutoffs)
            found: Tensor = loss(hidden, problem.target).loss
            return found

        named = leaves_of(embedding, softmax)
        optimizer = torch.optim.Adam(
            [*embedding.parameters(), *softmax.parameters()], lr=LEARNING_RATE, fused=fused or None
        )
        return prepare_step(problem, loss_of, named, [optimizer], dtype or problem.setting.dtype)

    return prepare


# Work and memory


def loss_of(problem: Problem) -> softmax_op.Problem:
    """The loss's problem within a step: that of its own benchmark, but for the step's targets."""
    loss = softmax_op.Problem(problem.fwd_bwd())
    loss.target = problem.target
    return loss


def updated_parameters(problem: Problem, sparse: bool) -> int:
    partition = problem.partition
    softmax, embedding = partition.softmax_parameters(), partition.embedding_parameters
    if not sparse:
        return softmax + embedding
    counts = tokens_per_cluster(partition, problem.ids.unique())
    return softmax + sum(count * rank for count, rank in zip(counts, partition.ranks, strict=True))


def step_work(kind: str, sparse: bool) -> Callable[[Problem], Work]:
    def work(problem: Problem) -> Work:
        loss = softmax_op.compressed_work(kind)(loss_of(problem))
        lookup = embedding_op.embedding_work(embedding_op.Problem(problem.fwd_bwd()), sparse, not sparse)
        update = 7.0 * FLOAT_BYTES * updated_parameters(problem, sparse)
        return Work(loss.flops + lookup.flops, loss.exps + lookup.exps, loss.bytes + lookup.bytes + update)

    return work


def state_bytes(problem: Problem) -> int:
    """Weights and two moments."""
    return 3 * FLOAT_BYTES * updated_parameters(problem, sparse=False)


def our_bytes(problem: Problem) -> int:
    return FLOAT_BYTES * updated_parameters(problem, sparse=True)


def torch_bytes(problem: Problem) -> int:
    loss = softmax_op.adaptive_bytes(loss_of(problem))
    return loss + FLOAT_BYTES * problem.partition.embedding_parameters


def torch_step(name: str, fused: bool, dtype: str = "") -> Provider:
    return Provider(
        name,
        prepare_torch(fused, dtype),
        step_work("stored", sparse=False),
        state_bytes,
        torch_bytes,
        dtype=dtype,
        narrow_only=bool(dtype),
    )


def ours_in(isa: str) -> Provider:
    return Provider(
        f"cprec-{isa}",
        prepare_ours,
        step_work("recompute", sparse=True),
        state_bytes,
        our_bytes,
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=missing_isa(isa, "block_embedding", "clustered_softmax"),
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider(
        "reference",
        prepare_ours,
        step_work("recompute", sparse=True),
        state_bytes,
        our_bytes,
        scope=reference_backend,
    ),
    torch_step("torch-fused-adam", fused=True),
    torch_step("torch-fused-adam-fp32", fused=True, dtype="float32"),
    torch_step("torch-adam", fused=False),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """The step by plain torch: reference kernels, dense gradients, Adam over everything."""
    embedding, softmax = problem.modules(sparse=False)
    if dtype == "float64":
        embedding, softmax = embedding.double(), softmax.double()
    tables, projections = list(embedding.embeddings), list(embedding.projections)

    def loss_of() -> Tensor:
        hidden = functional.block_embedding(problem.ids, tables, projections)
        found: Tensor = softmax(hidden, problem.target).loss
        return found

    optimizer = torch.optim.Adam([*embedding.parameters(), *softmax.parameters()], lr=LEARNING_RATE)
    with use_backend("reference"):
        prepared = prepare_step(problem, loss_of, leaves_of(embedding, softmax), [optimizer], dtype)
        prepared.call()
        return prepared.results()


OP = Op(
    "train_step",
    "embedding, loss, backward and optimizer; the memory of a row includes the optimizer's states",
    modes=("step",),
    cases=tuple(f"{size}-d{width}-t512" for size in ("100k", "1m", "10m") for width in (64, 128, 256)),
    baseline="torch-fused-adam",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
)
