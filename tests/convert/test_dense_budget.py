"""cprec_kernels.compress: clusters chosen for a compression, none within the budget lose less."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import cprec_kernels
from cprec_kernels import Partition, fitting
from cprec_kernels.convert import _partition
from tests.convert.dense_models import ITEMS, WIDTH, GRULike


def test_a_compression_is_kept_and_used(counts):
    model = GRULike(width=24)
    report = cprec_kernels.compress(model, counts, compression=3)
    for partition, width in ((report.plan.partition, WIDTH), (report.plan.output_partition, 24)):
        dense = ITEMS * width
        assert partition.embedding_dim == width
        assert 0.7 * dense < 3 * partition.embedding_parameters <= dense
    assert report.table_before >= 3 * report.table_after
    tighter = cprec_kernels.compress(GRULike(width=24), counts, compression=6).plan.partition
    assert tighter.embedding_parameters < report.plan.partition.embedding_parameters
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="compression must be a number of at least 1"):
            cprec_kernels.compress(GRULike(), counts, compression=wrong)
    with pytest.raises(ValueError, match="compression = 1000 is out of reach: rank 1 for all items gives"):
        cprec_kernels.compress(GRULike(), counts, compression=1000)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_counts_against_the_budget(counts, bias, tied):
    """Parent labels, biases and the padding's row, at many budgets, some of which are met to the last number."""
    for compression in torch.arange(1.5, 5.0, 0.1).tolist():
        model = GRULike(bias=bias, tied=tied)
        before = sum(parameter.numel() for parameter in nn.ModuleList([model.embed, model.out]).parameters())
        cprec_kernels.compress(model, counts, compression=compression)
        after = sum(parameter.numel() for parameter in nn.ModuleList([model.embed, model.out]).parameters())
        assert before / after >= compression


def test_no_clusters_within_the_budget_lose_less(monkeypatch):
    """Against every path over a few places, with the losses of truncated_svd itself."""
    monkeypatch.setattr(_partition, "PLACES", 5)
    monkeypatch.setattr(_partition, "FIRST_PLACE", 0.05)
    monkeypatch.setattr(_partition, "MAX_CLUSTERS", 3)
    scale = torch.linspace(3, 0.3, 60)[:, None] * torch.linspace(1, 0.1, 6)
    tables, weights = [torch.randn(60, 6) * scale, torch.randn(60, 6) * scale], torch.linspace(9, 1, 60).double()
    places, ranks = _partition._places(60).tolist(), _partition._ranks(6)

    def lost(partition):
        total = 0.0
        for table in tables:
            whole = float((weights[:, None] * table.double().square()).sum())
            for (lo, hi), rank in zip(itertools.pairwise(partition.offsets), partition.ranks, strict=True):
                if rank < 6:
                    rows = table[lo:hi].double()
                    factors = fitting.truncated_svd(rows, rank, weights[lo:hi])
                    gap = rows - factors.left @ factors.right
                    total += float((weights[lo:hi, None] * gap.square()).sum()) / whole
        return total

    candidates = [
        Partition(60, list(cuts), list(chosen), 6)
        for n in (1, 2, 3)
        for cuts in itertools.combinations(places[1:-1], n - 1)
        for chosen in itertools.combinations_with_replacement(ranks, n)
    ]
    for compression in (1.0, 1.5, 3.0):
        budget = 2 * 60 * 6 / compression
        found = _partition.fitted_partition(tables, weights, compression)
        within = [p for p in candidates if 2 * p.embedding_parameters <= budget]
        assert found in within
        assert math.isclose(lost(found), min(map(lost, within)), rel_tol=1e-6, abs_tol=1e-9)
