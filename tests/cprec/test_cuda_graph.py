"""Which training steps are replayed from CUDA graphs; that they are the same steps is tested on a device (tests/gpu)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cprec.cuda_graph import GraphedLoss
from cprec.model import NextItNet, NextItNetConfig

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
    assert loss(given()) == "replayed"
    trained.eval()
    assert loss(given()) == "eager"
