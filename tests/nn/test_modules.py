"""nn.BlockEmbedding and nn.ClusteredSoftmaxWithLoss: torch-like modules around the ops."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss
from cprec_kernels.testing import make_ids, make_targets

PARTITION = Partition(5000, [100, 1000], [64, 16, 4], 64)


def test_every_cluster_starts_with_the_same_variance():
    partition = Partition(40_000, [8000, 16_000, 24_000], [64, 32, 8, 2], 64)
    embedding = BlockEmbedding(partition)
    for lo, hi in zip(partition.offsets, partition.offsets[1:], strict=False):
        std = embedding(torch.arange(lo, hi)).std() * 64**0.5
        # P_j is drawn once: with rank r its 64 r entries leave a relative deviation near (2 / 64 r)^0.5 / 2.
        assert 0.8 < std < 1.2


def test_initial_logits_are_small_and_alike():
    head = ClusteredSoftmaxWithLoss(64, PARTITION, head_bias=True, tail_bias=True)
    hidden = torch.randn(200, 64)
    for level_weight, projection in zip(head.weights, [None, *head.projections], strict=True):
        z = hidden if projection is None else hidden @ projection.T
        assert 0.05 < (z @ level_weight.T).std() < 0.2
    _, loss = head(hidden, torch.full((200,), 4999))
    expected = torch.log(torch.tensor(102.0)) + torch.log(torch.tensor(4000.0))
    assert abs(loss - expected) < 0.1


def test_initial_weights_have_the_size_that_the_docs_say():
    head = ClusteredSoftmaxWithLoss(64, Partition(6000, [500, 2000], [64, 16, 4], 64))
    for weight in head.weights:
        assert float(weight.detach().std()) == pytest.approx(0.1 * weight.shape[1] ** -0.5, rel=0.1)
    for projection in head.projections:
        assert float(projection.detach().std()) == pytest.approx(64**-0.5, rel=0.15)


def test_padding_embeds_to_zero_and_stays_there():
    embedding = BlockEmbedding(PARTITION.with_padding(), padding_idx=-1)
    assert embedding.padding_idx == 5000
    ids = torch.tensor([[5000, 3, 4999]])
    out = embedding(ids)
    assert torch.count_nonzero(out[0, 0]) == 0
    out.sum().backward()
    assert torch.count_nonzero(embedding.embeddings[2].grad[-1]) == 0
    assert torch.count_nonzero(embedding.embeddings[2].grad[-2]) > 0


def test_padding_may_be_the_first_id_counted_from_the_end():
    embedding = BlockEmbedding(PARTITION, padding_idx=-5000)
    assert embedding.padding_idx == 0
    assert torch.count_nonzero(embedding(torch.tensor([0]))) == 0


def test_sparse_gradients_feed_sparse_adam():
    embedding = BlockEmbedding(PARTITION, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.embeddings), lr=0.1)
    before = [table.detach().clone() for table in embedding.embeddings]
    embedding(torch.tensor([1, 500, 4000, 4000])).sum().backward()
    optimizer.step()
    for table, old, touched in zip(embedding.embeddings, before, (1, 400, 3000), strict=True):
        changed = (table != old).any(1).nonzero().flatten()
        assert changed.tolist() == [touched]


def test_forward_gives_output_and_loss(case):
    head = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, case.partition, head_bias=True)
    hidden = torch.randn(7, 9, case.partition.embedding_dim)
    target = make_targets(case.partition)
    result = head(hidden, target)
    counted = target != -100
    torch.testing.assert_close(result.loss, -result.output[counted].mean())
    assert torch.count_nonzero(result.output[~counted]) == 0
    output, loss = result
    assert output.shape == target.shape
    assert loss.shape == ()


def test_search_methods_agree(case):
    head = ClusteredSoftmaxWithLoss(case.partition.embedding_dim, case.partition)
    nn.init.normal_(head.weights[0])
    hidden = torch.randn(5, case.partition.embedding_dim)
    scores, items = head.topk(hidden, 4)
    assert torch.equal(head.predict(hidden), items[:, 0])
    torch.testing.assert_close(head.score(hidden, items), scores)
    torch.testing.assert_close(head.log_prob(hidden).gather(1, items), scores)
    assert (head.rank(hidden, items[:, 3]) == 3).all()


def test_state_dict_has_plain_keys_and_round_trips():
    head = ClusteredSoftmaxWithLoss(64, PARTITION, head_bias=True, tail_bias=True)
    assert list(head.state_dict()) == [
        "head_bias", "weights.0", "weights.1", "weights.2", "projections.0", "projections.1",
        "tail_biases.0", "tail_biases.1",
    ]  # fmt: skip
    embedding = BlockEmbedding(PARTITION)
    assert list(embedding.state_dict()) == [
        "embeddings.0", "embeddings.1", "embeddings.2", "projections.0", "projections.1",
    ]  # fmt: skip
    other = BlockEmbedding(PARTITION)
    other.load_state_dict(embedding.state_dict())
    ids = make_ids(PARTITION)
    assert torch.equal(other(ids), embedding(ids))
    assert sum(p.numel() for p in embedding.parameters()) == PARTITION.embedding_parameters
    assert sum(p.numel() for p in head.parameters()) == PARTITION.softmax_parameters(True, True)


def test_modules_move_and_convert():
    head = ClusteredSoftmaxWithLoss(64, PARTITION, dtype=torch.float64)
    assert head.weights[0].dtype == torch.float64
    assert head.to(torch.bfloat16).weights[2].dtype == torch.bfloat16
    assert BlockEmbedding(PARTITION, device="meta").embeddings[0].is_meta


def test_meta_tensors_give_shapes():
    embedding = BlockEmbedding(PARTITION, device="meta")
    head = ClusteredSoftmaxWithLoss(64, PARTITION, device="meta")
    ids = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    hidden = embedding(ids)
    assert hidden.shape == (3, 4, 64)
    assert head(hidden, ids).output.shape == (3, 4)
    assert head.topk(hidden[:, -1], 7)[1].shape == (3, 7)


def test_repr_says_what_matters():
    text = repr(BlockEmbedding(PARTITION, padding_idx=3, sparse=True))
    assert "cutoffs=[100, 1000]" in text
    assert "padding_idx=3" in text
    assert "sparse=True" in text
    text = repr(ClusteredSoftmaxWithLoss(64, PARTITION, label_smoothing=0.1, reduction="sum", ignore_index=-1))
    assert "ranks=[64, 16, 4]" in text
    assert "label_smoothing=0.1" in text


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"must be a cprec_kernels.Partition, got int"):
        BlockEmbedding(5000)
    with pytest.raises(ValueError, match="padding_idx = 5000 is outside"):
        BlockEmbedding(PARTITION, padding_idx=5000)
    with pytest.raises(ValueError, match="in_features = 32, but the partition's embedding_dim is 64"):
        ClusteredSoftmaxWithLoss(32, PARTITION)
    with pytest.raises(ValueError, match="reduction must be"):
        ClusteredSoftmaxWithLoss(64, PARTITION, reduction="median")
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
            ClusteredSoftmaxWithLoss(64, PARTITION, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="ignore_index = 0 is an item"):
        ClusteredSoftmaxWithLoss(64, PARTITION, ignore_index=0)
    with pytest.raises(ValueError, match=r"storage must be one of 'float32', .* got 'int4'"):
        ClusteredSoftmaxWithLoss(64, PARTITION).topk(torch.randn(1, 64), 1, storage="int4")


def test_a_step_compiles_and_exports_whole():
    embedding, head = BlockEmbedding(PARTITION), ClusteredSoftmaxWithLoss(64, PARTITION)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = embedding, head

        def forward(self, ids, target):
            hidden = self.embedding(ids)
            output, loss = self.head(hidden, target)
            return output, loss, self.head.predict(hidden), *self.head.topk(hidden[:, -1], 3)

    model = Model()
    ids, target = make_ids(PARTITION), make_targets(PARTITION)
    expected = model(ids, target)
    for a, b in zip(torch.compile(model, fullgraph=True)(ids, target), expected, strict=True):
        torch.testing.assert_close(a, b)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (ids, target), dynamic_shapes=({0: batch}, {0: batch}))
    for a, b in zip(program.module()(ids[:3], target[:3]), model(ids[:3], target[:3]), strict=True):
        torch.testing.assert_close(a, b)


def test_smoothing_is_no_input_of_a_compiled_step():
    """Inductor makes a float that differs between modules a tensor on the CPU, which a step on a device must not hold."""
    narrow = []

    def compiler(graph, _inputs):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        # results of ours are vectors of float64; a wrapped float is a scalar of it
        narrow.extend(v for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.float64 and not v.dim())
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=compiler, bw_compiler=compiler)

    hidden, target = torch.randn(50, 64), make_targets(PARTITION, (50,))
    for smoothing in (0.0, 0.3, 0.1):
        head = ClusteredSoftmaxWithLoss(64, PARTITION, label_smoothing=smoothing)
        expected = head(hidden, target).loss
        loss = torch.compile(head, backend=backend, fullgraph=True)(hidden, target).loss
        loss.backward()
        assert torch.equal(loss, expected)
    assert not narrow


def test_training_lowers_the_loss():
    embedding, head = BlockEmbedding(PARTITION), ClusteredSoftmaxWithLoss(64, PARTITION, head_bias=True)
    optimizer = torch.optim.Adam([*embedding.parameters(), *head.parameters()], lr=0.05)
    ids, target = make_ids(PARTITION, (200,)), make_ids(PARTITION, (200,), seed=3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = head(embedding(ids) * 8, target).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_copy_of_a_compiled_head_runs_its_own_weights():
    head = ClusteredSoftmaxWithLoss(8, Partition(60, [20], [8, 4], 8))
    head.compile(backend="eager")
    twin = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x, target = torch.randn(5, 8), torch.arange(5)
    torch.testing.assert_close(twin(x, target).loss, twin.forward(x, target).loss)
    assert not torch.equal(twin(x, target).loss, head(x, target).loss)
    torch.save(head, io.BytesIO())


def test_what_is_no_tensor_is_named_with_the_way_to_make_one():
    embedding, head = BlockEmbedding(PARTITION), ClusteredSoftmaxWithLoss(64, PARTITION)
    index = head.build_index("float32")
    x, rows = torch.randn(2, 64), [[0.0] * 64] * 2
    items = torch.tensor([1, 2])
    one = torch.tensor([0, 1, 2])
    calls = [
        ("ids", "list", lambda: embedding([1, 2])),
        ("ids", "ndarray", lambda: embedding(items.numpy())),
        ("ids", "int", lambda: embedding(5)),
        ("input", "list", lambda: head(rows, items)),
        ("input", "list", lambda: head.log_prob(rows)),
        ("input", "ndarray", lambda: head.topk(x.numpy(), 3)),
        ("input", "list", lambda: index.topk(rows, 3)),
        ("input", "list", lambda: head.rank(rows, items)),
        ("input", "list", lambda: head.score(rows, items[:, None])),
        ("target", "list", lambda: head(x, [1, 2])),
        ("target", "list", lambda: head.rank(x, [1, 2])),
        ("items", "list", lambda: head.score(x, [[1], [2]])),
        ("candidates", "range", lambda: head.topk(x, 3, candidates=range(9))),
        ("candidates", "list", lambda: index.topk(x, 3, candidates=[1, 2])),
        ("offsets of exclude", "list", lambda: head.topk(x, 3, exclude=([0, 1, 2], items))),
        ("items of exclude", "list", lambda: index.topk(x, 3, exclude=(one, [1, 2]))),
    ]
    for name, kind, call in calls:
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got {kind}; torch.as_tensor makes one"):
            call()


def test_an_embedding_can_be_traced_by_fx():
    model = nn.Sequential(BlockEmbedding(PARTITION), nn.Linear(64, 3))
    ids = torch.randint(5000, (2, 5))
    assert torch.equal(torch.fx.symbolic_trace(model)(ids), model(ids))
