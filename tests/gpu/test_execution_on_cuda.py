"""How the ops run on a device: graphs, compilation, streams, several devices, repeated bits. ``pytest -m gpu``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cprec_kernels import Partition, warmup
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

pytestmark = pytest.mark.gpu
PARTITION = Partition(5_000, [100, 900], [64, 16, 8], 64)
TOKENS = 300


class Model(torch.nn.Module):
    """An embedding under a loss: a training step of every kernel."""

    def __init__(self, dtype=torch.float32, device="cuda", smoothing=0.1):
        super().__init__()
        self.embedding = BlockEmbedding(PARTITION, device=device, dtype=dtype)
        self.head = ClusteredSoftmaxWithLoss(
            64, PARTITION, True, True, label_smoothing=smoothing, device=device, dtype=dtype
        )

    def forward(self, ids, target):
        return self.head(self.embedding(ids), target).loss


def batch(seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    ids, target = (torch.randint(5_000, (TOKENS,), generator=generator) for _ in range(2))
    target[::7] = -100
    return ids.to(device), target.to(device)


def step(model, ids, target):
    """Loss and gradients, in tensors of their own."""
    model.zero_grad()
    loss = model(ids, target)
    loss.backward()
    return [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def errors_on_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_repeat(dtype):
    model = Model(dtype)
    expected = step(model, *batch())
    for _ in range(10):
        assert_equal(step(model, *batch()), expected)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16], ids=str)
def test_neither_a_step_nor_an_evaluation_waits(narrow, errors_on_synchronisation):
    model = Model()
    ids, target = batch(device="cpu")
    ids, target = (t.pin_memory().cuda(non_blocking=True) for t in (ids, target))
    with torch.autocast("cuda", narrow or torch.bfloat16, enabled=narrow is not None):
        with torch.no_grad():
            model(ids, target)
        model(ids, target).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_replays_on_other_batches(dtype):
    model = Model(dtype)
    batches = [batch(seed) for seed in range(20)]
    ids, target = (t.clone() for t in batches[0])
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            model.zero_grad()
            model(ids, target).backward()
    torch.cuda.current_stream().wait_stream(warm)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(ids, target)
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    replayed = []
    for given in batches:
        ids.copy_(given[0])
        target.copy_(given[1])
        for gradient in gradients:
            gradient.zero_()
        graph.replay()
        replayed.append([loss.clone(), *(gradient.clone() for gradient in gradients)])
    for given, ours in zip(batches, replayed, strict=True):
        assert_equal(ours, step(model, *given))


@pytest.mark.xdist_group("compiled")  # processes that compile the same graphs share files, and one was seen to crash
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_compiled_step(mode, smoothing):
    model = Model(smoothing=smoothing)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for seed in range(5):
        ids, target = batch(seed)
        expected = step(model, ids, target)
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(ids, target)
        loss.backward()
        ours = [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, target), expected[0], rtol=1e-5, atol=1e-6)


BAD_IDS = """
import torch
from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding
ids = torch.full((5000,), 7, device="cuda")
ids[4321] = 100
BlockEmbedding(Partition(100, [10], [8, 4], 8), device="cuda")(ids)
torch.cuda.synchronize()
"""
BAD_OFFSETS = """
import torch
from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
head = ClusteredSoftmaxWithLoss(8, Partition(100, [10], [8, 4], 8), device="cuda")
offsets = torch.tensor([0, 5, 10**9], device="cuda")
head.topk(torch.randn(2, 8, device="cuda"), 3, exclude=(offsets, torch.arange(6, device="cuda")))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [(BAD_IDS, "ids holds an id outside 0..num_items - 1"), (BAD_OFFSETS, "exclude offsets must ascend from 0")],
)
def test_bad_values_stop_the_stream(code, message):
    """In a process of its own: a device that stopped serves nobody any more."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_another_stream():
    """Work is queued on the current stream: behind what fills its inputs there, before what reads its results."""
    model = Model()
    ids, target = batch()
    expected = step(model, ids, target)
    late_ids, late_target = torch.zeros_like(ids), torch.zeros_like(target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late_ids.copy_(ids)
        late_target.copy_(target)
        ours = step(model, late_ids, late_target)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    model = Model()
    expected = step(model, *batch())
    there = Model(device="cuda:1")
    there.load_state_dict(model.state_dict())
    assert torch.cuda.current_device() == 0
    ours = step(there, *batch(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in ours)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_equal([tensor.to("cuda:0") for tensor in ours], expected)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=str)
def test_after_a_warm_up_a_step_compiles_nothing(narrow):
    from cprec_kernels._triton import common

    model = Model()
    warmup(model, dtype=narrow)
    assert warmup(model, dtype=narrow) == 0
    with common.rehearse() as launches, torch.autocast("cuda", narrow or torch.bfloat16, enabled=narrow is not None):
        model(*batch())

    def cached():
        return sum(
            len(cache[0])
            for kernel in {launch.kernel for launch in launches}
            for cache in kernel.device_caches.values()
        )

    before = cached()
    with torch.autocast("cuda", narrow or torch.bfloat16, enabled=narrow is not None):
        with torch.no_grad():
            model(*batch())
        loss = model(*batch())
    loss.backward()
    assert launches
    assert cached() == before


def test_tuning_times_on_the_device(tmp_path, monkeypatch):
    from cprec_kernels._triton import tuning

    monkeypatch.setattr(tuning, "enabled", lambda: False)
    model = Model()
    expected = step(model, *batch())
    for name, empty in (("_winners", {}), ("_read", set()), ("_broken", set())):
        monkeypatch.setattr(tuning, name, empty)
    monkeypatch.setattr(tuning, "enabled", lambda: True)
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / tuning.FILE)
    ours = step(model, *batch())
    assert {key.kernel for key in tuning._winners} == {"scan_rows", "weight"}
    assert {key.device for key in tuning._winners} == {torch.cuda.get_device_name()}
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_equal(step(model, *batch()), ours)
