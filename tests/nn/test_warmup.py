"""cprec_kernels.warmup: what it refuses, what it leaves alone, and that what it lists compiles and is then found."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import pkgutil
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec_kernels import Partition, _triton, _warmup, functional, use_backend, warmup
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks

SMALL = Partition(300, [40, 100], [32, 16, 5], 32)


def test_on_the_cpu_there_is_nothing_to_compile():
    model = nn.ModuleDict({"embedding": BlockEmbedding(SMALL), "head": ClusteredSoftmaxWithLoss(32, SMALL)})
    assert warmup(model) == 0
    assert warmup(model, dtype=torch.bfloat16) == 0
    assert warmup(model["head"], dtype=torch.float32) == 0
    assert warmup(TiedBlocks(SMALL)) == 0


def test_wrong_arguments_are_named():
    head = ClusteredSoftmaxWithLoss(32, SMALL)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got function"):
        warmup(functional.clustered_cross_entropy)
    with pytest.raises(ValueError, match="Linear holds no BlockEmbedding, ClusteredSoftmaxWithLoss or TiedBlocks"):
        warmup(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"dtype = torch.float64 is neither that of the parameters.*leave it out"):
        warmup(head, dtype=torch.float64)
    with pytest.raises(ValueError, match="device cpu is not a CUDA device"):
        warmup(head, devices=["cpu"])
    with pytest.raises(RuntimeError, match=r"there is no device cuda:99 here: torch .* sees \d+ CUDA devices"):
        warmup(head, devices=[99])


# Compilation for a device that is not there: Triton asks its driver for no more than the target.


@pytest.fixture
def target_sm_90(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels cannot be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr("cprec_kernels._triton.common._device_facts", lambda index: (90, 132))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        monkeypatch.setattr(driver, "_active", Driver())
        yield
    # What was compiled here must serve no other test.
    for info in pkgutil.iter_modules(_triton.__path__, "cprec_kernels._triton."):
        for kernel in vars(importlib.import_module(info.name)).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


def cached_kernels(launches):
    return sum(
        len(cache[0]) for kernel in {launch.kernel for launch in launches} for cache in kernel.device_caches.values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_compiles_and_a_step_finds_it(dtype, target_sm_90, through_triton):
    from cprec_kernels._triton import common
    from cprec_kernels._triton.warmup import compile_all

    device = torch.device("cuda", 0)
    model = nn.ModuleList([BlockEmbedding(SMALL, dtype=dtype), ClusteredSoftmaxWithLoss(32, SMALL, dtype=dtype)])
    with FakeTensorMode():
        here = [launch for block in model for launch in _warmup.rehearse(block, None, torch.device("cpu"))]
        # More multiprocessors, so that some weights are cut; one dtype will do for that.
        blocks = model if dtype == torch.float32 else []
        on_device = [launch for block in blocks for launch in _warmup.rehearse(block, None, device)]
    assert compile_all(here, device) > 15
    compile_all(on_device, device)
    assert compile_all([*on_device, *here], device) == 0
    # A step on real tensors, whose addresses and sizes are what a launch would be specialised on.
    with common.rehearse() as launches:
        hidden = model[0](torch.randint(300, (200,)))
        with torch.no_grad():
            model[1](hidden, torch.randint(300, (200,)))
        model[1](hidden, torch.randint(300, (200,))).loss.backward()
    before = cached_kernels(launches)
    for launch in launches:
        launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    assert cached_kernels(launches) == before > 15


def test_a_kernel_that_does_not_compile_is_named(target_sm_90):
    from cprec_kernels._triton.warmup import CompilationError, compile_all

    device = torch.device("cuda", 0)
    with FakeTensorMode():
        launches = _warmup.rehearse(BlockEmbedding(SMALL), None, device)
    (forward,) = (launch for launch in launches if "fwd" in launch.kernel.__name__)
    broken = forward._replace(options=forward.options | {"BLOCK_T": 17})
    with pytest.raises(
        CompilationError, match=r"block_embedding_fwd_kernel with .*BLOCK_T.*does not compile for cuda:0"
    ):
        compile_all([broken], device)
    assert compile_all([forward], device) == 1


def test_a_parser_confused_by_threads_costs_no_kernel(target_sm_90, monkeypatch):
    from cprec_kernels._triton.warmup import compile_all

    parse, main, confused = ast.parse, threading.main_thread(), []

    def parse_for_one_thread(*args, **options):
        if threading.current_thread() is not main:
            confused.append(args)
            raise SystemError("AST constructor recursion depth mismatch (before=33, after=138)")
        return parse(*args, **options)

    device = torch.device("cuda", 0)
    with FakeTensorMode():
        launches = _warmup.rehearse(BlockEmbedding(SMALL), None, device)
    monkeypatch.setattr(ast, "parse", parse_for_one_thread)
    assert compile_all(launches, device) == len(confused) == 7
    assert compile_all(launches, device) == 0


def test_with_another_backend_there_is_nothing_to_compile(target_sm_90, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model = nn.ModuleList([BlockEmbedding(SMALL), ClusteredSoftmaxWithLoss(32, SMALL)])
    with use_backend("reference"):
        assert warmup(model, devices=["cuda:0"]) == 0
    assert warmup(model[0], devices=["cuda:0", 0]) == 7
    assert warmup(model[0], devices=["cuda:0"]) == 0
