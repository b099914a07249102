"""Packing for search: where items are, and bounds that hold."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch

from cprec_kernels import Partition, release_memory
from cprec_kernels.nn import ClusteredSoftmaxWithLoss, index_packing
from cprec_kernels.nn.index_packing import MIN_EIGENVALUE, STORAGES, kd_order, leaf_basis, pack, rows_of
from cprec_kernels.ops.topk_index import GROUP, LEAF
from cprec_kernels.testing import make_softmax

PARTITION = Partition(3_017, [101, 700], [24, 9, 4], 24)


def levels(arrays, weights, exact):
    """Per level: fp32 weights, stored weights, the ones that count, biases, all in packed order and fp64."""
    first = 0
    for j, size in enumerate(arrays.sizes):
        ids = arrays.ids[j][:size].long() - first if arrays.ids[j].numel() > 0 else torch.arange(size)
        assert torch.equal(ids.sort().values, torch.arange(size))
        full = weights.weights[j][:size][ids].double()
        stored = rows_of(arrays.groups[j], arrays.scales[j], slice(0, size))
        bias = weights.head_bias if j == 0 else (weights.tail_biases[j - 1] if weights.tail_biases else None)
        yield j, full, stored, full if exact else stored, None if bias is None else bias[:size][ids]
        first += size


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_items_are_where_the_layout_has_them(case, storage, exact, bias):
    weights = make_softmax(case.partition, bias=bias, logit_std=3.0)
    for blocks in ("kd", None):
        arrays = pack(weights, storage, exact, blocks)
        assert arrays.num_items == case.partition.num_items
        assert arrays.width == case.partition.embedding_dim
        projections = iter(weights.projections)
        for j, full, stored, _, own_bias in levels(arrays, weights, exact):
            size, groups, scales = len(full), arrays.groups[j], arrays.scales[j]
            assert groups.shape == (math.ceil(size / GROUP), full.shape[1], GROUP)
            for place in {0, size // 2, size - 1}:
                packed = groups[place // GROUP, :, place % GROUP].double()
                packed = packed * scales[place // GROUP].double() if storage == "int8" else packed
                assert torch.equal(packed, stored[place])
                if storage != "int8":
                    assert torch.equal(packed, full[place].to(STORAGES[storage]).double())
            if storage == "int8":
                by_group = arrays.exact[j] if exact else pack(weights, "float32", True, blocks).groups[j]
                assert torch.equal(scales, by_group.abs().amax((1, 2)) / 127)
                # Rounded to the nearest: half a step, and the rounding of the division.
                steps = (by_group.double() / scales.double()[:, None, None] - groups).abs()
                assert steps.nan_to_num().max() <= 0.5 + 1e-4
            if exact and storage != "float32":
                assert torch.equal(rows_of(arrays.exact[j], torch.empty(0), slice(0, size)), full)
            else:
                assert arrays.exact[j].numel() == 0
            assert torch.count_nonzero(rows_of(groups, scales, slice(0, groups.shape[0] * GROUP))[size:]) == 0
            if own_bias is None:
                assert arrays.biases[j].numel() == 0
            else:
                assert torch.equal(arrays.biases[j][:size], own_bias)
                assert torch.count_nonzero(arrays.biases[j][size:]) == 0
            if arrays.ids[j].numel() > 0:
                assert blocks == "kd"
                assert (arrays.ids[j][size:] == -1).all()
                for leaf in arrays.ids[j][:size].split(LEAF):
                    assert (leaf.diff() > 0).all()
            if full.shape[1] < arrays.width:
                assert torch.equal(arrays.projections[j], next(projections))
        head = case.partition.sizes[0]
        assert torch.equal(arrays.parents, weights.weights[0][head:])
        assert torch.equal(arrays.parent_bias, weights.head_bias[head:] if bias else torch.empty(0))
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for _, t in arrays.named())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bounds_hold(case, storage, exact, bias):
    """Against the definition, in fp64; none is looser than rounding asks for."""
    weights = make_softmax(case.partition, bias=bias, logit_std=3.0)
    arrays = pack(weights, storage, exact, "kd")

    def tight(bound, value):
        assert value <= bound <= value * (1 + 3e-6) + 1e-300

    for j, full, stored, counting, own_bias in levels(arrays, weights, exact or storage == "float32"):
        error, norm, radius, above, largest, longest = arrays.bounds[j]
        tight(error, (full - stored).norm(dim=1).max() if exact else 0.0)
        tight(norm, torch.maximum(full.norm(dim=1), stored.norm(dim=1)).max())
        tight(radius, (counting - counting.mean(0)).norm(dim=1).max())
        if own_bias is None:
            assert above == largest == 0
        else:
            tight(above, own_bias.max() - own_bias.double().mean())
            tight(largest, own_bias.abs().max())
        if j == 0:
            assert (
                arrays.leaves[0].numel() == arrays.leaf_stats[0].numel() == arrays.leaf_bases[0].numel() == longest == 0
            )
            continue
        counting = counting @ torch.linalg.inv(arrays.leaf_bases[j].double())
        tight(longest, counting.norm(dim=1).max())
        leaves = arrays.leaves[j].movedim(3, 1).flatten(0, 1)  # (leaves and pads, 3, r)
        stats = arrays.leaf_stats[j].movedim(2, 1).flatten(0, 1)
        parts = counting.split(LEAF)
        assert torch.count_nonzero(leaves[len(parts) :]) == 0
        assert (stats[len(parts) :, 1] == -1e30).all()
        assert torch.count_nonzero(stats[len(parts) :, [0, 2, 3]]) == 0
        for place, own in enumerate(parts):
            mean, centre, half = leaves[place].double()
            torch.testing.assert_close(mean, own.mean(0), rtol=1e-6, atol=1e-7)
            assert ((own - centre).abs() <= half).all()
            assert (half <= (own.amax(0) - own.amin(0)) / 2 * (1 + 1e-6) + 1e-6 * own.abs().max()).all()
            tight(stats[place, 0].double(), (own - mean).norm(dim=1).max())
            assert stats[place, 1] == torch.tensor(float(len(own))).log2()
            if own_bias is not None:
                held = own_bias[place * LEAF : (place + 1) * LEAF]
                assert stats[place, 2] == held.max()
                torch.testing.assert_close(stats[place, 3], held.mean())
            else:
                assert torch.count_nonzero(stats[place, 2:]) == 0


def exact_inverse(matrix):
    """Of a small matrix of floats, in fractions."""
    size = len(matrix)
    rows = [
        [Fraction(value) for value in row] + [Fraction(int(i == j)) for j in range(size)]
        for i, row in enumerate(matrix.tolist())
    ]
    for i in range(size):
        pivot = next(j for j in range(i, size) if rows[j][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [value - rows[j][i] * own for value, own in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]


@pytest.mark.parametrize("storage", STORAGES)
def test_half_widths_hold_in_exact_arithmetic(storage):
    """Where fp32 and fp64 round: magnitudes far apart in one box, neighbours of one ulp, numbers without a normal form."""
    partition = Partition(132, [4], [3, 3], 3)
    weights = make_softmax(partition, bias=False)
    table = weights.weights[1]
    table[:, 0] *= 10.0 ** torch.randint(-30, 1, (128,)).float()
    table[:, 1] = 1.0 + torch.randint(0, 2, (128,)) * 2.0**-23
    table[:, 2] = torch.randint(-9, 9, (128,)) * 1e-45
    for exact in (True, False):
        arrays = pack(weights, storage, exact, "kd")
        counting = list(levels(arrays, weights, exact or storage == "float32"))[1][3]
        inverse = exact_inverse(arrays.leaf_bases[1])
        # What fp64 rounds beside what the search allows fp32 to round.
        room = Fraction(float(arrays.bounds[1, 5])) * Fraction(1, 2**40)
        for place, own in enumerate(counting.split(LEAF)):
            _, centre, half = arrays.leaves[1][0, :, :, place]
            for w in own.tolist():
                for column in range(3):
                    exactly = sum(Fraction(w[c]) * inverse[c][column] for c in range(3))
                    c, h = Fraction(float(centre[column])), Fraction(float(half[column]))
                    assert abs(exactly - c) <= h + room


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 257, 1_000, 4_096, 5_003])
def test_kd_order_is_a_permutation(count, monkeypatch):
    points = torch.randn(count, 5)
    order = kd_order(points)
    assert torch.equal(order.sort().values, torch.arange(count))
    monkeypatch.setattr(index_packing, "MAX_NUMBERS", 1)
    assert torch.equal(kd_order(points), order)


def test_kd_blocks_hold_neighbours():
    """Items of eight far-apart clouds of 64, shuffled: each leaf is one cloud."""
    clouds = torch.tensor([[x, y, z] for x in (0.0, 9.0) for y in (0.0, 9.0) for z in (0.0, 9.0)])
    points = (clouds[:, None] + torch.rand(8, LEAF, 3)).reshape(-1, 3)[torch.randperm(8 * LEAF)]
    for leaf in points[kd_order(points)].split(LEAF):
        assert (leaf.amax(0) - leaf.amin(0)).max() < 1


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_in_a_leafs_basis_rows_are_as_long_in_every_direction(rank):
    scale = 10.0 ** torch.linspace(-1, 0, 8)
    hidden = (torch.randn(500, 8) * scale).double()
    projection = torch.randn(rank, 8) if rank < 8 else None
    basis = leaf_basis(hidden.T @ hidden, projection)
    z = hidden if projection is None else hidden @ projection.double().T
    turned, weights = z @ basis.double().T, torch.randn(50, rank).double()
    moment = turned.T @ turned
    torch.testing.assert_close(moment / moment[0, 0], torch.eye(rank).double(), rtol=1e-4, atol=1e-4)
    there = weights @ torch.linalg.inv(basis.double())
    torch.testing.assert_close(turned @ there.T, z @ weights.T, rtol=1e-9, atol=1e-9)


def test_a_basis_stays_well_conditioned():
    """Hidden states without a second direction, with hardly one, and none at all."""
    for moment in (torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([1.0, 1e-30])), torch.zeros(2, 2)):
        basis = leaf_basis(moment.double(), None)
        assert basis.isfinite().all()
        assert torch.linalg.cond(basis.double()) <= MIN_EIGENVALUE**-0.5 * (1 + 1e-5)
    weights = make_softmax(PARTITION)
    weights.weights[0].zero_()
    arrays = pack(weights, "float32", True, "kd")
    assert torch.equal(arrays.leaf_bases[1], torch.eye(arrays.leaf_bases[1].shape[0]))


def test_a_basis_knows_the_heads_items():
    """Leaves are split along the direction that the head's items have, though all directions of a tail are alike."""
    weights = make_softmax(Partition(2_000, [100], [4, 4], 4), bias=False)
    weights.weights[0][:, 1:] *= 0.01
    arrays = pack(weights, "float32", True, "kd")
    ids = arrays.ids[1][:1_900].long() - 100
    along = weights.weights[1][ids, 0].split(LEAF)
    across = weights.weights[1][ids, 1].split(LEAF)
    widths = [torch.stack([leaf.max() - leaf.min() for leaf in of]).mean() for of in (along, across)]
    assert widths[0] < widths[1] / 4


def near_a_line(tail_rank, size=4_000):
    """A head along one direction, and a tail of which a leaf in fifty lies there; of every rank up to the width."""
    weights = make_softmax(Partition(size + 100, [100], [16, tail_rank], 16), bias=False)
    direction = torch.full((16,), 0.25)
    weights.weights[0].copy_(direction + 0.01 * weights.weights[0])
    along = direction if tail_rank == 16 else weights.projections[0] @ direction
    weights.weights[1][:64] += 40 * along / along.norm()
    return weights


@pytest.mark.parametrize(("storage", "exact"), [("float32", True), ("float16", True), ("int8", False)])
def test_leaves_are_kept_where_few_of_them_are_left(storage, exact):
    """And not where rows of the head's items could pass over next to none of them."""
    useful, useless = near_a_line(16), make_softmax(Partition(4_100, [100], [16, 16], 16), bias=True)
    for weights, kept in ((useful, True), (useless, False), (near_a_line(4), True)):
        auto, always, never = (pack(weights, storage, exact, blocks) for blocks in ("auto", "kd", None))
        for (name, own), (_, expected) in zip(auto.named(), (always if kept else never).named(), strict=True):
            assert torch.equal(own, expected), name
        assert (auto.leaves[1].numel() > 0) == kept


@pytest.mark.parametrize("bias", [True, False])
def test_the_share_of_leaves_left(bias):
    """By the definition, from the tail's own leaves in fp64."""
    weights = make_softmax(PARTITION, bias=bias)
    arrays = pack(weights, "float32", True, "kd")
    probes = weights.weights[0][:5].double()
    for j in (1, 2):
        projection = arrays.projections[j]
        z = probes @ projection.double().t()
        size, basis = arrays.sizes[j], arrays.leaf_bases[j]
        own = rows_of(arrays.groups[j], arrays.scales[j], slice(0, size))
        own_bias = arrays.biases[j][:size] if bias else None
        logits = own @ z.t() + (own_bias.double()[:, None] if bias else 0)
        turned, tails = own @ torch.linalg.inv(basis.double()), z @ basis.double().t()
        left = 0
        for leaf in range(-(-size // LEAF)):
            held = slice(leaf * LEAF, min((leaf + 1) * LEAF, size))
            mean, low, high = turned[held].mean(0), turned[held].amin(0), turned[held].amax(0)
            sphere = tails @ mean + tails.norm(dim=1) * (turned[held] - mean).norm(dim=1).max()
            box = tails @ ((low + high) / 2) + tails.abs() @ ((high - low) / 2)
            bound = torch.minimum(sphere, box) + (own_bias[held].max() if bias else 0)
            left += (bound >= logits.amax(0)).sum()
        share = index_packing.share_left(
            arrays.groups[j], arrays.scales[j], own_bias, size, basis, arrays.leaves[j], arrays.leaf_stats[j], z,
        )  # fmt: skip
        assert 0 < share <= 1
        assert share == pytest.approx(float(left) / (5 * -(-size // LEAF)), abs=0.02)


def test_bounds_of_many_rows_are_taken_in_chunks(monkeypatch):
    weights = make_softmax(PARTITION)
    whole = pack(weights, "int8", True, "kd")
    monkeypatch.setattr(index_packing, "MAX_NUMBERS", 1_000)
    monkeypatch.setattr(index_packing, "PROBED_ROWS", 10)
    monkeypatch.setattr(index_packing, "MAX_LEFT", 1.0)
    for (name, part), (_, expected) in zip(pack(weights, "int8", True, "auto").named(), whole.named(), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12 if name == "bounds" else 0, atol=0)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 3e-44, 1e-38])
def test_tiny_int8_groups_do_not_divide_by_zero(largest):
    weights = make_softmax(PARTITION, bias=False)
    weights.weights[2].copy_(torch.randn_like(weights.weights[2]).clamp(-1, 1) * largest)
    arrays = pack(weights, "int8", True, "kd")
    assert rows_of(arrays.groups[2], arrays.scales[2], slice(0, 2_317)).isfinite().all()
    assert arrays.bounds[2, 0] <= 3 * largest  # each of four columns at most 1.4 largest, rounded to fp32


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "int8"])
def test_an_index_is_built_with_deterministic_algorithms(storage):
    """torch fills new memory then, with NaN where that is a number."""
    head = ClusteredSoftmaxWithLoss(64, Partition(40_000, [20_000], [64, 4], 64))
    x = torch.randn(3, 64)
    expected = head.topk(x, 5)[1]
    torch.use_deterministic_algorithms(True)
    try:
        found = head.build_index(storage=storage).topk(x, 5).items
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


def test_an_index_does_not_share_its_projections_with_the_module():
    head = ClusteredSoftmaxWithLoss(24, PARTITION)
    arrays = pack(head.packed_weights(), "float32", True, None)
    before = head.projections[0].detach().clone()
    with torch.no_grad():
        head.projections[0].zero_()
    assert torch.equal(arrays.projections[1], before)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_a_stale_index_is_saved_as_what_it_was_built_from(storage, tmp_path):
    head = ClusteredSoftmaxWithLoss(24, PARTITION, head_bias=True, tail_bias=True)
    index = head.build_index(storage)
    index.save(tmp_path / "before")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    assert index.is_stale
    index.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_biases_that_mask_items_are_warned_of():
    head = ClusteredSoftmaxWithLoss(8, Partition(200, [50], [8, 4], 8), head_bias=True, tail_bias=True)
    with torch.no_grad():
        head.tail_biases[0][3] = -1e9
    with pytest.warns(UserWarning, match=r"tail_biases\[0\] reaches 1e\+09 in size: .* exclude= or leave them"):
        index = head.build_index()
    hidden = torch.randn(4, 8)
    assert torch.equal(index.topk(hidden, 200).items, head.topk(hidden, 200)[1])
    with torch.no_grad():
        head.tail_biases[0][3] = -50.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.build_index()


def test_the_memory_of_an_index_that_is_gone_goes_back_to_the_system():
    head = ClusteredSoftmaxWithLoss(64, Partition(100_000, [1_000], [64, 16], 64))
    release_memory()
    index = head.build_index()
    del index
    assert release_memory() < 1 << 20
