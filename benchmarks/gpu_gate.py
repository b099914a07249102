"""The gate of ``python -m benchmarks.gpu --stage bench``: what a call of ours returns at full size is right before it is timed.

Rows of a batch do not depend on one another, so a few are compared with fp64 by the tolerance rule. The gradients of a loss's
parameters are sums over the whole batch, for which fp64 would take too long; they are held to what they have to satisfy. A
level's logits are linear in its weights W and in its projection Q, so <W, dW> = <Q, dQ>, and all <W, dW> together are <h, dh>,
whose rows were compared. And the gradients of a token's logits sum to zero, hence so do the rows of dW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.testing import (
    EPS,
    assert_accurate,
    copy_weights,
    make_embedding,
    make_hidden,
    make_ids,
    make_softmax,
)

ROWS = 32  # that are compared with fp64
SEARCHED = 256  # rows of a search
SUMS = 1e-6  # how far two sums of millions of fp32 products may be apart, of the sum of their sizes


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of ids, targets and hidden states, and the parameters of an embedding and of a softmax; all of one dtype.

    Attributes:
        upstream: (T, d), of the embedding's rows. searched: (256, d). negatives: (256, 100) items to score.
    """

    partition: Partition
    dtype: torch.dtype
    ids: Tensor
    target: Tensor
    hidden: Tensor
    upstream: Tensor
    tables: list[Tensor]
    projections: list[Tensor]
    weights: functional.Weights
    negatives: Tensor

    @classmethod
    def of(cls, partition: Partition, tokens: int, dtype: torch.dtype, device: str) -> Self:
        upstream = make_hidden(partition, (tokens,), dtype).to(device)
        tables, projections = ([t.to(device).requires_grad_() for t in g] for g in make_embedding(partition, dtype))
        return cls(
            partition, dtype, make_ids(partition, (tokens,)).to(device),
            make_ids(partition, (tokens,), seed=1).to(device), upstream.clone().requires_grad_(), upstream,
            tables, projections,
            copy_weights(make_softmax(partition, dtype, bias=False), device=device, requires_grad=True),
            make_ids(partition, (min(tokens, SEARCHED), 100), seed=2).to(device),
        )  # fmt: skip

    @property
    def searched(self) -> Tensor:
        return self.upstream[:SEARCHED]


def problem(op: str, given: Inputs, results: Any) -> str:
    """What is wrong with what a call of ``op`` returned for these inputs; "" where nothing is."""
    try:
        JUDGES[op](given, results)
    except AssertionError as error:
        return str(error).strip() or "wrong"
    return ""


def _reference(given: Inputs, compute: Callable[[torch.dtype], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The results of plain torch in the dtype of the inputs, and in fp64."""
    with use_backend("reference"):
        return [compute(dtype) for dtype in (given.dtype, torch.float64)]


def _judge_all(given: Inputs, results: Sequence[Tensor], compute: Callable[[torch.dtype], Sequence[Tensor]]) -> None:
    base, truth = _reference(given, compute)
    assert len(results) == len(truth), f"{len(results)} results, expected {len(truth)}"
    for i, (a, b, t) in enumerate(zip(results, base, truth, strict=True)):
        assert a.shape == t.shape, f"result {i} has shape {tuple(a.shape)}, expected {tuple(t.shape)}"
        assert_accurate(a, b, t, given.dtype, f"result {i}")


def _embedding(given: Inputs, output: Tensor) -> None:
    def compute(dtype: torch.dtype) -> list[Tensor]:
        factors = [[t.detach().to(dtype) for t in group] for group in (given.tables, given.projections)]
        return [functional.block_embedding(given.ids, *factors)]

    _judge_all(given, [output], compute)


def _embedding_gradients(given: Inputs, gradients: Sequence[Tensor]) -> None:
    def compute(dtype: torch.dtype) -> Sequence[Tensor]:
        groups = (given.tables, given.projections)
        factors = [[t.detach().to(dtype).requires_grad_() for t in group] for group in groups]
        out = functional.block_embedding(given.ids, *factors)
        return torch.autograd.grad(out, [*factors[0], *factors[1]], given.upstream.to(dtype))

    _judge_all(given, gradients, compute)


def _loss_gradients(given: Inputs, gradients: Sequence[Tensor]) -> None:
    tokens, levels = len(given.target), len(given.weights.weights)

    def compute(dtype: torch.dtype) -> Sequence[Tensor]:
        hidden = given.hidden[:ROWS].detach().to(dtype).requires_grad_()
        weights = copy_weights(given.weights, dtype)
        loss = functional.clustered_cross_entropy(hidden, given.target[:ROWS], weights, reduction="sum") / tokens
        return torch.autograd.grad(loss, [hidden])

    of_input, of_weights, of_projections = gradients[0], gradients[1 : 1 + levels], gradients[1 + levels :]
    _judge_all(given, [of_input[:ROWS]], compute)
    parameters = [*given.weights.weights, *given.weights.projections]
    for name, group in (("gradients", gradients[1:]), ("parameters", parameters)):
        assert len(group) == len(parameters), f"{len(group)} {name}, expected {len(parameters)}"
    bound = max(EPS[given.dtype], SUMS)
    for j, gradient in enumerate(of_weights):
        total, size = gradient.double().sum(0), gradient.double().abs().sum(0)
        assert bool((total.abs() <= bound * size).all()), f"the rows of d_weight{j} do not sum to zero"
    inner = [_inner(w, g) for w, g in zip(given.weights.weights, of_weights, strict=True)]
    narrow = [j for j, w in enumerate(given.weights.weights) if w.shape[1] < given.partition.embedding_dim]
    for j, q, g in zip(narrow, given.weights.projections, of_projections, strict=True):
        _same(inner[j], _inner(q, g), bound, f"<weight{j}, d_weight{j}> is not <projection, d_projection> of its level")
    whole = inner[0][0].new_tensor(0.0), inner[0][1].new_tensor(0.0)
    for value, size in inner:
        whole = whole[0] + value, whole[1] + size
    _same(whole, _inner(given.hidden, of_input), bound, "the gradients of the weights do not fit the input's")


def _inner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """<a, b>, and the same of absolute values."""
    products = a.detach().double() * b.double()
    return products.sum(), products.abs().sum()


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bound: float, message: str) -> None:
    off, size = (a[0] - b[0]).abs(), a[1] + b[1]
    assert bool(off <= bound * size), f"{message}: {float(a[0]):.6e} and {float(b[0]):.6e}"


def _search(given: Inputs, results: tuple[Tensor, Tensor]) -> None:
    k = results[1].shape[1]
    hidden, weights = given.searched[:ROWS].double(), copy_weights(given.weights, torch.float64)

    def with_true_scores(scores: Tensor, items: Tensor) -> list[Tensor]:
        # Near ties trade places when logits are rounded: an item is right if its own score is.
        with use_backend("reference"):
            return [scores, functional.clustered_score(hidden, items, weights)]

    def compute(dtype: torch.dtype) -> list[Tensor]:
        rows = given.searched[:ROWS].to(dtype)
        return with_true_scores(*functional.clustered_topk(rows, k, copy_weights(given.weights, dtype)))

    scores, items = (part[:ROWS] for part in results)
    inside = (items >= 0) & (items < given.partition.num_items)
    assert bool(inside.all()), "items out of range"
    assert all(row.unique().numel() == k for row in items), "an item twice in a row"
    _judge_all(given, with_true_scores(scores, items), compute)


def _rank(given: Inputs, ranks: Tensor) -> None:
    def compute(dtype: torch.dtype) -> list[Tensor]:
        rows, weights = given.searched[:ROWS].to(dtype), copy_weights(given.weights, dtype)
        return [functional.clustered_rank(rows, given.target[:ROWS], weights).log1p()]

    # Near ties trade places when logits are rounded: the logarithm of a place is as good as a score.
    _judge_all(given, [ranks[:ROWS].log1p()], compute)


def _score(given: Inputs, scores: Tensor) -> None:
    def compute(dtype: torch.dtype) -> list[Tensor]:
        rows, weights = given.searched[:ROWS].to(dtype), copy_weights(given.weights, dtype)
        return [functional.clustered_score(rows, given.negatives[:ROWS], weights)]

    _judge_all(given, [scores[:ROWS]], compute)


JUDGES: dict[str, Callable[[Inputs, Any], None]] = {
    "block_embedding fwd": _embedding,
    "block_embedding fwd+bwd": _embedding_gradients,
    "clustered_cross_entropy fwd+bwd": _loss_gradients,
    "clustered_topk": _search,
    "clustered_rank": _rank,
    "clustered_score": _score,
}
