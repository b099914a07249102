"""Batches without their padding: the same function as with it, values and gradients."""

import pytest
import torch

from cprec.model import NextItNet, NextItNetConfig
from cprec.model import nextitnet as module
from cprec.model.packing import Packing

K, D = 60, 8


def make(block, kernel_size=3, dtype=torch.float64):
    torch.manual_seed(0)
    config = NextItNetConfig.from_plan(
        K, D, [7, 20], [8, 4, 2], block=block, dilations=[1, 4], repeats=2, kernel_size=kernel_size, head_bias=True
    )
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

    def if_worth_it(is_item):
        if Calls.off or not is_item.numel():
            return None
        Calls.count += 1
        return Packing(is_item)

    monkeypatch.setattr(module.Packing, "if_worth_it", if_worth_it)
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


def test_packing_is_for_much_padding_on_the_cpu():
    windows = torch.arange(40).view(4, 10) % K
    windows[:, :2] = K
    assert Packing.if_worth_it(windows != K) is None
    windows[:, :3] = K
    assert Packing.if_worth_it(windows != K) is not None
    assert Packing.if_worth_it((windows != K).to("meta")) is None
    assert Packing.if_worth_it(torch.ones(0, 10, dtype=torch.bool)) is None


def test_dropout_in_training_is_of_items_alone():
    model = make("residual").train()
    model.backbone.dropout = 0.5
    windows = batches()["left"]
    hidden = model(windows)
    assert torch.equal(hidden[windows == K], torch.zeros_like(hidden[windows == K]))
    assert not torch.equal(hidden, model(windows))
