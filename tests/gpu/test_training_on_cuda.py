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


def captures(monkeypatch):
    """A list that gets an entry with every capture."""
    capture, captured = GraphedLoss._capture, []
    monkeypatch.setattr(GraphedLoss, "_capture", lambda self, windows: (captured.append(1), capture(self, windows))[1])
    return captured


def test_a_run_with_graphs_ends_with_the_weights_of_one_without(data, tmp_path, monkeypatch):
    run = TrainingConfig(length=LENGTH, batch_size=BATCH, epochs=2, seed=0, accelerator="gpu", devices=1)
    captured = captures(monkeypatch)
    train(data, config(dropout=0.3), run, tmp_path / "graphed", progress=False)
    assert captured == [1]
    monkeypatch.setattr(GraphedLoss, "_capture", lambda self, windows: self.model.loss)
    train(data, config(dropout=0.3), run, tmp_path / "eager", progress=False)
    graphed, eager = (checkpoint.load(tmp_path / name).state_dict() for name in ("graphed", "eager"))
    assert graphed.keys() == eager.keys()
    assert all(torch.equal(graphed[name], eager[name]) for name in eager)


def test_under_ddp_steps_are_launched_one_by_one(data, tmp_path, monkeypatch):
    run = TrainingConfig(
        length=LENGTH, batch_size=BATCH, epochs=1, seed=0, accelerator="gpu", devices=1, strategy="ddp"
    )
    captured = captures(monkeypatch)
    result = train(data, config(dropout=0.3), run, tmp_path / "run", progress=False)
    assert captured == []
    assert result.history[0].train_loss > 0


def test_batches_from_workers_do_not_disturb_a_capture(data, tmp_path, monkeypatch):
    captured = captures(monkeypatch)
    weights = []
    for workers in (0, 2):
        run = TrainingConfig(
            length=LENGTH, batch_size=BATCH, epochs=1, seed=0, accelerator="gpu", devices=1, workers=workers
        )
        train(data, config(dropout=0.3), run, tmp_path / str(workers), progress=False)
        weights.append(checkpoint.load(tmp_path / str(workers)).state_dict())
    assert captured == [1, 1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_memory_for_graphs_steps_are_launched_one_by_one(monkeypatch):
    torch.manual_seed(0)
    model = NextItNet(config(dropout=0.3)).cuda().train()
    graphed, given = GraphedLoss(model, (BATCH, LENGTH + 1)), windows(0)
    expected = step(model, model.loss, given, 0)
    capture = torch.cuda.make_graphed_callables

    def without_memory(*args, **options):  # of its own: what the step above took is kept for its stream
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            return capture(*args, **options)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", without_memory)
    with pytest.warns(UserWarning, match="no memory left for CUDA graphs"):
        ours = step(model, graphed, given, 0)
    assert graphed.shape is None
    for own, theirs in zip(ours, expected, strict=True):
        assert torch.equal(own, theirs)
