"""Training a NextItNet on a CUDA device: steps replayed from graphs, whole runs. ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from cprec import checkpoint
from cprec.cuda_graph import GraphedLoss
from cprec.data import PreparedData, prepare_synthetic
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train

pytestmark = pytest.mark.gpu
ITEMS, LENGTH, BATCH = 2_000, 12, 32


def config(**options):
    return NextItNetConfig.from_plan(ITEMS, 32, [100, 500], [32, 16, 8], dilations=(1, 4), repeats=1, **options)


def windows(seed, rows=BATCH):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randint(ITEMS, (rows, LENGTH + 1), generator=generator)
    empty = torch.randint(LENGTH, (rows, 1), generator=generator)
    return given.masked_fill(torch.arange(LENGTH + 1) < empty, ITEMS).cuda()


def step(model, loss_of, given, seed):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(given)
    loss.backward()
    return [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"dropout": 0.3, "tie_tails": True},
        {"sharing": "cross-layer", "label_smoothing": 0.1},
        {"block": "bottleneck", "head_bias": False},
    ],
    ids=["dropout", "tied", "shared", "bottleneck"],
)
def test_a_replayed_step_is_the_step(options, narrow):
    torch.manual_seed(0)
    model = NextItNet(config(**options)).cuda().train()
    graphed = GraphedLoss(model, (BATCH, LENGTH + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # A capture casts a parameter at each of its uses and so adds their gradients in fp32; shared layers show the difference.
    with torch.autocast("cuda", torch.bfloat16, enabled=narrow, cache_enabled=False):
        for seed in range(4):
            given = windows(seed, BATCH if seed != 2 else 7)  # the third as an epoch's last: not replayed
            expected = step(model, model.loss, given, seed)
            for ours, theirs in zip(step(model, graphed, given, seed), expected, strict=True):
                assert torch.equal(ours, theirs)
            optimizer.step()  # the next step must read other parameters than the one that was captured
    assert graphed._replayed is not None


def test_evaluation_is_not_replayed():
    model = NextItNet(config(dropout=0.3)).cuda()
    graphed, given = GraphedLoss(model, (BATCH, LENGTH + 1)), windows(0)
    graphed(given).backward()
    with torch.no_grad():
        model.eval()
        assert torch.equal(graphed(given), model.loss(given))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_synthetic(folder / "prepared", ITEMS, 600, seed=0)
    return PreparedData.open(folder / "prepared")


def test_a_run_with_graphs_ends_with_the_weights_of_one_without(data, tmp_path, monkeypatch):
    run = TrainingConfig(length=LENGTH, batch_size=BATCH, epochs=2, seed=0, accelerator="gpu", devices=1)
    capture, captured = GraphedLoss._capture, []
    monkeypatch.setattr(GraphedLoss, "_capture", lambda self, windows: (captured.append(1), capture(self, windows))[1])
    train(data, config(dropout=0.3), run, tmp_path / "graphed", progress=False)
    assert captured == [1]
    monkeypatch.setattr(GraphedLoss, "_capture", lambda self, windows: self.model.loss)
    train(data, config(dropout=0.3), run, tmp_path / "eager", progress=False)
    graphed, eager = (checkpoint.load(tmp_path / name).state_dict() for name in ("graphed", "eager"))
    assert graphed.keys() == eager.keys()
    assert all(torch.equal(graphed[name], eager[name]) for name in eager)
