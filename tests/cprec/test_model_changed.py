"""Models whose parts someone replaced, hooked, traced or compiled: searches and losses still are those of ``forward``."""

import copy
import warnings

import pytest
import torch
from torch import nn

from cprec.model import NextItNet, NextItNetConfig
from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

K, D = 60, 8


def make(**options):
    torch.manual_seed(0)
    model = NextItNet(NextItNetConfig.from_plan(K, D, [7, 20], [8, 4, 2], dilations=[1, 2], repeats=2, **options))
    with torch.no_grad():
        for parameter in (*model.backbone.parameters(), *model.softmax.parameters()):
            parameter.normal_(std=0.5)
    return model.eval()


def histories():
    ids = torch.randint(K, (5, 9), generator=torch.Generator().manual_seed(1))
    ids[0, :8] = ids[1, :5] = ids[2, :7] = ids[3, :6] = ids[4, :4] = K
    return ids


class Doubled(BlockEmbedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Wrapped(nn.Module):
    """Blocks of someone's own: they know a mask, and nothing of packing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask=None):
        return 0.5 * self.inner(x, mask)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.backbone.sets[1])
    with torch.no_grad():
        model.backbone.sets[1].parametrizations.weight.original0.mul_(1.5)


def adapter(model):
    model.backbone.sets[0].register_forward_hook(lambda module, args, out: out + args[0])


def other_eps(model):
    model.backbone.norms[2].eps = 1.0


def without_norm(model):
    model.backbone.norms[1] = nn.Identity()


def rms_norm(model):
    model.backbone.norms[3] = nn.RMSNorm(D)


class Adapted(nn.Module):
    """A convolution of someone's own around one of ours."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, dilation=1):
        return self.inner(x, dilation) + x


def own_conv(model):
    model.backbone.sets[0] = Adapted(model.backbone.sets[0])


def own_embedding(model):
    embedding = Doubled(Partition(K, [7, 20], [8, 4, 2], D).with_padding(), padding_idx=K)
    embedding.load_state_dict(model.embedding.state_dict())
    model.embedding = embedding


def own_blocks(model):
    model.backbone = Wrapped(model.backbone)


CHANGES = (weight_norm, adapter, other_eps, without_norm, rms_norm, own_conv, own_embedding, own_blocks)


@pytest.mark.parametrize("change", CHANGES)
def test_a_search_is_one_of_forwards_states_whatever_was_changed(change):
    model, ids = make(), histories()
    before = model.topk(ids, 5)[0]
    change(model)
    hidden = model(ids)[:, -1]
    scores, items = model.topk(ids, 5)
    assert torch.equal(items, model.softmax.topk(hidden, 5)[1])
    torch.testing.assert_close(scores, model.softmax.topk(hidden, 5)[0])
    assert not torch.allclose(scores, before)  # the change counts
    model.loss(ids).backward()


def test_hooks_run_in_searches():
    model, calls = make(), []
    model.backbone.norms[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    model.topk(histories(), 3)
    assert calls == [1]


def test_a_trace_holds_for_other_batches():
    model, ids = make(), histories()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a deprecation, and of Python values in the trace
        traced = torch.jit.trace(model, (ids,), check_trace=False)
    full = torch.randint(K, (5, 9))
    torch.testing.assert_close(traced(full), model(full))


def test_shapes_alone_need_no_values():
    model = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(histories())).shape == (5, 9, D)


def test_compiled_blocks_are_compiled_once():
    torch._dynamo.reset()
    model = make()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = [model.loss(ids) for ids in (histories(), histories().flip(0), torch.full((5, 9), 3))]
    model.backbone = torch.compile(model.backbone, backend=count)
    for ids, loss in zip((histories(), histories().flip(0), torch.full((5, 9), 3)), expected, strict=True):
        torch.testing.assert_close(model.loss(ids), loss)
    assert len(graphs) == 1


def test_parameters_are_contiguous():
    """torch's fused optimizers, LBFGS, pruning and parameters_to_vector all count on it."""
    for model in (make(), make(tie_tails=True), make(block="bottleneck")):
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        vector = nn.utils.parameters_to_vector(model.parameters())
        assert vector.numel() == model.config.num_parameters


def test_a_model_elsewhere_than_its_input_is_told_so():
    model = copy.deepcopy(make()).to("meta")
    with pytest.raises(ValueError, match="ids are on cpu, embeddings on meta"):
        model.topk(histories(), 3)


def test_another_softmax_leaves_no_embedding_untrained():
    """A tied model's embedding is a part of its softmax; replaced, the old embedding is a part of the model itself."""
    model = make(tie_tails=True).train()
    kept = model.embedding
    model.softmax = ClusteredSoftmaxWithLoss(D, model.config.output_partition)
    assert model.embedding is kept
    trained = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in trained for parameter in kept.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} == {"embedding", "backbone", "softmax"}
    model.loss(histories()).backward()
    assert all(parameter.grad is not None for parameter in kept.parameters())


def test_another_tied_softmax_brings_its_embedding():
    model, other = make(tie_tails=True), make(tie_tails=True)
    names = set(model.state_dict())
    model.softmax = other.softmax
    assert model.embedding is other.softmax.embedding
    assert set(model.state_dict()) == names
    model.softmax = copy.deepcopy(model).softmax  # and a copy its own
    assert model.embedding is model.softmax.embedding is not other.softmax.embedding
