"""cprec::topk_index: check 10, a hunt for a lost item with weights, rows and a k that are meant to break a bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_kernels import Partition, backend_of
from cprec_kernels.functional import Weights
from cprec_kernels.nn.index_packing import STORAGES, pack
from cprec_kernels.ops.topk_index import topk_index
from cprec_kernels.testing import make_softmax
from tests.ops.index_checks import BAND, assert_best, rounding, truth


@st.composite
def searches(draw):
    """Weights, rows and a k meant to break a bound: ties, outliers, lonely items, likely tails, k near k_0."""
    head = draw(st.integers(1, 70))
    tails = draw(st.lists(st.sampled_from([1, 2, 31, 33, 64, 65, 129, 300, 521]), max_size=3))
    width = draw(st.integers(1, 12))
    ranks = sorted(draw(st.lists(st.integers(1, width), min_size=len(tails) + 1, max_size=len(tails) + 1)))[::-1]
    sizes = [head, *tails]
    cutoffs = torch.tensor(sizes).cumsum(0).tolist()
    partition = Partition(cutoffs[-1], cutoffs[:-1], ranks, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = make_softmax(partition, seed=draw(st.integers(0, 2**31)), bias=draw(st.booleans()), logit_std=1.0)
    spread = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    for table in weights.weights:
        table *= spread
        kind = draw(st.sampled_from(["as they are", "few rows", "outliers", "far from zero", "one direction", "zero"]))
        if kind == "few rows":  # ties
            table.copy_(table[torch.randint(min(3, len(table)), (len(table),), generator=generator)].clone())
        elif kind == "outliers":
            table[torch.randint(len(table), (1 + len(table) // 50,), generator=generator)] *= 20.0
        elif kind == "far from zero":
            table += 5.0 * spread
        elif kind == "one direction":
            table[:, 1:] *= 1e-3
        elif kind == "zero":
            table.zero_()
    for bias in [weights.head_bias, *weights.tail_biases] if weights.head_bias is not None else []:
        bias *= draw(st.sampled_from([0.0, 1.0, 10.0]))
    if weights.head_bias is not None and tails:
        weights.head_bias[head:] += draw(st.sampled_from([-20.0, -3.0, 0.0, 3.0]))
    rows = torch.randn(draw(st.integers(1, 5)), width, generator=generator)
    rows *= draw(st.sampled_from([1e-3, 1.0, 5.0]))
    k = draw(st.sampled_from([1, 2, 10, head - 1, head, head + 1, head + 40, partition.num_items]))
    return partition, weights, rows, min(max(k, 0), partition.num_items)


@settings(max_examples=150, deadline=None)
@given(search=searches(), storage=st.sampled_from(list(STORAGES)), blocks=st.sampled_from(["kd", "kd", None]))
def test_no_search_loses_an_item(search, storage, blocks):
    partition, weights, hidden, k = search
    arrays = pack(weights, storage, True, blocks)
    early = topk_index(hidden, k, arrays)
    full = topk_index(hidden, k, arrays, early_termination=False)
    assert torch.equal(early[1], full[1])
    if storage == "float32":
        assert torch.equal(early[0], full[0])
    # fp32 sums err by the size of what they add: |w| |Q h| of the level.
    largest = max(
        float(norm * (hidden if projection.numel() == 0 else hidden @ projection.T).norm(dim=1).max())
        for norm, projection in zip(arrays.bounds[:, 1], arrays.projections, strict=True)
    )
    largest += (
        float(arrays.parents.norm(dim=1).max()) * float(hidden.norm(dim=1).max()) * 3 if len(arrays.parents) else 0
    )
    expected = truth(hidden, weights)
    for result in (early, full):
        assert_best(result, expected, BAND + 2e-6 * largest, rounding(hidden, weights, arrays))
    # The reference multiplies by the library, which may give equal rows of weights products an ulp apart.
    if backend_of("topk_index", hidden) == "native":
        assert_equal_items_in_order(early[1], weights, partition)


def assert_equal_items_in_order(items, weights, partition):
    """Of items with the same weights and bias, those with the smallest ids are returned, in order."""
    for j in range(partition.num_clusters):
        lo, hi = partition.offsets[j : j + 2]
        table = weights.weights[j][: hi - lo]
        bias = weights.head_bias if j == 0 else (weights.tail_biases[j - 1] if weights.tail_biases else None)
        if bias is not None:
            table = torch.cat([table, bias[: hi - lo, None]], 1)
        # + 0.0: a negative zero is the same number.
        kinds = (table + 0.0).unique(dim=0, return_inverse=True)[1]
        for row in items:
            own = row[(row >= lo) & (row < hi)] - lo
            for kind in kinds[own].unique():
                wanted = (kinds == kind).nonzero().flatten()
                got = own[kinds[own] == kind]
                assert torch.equal(got, wanted[: got.numel()])


def assert_storage_changes_no_item(hidden, weights, ks, orders):
    """Items of an exact index that stores int8 are those of one that stores fp32."""
    plain = pack(weights, "float32", True, None)
    for blocks in orders:
        arrays = pack(weights, "int8", True, blocks)
        for k in ks:
            items = topk_index(hidden, k, plain)[1]
            for early in (True, False):
                assert torch.equal(topk_index(hidden, k, arrays, early_termination=early)[1], items)


@pytest.mark.parametrize("seed", range(56, 76))
def test_int8_finds_the_same_items_where_it_holds_them_almost_exactly(seed, cpu_isa):
    """Nothing but rounding parts stored logits from true ones, and half of the items stand there twice."""
    generator = torch.Generator().manual_seed(seed)
    width, scale = (4, 8, 16)[seed % 3], torch.tensor(0.1 * 2.0 ** (seed // 3 % 6) / 127)
    tables = []
    for size in (42, 64, 100):
        table = torch.randint(-127, 128, (size, width), generator=generator).float()
        table[::32, 0] = 127  # a group's largest: its scale is the one above
        table *= scale
        table[size // 2 : size // 2 * 2] = table[: size // 2].flip(0)
        tables.append(table)
    hidden = torch.randn(16, width, generator=generator) * (2 + seed % 5)
    assert_storage_changes_no_item(hidden, Weights(tables), (1, 3, 10, 39), (None, "kd"))


@pytest.mark.parametrize("seed", range(1, 21))
def test_int8_finds_the_same_items_where_all_are_nearly_tied(seed, cpu_isa):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, 8, generator=generator)
    centre /= centre.norm()
    spread = 10.0 ** -(1 + seed // 4 % 6)
    tables = [centre * (1 + seed % 4) + torch.randn(size, 8, generator=generator) * spread for size in (62, 200, 70)]
    hidden = centre * (1 + seed % 7) + torch.randn(8, 8, generator=generator) * 0.3
    assert_storage_changes_no_item(hidden, Weights(tables), (1, 5, 30, 59, 120), (None,))
