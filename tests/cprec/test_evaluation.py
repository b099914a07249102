"""Ranking metrics against figures worked out by hand and against the whole score matrix."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from cprec.cli_options import print_rich
from cprec.data import prepare
from cprec.evaluation import (
    EvaluationReport,
    evaluate,
    metrics_of_ranks,
    popularity_bands,
    rank_targets,
    report_of_ranks,
)
from cprec.model import NextItNet, NextItNetConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [" ".join(str(item) for item in rng.zipf(1.4, size=8) % 60) for _ in range(90)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return prepare(folder / "log.txt", folder / "prepared", format="sequences")


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    size = data.num_items
    config = NextItNetConfig.from_plan(size, 8, [size // 6, size // 2], [8, 4, 2], dilations=(1, 2), dropout=0.5)
    return NextItNet(config)


def test_metrics_by_hand():
    metrics = metrics_of_ranks(np.array([0, 4, 5, 30]), (5, 10))
    assert metrics.count == 4
    assert metrics.hr == {5: 0.5, 10: 0.75}
    assert metrics.ndcg[5] == pytest.approx((1 + 1 / np.log2(6)) / 4)
    assert metrics.ndcg[10] == pytest.approx((1 + 1 / np.log2(6) + 1 / np.log2(7)) / 4)
    assert metrics.mrr[5] == pytest.approx((1 + 1 / 5) / 4)
    assert metrics.mrr[10] == pytest.approx((1 + 1 / 5 + 1 / 6) / 4)


def test_metrics_of_nothing_are_zero_and_counted_as_such():
    metrics = metrics_of_ranks(np.zeros(0, dtype=np.int64))
    assert metrics.count == 0
    assert set(metrics.to_dict().values()) == {0.0}


def test_bands_cut_at_shares_of_interactions():
    # cumulative 40, 60, 80, 90, 95, 100, 100, 100
    bands = popularity_bands([40, 20, 20, 10, 5, 5, 0, 0])
    assert [(name, start, end) for name, start, end, _ in bands] == [("head", 0, 2), ("mid", 2, 3), ("tail", 3, 8)]
    assert [share for *_, share in bands] == pytest.approx([0.6, 0.2, 0.2])


def test_a_catalogue_without_interactions_has_no_shares():
    assert [share for *_, share in popularity_bands([0, 0, 0])] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("counts", [[1], [100, 1], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [0, 0, 0]])
def test_bands_cover_every_item_once(counts):
    bands = popularity_bands(counts)
    assert bands[0][1] == 0
    assert bands[-1][2] == len(counts)
    assert all(end == following for (_, _, end, _), (_, following, _, _) in itertools.pairwise(bands))


def test_ranks_are_those_of_the_whole_score_matrix(data, model):
    ranks, targets = rank_targets(model, data, "test", length=5, batch_size=32)
    split = data.evaluation("test")
    assert targets.tolist() == list(split.targets)
    model.eval()
    for index in range(0, len(targets), 7):
        history = torch.as_tensor(np.array(split.histories[index])).long()[-5:]
        padded = torch.full((1, 5), data.num_items)
        padded[0, 5 - len(history) :] = history
        with torch.no_grad():
            scores = model.softmax.log_prob(model(padded)[:, -1])[0]
        order = torch.argsort(scores, descending=True, stable=True)  # ties by smaller item
        assert int((order == targets[index]).nonzero()) == ranks[index]


def test_batch_size_does_not_matter_and_the_mode_of_the_model_is_kept(data, model):
    model.train()
    ranks, _ = rank_targets(model, data, "valid", length=5, batch_size=7)
    assert model.training  # and dropout was off: the next line would differ otherwise
    assert np.array_equal(ranks, rank_targets(model, data, "valid", length=5, batch_size=1000)[0])


def test_a_report_puts_popularity_beside_the_model_and_splits_by_band(data, model):
    report = evaluate(model, data, "test", length=5, topn=(10, 5, 10))
    ranks, targets = rank_targets(model, data, "test", length=5)
    assert report.topn == (5, 10)
    assert report.model == metrics_of_ranks(ranks, (5, 10))
    assert report.popularity.hr[10] == np.mean(targets < 10)  # item numbers are popularity ranks
    assert [band.name for band in report.bands] == ["head", "mid", "tail"]
    assert sum(band.num_items for band in report.bands) == data.num_items
    assert sum(band.interaction_share for band in report.bands) == pytest.approx(1.0)
    assert sum(band.model.count for band in report.bands) == report.model.count == len(targets)
    weighted = sum(band.model.ndcg[10] * band.model.count for band in report.bands) / len(targets)
    assert weighted == pytest.approx(report.model.ndcg[10])
    head = report.bands[0]
    inside = targets < head.num_items
    assert head.model == metrics_of_ranks(ranks[inside], (5, 10))
    assert head.popularity == metrics_of_ranks(targets[inside], (5, 10))


def printed(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table())
    return console.file.getvalue()


def test_a_report_survives_json_and_prints_within_a_terminal(data, model):
    report = report_of_ranks(np.array([0, 3, 50]), np.array([0, 8, data.num_items - 1]), data.counts, "valid")
    assert EvaluationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    text = printed(report)
    row = next(line.split() for line in text.splitlines() if "HR@5" in line)
    assert row[:3] == ["HR@5", "0.6667", "0.3333"]
    assert "…" not in text
    assert f"{data.num_items:,} items ranked" in text


def test_a_band_without_examples_shows_no_figure(data):
    report = report_of_ranks(np.array([0]), np.array([0]), data.counts, "valid", (5,))
    row = next(line.split() for line in printed(report).splitlines() if "HR@5" in line)
    assert row == ["HR@5", "1.0000", "1.0000", "1.0000", "1.0000", "-", "-", "-", "-"]


def test_the_footer_says_items_interactions_and_examples_of_every_band():
    targets = np.array([0, 0, 1, 2, 7])
    report = report_of_ranks(targets, targets, [40, 20, 20, 10, 5, 5, 0, 0], "valid", (5,))
    rows = [line.split() for line in printed(report).splitlines()]
    assert ["items", "8", "2", "1", "5"] in rows
    assert ["interactions", "100%", "60%", "20%", "20%"] in rows
    assert ["examples", "5", "3", "1", "1"] in rows


def test_no_digit_is_lost_on_a_narrow_terminal(data, monkeypatch, capsys):
    targets = np.arange(data.num_items)
    report = report_of_ranks(targets[::-1], targets, data.counts, "valid")
    monkeypatch.setenv("COLUMNS", "40")
    print_rich(report.table())
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        line.split() for line in printed(report).splitlines()
    ]


def test_another_catalogue_and_impossible_cut_offs_are_refused(data, model):
    small = NextItNet(NextItNetConfig.from_plan(5, 8))
    with pytest.raises(ValueError, match="the model ranks 5 items"):
        evaluate(small, data, length=5)
    for topn in ((), (0, 5)):
        with pytest.raises(ValueError, match="topn"):
            evaluate(model, data, length=5, topn=topn)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_impossible_batch_sizes_are_named(data, model, batch_size):
    for call in (evaluate, rank_targets):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1 .* got {batch_size}"):
            call(model, data, "test", length=5, batch_size=batch_size)
