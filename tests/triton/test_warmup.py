"""A rehearsal lists what a training step and an evaluation launch, no more and no less."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec_kernels import Partition, _warmup, accumulate_in_place
from cprec_kernels._triton import common, configs, ids
from cprec_kernels._triton.configs import Tile
from cprec_kernels._triton.warmup import variant
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks
from cprec_kernels.testing import make_hidden, make_ids, make_targets

STEMS = ("block_embedding", "block_embedding_backward", "block_embedding_projection")
STEMS += ("clustered_softmax", "clustered_softmax_backward", "clustered_softmax_plan", "clustered_softmax_weight")
SMALL = Partition(100, [10, 50], [20, 4, 2], 20)
COUNT = 70
TINY = {
    "scan_lse": Tile(16, 16, 4, 1),
    "scan_rows": Tile(16, 32, 4, 1),
    "weight": Tile(16, 16, 4, 1),
    "weight_unbiased": Tile(16, 16, 4, 1),
    "token": Tile(16, 0, 4, 1),
}


@pytest.fixture(autouse=True)
def _tiny_tiles(through_triton):
    with configs.override(**TINY):
        yield


@pytest.fixture
def launched(monkeypatch):
    """All launches of the test, which run."""
    found = []

    def launch(kernel, grid, anchor, *args, **options):
        with common.rehearse() as listed:
            common.launch(kernel, grid, anchor, *args, **options)
        found.extend(listed)
        common.launch(kernel, grid, anchor, *args, **options)

    for stem in STEMS:
        monkeypatch.setattr(importlib.import_module(f"cprec_kernels._triton.{stem}"), "launch", launch)
    return found


def rehearsed(block, dtype=None):
    with FakeTensorMode():
        return {variant(launch) for launch in _warmup.rehearse(block, dtype, torch.device("cpu"))}


def check(block, launched, dtype=None, num_kernels=6):
    assert all(t.data_ptr() % 16 == 0 for x in launched for t in x.args if isinstance(t, torch.Tensor) and t.numel())
    ours = {variant(launch) for launch in launched}
    listed = rehearsed(block, dtype)
    checks = {
        found for found in listed if found[0] is ids.ids_kernel
    }  # tensors of the CPU are checked without a launch
    assert len(checks) == 1
    assert listed - checks == ours
    assert len({kernel for kernel, *_ in ours}) == num_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_block_embedding(sparse, dtype, launched):
    block = BlockEmbedding(SMALL, padding_idx=3, sparse=sparse, dtype=dtype)
    block(make_ids(SMALL, (COUNT,))).sum().backward()
    check(block, launched)


def test_block_embedding_in_place(launched):
    block = BlockEmbedding(SMALL)
    accumulate_in_place(block.parameters())
    for _ in range(2):
        block(make_ids(SMALL, (COUNT,))).sum().backward()
    check(block, launched)


def test_a_frozen_embedding_has_no_backward_pass(launched):
    block = BlockEmbedding(SMALL).requires_grad_(False)
    block(make_ids(SMALL, (COUNT,)))
    check(block, launched, num_kernels=1)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_clustered_softmax(bias, dtype, narrow, launched):
    block = ClusteredSoftmaxWithLoss(20, SMALL, bias, bias, label_smoothing=0.1 * bias, dtype=dtype)
    hidden, target = make_hidden(SMALL, (COUNT,), dtype), make_targets(SMALL, (COUNT,))
    with torch.autocast("cpu", narrow, enabled=narrow is not None):
        with torch.no_grad():
            block(hidden, target)
        loss = block(hidden.requires_grad_(), target).loss
    loss.backward()
    check(block, launched, narrow, num_kernels=12 + bias)


@pytest.mark.parametrize("tied", [True, False], ids=["one-vector", "tails-alone"])
def test_tied_blocks(tied, launched):
    """The softmax of tables that an embedding shares, itself a block that is looked for."""
    block = TiedBlocks(SMALL, padding=True, tie_head=tied, tie_projections=tied)
    hidden, target = make_hidden(SMALL, (COUNT,)), make_targets(SMALL, (COUNT,))
    with torch.no_grad():
        block(hidden, target)
    block(hidden.requires_grad_(), target).loss.backward()
    check(block, launched, num_kernels=12)
    assert block.embedding in _warmup._blocks(block)


def test_the_size_of_the_catalogue_changes_nothing():
    small, large = (ClusteredSoftmaxWithLoss(20, Partition(size, [10, 50], [20, 4, 2], 20)) for size in (100, 5_003))
    assert rehearsed(small) == rehearsed(large)


def test_what_triton_does_not_serve_is_left_alone():
    for kind in (BlockEmbedding, functools.partial(ClusteredSoftmaxWithLoss, 20)):
        assert [kernel for kernel, *_ in rehearsed(kind(SMALL, dtype=torch.float64))] == [ids.ids_kernel]
