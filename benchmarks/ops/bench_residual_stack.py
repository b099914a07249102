"""Hidden states of the newest items of B histories, as serving needs them: ids (B, 20) to (B, d), padding on the left.

Histories hold 1..20 items, as many of one length as of any other; the blocks are NextItNet's with dilations 1 and 4 twice,
two layers each, three taps. Formula "clustered": the table is a block embedding. Peers are torch's own ops in eager mode on the
same weights, all places computed, each with a lookup in an nn.Embedding: a dense table costs no product.

Model of work: products 2 d^2 for every tap that meets an item, at the places that count (those that the newest item
depends on for ours, all 20 for the others); bytes: the layers' weights once, the rows of the embedding, the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import draw_items, fill_normal, normal
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
from cprec_kernels import functional
from cprec_kernels.nn import BlockEmbedding

FLOAT_BYTES = 4
LENGTH, TAPS, EPS = 20, 3, 1e-8
DILATIONS = (1, 2, 4, 8) * 2
TENSORS = ("weights", "biases", "norm_weights", "norm_biases")


class Problem:
    """Inputs of a setting, and the parameters that its providers share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        case = setting.case
        self.partition = case.partition.with_padding()
        self.padding_id = case.num_items
        ids = draw_items(case.num_items, case.tokens * LENGTH, setting.targets, seed=1).view(case.tokens, LENGTH)
        lengths = torch.randint(1, LENGTH + 1, (case.tokens, 1), generator=torch.Generator().manual_seed(2))
        if case.tokens == 1:
            lengths.fill_(LENGTH // 2)
        self.ids = ids.masked_fill(torch.arange(LENGTH) < LENGTH - lengths, self.padding_id)

    @functools.cached_property
    def module(self) -> BlockEmbedding:
        module = BlockEmbedding(self.partition)
        fill_normal(module.embeddings, seed=10)
        fill_normal(module.projections, seed=20, fan_dim=0)
        return module

    @functools.cached_property
    def layers(self) -> dict[str, Any]:
        """What the op takes beside the embedding."""
        width = self.setting.case.width
        layers = range(len(DILATIONS))
        scale = (TAPS * width) ** -0.5
        return {
            "weights": [normal((width, width, TAPS), scale, 30 + i) for i in layers],
            "biases": [normal((width,), 0.1, 50 + i) for i in layers],
            "norm_weights": [1 + normal((width,), 0.1, 70 + i) for i in layers],
            "norm_biases": [normal((width,), 0.1, 90 + i) for i in layers],
            "sets": list(layers),
            "dilations": list(DILATIONS),
            "eps": EPS,
        }

    @functools.cached_property
    def dense(self) -> Tensor:
        """The table as nn.Embedding has it."""
        with torch.no_grad():
            rows: Tensor = self.module(torch.arange(self.partition.num_items))
        return rows


def prepare(problem: Problem, states: Callable[[], Tensor]) -> Prepared:
    last: list[Tensor] = []

    def call() -> None:
        with torch.no_grad(), autocast(problem.setting.dtype):
            last[:] = [states()]

    def results() -> Results:
        return {"hidden": last[0]}

    return Prepared(call, (), results, results)


def prepare_ours(problem: Problem) -> Prepared:
    tables, projections = list(problem.module.embeddings), list(problem.module.projections)
    layers = problem.layers
    return prepare(
        problem,
        lambda: functional.residual_stack(problem.ids, problem.padding_id, tables, projections, **layers),
    )


def eager(problem: Problem, convolve: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Callable[[], Tensor]:
    """All places of all layers by torch's own ops; ``convolve(x, weight, bias, dilation)`` is the causal convolution."""
    layers, table, width = problem.layers, problem.dense, problem.setting.case.width

    def states() -> Tensor:
        mask = (problem.ids != problem.padding_id).unsqueeze(-1).to(table.dtype)
        x = inner = F.embedding(problem.ids, table) * mask
        for i, dilation in enumerate(DILATIONS):
            out = convolve(inner, layers["weights"][i], layers["biases"][i], dilation)
            inner = F.relu(F.layer_norm(out, (width,), layers["norm_weights"][i], layers["norm_biases"][i], EPS)) * mask
            if i % 2 == 1:
                x = inner = x + inner
        return x[:, -1]

    return states


def conv1d(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    padded = F.pad(x.transpose(1, 2), ((TAPS - 1) * dilation, 0))
    return F.conv1d(padded, weight, bias, dilation=dilation).transpose(1, 2)


def shifted_products(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    out = F.linear(x, weight[:, :, TAPS - 1], bias)
    for tap in range(TAPS - 1):
        lag = (TAPS - 1 - tap) * dilation
        if lag < LENGTH:
            out = out + F.pad(F.linear(x[:, : LENGTH - lag], weight[:, :, tap]), (0, 0, lag, 0))
    return out


def needed_products(length: int) -> int:
    """Taps that meet an item of a history of so many, at the places that its newest item depends on."""
    needed: list[set[int]] = [set() for _ in DILATIONS]
    needed[-1] = {length - 1}
    taps = 0
    for i in reversed(range(len(DILATIONS))):
        if i % 2 == 1 and i + 2 < len(DILATIONS):
            needed[i] |= needed[i + 2]
        read = {t - tap * DILATIONS[i] for t in needed[i] for tap in range(TAPS)}
        taps += sum(1 for t in needed[i] for tap in range(TAPS) if t - tap * DILATIONS[i] >= 0)
        if i:
            needed[i - 1] |= {t for t in read if t >= 0}
    return taps


def work(needed_only: bool) -> Callable[[Problem], Work]:
    def model(problem: Problem) -> Work:
        case = problem.setting.case
        lengths = (problem.ids != problem.padding_id).sum(1).tolist()
        if needed_only:
            taps = sum(map(needed_products, lengths))
        else:
            taps = case.tokens * sum(max(0, LENGTH - tap * dilation) for dilation in DILATIONS for tap in range(TAPS))
        numbers = len(DILATIONS) * TAPS * case.width**2 + (sum(lengths) + case.tokens) * case.width
        return Work(2.0 * taps * case.width**2, 0.0, FLOAT_BYTES * float(numbers))

    return model


def float32_only(setting: Setting) -> str:
    return "" if setting.dtype == "float32" else "the op computes in float32 alone"


def ours_in(isa: str) -> Provider:
    missing = missing_isa(isa, "residual_stack")
    return Provider(
        f"cprec-{isa}",
        prepare_ours,
        work(needed_only=True),
        isa=isa,
        scope=functools.partial(forced_isa, isa),
        missing=lambda setting: float32_only(setting) or missing(setting),
    )


PROVIDERS = (
    *map(ours_in, ISAS),
    Provider("reference", prepare_ours, work(False), scope=reference_backend, missing=float32_only),
    Provider("torch-conv1d", lambda problem: prepare(problem, eager(problem, conv1d)), work(False)),
    Provider("torch-linear", lambda problem: prepare(problem, eager(problem, shifted_products)), work(False)),
)


def truth(problem: Problem, formula: str, dtype: str) -> Results:
    """Plain torch in "float64", or in a dtype of DTYPES."""
    wide = torch.float64 if dtype == "float64" else torch.float32

    def cast(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.detach().to(wide) for tensor in tensors]

    layers: dict[str, Any] = {name: cast(value) for name, value in problem.layers.items() if name in TENSORS}
    tables, projections = cast(problem.module.embeddings), cast(problem.module.projections)
    with torch.no_grad(), reference_backend():
        hidden = functional.residual_stack(
            problem.ids, problem.padding_id, tables, projections, **problem.layers | layers
        )
    return {"hidden": hidden}


OP = Op(
    "residual_stack",
    "the newest item's hidden state after NextItNet's blocks",
    modes=("fwd",),
    cases=tuple(f"100k-d{width}-b{rows}" for width in (64, 128, 256) for rows in (1, 32, 256)),
    baseline="torch-linear",
    providers=PROVIDERS,
    problem=Problem,
    truth=truth,
)
