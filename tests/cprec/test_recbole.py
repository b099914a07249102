"""CpRec inside RecBole: ids, losses and scores against the network alone, on RecBole's own classes."""

import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction

from cprec.integrations.recbole import CpRec

K, LENGTH = 40, 7
BIAS = {"head_bias": True, "tail_bias": True}


class Settings(dict):
    """Answers None for what it does not hold, as RecBole's Config does."""

    def __missing__(self, key):
        return None


def settings(**options):
    fields = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "ITEM_LIST_LENGTH_FIELD": "item_length"}
    fields |= {"LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu"}
    small = {"embedding_size": 8, "dilations": [1, 2], "cutoffs": [5, 15], "ranks": [8, 4, 2]}
    return Settings({**fields, **small, **options})


def padded(histories, length=LENGTH):
    """Histories as RecBole holds them: ids (B, length), 0 behind the newest item, and lengths (B,)."""
    rows = [history + [0] * (length - len(history)) for history in histories]
    return torch.tensor(rows), torch.tensor([len(history) for history in histories])


def interaction(histories, targets, length=LENGTH):
    rows, lengths = padded(histories, length)
    return Interaction({"item_id_list": rows, "item_length": lengths, "item_id": torch.tensor(targets)})


def users(seed=0):
    """Histories of unequal popularity: the item's id says nothing about it."""
    generator = random.Random(seed)
    order = generator.sample(range(1, K + 1), K)
    weights = [1 / (place + 1) for place in range(K)]
    return [generator.choices(order, weights, k=generator.randint(2, LENGTH + 1)) for _ in range(30)]


def prefixes(histories):
    """One row per prefix of a history, as RecBole augments its training part."""
    pairs = [(history[:end], history[end]) for history in histories for end in range(1, len(history))]
    return interaction([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def make(histories=None, **options):
    """A float64 model whose every parameter is random, so that biases and norms would show a leak."""
    torch.manual_seed(0)
    rows = prefixes(users() if histories is None else histories)
    model = CpRec(settings(**options), SimpleNamespace(inter_feat=rows, num=lambda field: K + 1)).double()
    with torch.no_grad():
        for parameter in (*model.net.backbone.parameters(), *model.net.softmax.parameters()):
            parameter.normal_(std=0.5)
    return model.eval()


def test_items_are_numbered_by_falling_training_counts():
    model = make()
    counts = Counter(item for history in users() for item in history)
    by_number = [counts[item] for item in model.id_of_item.tolist()]
    assert by_number == sorted(by_number, reverse=True)
    assert by_number[0] > by_number[-1] == 0
    assert sorted(model.id_of_item.tolist()) == list(range(1, K + 1))
    assert torch.equal(model.item_of_id[model.id_of_item], torch.arange(K))
    assert model.item_of_id[0] == model.net.padding_id


@pytest.mark.filterwarnings("ignore")  # RecBole 1.2.1 calls what pandas and numpy deprecate
def test_counts_are_those_of_the_training_part_of_recbole(tmp_path, monkeypatch):
    for name in ("bool", "int", "float", "complex", "object", "str", "long", "unicode"):  # Config sets these for good
        monkeypatch.setitem(vars(np), name, vars(np).get(name))
    for name, dtype in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        monkeypatch.setitem(vars(np), name, dtype)  # numpy 2 has none of these, which RecBole 1.2.1 looks up
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    histories = [history for history in users() if len(history) > 3]
    rows = [f"u{u}\ti{item}\t{t}" for u, history in enumerate(histories) for t, item in enumerate(history)]
    (tmp_path / "few").mkdir()
    text = "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows])
    (tmp_path / "few" / "few.inter").write_text(text, encoding="utf-8")
    options = {
        "data_path": str(tmp_path), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": False,
        "train_neg_sample_args": None, "embedding_size": 8,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"},
    }  # fmt: skip
    config = Config(model=CpRec, dataset="few", config_dict=options)
    dataset = create_dataset(config)
    train_data, _, _ = data_preparation(config, dataset)
    model = CpRec(config, train_data._dataset)
    found = model._training_counts(train_data._dataset)
    expected = Counter(f"i{item}" for history in histories for item in history[:-2])
    assert {dataset.id2token("item_id", i): n for i, n in enumerate(found.tolist()) if n} == dict(expected)
    batch = next(iter(train_data))
    assert torch.isfinite(model.calculate_loss(batch))


def test_the_maps_travel_with_the_state():
    model, other = make(), make([[*range(1, 6)], [*range(K, 0, -1)][:LENGTH]])
    batch = prefixes(users(1))
    assert not torch.equal(other.id_of_item, model.id_of_item)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.full_sort_predict(batch), model.full_sort_predict(batch))


@pytest.mark.parametrize(
    "options", [{}, {"block": "bottleneck", "label_smoothing": 0.1, **BIAS}, {"cutoffs": [], "ranks": [8]}]
)
def test_an_epoch_of_prefixes_costs_what_whole_histories_cost(options):
    model, histories = make(**options), users()
    rows = [[0] * (LENGTH + 1 - len(history)) + history for history in histories]
    torch.testing.assert_close(
        model.calculate_loss(prefixes(histories)), model.net.loss(model.item_of_id[torch.tensor(rows)])
    )


def test_scores_are_log_probabilities_under_the_ids_of_recbole():
    model, histories = make(**BIAS), users(1)
    batch = interaction([history[:-1] for history in histories], [history[-1] for history in histories])
    scores = model.full_sort_predict(batch)
    assert scores.shape == (len(histories), K + 1)
    assert (scores[:, 0] == -torch.inf).all()
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(histories), dtype=torch.float64))
    for row, history in zip(scores, histories, strict=True):
        hidden = model.net(model.item_of_id[torch.tensor([history[:-1]])])[:, -1]
        log_prob = model.net.softmax.log_prob(hidden)[0]
        torch.testing.assert_close(row[1:], log_prob[model.item_of_id[1:]])
    torch.testing.assert_close(model.predict(batch), scores.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(model.calculate_loss(batch), -model.predict(batch).mean())
    padding = interaction([[1, 2], [3]], [0, 4])
    assert model.predict(padding)[0] == -torch.inf
    torch.testing.assert_close(model.predict(padding)[1], model.full_sort_predict(padding)[1, 4])


def test_what_stands_behind_a_history_does_not_reach_its_scores():
    model = make(**BIAS)
    histories, targets = [[3], [5, 1, 9], [7, 7, 2, 4]], [1, 2, 3]
    scores = model.full_sort_predict(interaction(histories, targets, 4))
    for length in (5, LENGTH, 23):
        torch.testing.assert_close(model.full_sort_predict(interaction(histories, targets, length)), scores)
    filled = interaction(histories, targets)
    filled["item_id_list"][filled["item_id_list"] == 0] = 11
    torch.testing.assert_close(model.full_sort_predict(filled), scores)


def test_topk_is_the_order_of_all_scores():
    model = make()
    histories = [history[:-1] for history in users(1)]
    batch = interaction(histories, [1] * len(histories))
    expected, order = model.full_sort_predict(batch).topk(10)
    scores, ids = model.topk(batch, 10)
    assert torch.equal(ids, order)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad
    scores, ids = model.topk(batch, K, exclude=batch[model.ITEM_SEQ])
    for row, found, history in zip(scores, ids.tolist(), histories, strict=True):
        left = K - len(set(history))
        assert set(found[:left]) == set(range(1, K + 1)) - set(history)
        assert found[left:] == [0] * len(set(history))
        assert (row[left:] == -torch.inf).all()


def test_every_parameter_learns_and_dropout_acts_in_training_only():
    model = make(dropout_prob=0.5, sharing="adjacent-block", **BIAS)
    batch = prefixes(users())
    assert model.calculate_loss(batch) == model.calculate_loss(batch)
    model.train()
    assert model.calculate_loss(batch) != model.calculate_loss(batch)
    model.calculate_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_keys_reach_the_network():
    config = make(block_num=3, kernel_size=2, block="bottleneck", sharing="cross-block", dropout_prob=0.25).net.config
    assert (config.repeats, config.kernel_size, config.dilations) == (3, 2, (1, 2))
    assert (config.block, config.sharing, config.dropout) == ("bottleneck", "cross-block", 0.25)
    assert config.input_partition.to_dict() == {
        "num_items": K, "cutoffs": [5, 15], "ranks": [8, 4, 2], "embedding_dim": 8,
    }  # fmt: skip
    unset = dict.fromkeys(("embedding_size", "dilations", "cutoffs", "ranks"))
    config = make(**unset).net.config
    assert (config.embedding_dim, config.dilations) == (64, (1, 2, 4, 8))
    assert (config.input_partition.cutoffs, config.input_partition.ranks) == ((2, 8), (64, 16, 4))
    planned = make(cutoffs=None, ranks=None, compression=1.2).net.config
    assert planned.num_parameters * 1.2 <= planned.twin().num_parameters
    assert planned.tie_tails
    assert not config.tie_tails
    assert not make(cutoffs=None, ranks=None, compression=1.2, tie_tails=False).net.config.tie_tails


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding_size": 0}, ValueError, "embedding_size must be at least 1"),
        ({"embedding_size": "8"}, TypeError, "embedding_size must be an integer"),
        ({"block_num": 0}, ValueError, "block_num must be at least 1"),
        ({"dilations": 4}, TypeError, "dilations must be a list"),
        ({"dropout_prob": 1.5}, ValueError, r"dropout_prob = 1.5 is outside \[0, 1\)"),
        ({"sharing": "all"}, ValueError, "sharing = 'all' is not one of"),
        ({"cutoffs": 5}, TypeError, "cutoffs must be a list, got 5"),
        ({"cutoffs": [5, 50]}, ValueError, r"cutoffs\[1\] = 50 is outside"),
        ({"ranks": "8,4"}, TypeError, "ranks must be a list, got '8,4'"),
        ({"ranks": [8, 4]}, ValueError, "which need as many ranks"),
        ({"ranks": [16, 4, 2]}, ValueError, r"ranks\[0\] = 16 is outside 1..8 \(embedding_size\)"),
        ({"compression": 2}, ValueError, "compression = 2 chooses cutoffs and ranks itself"),
        ({"compression": "2x", "cutoffs": None, "ranks": None}, TypeError, "compression must be a number"),
        ({"compression": 1e9, "cutoffs": None, "ranks": None}, ValueError, "more than this model allows"),
        ({"loss_type": "BPR"}, ValueError, "loss_type = 'BPR'"),
        ({"train_neg_sample_args": {"distribution": "uniform"}}, ValueError, "set train_neg_sample_args to None"),
    ],
)
def test_errors_name_the_key(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_recbole_is_asked_for_only_when_it_is_needed():
    code = (
        "import sys; import cprec, cprec.integrations; assert 'recbole' not in sys.modules; "
        "sys.modules['recbole'] = None; import cprec.integrations.recbole"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: cprec.integrations.recbole needs RecBole 1.2" in done.stderr
    assert "pip install recbole" in done.stderr
