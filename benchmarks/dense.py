"""What compressing a trained dense model costs: train, compress, fine-tune, and rank the test targets after each.

The models are a SASRec-like transformer, which scores by its item table, and a GRU with a linear classifier. Their ids are
shuffled, as ids of models that people have are. Both train on all items: the loss of one cluster of full rank is the plain
cross entropy, and its kernel the fastest way to it here. The epoch of a run is the one of the best validation NDCG@10;
the test split is looked at once per stage.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cprec_kernels
from benchmarks.errors import BenchmarkError, unknown
from cprec.data import EvaluationWindows, TrainingWindows
from cprec.evaluation import metrics_of_ranks
from cprec_kernels import functional
from cprec_kernels.functional import Weights
from cprec_kernels.nn import ReindexedSoftmax

if TYPE_CHECKING:
    from cprec.data import PreparedData
    from cprec_kernels.convert import CompressionReport

EVALUATION_BATCH = 512
SAMPLE = 4_096  # hidden states that parent labels are fitted to
MONITOR = "ndcg@10"
PAD = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A run. ``epochs`` and ``patience`` are those of the dense model, ``fine_tune`` the epochs after compression."""

    model: str
    compression: float = 6.0
    fine_tune: int = 2
    dim: int = 64
    length: int = 20
    layers: int = 2
    dropout: float = 0.3
    batch_size: int = 128
    epochs: int = 40
    patience: int = 3
    learning_rate: float = 1e-3
    seed: int = 0


class Recommender(nn.Module):
    """Ids 1..num_items in any order, 0 pads; hidden states (B, L, d) of histories (B, L)."""

    item_emb: nn.Embedding

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(num_items + 1, settings.dim, padding_idx=PAD)
        with torch.no_grad():
            self.item_emb.weight *= settings.dim**-0.5
        self.dropout = nn.Dropout(settings.dropout)

    def hidden(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self) -> Weights:
        """The classifier as one cluster of full rank; an item's number in it is its id less one."""
        return Weights([self.item_emb.weight[1:]], [], None, [])


class SASRec(Recommender):
    """Self-attention; scores by the item table."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__(num_items, settings)
        self.position_emb = nn.Embedding(settings.length, settings.dim)
        layer = nn.TransformerEncoderLayer(
            settings.dim, 2, 4 * settings.dim, settings.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(settings.dim)

    def hidden(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.item_emb(ids) * math.sqrt(self.norm.normalized_shape[0]) + self.position_emb.weight[-length:]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        states: Tensor = self.norm(self.encoder(self.dropout(x), mask=mask, is_causal=True))
        return states


class GRU4Rec(Recommender):
    """A GRU, and a classifier with biases of its own."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__(num_items, settings)
        self.gru = nn.GRU(settings.dim, settings.dim, batch_first=True)
        self.out = nn.Linear(settings.dim, num_items + 1)

    def hidden(self, ids: Tensor) -> Tensor:
        states: Tensor = self.dropout(self.gru(self.dropout(self.item_emb(ids)))[0])
        return states

    def weights(self) -> Weights:
        return Weights([self.out.weight[1:]], [], self.out.bias[1:], [])


MODELS: dict[str, type[Recommender]] = {"sasrec": SASRec, "gru": GRU4Rec}


class Trial:
    """A model on its data, before and after compression."""

    def __init__(self, data: PreparedData, settings: Settings) -> None:
        if settings.model not in MODELS:
            raise unknown("--model", settings.model, MODELS)
        self.settings, self.data = settings, data
        torch.manual_seed(settings.seed)
        shuffled = 1 + torch.randperm(data.num_items)
        self.ids = torch.cat([shuffled, torch.tensor([PAD])])  # of item numbers; the padding's number is num_items
        self.model = MODELS[settings.model](data.num_items, settings)
        self.softmax: ReindexedSoftmax | None = None  # once the model is compressed
        self.windows = TrainingWindows(data.train, settings.length, data.num_items)
        if not len(self.windows):
            raise BenchmarkError("no sequence has two items: there is nothing to train on")

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross entropy of windows (B, L + 1) of ids."""
        hidden, target = self.model.hidden(windows[:, :-1]), windows[:, 1:]
        if self.softmax is not None:
            return self.softmax.loss(hidden, target)
        known = target != PAD
        return functional.clustered_cross_entropy(hidden[known], target[known] - 1, self.model.weights())

    def ranks(self, hidden: Tensor, target: Tensor) -> Tensor:
        """0-based places (B,) of target ids among all items."""
        if self.softmax is not None:
            return self.softmax.rank(hidden, target)
        return functional.clustered_rank(hidden, target - 1, self.model.weights())

    @torch.inference_mode()
    def evaluate(self, split: str) -> dict[str, float]:
        """HR, NDCG and MRR over a split's targets, all items ranked."""
        self.model.eval()
        windows = EvaluationWindows(self.data.evaluation(split), self.settings.length, self.data.num_items)
        ranks = []
        for start in range(0, len(windows), EVALUATION_BATCH):
            history, target, _ = windows.__getitems__(range(start, min(start + EVALUATION_BATCH, len(windows))))
            ranks.append(self.ranks(self.model.hidden(self.ids[history])[:, -1], self.ids[target]))
        return metrics_of_ranks(torch.cat(ranks).numpy()).to_dict()

    def train_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """One pass over the training windows, in an order of the seed's and the epoch's."""
        self.model.train()
        generator = torch.Generator().manual_seed(1_000 * self.settings.seed + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        for part in order.split(self.settings.batch_size):
            optimizer.zero_grad(set_to_none=True)
            self.loss(self.ids[self.windows.__getitems__(part.tolist())]).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()

    def train(self, epochs: int, first: int, patience: int, tell: Callable[[str], None]) -> tuple[int, float]:
        """Train, and keep the weights of the best epoch; its number from ``first`` on, and seconds per epoch."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.learning_rate, weight_decay=0.01)
        best, best_epoch, best_weights, seconds = -1.0, first, copy.deepcopy(self.model.state_dict()), []
        for epoch in range(first, first + epochs):
            start = time.perf_counter()
            self.train_epoch(optimizer, epoch)
            seconds.append(time.perf_counter() - start)
            value = self.evaluate("valid")[MONITOR]
            tell(f"epoch {epoch}: validation NDCG@10 {value:.4f}, {seconds[-1]:.0f} s")
            if value > best:
                best, best_epoch, best_weights = value, epoch, copy.deepcopy(self.model.state_dict())
            elif epoch - best_epoch >= patience:
                break
        self.model.load_state_dict(best_weights)
        return best_epoch, sum(seconds) / len(seconds)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Hidden states (N, d) of training windows, N near :data:`SAMPLE`."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(self.windows), generator=generator)[:SAMPLE]
        windows = self.ids[self.windows.__getitems__(order.tolist())]
        return self.model.hidden(windows[:, :-1])[windows[:, 1:] != PAD][:SAMPLE]

    def compress(self) -> CompressionReport:
        """Compress the model in place; all that follows is of the compressed one."""
        counts = torch.zeros(self.data.num_items + 1, dtype=torch.int64)
        counts[self.ids[:-1]] = torch.as_tensor(self.data.counts, dtype=torch.int64)
        report = cprec_kernels.compress(
            self.model,
            counts,
            compression=self.settings.compression,
            classifier="tied" if self.settings.model == "sasrec" else None,
            inputs=self.sample(),
        )
        assert isinstance(report.softmax, ReindexedSoftmax)
        self.softmax = report.softmax
        return report


def run_dense(data: PreparedData, settings: Settings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything above; test metrics by stage: "dense", "compressed", "fine-tuned"."""
    trial = Trial(data, settings)
    tell(f"training {settings.model} on {data.name}: {data.num_items:,} items")
    epoch, dense_s = trial.train(settings.epochs, 0, settings.patience, tell)
    stages = {"dense": trial.evaluate("test")}
    report = trial.compress()
    tell(str(report))
    stages["compressed"] = trial.evaluate("test")
    tuned, tuned_s = trial.train(settings.fine_tune, 1, settings.fine_tune, tell)
    stages["fine-tuned"] = trial.evaluate("test")
    partition = report.plan.partition
    return {
        "settings": dataclasses.asdict(settings), "data": data.name, "items": data.num_items,
        "parameters": {
            "items_before": report.table_before, "items_after": report.table_after,
            "model_before": report.parameters_before, "model_after": report.parameters_after,
        },
        "partition": partition.to_dict(), "stages": stages, "epochs": {"dense": epoch + 1, "fine-tuned": tuned},
        "epoch_s": {"dense": dense_s, "fine-tuned": tuned_s},
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """A result in a few lines."""
    stages, parameters = result["stages"], result["parameters"]
    base = stages["dense"][MONITOR]
    lines = [
        f"{result['settings']['model']} on {result['data']}, {result['items']:,} items: item parameters "
        f"{parameters['items_before']:,} -> {parameters['items_after']:,} "
        f"({parameters['items_before'] / parameters['items_after']:.2f} times fewer), "
        f"epoch {result['epoch_s']['dense']:.1f} s -> {result['epoch_s']['fine-tuned']:.1f} s"
    ]
    for stage, metrics in stages.items():
        share = f" ({metrics[MONITOR] / base:.1%} of dense)" if base > 0 else ""
        lines.append(f"  {stage:<11} NDCG@10 {metrics[MONITOR]:.4f}{share}, HR@10 {metrics['hr@10']:.4f}")
    return "\n".join(lines)
