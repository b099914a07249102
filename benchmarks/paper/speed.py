"""Times of training steps and of searches: trained models beside the uncompressed twin on torch's own ops."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.cases import fill_normal, normal
from benchmarks.errors import BenchmarkError
from benchmarks.ops.bench_clustered_softmax import fused_loss, linear_loss
from benchmarks.ops.bench_clustered_topk import missing_index
from benchmarks.timing import order_of_round, summarise
from cprec.data import EvaluationWindows, PreparedData, TrainingWindows
from cprec.item_factors import initialise
from cprec.model import NextItNet
from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
from cprec_kernels.testing import relative_error

TOP = 10
BURST = 10  # searches of a contender in its turn
TRIES = 3  # of every form that the twin may take
LOSS_TOLERANCE = SCORE_TOLERANCE = 1e-3
FLOAT_BYTES = 4
TWIN = "twin (torch)"


class _Loss(NamedTuple):
    loss: Tensor


class TorchSoftmax(nn.Module):
    """A linear layer over all items with torch's cross entropy; ``chunk`` tokens at a time, None for all at once."""

    def __init__(self, weight: Tensor, chunk: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.ignore_index = -100
        self.chunk = chunk

    def forward(self, hidden: Tensor, target: Tensor) -> _Loss:
        hidden, target = hidden.flatten(0, -2), target.flatten()
        kept = target != self.ignore_index
        hidden, target = hidden[kept], target[kept]
        loss = linear_loss if self.chunk is None else fused_loss(self.chunk)
        return _Loss(loss(hidden, self.weight, target))

    def topk(self, hidden: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Logits suffice: the log-softmax does not change an order."""
        found = F.linear(hidden, self.weight).topk(k)
        return found.values, found.indices


def torch_twin(twin: NextItNet) -> NextItNet:
    """The twin with ``nn.Embedding`` and :class:`TorchSoftmax` in place of our modules, with the same weights.

    Its blocks are torch's products, norms and ReLUs one by one, without padding as ours are, and our ``gather_taps`` lays
    their rows side by side and our ``dropout`` drops: torch's own ways to do that are slower.

    Raises:
        BenchmarkError: the model is not uncompressed.
    """
    config = twin.config
    if config != config.twin():
        raise BenchmarkError("only an uncompressed model has a form on torch's own ops")
    copied = copy.deepcopy(twin)
    table = next(iter(twin.embedding.embeddings)).detach()
    embedding: Any = nn.Embedding(config.num_items + 1, config.embedding_dim, padding_idx=config.num_items)
    embedding.weight = nn.Parameter(table.clone())
    copied.embedding = embedding
    softmax: Any = TorchSoftmax(twin.softmax.packed_weights().weights[0])
    copied.softmax = softmax
    copied.backbone.norms = nn.ModuleList(map(nn.Sequential, copied.backbone.norms))  # nothing that our kernel takes
    return copied


def make_step(model: NextItNet) -> Callable[[Tensor], None]:
    """A training step with torch's fused AdamW, the same for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(windows: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(windows).backward()
        optimizer.step()

    return step


def _elapsed_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _interleave(calls: dict[str, Callable[[int], Any]], rounds: int, burst: int = 1) -> dict[str, dict[str, float]]:
    """Name -> median, p20 and p80 in ms over ``rounds`` calls, which take turns ``burst`` by ``burst``.

    The first turn, with calls from -``burst`` on, warms up. A server answers one request after the other with one model:
    after a single call of another one, whose weights fill the caches, a search of 0.1 ms is mostly a matter of fetching.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for first in range(-burst, rounds, burst):
        for name in order_of_round(list(calls), max(0, first // burst)):
            for turn in range(first, min(first + burst, rounds)):
                elapsed = _elapsed_ms(lambda name=name, turn=turn: calls[name](turn))  # type: ignore[misc]
                if turn >= 0:
                    times[name].append(elapsed)
    return {name: dataclasses.asdict(summarise(values)) for name, values in times.items()}


def _choose_chunk(twin: NextItNet, windows: Tensor) -> str:
    """Set the chunk with which the twin's step is fastest here; a note on it."""
    softmax: Any = twin.softmax
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    choices: list[int | None] = []
    if hasattr(F, "linear_cross_entropy"):
        choices += sorted({max(1, tokens // parts) for parts in (16, 8, 4, 2)})
    # Logits, their log-softmax and its gradient.
    if not choices or 3 * FLOAT_BYTES * tokens * twin.config.num_items < 0.5 * memory.available_bytes():
        choices.append(None)
    taken: dict[int | None, float] = {}
    for chunk in choices:
        softmax.chunk = chunk
        step = make_step(copy.deepcopy(twin))
        step(windows)
        taken[chunk] = min(_elapsed_ms(lambda step=step: step(windows)) for _ in range(TRIES))  # type: ignore[misc]
    softmax.chunk = min(taken, key=lambda chunk: taken[chunk])
    return "all logits at once" if softmax.chunk is None else f"chunks of {softmax.chunk} tokens"


def _choose_search(twin: NextItNet, asked: list[Tensor]) -> Callable[[int], Any]:
    """The twin's search for one history in the form that is fastest here: packed as for padded batches, or not.

    ``asked``: histories (1, items), without padding, for which the two are the same.
    """

    def unpacked(turn: int) -> Any:
        with torch.no_grad():
            hidden = twin.backbone(twin.embedding(asked[turn % len(asked)]))[:, -1]
        return twin.softmax.topk(hidden, TOP)

    forms: list[Callable[[int], Any]] = [lambda turn: twin.topk(asked[turn % len(asked)], TOP), unpacked]
    with torch.inference_mode():
        _check_scores("the twin without packing", unpacked(0)[0], forms[0](0)[0])
        taken = _interleave({str(index): form for index, form in enumerate(forms)}, TRIES * BURST, BURST)
    return forms[int(min(taken, key=lambda index: taken[index]["median_ms"]))]


def _check_scores(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise BenchmarkError unless the best scores agree, whatever constant the one leaves out."""
    error = relative_error(found - found[:, :1], expected - expected[:, :1])
    if not error <= SCORE_TOLERANCE:
        raise BenchmarkError(f"{what} finds items whose scores differ from the best by {error:.1e}: nothing is timed")


def measure_models(
    twin: NextItNet,
    models: dict[str, NextItNet],
    data: PreparedData,
    length: int,
    batch_size: int,
    rounds: int,
    search_rounds: int,
) -> dict[str, Any]:
    """Steps on real batches and top-10 searches for one test history, all contenders taking turns.

    Args:
        twin: the uncompressed model, which runs on torch's ops. models: ours, by label.

    Returns:
        "step_ms", "topk_ms" and, where an index can be built, "index_ms", and "search_ms" for the index without the
        model before it: label -> median, p20 and p80; "steps" per epoch; "note" on the twin's form.

    Raises:
        BenchmarkError: the twin's form on torch's ops does not compute the twin's loss, or a search finds other scores.
    """  # fmt: skip
    windows = TrainingWindows(data.train, length, data.num_items)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    batch_of: Callable[[int], Tensor] = lambda turn: windows.__getitems__(  # noqa: E731
        [order[(turn * batch_size + i) % len(order)] for i in range(min(batch_size, len(order)))]
    )
    plain = torch_twin(twin)
    with torch.no_grad():
        expected, found = twin.eval().loss(batch_of(0)), plain.eval().loss(batch_of(0))
    if not relative_error(found, expected) <= LOSS_TOLERANCE:
        raise BenchmarkError(
            f"the twin on torch's ops has loss {float(found)}, ours {float(expected)}: nothing is timed"
        )
    plain.train()
    note = _choose_chunk(plain, batch_of(0))
    trained = {TWIN: plain, **models}
    # Steps move weights: searches are timed first, on the trained ones.
    histories = EvaluationWindows(data.evaluation("test"), length, data.num_items)
    searches: dict[str, Callable[[int], Any]] = {}
    indexed: dict[str, Callable[[int], Any]] = {}
    searched: dict[str, Callable[[int], Any]] = {}

    def history(turn: int) -> Tensor:
        """(1, items): a service does not pad one history, and torch's ops gain most from that."""
        ids: Tensor = histories[turn % len(histories)][0]
        return ids[ids != data.num_items][None]

    asked = [history(turn) for turn in range(min(search_rounds, len(histories)))]

    def search(model: NextItNet, storage: str | None) -> Callable[[int], Any]:
        return lambda turn: model.topk(asked[turn % len(asked)], TOP, storage=storage)

    def search_alone(model: NextItNet, storage: str | None) -> Callable[[int], Any]:
        with torch.inference_mode():
            hidden = torch.cat([model(ids)[:, -1] for ids in asked])
        return lambda turn: model.softmax.topk(hidden[turn % len(hidden), None], TOP, storage=storage)

    for name, model in trained.items():
        model.eval()
        searches[name] = _choose_search(plain, asked) if name == TWIN else search(model, None)
        if name == TWIN:
            indexed[name], searched[name] = searches[name], search_alone(model, None)
        elif not missing_index():
            indexed[name], searched[name] = search(model, "float32"), search_alone(model, "float32")
    with torch.inference_mode():
        _check_scores(TWIN, searches[TWIN](0)[0], twin.topk(asked[0], TOP)[0])
        for name, call in indexed.items():
            _check_scores(f"the index of {name}", call(0)[0], searches[name](0)[0])
        result: dict[str, Any] = {"topk_ms": _interleave(searches, search_rounds, BURST)}
        result["index_ms"] = _interleave(indexed, search_rounds, BURST) if len(indexed) > 1 else {}
        result["search_ms"] = _interleave(searched, search_rounds, BURST) if len(searched) > 1 else {}
    steps: dict[str, Callable[[int], Any]] = {}
    for name, model in trained.items():
        step = make_step(model.train())
        steps[name] = lambda turn, step=step: step(batch_of(turn))  # type: ignore[misc]
    result["step_ms"] = _interleave(steps, rounds)
    return result | {"steps": -(-len(windows) // batch_size), "note": note}


def measure_start(model: NextItNet, data: PreparedData, rounds: int = 3) -> dict[str, float]:
    """Median, p20 and p80 in ms of counting transitions, factorising them and setting a model's item vectors."""
    return dataclasses.asdict(summarise([_elapsed_ms(lambda: initialise(model, data)) for _ in range(rounds)]))


# Generated catalogues


def missing_for_search(num_items: int, width: int) -> str:
    """Why a size cannot be measured here, "" when it can."""
    needed, free = 3 * FLOAT_BYTES * num_items * width, memory.available_bytes()
    return f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free" if 0 < free < needed else ""


def measure_search(partition: Partition, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Top-10 for one hidden state: torch's product and top-k over a full table, and three searches of ours.

    "weights" searches the parameters as they are, "index" an index, "index-full" the same without leaving anything out:
    random weights, which these are, let a search leave out more than trained ones do.
    """
    width, items = partition.embedding_dim, partition.num_items
    softmax = ClusteredSoftmaxWithLoss(width, partition)
    fill_normal(softmax.weights, seed=seed + 10, fan_dim=1)
    fill_normal(softmax.projections, seed=seed + 40, fan_dim=1)
    table = normal((items, width), width**-0.5, seed + 100)
    rows = normal((rounds, width), 1.0, seed + 200)
    calls: dict[str, Callable[[int], Any]] = {
        "torch": lambda turn: F.linear(rows[turn % rounds, None], table).topk(TOP),
        "weights": lambda turn: softmax.topk(rows[turn % rounds, None], TOP),
    }
    if not missing_index():
        index = softmax.build_index(storage="float32")
        calls["index"] = lambda turn: index.topk(rows[turn % rounds, None], TOP)
        calls["index-full"] = lambda turn: index.topk(rows[turn % rounds, None], TOP, early_termination=False)
    with torch.inference_mode():
        for name in calls.keys() - {"torch", "weights"}:
            _check_scores(name, calls[name](0)[0], calls["weights"](0)[0])
        return _interleave(calls, rounds, BURST)
