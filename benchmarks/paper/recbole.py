"""RecBole's NextItNet as a baseline: its class, its loss, its settings and its layout of histories, on our splits.

It sees every prefix of a sequence as an example of one target, where ours predicts at every place of a window.
"""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.errors import BenchmarkError
from cprec.data import EvaluationSplit, PreparedData, Sequences
from cprec.evaluation import TOPN, metrics_of_ranks
from cprec.training import MONITOR

MODEL = "recbole.model.sequential_recommender.nextitnet"
EVALUATION_BATCH = 512


def missing() -> str | None:
    """Why RecBole's model cannot be run here; None where it can."""
    if importlib.util.find_spec("recbole") is None:
        return "RecBole is not installed"
    try:
        _model_class()
    except Exception as error:  # of what it imports, at worst something else than an ImportError
        return f"RecBole's NextItNet cannot be imported ({type(error).__name__}: {error})"
    return None


def _model_class() -> Any:
    """RecBole's class; a model beside it turns torch's anomaly mode on when imported, which slows all backward passes."""
    anomaly, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        return importlib.import_module(MODEL).NextItNet
    finally:
        torch.autograd.set_detect_anomaly(anomaly, check_nan)


def defaults() -> dict[str, Any]:
    """Settings of the model and of training as RecBole ships them, those of its trainer that are used here alone."""
    import yaml  # type: ignore[import-untyped]  # RecBole needs it

    properties = importlib.resources.files("recbole") / "properties"
    overall = yaml.safe_load((properties / "overall.yaml").read_text(encoding="utf-8"))
    model: dict[str, Any] = yaml.safe_load((properties / "model" / "NextItNet.yaml").read_text(encoding="utf-8"))
    # YAML 1.1, which RecBole's own loader is more generous than, takes 1e-5 for a word
    model["reg_weight"] = float(model["reg_weight"])
    return model | {"batch_size": int(overall["train_batch_size"]), "learning_rate": float(overall["learning_rate"])}


class _Prefixes:
    """Every item but the first of every sequence as a target, with the at most ``length`` items before it."""

    def __init__(self, sequences: Sequences, length: int) -> None:
        counts = np.maximum(sequences.lengths - 1, 0)
        self.items, self.length = sequences.items, length
        self.starts = np.repeat(sequences.starts, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self.targets = self.starts + 1 + np.arange(len(first)) - first

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Histories (B, length) in RecBole's ids and order, and targets (B,)."""
        ends = self.targets[numbers]
        return _left_aligned(self.items, self.starts[numbers], ends, self.length), _ids(self.items[ends])


def _ids(items: npt.NDArray[np.integer]) -> Tensor:
    """RecBole's ids: 0 pads."""
    return torch.from_numpy(items.astype(np.int64) + 1)


def _left_aligned(
    items: npt.NDArray[np.integer], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], length: int
) -> Tensor:
    """The last ``length`` items before ``ends``, RecBole's ids, padded on the right with 0: (B, length) int64."""
    places = np.maximum(starts, ends - length)[:, None] + np.arange(length)
    inside = places < ends[:, None]
    return _ids(np.where(inside, items[np.where(inside, places, 0)], -1))


class _Catalogue:
    """What the model asks of RecBole's dataset."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def num(self, field: str) -> int:
        return self.num_items + 1


def build(num_items: int, length: int, device: torch.device) -> Any:
    """RecBole's NextItNet of its default size."""
    config = defaults() | {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": length, "device": device,
    }  # fmt: skip
    return _model_class()(config, _Catalogue(num_items)).to(device)


def train(data: PreparedData, length: int, seed: int, epochs: int, patience: int, device: str) -> dict[str, Any]:
    """Train with Adam until validation NDCG@10 has not improved for ``patience`` epochs; figures of the best epoch.

    Returns:
        parameters, epochs, best_epoch, validation and test metrics by name.

    Raises:
        BenchmarkError: RecBole is not there, or its loss became infinite or NaN.
    """
    if (reason := missing()) is not None:
        raise BenchmarkError(f"{reason}: pip install --no-deps recbole, see docs/drop-in.md")
    settings = defaults()
    torch.manual_seed(seed)
    target_device = torch.device(device)
    model = build(data.num_items, length, target_device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    prefixes = _Prefixes(data.train, length)
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {}
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(prefixes))
        total = torch.zeros((), device=target_device)
        model.train()
        for start in range(0, len(order), settings["batch_size"]):
            given, target = prefixes.batch(order[start : start + settings["batch_size"]])
            loss = model.calculate_loss({"item_list": given.to(target_device), "item": target.to(target_device)})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not math.isfinite(float(total)):
            raise BenchmarkError(f"the loss of RecBole's NextItNet is not finite in epoch {epoch + 1}")
        history.append(evaluate(model, data.evaluation("valid"), length, target_device))
        if not best or history[-1][MONITOR] > history[best["epoch"]][MONITOR]:
            best = {"epoch": epoch, "weights": {name: value.clone() for name, value in model.state_dict().items()}}
        elif epoch - best["epoch"] >= patience:
            break
    model.load_state_dict(best["weights"])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "epochs": len(history),
        "best_epoch": best["epoch"], "validation": history[best["epoch"]],
        "test": evaluate(model, data.evaluation("test"), length, target_device),
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: Any, split: EvaluationSplit, length: int, device: torch.device) -> dict[str, float]:
    """Metrics of the targets' places in the whole catalogue; of equal scores the smaller id comes first, as in ours."""
    model.eval()
    histories, ranks = split.histories, []
    for start in range(0, len(split), EVALUATION_BATCH):
        numbers = slice(start, start + EVALUATION_BATCH)
        given = _left_aligned(histories.items, histories.starts[numbers], histories.ends[numbers], length)
        scores = model.full_sort_predict({"item_list": given.to(device)})[:, 1:]
        if not bool(scores.isfinite().all()):
            raise BenchmarkError("the scores of RecBole's NextItNet are not finite")
        target = torch.from_numpy(np.asarray(split.targets[numbers], dtype=np.int64)).to(device)[:, None]
        own = scores.gather(1, target)
        earlier = torch.arange(scores.shape[1], device=device) < target
        ranks.append(((scores > own) | ((scores == own) & earlier)).sum(1).cpu().numpy())
    return metrics_of_ranks(np.concatenate(ranks) if ranks else np.zeros(0, np.int64), TOPN).to_dict()
