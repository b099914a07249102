"""``python -m benchmarks dense``: every stage is measured on the model that it names."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.cli import main
from benchmarks.dense import MODELS, Settings, Trial, describe
from cprec.data import PreparedData, prepare_synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "data"
    prepare_synthetic(folder, 300, 120, seed=0)
    return folder


def call(capfd, *arguments, expect=0):
    with pytest.raises(SystemExit) as stop:
        main(["dense", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert int(stop.value.code or 0) == expect, f"{out}\n{err}"
    return out, err


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_trained_compressed_and_fine_tuned(model, data, tmp_path, capfd):
    path = tmp_path / "result.json"
    out, err = call(
        capfd, "--data", data, "--model", model, "--epochs", 2, "--fine-tune", 1, "--compression", 2, "--json", path
    )
    result = json.loads(path.read_text())
    assert out.strip() == describe(result)
    assert "epoch 0: validation NDCG@10" in err
    assert list(result["stages"]) == ["dense", "compressed", "fine-tuned"]
    for metrics in result["stages"].values():
        assert 0 <= metrics["ndcg@10"] <= metrics["hr@10"] <= 1
    parameters = result["parameters"]
    assert parameters["items_before"] >= 2 * parameters["items_after"]
    saved = parameters["items_before"] - parameters["items_after"]
    assert parameters["model_before"] - parameters["model_after"] == saved


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_ranks_are_those_of_the_logits(model, data):
    trial = Trial(PreparedData.open(data), Settings(model=model, dim=16, compression=1.5, dropout=0.0))
    trial.model.eval()
    windows = trial.ids[trial.windows.__getitems__(range(20))]
    for stage in ("dense", "compressed"):
        if stage == "compressed":
            trial.compress()
        with torch.no_grad():
            hidden, target = trial.model.hidden(windows[:, :-1]), windows[:, 1:]
            head = trial.model.item_emb.weight.T if model == "sasrec" else None
            logits = hidden @ head if head is not None else trial.model.out(hidden)
            if stage == "compressed":
                logits = trial.softmax(hidden)
            logits[..., 0] = -torch.inf  # the padding is no item
            known = target != 0
            expected = torch.nn.functional.cross_entropy(logits[known], target[known])
            torch.testing.assert_close(trial.loss(windows), expected)
            own = logits.gather(-1, target[..., None])
            places = (logits > own).sum(-1)[known]
            assert (trial.ranks(hidden[known], target[known]) == places).double().mean() > 0.99  # but for ties


def test_what_cannot_be_run_is_said(data, tmp_path, capfd):
    assert "there are sasrec, gru" in call(capfd, "--data", data, "--model", "bert", expect=2)[1]
    assert "`cprec prepare" in call(capfd, "--data", tmp_path, expect=2)[1]
    assert "no such directory" in call(capfd, "--data", data, "--json", tmp_path / "no" / "x.json", expect=2)[1]
