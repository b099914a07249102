"""nn.TopKIndex: what it finds, what it refuses, and when it may be searched."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading

import pytest
import torch
from torch import nn

from cprec_kernels import Partition, optim
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TopKIndex, TopKResult, topk_index
from cprec_kernels.nn.index_packing import STORAGES
from cprec_kernels.testing import make_hidden, make_softmax

PARTITION = Partition(3_017, [101, 700], [24, 9, 4], 24)


def softmax(partition=PARTITION, bias=True, dtype=torch.float32, **options):
    """A module with weights that have something to say."""
    module = ClusteredSoftmaxWithLoss(partition.embedding_dim, partition, bias, bias, dtype=dtype)
    weights = make_softmax(partition, dtype, bias=bias, **options)
    with torch.no_grad():
        for own, given in zip(module.weights, weights.weights, strict=True):
            own.copy_(given)
        for own, given in zip(module.projections, weights.projections, strict=True):
            own.copy_(given)
        if bias:
            module.head_bias.copy_(weights.head_bias)
            for own, given in zip(module.tail_biases, weights.tail_biases, strict=True):
                own.copy_(given)
    return module


# Building


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_index_finds_what_the_module_does(case, storage, dtype):
    module = softmax(case.partition, dtype=dtype)
    hidden = make_hidden(case.partition, (2, 5), dtype)
    widened = softmax(case.partition, dtype=dtype).float()
    scores, items = widened.topk(hidden.float(), 7)
    for blocks in ("auto", "kd", None):
        index = TopKIndex.build(module, storage, blocks=blocks)
        result = index.topk(hidden, 7)
        assert torch.equal(result.items, items)
        torch.testing.assert_close(result.scores, scores, rtol=0, atol=0.2 if storage == "int8" else 0.1)
        full = index.topk(hidden, 7, early_termination=False)
        assert torch.equal(full.items, items)
        if storage == "float32":
            assert torch.equal(full.scores, result.scores)
    assert torch.equal(module.build_index(storage).topk(hidden, 7).items, items)
    assert torch.equal(module.topk(hidden, 7, storage=storage)[1], items)


def test_results_unpack_and_are_tuples():
    index = softmax().build_index()
    result = index.topk(make_hidden(PARTITION, (4,)), 3)
    scores, items = result
    assert len(result) == 2
    assert scores is result.scores
    assert items is result.items
    assert result.counters.shape == (4, 3)
    again = pickle.loads(pickle.dumps(result))
    assert isinstance(again, TopKResult)
    assert torch.equal(again.counters, result.counters)
    assert torch.equal(copy.deepcopy(result).items, items)
    assert "counters=" in repr(result)


def test_exclusions_and_candidates_reach_the_search():
    module = softmax()
    hidden = make_hidden(PARTITION, (6,))
    _, best = module.topk(hidden, 5)
    some = torch.arange(0, 3_000, 7)
    for storage in STORAGES:
        expected = module.topk(hidden, 5, exclude=best, candidates=some)[1]
        assert torch.equal(module.topk(hidden, 5, exclude=best, candidates=some, storage=storage)[1], expected)
        csr = torch.arange(7) * 5, best.flatten()
        assert torch.equal(module.build_index(storage).topk(hidden, 5, csr, some).items, expected)


def test_what_an_index_says_of_itself():
    module = softmax()
    index = module.build_index("float16")
    assert (index.storage, index.exact, index.blocks, index.num_items) == ("float16", True, "auto", 3_017)
    assert index.partition == PARTITION
    padded = 128 * 24 + 608 * 9 + 2_336 * 4
    assert index.nbytes_exact == 4 * padded
    narrow, wide = module.build_index("float16", exact=False), module.build_index("float32")
    assert narrow.nbytes == index.nbytes
    assert narrow.nbytes_exact == wide.nbytes_exact == 0
    assert wide.nbytes == index.nbytes + 2 * padded
    assert not narrow.exact
    assert wide.exact
    assert TopKIndex.build(module, "float32", exact=False).exact  # nothing was rounded
    text = repr(index)
    for part in ("num_items=3017", "storage='float16'", "exact=True", "blocks='auto'", "MiB"):
        assert part in text
    assert "stale" not in text
    with torch.no_grad():
        module.weights[0].add_(1)
    assert "stale" in repr(index)
    for name in ("storage", "exact", "partition", "num_items", "nbytes", "is_stale"):
        with pytest.raises(AttributeError):
            setattr(index, name, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers_are_named(value):
    for name, row in [
        ("weights.0", 7), ("weights.0", 102), ("weights.2", 2_316), ("projections.1", 3), ("head_bias", 102),
        ("tail_biases.0", 598),
    ]:  # fmt: skip
        module = softmax()
        with torch.no_grad():
            module.get_parameter(name)[row] = value
        field, _, j = name.partition(".")
        shown = f"{field}[{j}]" if j else field
        with pytest.raises(ValueError, match="holds NaN or inf") as error:
            module.build_index()
        assert str(error.value).startswith(f"{shown} row {row} ")


def test_weights_outside_the_storage_are_refused():
    module = softmax()
    with torch.no_grad():
        module.weights[1][5, 2] = -7e4
        module.weights[1][9, 2] = 6.6e4
    with pytest.raises(ValueError, match=r"weights\[1\] holds -70000, outside .* float16; .* storage='bfloat16'"):
        module.build_index("float16")
    for storage in ("float32", "bfloat16", "int8"):
        module.build_index(storage)
    with torch.no_grad():
        module.weights[1][5, 2] = 3.4e38
    with pytest.raises(ValueError, match=r"weights\[1\] holds 3.4e\+38, outside .* storage='float32'"):
        module.build_index("bfloat16")


def test_bad_arguments_are_named():
    module = softmax()
    with pytest.raises(ValueError, match=r"storage must be one of 'float32', 'float16', .* got 'int4'"):
        TopKIndex.build(module, "int4")
    with pytest.raises(ValueError, match="blocks must be 'auto', 'kd' or None, got 'pq'"):
        module.build_index(blocks="pq")
    with pytest.raises(TypeError, match="of a ClusteredSoftmaxWithLoss, got Linear; pass the model's softmax"):
        TopKIndex.build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"is on meta: an index serves from the CPU; .* module.cpu\(\)"):
        ClusteredSoftmaxWithLoss(24, PARTITION, device="meta").build_index()
    with pytest.raises(TypeError, match=r"is torch.float64: .* module.float\(\)"):
        softmax(dtype=torch.float64).build_index()
    index = module.build_index()
    with pytest.raises(ValueError, match=r"k = 3018 is outside 0..3017"):
        index.topk(torch.randn(1, 24), 3_018)
    with pytest.raises(ValueError, match="input row 0 holds NaN"):
        index.topk(torch.full((1, 24), math.nan), 3)
    with pytest.raises(TypeError, match=r"convert it with input\.float"):
        index.topk(torch.randn(1, 24).double(), 3)


# Staleness


def changes():
    """Name -> what changes a module's parameters."""

    def by(make):
        def step(module):
            optimizer = make(list(module.parameters()))
            module(torch.randn(3, 24), torch.tensor([1, 300, 2_000])).loss.backward()
            optimizer.step()

        return step

    def in_place(module):
        with torch.no_grad():
            module.tail_biases[1][3] += 1

    def replaced(module):
        module.weights[1] = nn.Parameter(module.weights[1].detach().clone())

    def through_data(module):
        module.weights[0].data = module.weights[0].data * 2

    def fused_and_cleared(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        module(make_hidden(PARTITION, (4,)), torch.arange(4)).loss.backward()
        optimizer.step()

    def there_and_back(module):
        # The second copy may well get the address of the first.
        module.bfloat16()
        module.float()

    return {
        "in place": in_place,
        "replaced": replaced,
        "another .data": through_data,
        "another dtype and back": there_and_back,
        "load_state_dict": lambda module: module.load_state_dict(softmax(seed=5).state_dict()),
        "load_state_dict(assign)": lambda module: module.load_state_dict(softmax(seed=5).state_dict(), assign=True),
        "reset_parameters": lambda module: module.reset_parameters(),
        "torch.optim.SGD": by(lambda p: torch.optim.SGD(p, lr=0.1)),
        "torch.optim.AdamW": by(lambda p: torch.optim.AdamW(p, lr=0.1)),
        "torch.optim.AdamW, fused": by(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
        "torch.optim.AdamW, fused, gradients cleared by a hook": fused_and_cleared,
        "RowwiseAdamW": by(lambda p: optim.RowwiseAdamW(p, lr=0.1)),
        "RowwiseAdagrad": by(lambda p: optim.RowwiseAdagrad(p, lr=0.1)),
    }


@pytest.mark.parametrize("change", changes())
def test_an_index_of_changed_parameters_is_stale(change, cpu_backend):
    module = softmax()
    hidden = make_hidden(PARTITION, (4,))
    index = module.build_index()
    first = module.topk(hidden, 5, storage="float32")
    assert not index.is_stale
    changes()[change](module)
    assert index.is_stale
    with pytest.raises(RuntimeError, match=r"have changed since this index was built: build it again .*build_index"):
        index.topk(hidden, 5)
    # The module's own index is built anew, and finds what the parameters say now.
    scores, _ = module.topk(hidden, 5, storage="float32")
    torch.testing.assert_close(scores, module.topk(hidden, 5)[0], rtol=1e-4, atol=1e-4)
    if change not in ("replaced", "another dtype and back", "in place"):
        assert not torch.equal(first[0], scores)
    assert not module.build_index().is_stale


class Masked(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mask", torch.ones(shape))

    def forward(self, weight):
        return weight * self.mask


def test_an_index_of_a_changed_mask_is_stale(tmp_path):
    """Weights that a parametrization makes of a parameter and a buffer."""
    module = softmax()
    mask = Masked(module.weights[1].shape)
    nn.utils.parametrize.register_parametrization(module.weights, "1", mask)
    index = module.build_index()
    index.save(tmp_path / "masked.idx")
    TopKIndex.load(tmp_path / "masked.idx", module=module)
    assert not index.is_stale
    mask.mask[::2] = 0
    assert index.is_stale
    with pytest.raises(ValueError, match=r"masked\.idx"):
        TopKIndex.load(tmp_path / "masked.idx", module=module)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_an_index_does_not_depend_on_torchs_defaults(default, tmp_path):
    module, hidden = softmax(Partition(3_000, [100, 400], [16, 8, 4], 16)), torch.randn(3, 16)
    single = softmax(Partition.single(50, 16))
    expected = module.topk(hidden, 5)
    single.build_index().save(tmp_path / "single.idx")
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        TopKIndex.load(tmp_path / "single.idx")
        for storage in STORAGES:
            index = module.build_index(storage)
            index.save(tmp_path / "one.idx")
            found = TopKIndex.load(tmp_path / "one.idx").topk(hidden, 5)
            assert torch.equal(found.items, expected[1])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("kind", [optim.RowwiseAdamW, optim.RowwiseAdagrad])
def test_row_optimizers_count_every_write(kind, cpu_backend):
    """Steps of some rows and decay that catches up: each bumps the version that staleness is read from."""
    embedding = BlockEmbedding(PARTITION, sparse=True)
    optimizer = kind(embedding.parameters(), lr=0.1, weight_decay=0.1)
    table = embedding.embeddings[1]
    for write in (
        optimizer.step,
        lambda: optimizer.prepare(embedding, torch.tensor([300])),
        optimizer.apply_pending_decay,
    ):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 300, 2_000])).sum().backward()
        before = table._version
        write()
        assert table._version > before
        optimizer.step()


def written_while_read(monkeypatch, module, times):
    """Write to the module, as a thread that trains it would, in the first ``times`` of the moments after packing."""
    fingerprint, left = topk_index._fingerprint, [times]

    def written(of):
        if left[0]:
            left[0] -= 1
            with torch.no_grad():
                module.weights[1].mul_(-3)
        return fingerprint(of)

    monkeypatch.setattr(topk_index, "_fingerprint", written)


def test_a_write_while_an_index_is_built_is_noticed(monkeypatch):
    module, x = softmax(), torch.randn(5, 24)
    written_while_read(monkeypatch, module, 1)
    assert torch.equal(module.build_index().topk(x, 9).items, module.topk(x, 9)[1])  # the second try
    written_while_read(monkeypatch, module, 2)
    with pytest.raises(RuntimeError, match="the module was written to while its index was built"):
        module.topk(x, 9, storage="float32")
    assert torch.equal(module.topk(x, 9, storage="float32")[1], module.topk(x, 9)[1])


def test_a_write_while_an_index_is_compared_makes_it_stale(monkeypatch, tmp_path):
    module = softmax()
    module.build_index().save(tmp_path / "index")
    fingerprint = topk_index._fingerprint

    def then_written(of):
        found = fingerprint(of)
        with torch.no_grad():
            module.weights[1].mul_(-3)
        return found

    monkeypatch.setattr(topk_index, "_fingerprint", then_written)
    assert TopKIndex.load(tmp_path / "index", module=module).is_stale


def test_an_index_is_a_copy():
    """Also where the parameters have the index's number format, and nothing would have to be converted."""
    module = softmax(Partition(40, [10], [8, 8], 8))
    hidden = torch.randn(3, 8)
    index = module.build_index(blocks=None)
    before = index.topk(hidden, 40)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data.zero_()  # not counted by torch, so not seen
    assert torch.equal(index.topk(hidden, 40).scores, before.scores)


def test_an_index_outlives_its_module():
    module = softmax()
    hidden = make_hidden(PARTITION, (4,))
    expected = module.topk(hidden, 5)[1]
    index = module.build_index()
    del module
    gc.collect()
    assert not index.is_stale
    assert torch.equal(index.topk(hidden, 5).items, expected)


def test_modules_of_inference_mode_can_be_searched():
    with torch.inference_mode():
        module = softmax()
        hidden = make_hidden(PARTITION, (4,))
        assert torch.equal(module.topk(hidden, 5, storage="float32")[1], module.topk(hidden, 5)[1])
    with torch.inference_mode():
        assert torch.equal(module.topk(hidden, 5, storage="float32")[1], module.topk(hidden, 5)[1])


# The module's own indexes


def test_a_module_builds_an_index_once(monkeypatch):
    module = softmax()
    hidden = make_hidden(PARTITION, (4,))
    built = []
    build = ClusteredSoftmaxWithLoss.build_index
    monkeypatch.setattr(ClusteredSoftmaxWithLoss, "build_index", lambda self, s: built.append(s) or build(self, s))
    module.topk(hidden, 5)
    assert built == []
    for _ in range(2):
        module.topk(hidden, 5, storage="float16")
        module.topk(hidden, 5, storage="int8")
    assert built == ["float16", "int8"]
    with torch.no_grad():
        module.weights[0][3] += 1
    module.topk(hidden, 5, storage="int8")
    assert built == ["float16", "int8", "int8"]
    assert list(module._indexes) == ["int8"]  # the other one, of no use, has been let go


def test_an_index_is_no_part_of_the_module():
    module = softmax()
    hidden = make_hidden(PARTITION, (4,))
    names = list(module.state_dict())
    expected = module.topk(hidden, 5, storage="float16")[1]
    assert list(module.state_dict()) == names
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
        copy.deepcopy(nn.Sequential(module))[0],
    ]
    for other in copies:
        assert other._indexes == {}
        assert torch.equal(other.topk(hidden, 5, storage="float16")[1], expected)
        assert list(other.state_dict()) == names
    assert list(module._indexes) == ["float16"]
    # A module that was pickled before there were indexes.
    old = {name: value for name, value in module.__getstate__().items() if name != "_indexes"}
    module.__dict__.clear()
    module.__setstate__(old)
    assert torch.equal(module.topk(hidden, 5, storage="float16")[1], expected)


def test_an_index_itself_is_not_copied():
    index = softmax().build_index()
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match=r"save\(path\) it and load\(path\) it"):
            attempt(index)


def test_threads_build_one_index_and_share_it(monkeypatch):
    module = softmax()
    hidden = make_hidden(PARTITION, (8,))
    expected = module.topk(hidden, 5)[1]
    built = []
    build = ClusteredSoftmaxWithLoss.build_index
    monkeypatch.setattr(ClusteredSoftmaxWithLoss, "build_index", lambda self, s: built.append(s) or build(self, s))
    results = [None] * 6

    def search(place):
        results[place] = [module.topk(hidden, 5, storage="float16")[1] for _ in range(5)]

    threads = [threading.Thread(target=search, args=(place,)) for place in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == ["float16"]
    assert all(torch.equal(items, expected) for result in results for items in result)
