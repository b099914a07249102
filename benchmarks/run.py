"""From settings to rows: skip what cannot run, gate, measure memory, warm up, compare at full size, time."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import machine, memory, verify
from benchmarks.registry import Op, Prepared, Provider, Setting
from benchmarks.results import Row, Run, fill_ratios
from benchmarks.roofline import Roofs, roof_isa
from benchmarks.timing import Timing, call_once_ms, time_interleaved, torch_threads

WARM_UP_CALLS = 2
# What is left to the system and to other processes when a provider's need is estimated.
MEMORY_SHARE = 0.9
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. budget_s: of timing per setting, shared among its providers. peak: measure memory in children."""

    min_rounds: int = 5
    budget_s: float = 30.0
    peak: bool = True
    quick_roofs: bool = False


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What every row carries along."""

    machine: str
    versions: dict[str, str]
    commit: str
    date: str

    @classmethod
    def here(cls) -> Provenance:
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(machine.machine_line(), machine.versions(), machine.commit(), day)


# Told what is being done and the share of the setting that is done.
Progress = Callable[[str, float], None]


def no_progress(_doing: str, _share: float) -> None:
    pass


def blank_row(op: Op, setting: Setting, provider: Provider, provenance: Provenance) -> Row:
    return Row(
        op=op.name,
        case=setting.case.name,
        provider=provider.name,
        mode=setting.mode,
        targets=setting.targets,
        device=setting.device,
        dtype=setting.dtype,
        isa=provider.isa or roof_isa(""),
        threads=setting.threads,
        baseline=op.baseline_of(provider, setting),
        **dataclasses.asdict(provenance),
    )


def memory_refusals(op: Op, setting: Setting, providers: Sequence[Provider], available_bytes: int) -> dict[str, str]:
    """Provider -> why it is left out for the memory it would need, by the providers' own estimates.

    Residents live side by side, because providers are interleaved; calls come one at a time.
    """
    problem = op.problem(setting)
    refused: dict[str, str] = {}
    resident = 0
    for provider in providers:
        own, call = provider.resident_bytes(problem), provider.call_bytes(problem)
        if available_bytes and resident + own + call > MEMORY_SHARE * available_bytes:
            beside = f" beside {resident / GB:.1f} GB of others" if resident else ""
            refused[provider.name] = (
                f"skipped: needs {(own + call) / GB:.1f} GB{beside}, {available_bytes / GB:.1f} GB are free"
            )
        else:
            resident += own
    return refused


def run_setting(
    op: Op,
    setting: Setting,
    providers: Sequence[Provider],
    options: Options,
    roofs: Roofs,
    provenance: Provenance,
    progress: Progress = no_progress,
) -> list[Row]:
    """Rows of one setting, one per provider and in their order; nothing is left out, what failed says so."""
    rows = {provider.name: blank_row(op, setting, provider, provenance) for provider in providers}
    alive = []
    for provider in providers:
        reason = provider.missing(setting)
        if reason:
            rows[provider.name].error = f"skipped: {reason}"
        else:
            alive.append(provider)
    refused = memory_refusals(op, setting, alive, memory.available_bytes())
    for name, reason in refused.items():
        rows[name].error = reason
    alive = [provider for provider in alive if provider.name not in refused]
    with torch_threads(setting.threads):
        alive = _gate(op, setting, alive, rows, progress)
        if options.peak:
            _measure_memory(setting, alive, rows, progress)
        _time(op, setting, alive, rows, options, roofs, progress)
    found = list(rows.values())
    fill_ratios(found)
    return found


def _fail(row: Row, reason: str) -> None:
    row.correct, row.error = False, reason


def _remark(row: Row, note: str) -> None:
    row.note = "; ".join(filter(None, (row.note, note)))


def _gate(
    op: Op, setting: Setting, providers: Sequence[Provider], rows: dict[str, Row], progress: Progress
) -> list[Provider]:
    gate = verify.Gate(op, setting)
    passed = []
    for index, provider in enumerate(providers):
        progress(f"checking {provider.name}", 0.2 * index / len(providers))
        verdict = gate.judge(provider)
        if verdict.error:
            _fail(rows[provider.name], verdict.error)
            continue
        _remark(rows[provider.name], verdict.note)
        rows[provider.name].correct = True
        passed.append(provider)
    return passed


def _measure_memory(setting: Setting, providers: Sequence[Provider], rows: dict[str, Row], progress: Progress) -> None:
    for index, provider in enumerate(providers):
        progress(f"memory of {provider.name}", 0.2 + 0.2 * index / len(providers))
        row = rows[provider.name]
        try:
            peak = memory.measure_in_child(setting, provider)
        except RuntimeError as error:
            _remark(row, str(error))
            continue
        row.peak_mb, row.gradients_mb = peak.peak_mb, peak.gradients_mb
        row.extra_mb = max(0.0, peak.peak_mb - peak.gradients_mb)


def _time(
    op: Op,
    setting: Setting,
    providers: Sequence[Provider],
    rows: dict[str, Row],
    options: Options,
    roofs: Roofs,
    progress: Progress,
) -> None:
    problem = op.problem(setting)
    runnable: dict[str, tuple[Provider, Prepared]] = {}
    summaries = {}
    for index, provider in enumerate(providers):
        progress(f"warming up {provider.name}", 0.4 + 0.1 * index / len(providers))
        try:
            with provider.scope():
                prepared = provider.prepare(problem)
            for call in range(WARM_UP_CALLS):
                call_once_ms(provider, prepared)
                if call == 0:
                    summaries[provider.name] = {name: value.clone() for name, value in prepared.summary().items()}
            prepared.reset()
        except Exception as error:  # a peer may fail in any way; that is a result, not the end of the run
            _fail(rows[provider.name], f"{verify.describe(error)} (at full size)")
            summaries.pop(provider.name, None)
            continue
        runnable[provider.name] = provider, prepared
        _remark(rows[provider.name], prepared.note)
    # The baseline first: it is not ours. Then whatever the op lists first.
    trusted = sorted(runnable, key=lambda name: name != op.baseline)
    formulas = {name: provider.formula for name, (provider, _) in runnable.items()}
    dtypes = {name: verify.dtype_of(provider, setting) for name, (provider, _) in runnable.items()}
    disputed = verify.disagreements(summaries, formulas, dtypes, trusted)
    if disputed and op.referee is not None:
        progress("asking fp64", 0.5)
        rows_to_judge = verify.rows_to_judge(summaries, formulas, trusted)
        formula, judged = op.referee(problem, rows_to_judge)
        for name, provider in [(name, pair[0]) for name, pair in runnable.items() if formulas[name] == formula]:
            reason = verify.errors_against_referee(summaries[name], rows_to_judge, judged, dtypes[name])
            if disputed.get(name, "").startswith(tuple(f"{key} " for key in judged)):
                del disputed[name]
            if reason and provider.is_ours:
                disputed[name] = reason
            elif reason:  # a peer that is less exact still shows how fast it is, with the error beside it
                _remark(rows[name], reason)
    for name, reason in disputed.items():
        _fail(rows[name], reason)
        del runnable[name]
    if not runnable:
        return
    timings = time_interleaved(
        runnable,
        options.min_rounds,
        options.budget_s,
        lambda share: progress("timing", 0.5 + 0.5 * share),
    )
    for name, timing in timings.items():
        _fill_row(rows[name], runnable[name][0], problem, timing, roofs)


def _fill_row(row: Row, provider: Provider, problem: object, timing: Timing, roofs: Roofs) -> None:
    work = provider.work(problem)
    row.median_ms, row.p20_ms, row.p80_ms, row.rounds = dataclasses.astuple(timing)
    row.flops, row.exps, row.bytes = work.flops, work.exps, work.bytes
    row.roofline_fraction = roofs.fraction(work, provider.isa, row.threads, timing.median_ms, row.dtype)


def run(
    jobs: Sequence[tuple[Op, Setting, Sequence[Provider]]],
    options: Options,
    on_setting: Callable[[int, Setting, str, float], None] = lambda index, setting, doing, share: None,
    on_rows: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Run several settings; roofs are measured first, once.

    Args:
        on_setting: told the setting's index, what is being done and which share of the setting is done.
        on_rows: given everything so far after every setting, so that a long run that is stopped leaves its rows.
    """
    provenance = Provenance.here()
    roofs = Roofs(options.quick_roofs)

    def located() -> list[dict[str, Any]]:
        return [{"machine": provenance.machine, **roof} for roof in roofs.to_list()]

    if jobs:
        on_setting(0, jobs[0][1], "measuring the machine's roofs", 0.0)
    isas = {provider.isa for _, setting, providers in jobs for provider in providers if not provider.missing(setting)}
    roofs.prepare(isas, sorted({setting.threads for _, setting, _ in jobs}))
    finished = Run(located(), [])
    for index, (op, setting, providers) in enumerate(jobs):

        def progress(doing: str, share: float, index: int = index, setting: Setting = setting) -> None:
            on_setting(index, setting, doing, share)

        finished.rows += run_setting(op, setting, providers, options, roofs, provenance, progress)
        finished.roofs = located()
        on_rows(finished)
    return finished
