"""Batches without their padding: the same function as with it, values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cprec.model import NextItNet, NextItNetConfig
from cprec.model import nextitnet as module
from cprec.model.packing import Packing
from cprec_kernels import functional

K, D = 60, 8


def make(block, kernel_size=3, dtype=torch.float64, sharing="none"):
    torch.manual_seed(0)
    config = NextItNetConfig.from_plan(
        K, D, [7, 20], [8, 4, 2], block=block, dilations=[1, 4], repeats=2, kernel_size=kernel_size, head_bias=True,
        sharing=sharing,
    )  # fmt: skip
    model = NextItNet(config).to(dtype)
    with torch.no_grad():
        for parameter in (*model.backbone.parameters(), *model.softmax.parameters()):
            parameter.normal_(std=0.5)
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(K, (7, 12), generator=generator)
    for row, padding in enumerate((0, 3, 11, 12, 9, 10, 8)):
        left[row, :padding] = K
    anywhere = torch.randint(K, (6, 12), generator=generator)
    anywhere[torch.rand(6, 12, generator=generator) < 0.6] = K
    return {
        "left": left,
        "anywhere": anywhere,
        "one item": torch.tensor([[K, K, 5], [K, K, K]]),
        "newest is padding": torch.tensor([[4, K, K, K], [4, K, 3, K]]),
        "all padding": torch.full((3, 5), K),
    }


@pytest.fixture
def packed(monkeypatch):
    """Counts the batches that were packed; ``packed.off`` packs none."""

    class Calls:
        count = 0
        off = False

    def where_possible(is_item):
        if Calls.off or not is_item.numel():
            return None
        Calls.count += 1
        return Packing(is_item)

    monkeypatch.setattr(module.Packing, "where_possible", where_possible)
    return Calls


def loss_and_gradients(model, windows):
    model.zero_grad()
    loss = model.loss(windows)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize("block", ["residual", "bottleneck"])
def test_packed_is_padded(packed, block, kernel_size, name):
    model, windows = make(block, kernel_size), batches()[name]
    hidden, (loss, gradients) = model(windows), loss_and_gradients(model, windows)
    scores, ranks = model.topk(windows, 5)[0], model.rank(windows, torch.arange(len(windows)))
    assert packed.count == (2 if block == "residual" else 4)  # residual blocks have a kernel for the newest item
    packed.off = True
    torch.testing.assert_close(hidden, model(windows), rtol=1e-12, atol=1e-12)
    expected, expected_gradients = loss_and_gradients(model, windows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(scores, model.topk(windows, 5)[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(ranks, model.rank(windows, torch.arange(len(windows))))


def test_rows_before_have_the_gradient_of_finite_differences():
    is_item = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    packing = Packing(is_item)
    x = torch.randn(int(is_item.sum()), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: packing.before([4, 2, 1, 0], rows), x)
    assert packing.before([1], x).tolist()[0] == [0.0] * 3  # the first item of the first row has none before it
    assert torch.equal(packing.before([2], x)[2], x[1])  # across a place without an item


def test_packing_is_for_values_on_the_cpu():
    windows = torch.arange(40).view(4, 10) % K
    assert Packing.where_possible(windows != K).tokens.tolist() == list(range(40))
    assert Packing.where_possible((windows != K).to("meta")) is None
    assert Packing.where_possible(torch.ones(0, 10, dtype=torch.bool)) is None
    with FakeTensorMode() as mode:
        assert Packing.where_possible(mode.from_tensor(windows) != K) is None


@pytest.fixture
def fused(monkeypatch):
    """The shapes of the rows that came to the kernel of a layer."""
    shapes = []

    def conv_norm_relu(input, rows, *args):
        shapes.append((tuple(input.shape), tuple(rows.shape)))
        return functional.conv_norm_relu(input, rows, *args)

    monkeypatch.setattr(module, "conv_norm_relu", conv_norm_relu)
    return shapes


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize("sharing", ["none", "cross-layer", "adjacent-layer", "adjacent-block"])
def test_layers_in_a_kernel_are_torchs(fused, monkeypatch, sharing, kernel_size, name):
    model, windows = make("residual", kernel_size, torch.float32, sharing), batches()[name]
    loss, gradients = loss_and_gradients(model, windows)
    tokens = int((windows[:, :-1] != K).sum())
    assert [own[0] for own in fused] == 8 * [(tokens, D)]
    assert max(own[1][0] for own in fused) == min(kernel_size, windows.shape[1] - 1)
    monkeypatch.setattr(module.ResidualStack, "_fuses", lambda self, x, packing: False)
    expected, expected_gradients = loss_and_gradients(model, windows)
    assert len(fused) == 8
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_layers_run_in_a_kernel_where_that_is_the_same(fused):
    windows = batches()["left"]

    def runs_fused(model, **autocast):
        fused.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            model.loss(windows)
        return bool(fused)

    make_own = lambda: make("residual", dtype=torch.float32)  # noqa: E731
    assert runs_fused(make_own())
    assert runs_fused(make_own().train())
    assert not runs_fused(make_own(), autocast=True)
    assert not runs_fused(make("residual", dtype=torch.float64))
    assert not runs_fused(make("residual", dtype=torch.bfloat16))
    assert not runs_fused(make("bottleneck", dtype=torch.float32))
    other_eps, replaced = make_own(), make_own()
    for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        for name in ("norms", "sets"):
            hooked = make_own()
            getattr(getattr(hooked.backbone, name)[1], f"register_{hook}")(lambda *args: None)
            assert not runs_fused(hooked)
    other_eps.backbone.norms[3].eps = 1e-3
    replaced.backbone.norms[0] = torch.nn.Identity()
    forwards = make_own()
    forwards.backbone.sets[1].forward = forwards.backbone.sets[1].forward
    assert not runs_fused(forwards)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not runs_fused(make_own())
    finally:
        handle.remove()
    without_bias, without_affine = make_own(), make_own()
    without_bias.backbone.sets[2].bias = None
    without_affine.backbone.norms[2] = torch.nn.LayerNorm(D, eps=1e-8, elementwise_affine=False)
    for partial in (without_bias, without_affine):
        assert not runs_fused(partial)
        assert torch.equal(partial.eval().topk(windows, 5)[1], partial.topk(windows, 5)[1])
    assert not runs_fused(other_eps)
    assert not runs_fused(replaced)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_step_can_be_checkpointed(fused, reentrant):
    windows = batches()["left"]
    model = make("residual", dtype=torch.float32)
    model.backbone.dropout = 0.5
    torch.manual_seed(5)
    loss, expected = loss_and_gradients(model.train(), windows)
    assert fused
    model.zero_grad()
    torch.manual_seed(5)
    again = checkpoint(lambda _: model.loss(windows), torch.ones(1, requires_grad=True), use_reentrant=reentrant)
    again.backward()
    assert torch.equal(again, loss)
    assert all(map(torch.equal, (parameter.grad for parameter in model.parameters()), expected))


def test_what_is_compiled_in_place_gets_one_shape():
    windows, shapes = batches()["left"], []
    for part in ("backbone", "backbone.sets.1"):
        model = make("residual", dtype=torch.float32)
        expected = model.loss(windows)
        model.get_submodule(part).compile(backend=lambda graph, inputs: shapes.append(len(inputs)) or graph)
        torch.testing.assert_close(model.loss(windows), expected)
        model.loss(windows.flip(0)[:, torch.arange(12)])
        count = len(shapes)
        model.loss(windows.roll(1, 0))
        assert len(shapes) == count > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_in_training_is_of_items_alone(dtype):
    model = make("residual", dtype=dtype).train()
    model.backbone.dropout = 0.5
    windows = batches()["left"]
    hidden = model(windows)
    assert torch.equal(hidden[windows == K], torch.zeros_like(hidden[windows == K]))
    assert not torch.equal(hidden, model(windows))
