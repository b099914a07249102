"""The gate of ``python -m benchmarks.gpu --stage bench``: what a call of ours returns at full size is right before it is timed.

Rows of a batch do not depend on one another, so some are compared with fp64 by the tolerance rule. The gradients of a loss's
parameters are sums over the whole batch, for which fp64 would take too long; they are held to what they have to satisfy. With
logits W Q h and gradients g of them, dW = sum g (Q h)^T and dQ = sum (W^T g) h^T, so W^T dW = dQ Q^T for every level with a
projection, and sum h dh^T = sum over levels of dQ^T Q, or of dW^T W without one. And the gradients of a token's logits sum to
zero, hence so do the rows of dW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.testing import (
    assert_accurate,
    copy_weights,
    make_embedding,
    make_hidden,
    make_ids,
    make_softmax,
)

ROWS = 32  # that are compared with fp64, from the first to the last
SEARCHED = 256  # rows of a search
# How far apart two sums of products may be, relative to the sum of their sizes. Rounding is random: with right gradients of
# 20,000 and 30,000 items they were at most 1.3e-7 apart in fp32, 1.2e-3 in bf16 and 8e-5 in fp16, for 90 tokens twice as much.
SUMS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 3e-4}
# How far apart the scores of items may be that trade places when logits are rounded.
BANDS = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


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
    parameters = [given.hidden, *given.weights.weights, *given.weights.projections]
    assert len(gradients) == len(parameters), f"{len(gradients)} gradients, expected {len(parameters)}"
    for i, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        assert gradient.shape == parameter.shape, f"gradient {i} has shape {tuple(gradient.shape)}"
        assert bool(gradient.isfinite().all()), f"gradient {i} is not finite"
    places = _places(given.hidden)
    tokens, levels = len(given.target), len(given.weights.weights)

    def compute(dtype: torch.dtype) -> Sequence[Tensor]:
        hidden = given.hidden[places].detach().to(dtype).requires_grad_()
        weights = copy_weights(given.weights, dtype)
        loss = functional.clustered_cross_entropy(hidden, given.target[places], weights, reduction="sum") / tokens
        return torch.autograd.grad(loss, [hidden])

    of_input, of_weights, of_projections = gradients[0], gradients[1 : 1 + levels], gradients[1 + levels :]
    _judge_all(given, [of_input[places]], compute)
    bound = SUMS[given.dtype]
    projected = iter(zip(given.weights.projections, of_projections, strict=True))
    outer = torch.zeros(2, *[given.partition.embedding_dim] * 2, dtype=torch.float64, device=given.hidden.device)
    for j, (weight, gradient) in enumerate(zip(given.weights.weights, of_weights, strict=True)):
        total, size = gradient.double().sum(0), gradient.double().abs().sum(0)
        assert bool((total.abs() <= bound * size).all()), f"the rows of d_weight{j} do not sum to zero"
        if weight.shape[1] == given.partition.embedding_dim:
            outer += _products(gradient.T, weight)
            continue
        projection, of_projection = next(projected)
        _same(_products(weight.T, gradient), _products(of_projection, projection.T), bound,
              f"the gradients of level {j}'s weights and projection do not fit one another")  # fmt: skip
        outer += _products(of_projection.T, projection)
    _same(outer, _products(given.hidden.T, of_input), bound, "the gradients of the parameters do not fit the input's")


def _places(rows: Tensor) -> Tensor:
    """ROWS of them, from the first to the last."""
    return torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device).long()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The matrix a b, and the same of absolute values, in fp64: (2, rows of a, columns of b)."""
    a, b = a.detach().double(), b.detach().double()
    return torch.stack([a @ b, a.abs() @ b.abs()])


def _same(a: Tensor, b: Tensor, bound: float, message: str) -> None:
    off = ((a[0] - b[0]).abs() / (a[1] + b[1]).clamp(min=1e-300)).max()
    assert bool(off <= bound), f"{message}: {float(off):.1e} of the sum of their sizes, over {bound:.0e}"


def _search(given: Inputs, results: tuple[Tensor, Tensor]) -> None:
    places = _places(given.searched)
    k = results[1].shape[1]
    hidden, weights = given.searched[places].double(), copy_weights(given.weights, torch.float64)

    def with_true_scores(scores: Tensor, items: Tensor) -> list[Tensor]:
        # Near ties trade places when logits are rounded: an item is right if its own score is.
        with use_backend("reference"):
            return [scores, functional.clustered_score(hidden, items, weights)]

    def compute(dtype: torch.dtype) -> list[Tensor]:
        rows = given.searched[places].to(dtype)
        return with_true_scores(*functional.clustered_topk(rows, k, copy_weights(given.weights, dtype)))

    scores, items = (part[places] for part in results)
    inside = (items >= 0) & (items < given.partition.num_items)
    assert bool(inside.all()), "items out of range"
    assert all(row.unique().numel() == k for row in items), "an item twice in a row"
    _judge_all(given, with_true_scores(scores, items), compute)


def _rank(given: Inputs, ranks: Tensor) -> None:
    places = _places(given.searched)
    with use_backend("reference"):
        weights = copy_weights(given.weights, torch.float64)
        truth = functional.clustered_log_prob(given.searched[places].double(), weights)
    own = truth.gather(1, given.target[: len(ranks)][places][:, None])
    band = BANDS[given.dtype]
    best, worst = (truth > own + band).sum(1), (truth > own - band).sum(1) - 1  # the target itself among the latter
    wrong = (ranks[places] < best) | (ranks[places] > worst)
    row = int(wrong.int().argmax())
    assert not bool(wrong.any()), (
        f"row {int(places[row])}: rank {int(ranks[places][row])}, expected {int(best[row])}..{int(worst[row])}"
    )


def _score(given: Inputs, scores: Tensor) -> None:
    places = _places(given.searched)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        rows, weights = given.searched[places].to(dtype), copy_weights(given.weights, dtype)
        return [functional.clustered_score(rows, given.negatives[places], weights)]

    _judge_all(given, [scores[places]], compute)


JUDGES: dict[str, Callable[[Inputs, Any], None]] = {
    "block_embedding fwd": _embedding,
    "block_embedding fwd+bwd": _embedding_gradients,
    "clustered_cross_entropy fwd+bwd": _loss_gradients,
    "clustered_topk": _search,
    "clustered_rank": _rank,
    "clustered_score": _score,
}
