"""Partition: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec_kernels import Partition


@st.composite
def partitions(draw):
    num_items = draw(st.integers(1, 300))
    most = min(7, num_items - 1)
    cutoffs = sorted(draw(st.sets(st.integers(1, num_items - 1), max_size=most))) if most else []
    width = draw(st.integers(1, 40))
    ranks = sorted((draw(st.integers(1, width)) for _ in range(len(cutoffs) + 1)), reverse=True)
    return Partition(num_items, cutoffs, ranks, width)


@given(partitions())
def test_clusters_cover_every_item_once(partition):
    assert sum(partition.sizes) == partition.num_items
    assert min(partition.sizes) >= 1
    covered = [partition.cluster_of(item) for item in range(partition.num_items)]
    assert covered == sorted(covered)
    assert [covered.count(j) for j in range(partition.num_clusters)] == list(partition.sizes)


@given(partitions())
def test_json_round_trip(partition):
    assert Partition.from_dict(partition.to_dict()) == partition
    assert hash(Partition.from_dict(partition.to_dict())) == hash(partition)


@given(partitions())
def test_padding_adds_one_item_to_the_last_cluster(partition):
    padded = partition.with_padding()
    assert padded.num_items == partition.num_items + 1
    assert padded.sizes[:-1] == partition.sizes[:-1]


def test_parameters():
    partition = Partition(1000, [50, 200], [64, 16, 4], 64)
    assert partition.embedding_parameters == 50 * 64 + 150 * 16 + 800 * 4 + (16 + 4) * 64
    assert partition.softmax_parameters() == partition.embedding_parameters + 2 * 64
    assert partition.softmax_parameters(head_bias=True, tail_bias=True) == partition.softmax_parameters() + 52 + 950
    assert Partition.single(1000, 64).softmax_parameters() == 64000


def test_numpy_integers_are_integers():
    partition = Partition(np.int64(100), np.array([10, 50]), np.array([8, 4, 2]), np.int32(8))
    assert partition == Partition(100, [10, 50], [8, 4, 2], 8)
    assert type(partition.cutoffs[0]) is int


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, [], [4], 4), ValueError, "num_items must be at least 1, got 0"),
        ((10, [], [4], 0), ValueError, "embedding_dim must be at least 1, got 0"),
        ((10, [5, 3], [4, 2, 1], 4), ValueError, r"ascending, but cutoffs\[1\] = 3 follows 5"),
        ((10, [3, 3], [4, 2, 1], 4), ValueError, r"ascending, but cutoffs\[1\] = 3 follows 3"),
        ((10, [0], [4, 2], 4), ValueError, r"cutoffs\[0\] = 0 is outside 1..9"),
        ((10, [10], [4, 2], 4), ValueError, r"cutoffs\[0\] = 10 is outside 1..9 .*is not a cutoff"),
        ((10, [3], [4], 4), ValueError, "1 cutoffs make 2 clusters, which need as many ranks; got 1"),
        ((10, [3], [4, 0], 4), ValueError, r"ranks\[1\] = 0 is outside 1..4"),
        ((10, [3], [5, 2], 4), ValueError, r"ranks\[0\] = 5 is outside 1..4"),
        ((10, [3], [2, 4], 4), ValueError, r"must not increase, but ranks\[1\] = 4 follows 2"),
        ((100, list(range(1, 9)), [4] * 9, 4), ValueError, "at most 8 clusters"),
        ((10.0, [], [4], 4), TypeError, "num_items must be an integer, got 10.0"),
        ((10, ["3"], [4, 2], 4), TypeError, r"cutoffs\[0\] must be an integer, got '3'"),
        ((10, [3], [True, 1], 4), TypeError, r"ranks\[0\] must be an integer, got the bool True"),
        ((10, 3, [4, 2], 4), TypeError, "cutoffs must be a sequence of integers, got 3"),
        ((10, [3], "42", 4), TypeError, "ranks must be a sequence of integers, got '42'"),
    ],
)
def test_bad_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Partition(*arguments)


def test_fractions():
    assert Partition.from_fractions(1000, [0.05, 0.2], [64, 16, 4], 64).cutoffs == (50, 200)
    assert Partition.from_fractions(100, [0.29, 0.57], [4, 2, 1], 4).cutoffs == (29, 57)  # 0.29 * 100 < 29
    with pytest.raises(ValueError, match=r"fractions\[0\] = 1.0"):
        Partition.from_fractions(1000, [1.0], [64, 16], 64)
    with pytest.raises(ValueError, match="ascending"):
        Partition.from_fractions(10, [0.1, 0.11], [4, 2, 1], 4)


def test_from_dict_names_keys():
    with pytest.raises(ValueError, match=r"missing keys \['ranks'\], unknown keys \['rank'\]"):
        Partition.from_dict({"num_items": 3, "cutoffs": [], "rank": [4], "embedding_dim": 4})


def test_cluster_of_names_the_item():
    with pytest.raises(IndexError, match=r"item 10 is outside 0..9"):
        Partition.single(10, 4).cluster_of(10)
