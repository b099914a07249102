"""Modules within what torch makes of them: compiled, averaged, sharded, parametrized, without values."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from cprec_kernels import Partition, accumulate_in_place, compress
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TopKIndex

PARTITION = Partition(300, [20, 80], [16, 8, 4], 16)
HIDDEN = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 19, 20, 80, 299])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def head():
    torch.manual_seed(0)
    return ClusteredSoftmaxWithLoss(16, PARTITION)


def test_a_compressed_model_compiles_in_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 16), nn.Linear(16, 300))
    compress(model, torch.arange(300, 0, -1), compression=3)

    def run(ids):
        hidden = model[0](ids)
        return model[1].loss(hidden, ids), model[1].topk(hidden, 3)[1], model[1].rank(hidden, ids)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(TARGET), run(TARGET), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.int32; convert with ids.long\(\)"):
        model[0](TARGET.int())


def test_an_index_is_built_within_a_compiled_function():
    module = head()
    search = torch.compile(lambda rows: module.topk(rows, 4, storage="float32")[1], backend="aot_eager")
    assert torch.equal(search(HIDDEN), module.topk(HIDDEN, 4)[1])
    with torch.no_grad():
        for weight in module.weights:
            weight.neg_()
    assert torch.equal(search(HIDDEN), module.topk(HIDDEN, 4)[1])


def test_steps_of_a_compiled_fused_optimizer_make_an_index_stale():
    module = head()
    index = module.build_index()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5, fused=True)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):  # the first one makes the state, uncompiled in part
        module(HIDDEN, TARGET).loss.backward()
        step()
        assert index.is_stale
        index = module.build_index()


def test_an_index_leaves_storages_resizable(tmp_path):
    module = head()
    module.build_index().save(tmp_path / "items.index")
    TopKIndex.load(tmp_path / "items.index", module=module)
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)  # as FSDP does between uses


def test_parametrized_modules_are_not_saved_nor_extended():
    module = head()
    weight_norm(module.weights, "0")
    for call in (lambda: module.extend(3), lambda: module.remove([1]), lambda: module.save_pretrained("never")):
        with pytest.raises(RuntimeError, match=r"a parameter of weights is parametrized: .*remove_parametrizations"):
            call()
    assert module.partition.num_items == 300


def test_terms_of_a_loss_without_values():
    with FakeTensorMode():
        module = ClusteredSoftmaxWithLoss(16, PARTITION, z_loss=0.1)
        assert module(torch.randn(5, 16), torch.zeros(5, dtype=torch.int64)).loss.shape == ()


def test_gradients_added_in_place_by_several_threads():
    torch.manual_seed(0)
    embedding = BlockEmbedding(Partition(20_000, [500], [64, 64], 64))
    ids, factor = torch.randint(20_000, (100, 20)), torch.randn(100, 20, 64)
    accumulate_in_place(embedding.parameters())

    def work(times):
        for _ in range(times):
            (embedding(ids) * factor).sum().backward()

    def gradients(threads, times):
        for parameter in embedding.parameters():
            parameter.grad = torch.zeros_like(parameter)
        running = [threading.Thread(target=work, args=(times,)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return [parameter.grad for parameter in embedding.parameters()]

    for alone, together in zip(gradients(1, 64), gradients(4, 16), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_compiled_autograd_adds_gradients_itself():
    def gradients(backward):
        module = head()
        accumulate_in_place(module.parameters())
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        backward(module(HIDDEN, TARGET).loss)
        return [parameter.grad for parameter in module.parameters()]

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = gradients(lambda loss: torch.compile(lambda: loss.backward(), backend="aot_eager")())
    for one, other in zip(compiled, gradients(lambda loss: loss.backward()), strict=True):
        torch.testing.assert_close(one, other)
