"""Which training steps are replayed from CUDA graphs; that they are the same steps is tested on a device (tests/gpu)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cprec.cuda_graph import GraphedLoss
from cprec.data import prepare_synthetic
from cprec.model import NextItNet, NextItNetConfig
from cprec.training import TrainingConfig, train

SHAPE = (4, 6)


def given(device="cuda", shape=SHAPE):
    """As much of a batch of windows as the choice looks at."""
    return SimpleNamespace(device=torch.device(device), shape=torch.Size(shape))


@pytest.fixture
def captured(monkeypatch):
    """Batches that graphs were captured from."""
    batches = []

    def capture(self, windows):
        batches.append(windows)
        return lambda windows: "replayed"

    monkeypatch.setattr(GraphedLoss, "_capture", capture)
    return batches


def model(**options):
    made = NextItNet(NextItNetConfig.from_plan(50, 8, dilations=(1,), **options)).train()
    made.loss = lambda windows: "eager"
    return made


def test_full_batches_on_a_device_are_captured_once(captured):
    loss = GraphedLoss(model(), SHAPE)
    assert loss(given(shape=(3, 6))) == "eager"  # a run that goes on at an epoch's last batch
    assert [loss(given()) for _ in range(3)] == ["replayed"] * 3
    assert loss(given(shape=(3, 6))) == "eager"
    assert len(captured) == 1


@pytest.mark.parametrize(
    ("options", "shape", "device"),
    [({}, SHAPE, "cpu"), ({}, None, "cuda"), ({"sparse_embedding": True}, SHAPE, "cuda")],
    ids=["cpu", "several devices", "sparse gradients"],
)
def test_others_run_as_they_are(captured, options, shape, device):
    assert GraphedLoss(model(**options), shape)(given(device)) == "eager"
    assert not captured


def test_evaluation_is_not_replayed(captured):
    trained = model()
    loss = GraphedLoss(trained, SHAPE)
    with torch.no_grad():
        assert loss(given()) == "eager"
    assert loss(given()) == "replayed"
    trained.eval()
    assert loss(given()) == "eager"


def test_without_memory_for_graphs_training_goes_on(monkeypatch):
    def full(self, windows):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(GraphedLoss, "_capture", full)
    loss = GraphedLoss(model(), SHAPE)
    with pytest.warns(UserWarning, match="no memory left for CUDA graphs: .* a smaller batch_size may fit"):
        assert loss(given()) == "eager"
    assert loss(given()) == "eager"  # and is not tried again


@pytest.mark.parametrize(("strategy", "workers"), [("auto", 0), ("auto", 1), ("ddp", 0)])
def test_a_run_asks_for_graphs_of_its_full_batches_on_one_device_alone(tmp_path, monkeypatch, strategy, workers):
    """Under DDP, which one process may be, there are none."""
    from cprec import lightning_module

    asked = []

    class Asked(GraphedLoss):
        def __init__(self, model, shape):
            asked.append(shape)
            super().__init__(model, shape)

    monkeypatch.setattr(lightning_module, "GraphedLoss", Asked)
    data = prepare_synthetic(tmp_path / "data", 50, 60, seed=0)
    config = TrainingConfig(
        length=5, batch_size=7, epochs=1, accelerator="cpu", devices=1, strategy=strategy, workers=workers
    )
    train(data, NextItNetConfig.from_plan(50, 8, dilations=(1,)), config, tmp_path / "run", progress=False)
    assert asked == [None if strategy == "ddp" else (7, 6)]


@pytest.mark.parametrize(
    ("device", "workers", "graphed", "pinned"),
    [
        ("cuda", 0, (7, 6), True),
        ("cuda", 2, None, True),
        ("cuda", 2, (7, 6), False),
        ("cpu", 0, None, False),
        ("cpu", 2, (7, 6), False),
    ],
)
def test_no_thread_pins_memory_beside_a_capture(device, workers, graphed, pinned):
    from cprec.lightning_module import pins_memory

    assert pins_memory(torch.device(device), workers, graphed) == pinned
