"""``python -m benchmarks.paper``: what its page says of rows and times that are made up, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.paper.by_length import _add_times
from benchmarks.paper.page import findings, markdown
from benchmarks.paper.speed import TWIN
from benchmarks.paper.store import Kept
from benchmarks.paper.table import Row, Table


@pytest.fixture
def rows():
    """The twin's and ours."""
    twin = Row(
        "L = 20", "twin", parameters=600, metrics={"ndcg@10": [0.2], "mrr@5": [0.4]}, figures={"to_metric_epochs": 8.0}
    )  # fmt: skip
    ours = Row(
        "L = 20", "compressed", "twin", 100, metrics={"ndcg@10": [0.1], "mrr@5": [0.1]},
        figures={"to_metric_epochs": 3.0}, settings={"cutoffs": [10]},
    )  # fmt: skip
    return twin, ours


def test_findings(rows):
    table = Table(1, {"name": "Data"}, {}, {}, list(rows))
    assert findings(table) == [
        "- Data, L = 20, compressed: 6.00 times fewer parameters; NDCG@10 50.0%: one seed; MRR@5 25.0%: one seed; the twin's "
        "best validation NDCG@10 after 3.0 epochs, the twin's own after 8.0."
    ]
    for row, step, top, index in zip(rows, (40.0, 10.0), (8.0, 4.0), (6.0, 2.0), strict=True):
        row.times = [{"machine": "m", "step_ms": step, "topk_ms": top, "index_ms": index}]
    (line,) = findings(table)
    assert "; a training step 4.00 times, top 10 of a history 3.00 times as fast; " in line


def test_times_follow_from_steps(rows):
    twin, ours = rows
    steps, searches = {TWIN: 50.0, "compressed": 10.0}, {TWIN: 4.0, "compressed": 1.0}
    measured = {
        "step_ms": {name: {"median_ms": ms} for name, ms in steps.items()},
        "topk_ms": {name: {"median_ms": ms} for name, ms in searches.items()},
        "index_ms": {}, "search_ms": {}, "steps": 400, "note": "as it is",
    }  # fmt: skip
    ours.settings["init"] = "als"
    start = [Kept({"median_ms": 2500.0}, {"machine": "m"})]
    _add_times({"twin": twin, "compressed": ours}, "twin", [Kept(measured, {"machine": "m"})], start)
    assert twin.figures == {
        "to_metric_epochs": 8.0, "step_ms": 50.0, "epoch_s": 20.0, "to_metric_s": 160.0, "topk_ms": 4.0
    }  # fmt: skip
    assert ours.figures["epoch_s"] == 4.0
    assert ours.figures["to_metric_s"] == 2.5 + 3 * 4.0


def test_searches_are_set_against_torchs():
    figures = {"items": 1e6, "torch_ms": 40.0, "weights_ms": 8.0, "index_ms": 0.5, "index-full_ms": 4.0}
    full = Row("1,000,000 items", "a", figures=figures)
    bare = dataclasses.replace(full, figures={"torch_ms": 40.0, "weights_ms": 8.0})
    *_, first, second = markdown(Table(5, {}, {}, {}, [full, bare])).strip().splitlines()
    assert first.startswith("| 1,000,000 items |  | 40.0 | 8.00 | 0.500 | 4.00 | 80.0x | 10.0x |")
    assert second.startswith("| 1,000,000 items |  | 40.0 | 8.00 |  |  | 5.00x |  |")
