"""Tables 1, 6 and 7: a twin and compressed models, with times, at one or several lengths of history."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.paper.presets import Settings
from benchmarks.paper.runs import Trained, epochs_to_reach
from benchmarks.paper.speed import TWIN
from benchmarks.paper.store import Kept
from benchmarks.paper.table import TIMES, Row
from cprec.model import NextItNetConfig

if TYPE_CHECKING:
    from benchmarks.paper.tables import Bench

SHARED = "compressed, layers shared"
STARTED, STARTED_TWIN = "compressed, from factors", "twin, from factors"


def twin_and_compressed(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 1: at every length, the popularity baseline, the twin and the planned model, tuned alike.

    And the planned model with shared layers, on the same tables and by the same settings.
    """
    contenders = {"twin": bench.model(), "compressed": bench.planned()}
    chosen = {label: bench.tune(model) for label, model in contenders.items()}
    contenders[SHARED] = dataclasses.replace(contenders["compressed"], sharing="cross-layer")
    chosen[SHARED] = chosen["compressed"]

    def others(group: str, length: int, twins: list[Trained]) -> None:
        add(bench.popularity(group, twins[0]))
        if bench.preset.recbole and length == bench.preset.main_length:
            add(bench.recbole(group, length))

    _by_length(bench, add, contenders, chosen, others, bench.preset.lengths)


def _by_length(
    bench: Bench,
    add: Callable[[Row], None],
    contenders: dict[str, NextItNetConfig],
    chosen: dict[str, Settings],
    others: Callable[[str, int, list[Trained]], None],
    timed: Sequence[int],
) -> None:
    """At every length the rows that ``others`` adds, then those of the contenders; "twin" is the baseline.

    ``timed``: the lengths at which steps and searches are timed.
    """
    for length in bench.preset.lengths:
        group = f"L = {length}"
        rows, runs = {}, {}
        for label, model in contenders.items():
            baseline = "twin" if label != "twin" else ""
            rows[label], runs[label] = bench.row(group, label, model, length, chosen[label], baseline)
        others(group, length, runs["twin"])
        _add_epochs(rows, runs, "twin")
        if length in timed:
            ours = {label: found[0] for label, found in runs.items() if label != "twin"}
            _add_times(rows, "twin", bench.speed(runs["twin"][0], ours, length))
        for row in rows.values():
            add(row)


def _add_epochs(rows: dict[str, Row], runs: dict[str, list[Trained]], baseline: str) -> None:
    """Epochs to the best validation metric of the baseline."""
    for label, row in rows.items():
        goals = runs[baseline]
        if (needed := epochs_to_reach(goals, runs[label][: len(goals)])) is not None:
            row.figures["to_metric_epochs"] = needed


def _add_times(rows: dict[str, Row], baseline: str, timings: list[Kept], starts: list[Kept] | None = None) -> None:
    """Times of the first seed's models: steps, epochs, training to the baseline's metric, searches.

    ``timings``: of :meth:`benchmarks.paper.tables.Bench.speed`; the baseline's are those of the twin. ``starts``: what comes
    before the first step of a model that starts from factors, on the same machines.
    """
    start_s = {kept.provenance["machine"]: float(kept.result["median_ms"]) / 1e3 for kept in starts or ()}
    for label, row in rows.items():
        name = TWIN if label == baseline else label
        for kept in timings:
            times = {
                kind: kept.result[kind][name]["median_ms"]
                for kind in ("step_ms", "topk_ms", "index_ms", "search_ms")
                if kept.result[kind]
            }
            times["epoch_s"] = times["step_ms"] * kept.result["steps"] / 1e3
            machine = kept.provenance["machine"]
            before = start_s.get(machine) if "init" in row.settings else 0.0
            if "to_metric_epochs" in row.figures and before is not None:
                times["to_metric_s"] = before + row.figures["to_metric_epochs"] * times["epoch_s"]
            row.times.append({**kept.provenance, **times})
        row.figures |= {name: row.times[0][name] for name in TIMES if name in row.times[0]}
        if label == baseline:
            row.settings["timed_as"] = timings[0].result["note"]


def twice_as_wide(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 6: a wider twin, tuned, and the model planned for shared layers, which takes the twin's settings.

    And the twin of table 1, so that the wider one is not a weaker baseline unseen.
    """
    wide = bench.wide()
    contenders = {"twin": wide.model(), SHARED: wide.planned(sharing=bench.preset.wide_sharing)}
    chosen = wide.tune(contenders["twin"])
    narrow, label = bench.model(), f"twin, d = {bench.preset.dim}"
    narrowly = bench.tune(narrow)

    def others(group: str, length: int, twins: list[Trained]) -> None:
        row = bench.row(group, label, narrow, length, narrowly, "twin")[0]
        row.figures["compression"] = wide.model().num_parameters / narrow.num_parameters
        add(row)

    _by_length(wide, add, contenders, dict.fromkeys(contenders, chosen), others, (bench.preset.main_length,))


def from_factors(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 7: table 6's compressed model from factors, with smoothed labels, against its twin and against that twin from
    factors, with smoothed labels, too."""
    preset, wide = bench.preset, bench.wide()
    twin, ours = wide.model(), wide.planned(sharing=preset.wide_sharing)
    chosen = wide.tune(twin)
    started = chosen | {"init": "als", "label_smoothing": preset.factor_smoothing}
    for length in preset.factor_lengths:
        groups = {
            f"L = {length}": ("twin", chosen),
            f"L = {length}, the twin from factors, too": (STARTED_TWIN, started),
        }
        times: list[Kept] = []
        for group, (baseline, settings) in groups.items():
            rows, runs = {}, {}
            rows[baseline], runs[baseline] = wide.row(group, baseline, twin, length, settings)
            rows[STARTED], runs[STARTED] = wide.row(group, STARTED, ours, length, started, baseline)
            _add_epochs(rows, runs, baseline)
            if length == preset.main_length:
                # A step and a search of the twin take as long wherever it started.
                times = times or wide.speed(runs[baseline][0], {STARTED: runs[STARTED][0]}, length)
                _add_times(rows, baseline, times, wide.start(ours))
            for row in rows.values():
                add(row)
