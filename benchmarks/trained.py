"""Searching a trained model's packed index over real test histories: what early termination saves, and what it must not
change.

How much of a catalogue a search can leave out depends on the weights and on the rows; random ones say little about it. Rows
here are those of other runs (mode "trained", targets "histories", baseline the search on the weights as they are), so
``table`` and ``report`` read them. All searches get the same batch in a round and a new batch in the next. Those of one
index, and the baseline, are interleaved by themselves: caches then hold what a server's hold, one index and not eight.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import cprec
from benchmarks.errors import BenchmarkError
from benchmarks.ops.bench_clustered_topk import agreement, build_index, judge_agreement, missing_index
from benchmarks.results import Row, Run, fill_ratios
from benchmarks.run import WARM_UP_CALLS, Provenance
from benchmarks.timing import order_of_round, summarise, torch_threads
from benchmarks.verify import FULL_SIZE_TOLERANCE, describe
from cprec_kernels import cpu_isa
from cprec_kernels.nn import ClusteredSoftmaxWithLoss, TiedBlocks
from cprec_kernels.testing import relative_error

if TYPE_CHECKING:
    from cprec.data import PreparedData

BASELINE = "cprec-weights"
EXACT_STORAGES = ("float32", "float16")
APPROXIMATE_STORAGES = ("float16", "bfloat16", "int8")
COUNTERS = ("levels", "leaves", "items")
BATCH = 512  # histories at a time, for their hidden states
Softmax = ClusteredSoftmaxWithLoss | TiedBlocks
HOW_TO = "`cprec prepare LOG -o DATA` and `cprec train DATA -o RUN` make one; then pass --run RUN"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained softmax and the hidden states (N, d) of test histories. name: of the data it was trained on."""

    name: str
    softmax: Softmax
    hidden: Tensor


@dataclasses.dataclass(frozen=True)
class Search:
    """One way to search. full: the name of the same search without early termination, "" where there is none."""

    name: str
    topk: Callable[[Tensor], Any]
    full: str = ""
    index: Any = None

    @property
    def is_approximate(self) -> bool:
        return self.name.endswith("-approx")


# The run


def read_trained(folder: Path, data: Path | None, limit: int) -> TrainedModel:
    """The model of a training run and the hidden states of at most ``limit`` of its test histories.

    Args:
        data: the prepared data, if it is no longer where the run found it.

    Raises:
        BenchmarkError: not a training run, no weights in it yet, or its data is not there.
    """
    place = data or _data_folder(folder)
    if reason := missing_index():
        raise BenchmarkError(f"there is no index to measure: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "model"
        _export(folder, exported, data)
        model = cprec.load(exported)
    from cprec.data import EvaluationWindows, PreparedData  # the export has shown that what they need is installed

    try:
        prepared = PreparedData.open(place)
    except (OSError, ValueError) as error:
        raise BenchmarkError(str(error)) from None
    numbers = _histories(prepared, limit)
    windows = EvaluationWindows(prepared.evaluation("test"), model.length, prepared.num_items)
    with torch.no_grad():
        parts = [
            model.model(windows.__getitems__(numbers[start : start + BATCH])[0])[:, -1]
            for start in range(0, len(numbers), BATCH)
        ]
    return TrainedModel(prepared.name, model.model.softmax, torch.cat(parts))


def _data_folder(folder: Path) -> Path:
    """Where a run's prepared data was. Raises BenchmarkError for a folder that is not a run's."""
    try:
        values = json.loads((folder / "config.json").read_bytes())
        return Path(values["data"]["folder"])
    except OSError:
        raise BenchmarkError(f"{folder} is no training run, it has no config.json: {HOW_TO}") from None
    except (ValueError, KeyError, TypeError):
        raise BenchmarkError(
            f"{folder} is no training run, its config.json names no prepared data (an exported model's does not: pass "
            f"the run that it came from): {HOW_TO}"
        ) from None


def _export(run: Path, out: Path, data: Path | None) -> None:
    """Export a run, which checks that run and data belong together. Raises BenchmarkError with what was wrong."""
    try:
        cprec.export(run, out, data=data)
    except ImportError as error:
        raise BenchmarkError(f"a run's data needs {error.name}: pip install 'cprec-kernels[app]'") from None
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"the model of {run} cannot be read: {error}") from None


def _histories(prepared: PreparedData, limit: int) -> list[int]:
    """Numbers of test examples that have a history, drawn at random. Raises BenchmarkError without any."""
    lengths = torch.from_numpy(prepared.evaluation("test").histories.lengths)
    known = lengths.nonzero().squeeze(1)
    if not len(known):
        raise BenchmarkError(f"{prepared.folder} holds no test history to search for")
    drawn: list[int] = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:limit]].tolist()
    return drawn


# Searches


def make_searches(softmax: Softmax, k: int) -> list[Search]:
    """The baseline, exact indexes with early termination on and off, approximate ones with it on."""

    def search_in(index: Any, early_termination: bool) -> Callable[[Tensor], Any]:
        return lambda rows: index.topk(rows, k, early_termination=early_termination)

    found = [Search(BASELINE, lambda rows: softmax.topk(rows, k))]
    for storage in EXACT_STORAGES:
        name = f"cprec-index-{storage}"
        index = build_index(softmax, storage, exact=True)
        found.append(Search(name, search_in(index, True), f"{name}-full", index))
        found.append(Search(f"{name}-full", search_in(index, False), index=index))
    for storage in APPROXIMATE_STORAGES:
        index = build_index(softmax, storage, exact=False)
        found.append(Search(f"cprec-index-{storage}-approx", search_in(index, True), index=index))
    return found


@dataclasses.dataclass
class Findings:
    """What a search gave over all rounds: times, items and scores (N, k), counters (N, 3) of an index."""

    times_ms: list[float]
    items: Tensor
    scores: Tensor
    counters: Tensor | None


def time_searches(searches: Sequence[Search], hidden: Tensor, rows: int, rounds: int) -> dict[str, Findings]:
    """Name -> findings over ``rounds`` batches of ``rows`` hidden states, begun anew where these run out."""
    numbers = torch.arange(rounds * rows) % hidden.shape[0]
    batches = [hidden[part] for part in numbers.split(rows)]
    by_name = {search.name: search for search in searches}
    times: dict[str, list[float]] = {name: [] for name in by_name}
    results: dict[str, list[Any]] = {name: [] for name in by_name}
    for search in searches:
        for _ in range(WARM_UP_CALLS):
            search.topk(batches[0])
    for index, batch in enumerate(batches):
        for name in order_of_round(list(by_name), index):
            start = time.perf_counter()
            result = by_name[name].topk(batch)
            times[name].append((time.perf_counter() - start) * 1e3)
            results[name].append(result)
    found = {}
    for name, search in by_name.items():
        scores, items = (torch.cat([result[part] for result in results[name]]) for part in (0, 1))
        counters = None if search.index is None else torch.cat([result.counters for result in results[name]])
        found[name] = Findings(times[name], items, scores, counters)
    return found


def time_by_index(searches: Sequence[Search], hidden: Tensor, rows: int, rounds: int) -> dict[str, Findings]:
    """:func:`time_searches` for the baseline and one index after the other; the baseline's times are those of all turns."""
    baseline = searches[0]
    found: dict[str, Findings] = {}
    times: list[float] = []
    for index in dict.fromkeys(id(search.index) for search in searches[1:]):
        own = [search for search in searches[1:] if id(search.index) == index]
        found |= time_searches([baseline, *own], hidden, rows, rounds)
        times += found[baseline.name].times_ms
    found[baseline.name].times_ms = times
    return found


# Rows


def judge(search: Search, found: dict[str, Findings], softmax: Softmax, hidden: Tensor) -> str:
    """A remark on a search's items. Raises AssertionError when they are wrong.

    Early termination may not change an id. The items of an exact index must have the best scores there are; which of two
    items with the same rounded score is found may differ from the search on the weights.
    """
    own, best = found[search.name], found[BASELINE]
    if search.is_approximate:
        return judge_agreement(agreement(own.items, best.items))
    if search.full:
        changed = int((own.items != found[search.full].items).any(1).sum())
        if changed:
            raise AssertionError(f"early termination changes the ids of {changed} of {len(own.items)} rows")
    if search.index is not None:
        with torch.no_grad():
            error = relative_error(softmax.score(hidden, own.items), best.scores)
        if not error <= FULL_SIZE_TOLERANCE["float32"]:
            raise AssertionError(f"the items' scores differ from those of {BASELINE} by {error:.1e}")
    return ""


def count(search: Search, found: dict[str, Findings]) -> tuple[str, dict[str, float]]:
    """What a search met per row, against all that a full scan meets: a remark, and the numbers."""
    counters, everything = found[search.name].counters, found[f"cprec-index-{EXACT_STORAGES[0]}-full"].counters
    if counters is None or everything is None:
        return "", {}
    means, limits = counters.double().mean(0).tolist(), everything.double().mean(0).tolist()
    figures = dict(zip(COUNTERS, means, strict=True)) | {
        f"all_{name}": limit for name, limit in zip(COUNTERS, limits, strict=True)
    }
    figures["index_mb"] = search.index.nbytes / 1e6
    parts = [
        f"{mean:,.{1 if name == 'levels' else 0}f} of {limit:,.0f} {name}"
        for name, mean, limit in zip(COUNTERS, means, limits, strict=True)
    ]
    return f"{', '.join(parts)} per row", figures


def make_rows(
    model: TrainedModel, searches: Sequence[Search], found: dict[str, Findings], row_count: int, threads: int
) -> list[Row]:
    """One row per search, for batches of ``row_count`` hidden states."""
    provenance = dataclasses.asdict(Provenance.here())
    case = f"{model.name}-d{model.softmax.in_features}-b{row_count}"
    numbers = torch.arange(len(found[BASELINE].items)) % model.hidden.shape[0]
    rows = []
    for search in searches:
        own = found[search.name]
        row = Row(
            op="clustered_topk", case=case, provider=search.name, mode="trained", targets="histories", device="cpu",
            dtype="float32", isa=cpu_isa(), threads=threads, baseline=BASELINE, **provenance,
        )  # fmt: skip
        note, row.figures = count(search, found)
        row.figures["agreement"] = agreement(own.items, found[BASELINE].items)
        try:
            row.note = "; ".join(filter(None, (judge(search, found, model.softmax, model.hidden[numbers]), note)))
            row.correct = True
        except AssertionError as error:
            row.correct, row.error, row.note = False, describe(error), note
        else:
            timing = summarise(own.times_ms)
            row.median_ms, row.p20_ms, row.p80_ms, row.rounds = dataclasses.astuple(timing)
        rows.append(row)
    fill_ratios(rows)
    return rows


def run_trained(
    folder: Path,
    row_counts: Sequence[int],
    k: int,
    rounds: int,
    threads: int,
    data: Path | None = None,
    on_step: Callable[[str], None] = lambda doing: None,
) -> Run:
    """Measure the model of a training run; see :func:`read_trained` for what is refused."""
    with torch_threads(threads):
        on_step("reading the run and its test histories")
        model = read_trained(folder, data, rounds * max(row_counts))
        if not 1 <= k <= model.softmax.partition.num_items:
            raise BenchmarkError(f"--k {k} is outside 1..{model.softmax.partition.num_items}, the model's items")
        on_step("building indexes")
        searches = make_searches(model.softmax, k)
        rows: list[Row] = []
        for row_count in row_counts:
            on_step(f"searching with {row_count} rows at a time")
            found = time_by_index(searches, model.hidden, row_count, rounds)
            rows += make_rows(model, searches, found, row_count, threads)
    return Run([], rows)
