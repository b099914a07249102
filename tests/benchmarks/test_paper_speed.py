"""``python -m benchmarks.paper``: what it times is the same function, in its fastest form."""

from __future__ import annotations

import pytest
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.paper import speed
from cprec.data import prepare_synthetic
from cprec.model import NextItNet, NextItNetConfig


def model(**options):
    return NextItNet(NextItNetConfig.from_plan(50, 8, dilations=(1,), **options)).eval()


def test_the_twin_on_torchs_ops_is_the_same_function():
    twin = model()
    plain = speed.torch_twin(twin)
    windows = torch.randint(51, (6, 5))
    windows[:, -1] = 3
    windows[:, -2] = 4
    assert not any(type(module).__module__.startswith("cprec_kernels") for module in plain.modules())
    expected = twin.loss(windows)
    for chunk in (None, 4) if hasattr(torch.nn.functional, "linear_cross_entropy") else (None,):
        plain.softmax.chunk = chunk
        torch.testing.assert_close(plain.loss(windows), expected)
    torch.testing.assert_close(plain.topk(windows[:, :-1], 7)[1], twin.topk(windows[:, :-1], 7)[1])
    with pytest.raises(BenchmarkError, match="only an uncompressed model"):
        speed.torch_twin(model(cutoffs=[10], ranks=[8, 4]))


def test_a_wrong_twin_or_search_is_not_timed(tmp_path, monkeypatch):
    prepared = prepare_synthetic(tmp_path / "data", 300, 120, seed=0)
    config = NextItNetConfig.from_plan(300, 8, dilations=(1,))
    right = speed.torch_twin

    def off(twin):
        changed = right(twin)
        with torch.no_grad():
            changed.softmax.weight[7] += 1.0
        return changed

    monkeypatch.setattr(speed, "torch_twin", off)
    with pytest.raises(BenchmarkError, match="nothing is timed"):
        speed.measure_models(NextItNet(config), {}, prepared, 4, 8, 1, 1)
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    speed._check_scores("same", scores + 5, scores)
    with pytest.raises(BenchmarkError, match="changed finds items whose scores differ"):
        speed._check_scores("changed", torch.tensor([[3.0, 2.0, 0.0]]), scores)


@pytest.mark.parametrize("faster", [0, 1])
def test_the_twin_searches_in_its_faster_form(monkeypatch, faster):
    twin = speed.torch_twin(model())
    asked = [torch.arange(3)[None], torch.arange(5)[None]]
    forms = {}

    def timed(calls, rounds, burst):
        forms.update(calls)
        return {name: {"median_ms": float(int(name) != faster)} for name in calls}

    monkeypatch.setattr(speed, "_interleave", timed)
    chosen = speed._choose_search(twin, asked)
    assert chosen is forms[str(faster)]
    for turn in range(2):
        values = [form(turn)[0] for form in forms.values()]
        torch.testing.assert_close(*values)
