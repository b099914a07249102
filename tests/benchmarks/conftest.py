"""A packed search index in plain torch: what the harness makes of one is tested without the kernels behind it."""

from __future__ import annotations

import pytest
import torch

from cprec_kernels import functional
from cprec_kernels.nn import ClusteredSoftmaxWithLoss

GROUP = 32  # items that share an int8 scale


class Found(tuple):
    counters: torch.Tensor


def stored(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """The weights as a storage keeps them, in fp32 again."""
    if storage != "int8":
        return weight.to(getattr(torch, storage)).float()
    parts = []
    for group in weight.split(GROUP):
        scale = group.abs().max() / 127
        parts.append((group / scale).round() * scale)
    return torch.cat(parts)


class PlainIndex:
    """As cprec_kernels.nn.TopKIndex. Early termination pretends to meet half of the items."""

    def __init__(self, module: ClusteredSoftmaxWithLoss, storage: str, exact: bool) -> None:
        self.partition, self.exact, self.nbytes = module.partition, exact, 1_000_000
        true = [weight.detach().clone() for weight in module.weights]
        projections = [projection.detach().clone() for projection in module.projections]
        self.true = functional.Weights(true, projections)
        self.stored = functional.Weights([stored(weight, storage) for weight in true], projections)

    def topk(self, input: torch.Tensor, k: int, *, early_termination: bool = True) -> Found:
        _, items = functional.clustered_topk(input, k, self.true if self.exact else self.stored)
        found = Found((functional.clustered_score(input, items, self.stored), items))
        everything = torch.tensor([self.partition.num_clusters, 40, self.partition.num_items])
        found.counters = (everything // (2 if early_termination else 1)).expand(input.shape[0], -1)
        return found


@pytest.fixture
def plain_index(monkeypatch: pytest.MonkeyPatch) -> type[PlainIndex]:
    """``build_index`` gives a :class:`PlainIndex`; patch its methods to plant errors."""

    def build_index(self, storage="float32", exact=True):
        return PlainIndex(self, storage, exact)

    monkeypatch.setattr(ClusteredSoftmaxWithLoss, "build_index", build_index, raising=False)
    monkeypatch.setattr("benchmarks.ops.bench_clustered_topk.missing_kernels", lambda *ops: "")
    return PlainIndex
