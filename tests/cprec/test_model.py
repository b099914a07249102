import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from cprec.model import NextItNet, NextItNetConfig, ResidualStack
from cprec.model.nextitnet import CausalConv, TapsSideBySide

K, D = 60, 8
BLOCKS = ["residual", "bottleneck"]


def make(block="residual", seed=0, **options):
    """A float64 model whose every parameter is random, so that biases and norms would show a leak."""
    torch.manual_seed(seed)
    options = {"dilations": [1, 2], "repeats": 2, **options}
    model = NextItNet(NextItNetConfig.from_plan(K, D, [7, 20], [8, 4, 2], block=block, **options)).double()
    with torch.no_grad():
        for parameter in itertools.chain(model.backbone.parameters(), model.softmax.parameters()):
            parameter.normal_(std=0.5)
    return model.eval()


def ids(*shape, seed=1):
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dilation", [1, 2, 5, 40])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize("form", [CausalConv.forward, CausalConv._in_one_product], ids=["cpu", "cuda"])
def test_causal_conv_is_a_left_padded_conv1d(dilation, kernel_size, form):
    torch.manual_seed(0)
    conv = CausalConv(4, 6, kernel_size).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(3, 9, 4, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x.transpose(1, 2), ((kernel_size - 1) * dilation, 0))
    expected = F.conv1d(padded, conv.weight, conv.bias, dilation=dilation).transpose(1, 2)
    torch.testing.assert_close(form(conv, x, dilation), expected)
    grad = torch.randn_like(expected)
    leaves = (x, conv.weight, conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(form(conv, x, dilation), leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_taps_side_by_side_is_a_gradient(tmp_path):
    """Differentiable twice, under torch.func and, where it is traced, saved: as autograd's own."""
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    for lags in ([4, 2, 0], [6, 0], [0]):
        assert torch.autograd.gradcheck(TapsSideBySide.apply, (x, lags))
        assert torch.autograd.gradgradcheck(TapsSideBySide.apply, (x, lags))
    conv = CausalConv(3, 3, 3).double()
    conv.forward = lambda given: conv._in_one_product(given, 2)
    torch.testing.assert_close(
        torch.func.grad(lambda given: conv(given).pow(2).sum())(x.detach()),
        torch.autograd.grad(conv(x).pow(2).sum(), x)[0],
    )
    del conv.forward

    class OnCuda(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, given):
            return self.conv._in_one_product(given, 2)

    torch.jit.trace(OnCuda(), (x,)).save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), OnCuda()(x))


def test_residual_block_as_published():
    torch.manual_seed(0)
    stack = ResidualStack(NextItNetConfig.from_plan(K, D, dilations=[3])).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 11, D, dtype=torch.float64)
    y = x
    for layer, dilation in enumerate((3, 6)):
        conv, norm = stack.sets[layer], stack.norms[layer]
        padded = F.pad(y.transpose(1, 2), (2 * dilation, 0))
        y = F.conv1d(padded, conv.weight, conv.bias, dilation=dilation).transpose(1, 2)
        y = F.relu(F.layer_norm(y, (D,), norm.weight, norm.bias, 1e-8))
    torch.testing.assert_close(stack(x), x + y)


def test_bottleneck_block_as_published():
    torch.manual_seed(0)
    stack = ResidualStack(NextItNetConfig.from_plan(K, D, dilations=[3], block="bottleneck")).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 11, D, dtype=torch.float64)
    (convs,) = stack.sets
    y = x
    for conv, norm, dilation in zip((convs.down, convs.dilated, convs.up), stack.norms, (1, 3, 1), strict=True):
        y = F.relu(F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, 1e-8)).transpose(1, 2)
        y = F.pad(y, ((conv.weight.shape[2] - 1) * dilation, 0))
        y = F.conv1d(y, conv.weight, conv.bias, dilation=dilation).transpose(1, 2)
    assert convs.down.weight.shape == (D // 2, D, 1)
    torch.testing.assert_close(stack(x), x + y)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("padding", [1, 6, 19])
def test_left_padding_changes_nothing(block, padding):
    model = make(block)
    history = ids(3, 5)
    padded = torch.cat([torch.full((3, padding), K), history], dim=1)
    hidden = model(padded)
    torch.testing.assert_close(hidden[:, padding:], model(history), rtol=1e-12, atol=1e-12)
    assert torch.equal(hidden[:, :padding], torch.zeros(3, padding, D, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_future_does_not_change_the_past(block):
    model = make(block)
    items = ids(2, 12)
    changed = items.clone()
    changed[:, 7:] = ids(2, 5, seed=2)
    before, after = model(items), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


@pytest.mark.parametrize("block", BLOCKS)
def test_receptive_field(block):
    model = make(block, seed=1, dilations=[1, 2], repeats=1)
    field = model.config.receptive_field
    items = ids(1, field + 3)
    assert (items[0, 2:4] != 5).all()
    inside, outside = items.clone(), items.clone()
    inside[0, 3] = outside[0, 2] = 5
    assert torch.equal(model(outside)[0, -1], model(items)[0, -1])
    assert not torch.allclose(model(inside)[0, -1], model(items)[0, -1])


def test_loss_is_the_mean_over_targets_with_a_history():
    model = make(head_bias=True, tail_bias=True)
    windows = ids(3, 9)
    windows[0, :4] = K
    windows[1] = K
    windows[1, -1] = 3  # a lone item has no history and costs nothing
    total, count = 0.0, 0
    for row in windows.tolist():
        items = [item for item in row if item != K]
        for end in range(1, len(items)):
            log_prob = model.softmax.log_prob(model(torch.tensor([items[:end]]))[:, -1])
            total, count = total - log_prob[0, items[end]], count + 1
    assert count == 4 + 0 + 8
    torch.testing.assert_close(model.loss(windows), total / count)


def test_padding_between_items_is_no_history():
    model = make()
    windows = torch.tensor([[5, K, 9, 4]])
    hidden = model(windows[:, :-1])
    expected = -model.softmax.log_prob(hidden[:, 2])[0, 4]
    torch.testing.assert_close(model.loss(windows), expected)


def test_gradients_reach_every_parameter_and_not_the_padding_row():
    model = make(head_bias=True, tail_bias=True, sharing="adjacent-block").train()
    windows = ids(16, 10)
    windows[:, :3] = K
    model.loss(windows).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert torch.equal(model.embedding.embeddings[-1].grad[-1], torch.zeros(2, dtype=torch.float64))


def test_loss_falls_when_trained():
    torch.manual_seed(0)
    model = NextItNet(NextItNetConfig.from_plan(K, D, [7, 20], [8, 4, 2], dilations=[1]))
    windows = (torch.arange(8)[None] + torch.arange(16)[:, None] * 3) % K
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.loss(windows).item()
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(windows).backward()
        optimizer.step()
    assert model.loss(windows).item() < 0.4 * first


def test_topk_and_rank_agree_with_log_prob():
    model = make(head_bias=True)
    histories = ids(5, 7)
    histories[0, :6] = K
    scores, items = model.topk(histories, 10)
    log_prob = model.softmax.log_prob(model(histories)[:, -1])
    expected, order = log_prob.topk(10)
    assert torch.equal(items, order)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad
    for place in (0, 3, 9):
        assert torch.equal(model.rank(histories, order[:, place]), torch.full((5,), place))


def test_topk_excludes_histories_and_keeps_to_candidates():
    model = make()
    histories = ids(4, 6)
    histories[1, :5] = K
    _, items = model.topk(histories, K, exclude=histories)
    for row, history in zip(items.tolist(), histories.tolist(), strict=True):
        seen = {item for item in history if item != K}
        left = [item for item in row if item >= 0]
        assert sorted(left) == sorted(set(range(K)) - seen)
        assert row[len(left) :] == [-1] * len(seen)
    csr = (torch.tensor([0, 1, 1, 1, 1]), items[0, :1].clone())
    assert model.topk(histories, 1, exclude=csr)[1][0, 0] != items[0, 0]
    chosen = torch.tensor([3, 40, 41])
    assert set(model.topk(histories, 3, candidates=chosen)[1].flatten().tolist()) == {3, 40, 41}


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    items = ids(4, 6)
    assert torch.equal(model(items), model(items))
    model.train()
    assert not torch.equal(model(items), model(items))
    padded = torch.cat([torch.full((4, 2), K), items], dim=1)
    assert torch.equal(model(padded)[:, :2], torch.zeros(4, 2, D, dtype=torch.float64))


def test_a_one_cluster_model_is_nn_embedding_and_cross_entropy():
    torch.manual_seed(0)
    model = NextItNet(make().config.twin()).double()
    assert [tuple(table.shape) for table in model.embedding.embeddings] == [(K + 1, D)]
    windows = ids(3, 8)
    hidden = model.backbone(F.embedding(windows[:, :-1], model.embedding.embeddings[0]))
    logits = hidden @ model.softmax.weights[0].T
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(model.loss(windows), expected)


def test_bf16_autocast():
    torch.manual_seed(0)
    model = NextItNet(NextItNetConfig.from_plan(K, D, [7, 20], [8, 4, 2]))
    windows = ids(4, 9)
    windows[0, :4] = K
    exact = model.loss(windows)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(windows)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("form", ["cpu", "cuda"])
@pytest.mark.parametrize("block", BLOCKS)
def test_compiles_to_one_graph(block, form, monkeypatch):
    torch._dynamo.reset()
    if form == "cuda":
        monkeypatch.setattr(CausalConv, "forward", lambda self, x, dilation=1, packing=None: (
            self._in_one_product(x, dilation) if packing is None else self._packed(x, dilation, packing)
        ))  # fmt: skip
    model = make(block, sharing="cross-block")
    windows = ids(3, 9)
    windows[0, :4] = K
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    topk = torch.compile(model.topk, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(forward(windows), model(windows))
    compiled, eager = loss(windows), model.loss(windows)
    torch.testing.assert_close(compiled, eager)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(compiled, parameters), torch.autograd.grad(eager, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(topk(windows, 4)[1], model.topk(windows, 4)[1])


def test_tied_tails_are_one_parameter_and_otherwise_a_softmax_of_its_own():
    tied, apart = make(tie_tails=True, head_bias=True), make(head_bias=True)
    assert sum(parameter.numel() for parameter in tied.parameters()) == tied.config.num_parameters
    assert tied.embedding is tied.softmax.embedding
    with torch.no_grad():
        for mine, theirs in zip(apart.embedding.parameters(), tied.embedding.parameters(), strict=True):
            mine.copy_(theirs)
        weights = tied.softmax.packed_weights()
        for mine, theirs in zip(apart.softmax.weights, weights.weights, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(apart.softmax.projections, weights.projections, strict=True):
            mine.copy_(theirs)
        apart.softmax.head_bias.copy_(tied.softmax.head_bias)
        apart.backbone.load_state_dict(tied.backbone.state_dict())
    windows = ids(6, 9)
    windows[0, :4] = K
    losses = [model.loss(windows) for model in (tied, apart)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    own = apart.embedding.embeddings[1].grad + apart.softmax.weights[1].grad
    torch.testing.assert_close(tied.embedding.embeddings[1].grad, own)
    torch.testing.assert_close(tied.topk(windows, 5), apart.topk(windows, 5))
    copied = copy.deepcopy(tied)
    assert copied.embedding is copied.softmax.embedding
    assert copied.embedding is not tied.embedding


def test_sparse_embedding_gives_sparse_gradients():
    model = make(sparse_embedding=True)
    model.loss(ids(3, 5)).backward()
    assert all(table.grad.is_sparse for table in model.embedding.embeddings)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(ids(3, 4).int()), TypeError, "items must be int64 item ids, got torch.int32"),
        (lambda m: m(ids(4)), ValueError, r"items must have shape \(B, length\), got \(4,\)"),
        (lambda m: m.loss(ids(3, 4).float()), TypeError, "windows must be int64"),
        (lambda m: m.loss(ids(3, 1)), ValueError, "at least 2 items per row"),
        (lambda m: m.topk(ids(3, 4, 2), 2), ValueError, "histories must have shape"),
        (lambda m: m.topk(ids(3, 0), 2), ValueError, "histories have length 0"),
        (lambda m: m.topk(ids(3, 4), 2, exclude=ids(3)), ValueError, "exclude must have shape"),
        (lambda m: m.rank(ids(3, 4), ids(3, 1)), ValueError, r"target must have shape \(B,\)"),
        (lambda m: m.rank(ids(3, 4), ids(2)), ValueError, "2 targets were given for 3 histories"),
        (lambda m: m(torch.tensor([[K + 1]])), IndexError, str(K + 1)),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(make())
