"""``cprec demo``: a generated catalogue, the uncompressed twin and the compressed model trained alike, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cprec import checkpoint
from cprec.data import EvaluationWindows, PreparedData, prepare_synthetic
from cprec.files import atomic_write, is_leftover, read_json, write_json
from cprec.model import NextItNet, NextItNetConfig
from cprec.progress import staged_progress
from cprec.ranking import top_items
from cprec.training import RunResult, TrainingConfig, train

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cprec.evaluation import Metrics

TOP = 10
MARKER = ".cprec-demo"  # written first of all, so that a demo that was stopped can be told from a user's folder
FIGURES = "comparison.json"
NAMES = ("twin", "compressed")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the two models and what was measured of it. Latencies in ms for one history, top 10 of all items."""

    name: str
    parameters: int
    epoch_seconds: float
    hr: float
    ndcg: float
    mrr: float
    latency_ms: float
    latency_p20_ms: float
    latency_p80_ms: float


def run_demo(
    out: Path, *, items: int, users: int, epochs: int, seed: int = 0, overwrite: bool = False, quiet: bool = False
) -> list[Contender]:
    """Generate, train both, evaluate both, print, and leave everything in ``out``.

    Raises:
        FileExistsError: ``out`` holds something that is not of a demo, or a finished demo and ``overwrite`` is False. A
            demo that was stopped is started again.
        ValueError: sizes too small to cut into clusters.
    """
    from rich.console import Console

    config = NextItNetConfig.from_plan(items, 64, [0.05, 0.2], [64, 16, 4], dilations=(1, 4), repeats=1, dropout=0.1)
    training = TrainingConfig(
        length=20, batch_size=64, epochs=epochs, learning_rate=2e-3, patience=0, seed=seed, checkpoint_every=0
    )
    _claim(out, overwrite)
    console = Console()
    console.print(f"[bold]1. data[/]: {users:,} sequences over {items:,} items, Zipf popularity ({out / 'data'})")
    with staged_progress(not quiet) as progress:
        data = prepare_synthetic(out / "data", items, users, seed=seed, overwrite=True, progress=progress)
    results: dict[str, RunResult] = {}
    for step, (name, model_config) in enumerate(zip(NAMES, (config.twin(), config), strict=True), start=2):
        console.print(f"[bold]{step}. {name}[/]: {model_config.num_parameters:,} parameters, {epochs} epochs")
        results[name] = train(data, model_config, training, out / name, overwrite=True, progress=not quiet)
    models = {name: checkpoint.load(out / name) for name in NAMES}
    latencies = measure_latency(models, data, training.length)
    contenders = [_contender(name, results[name], latencies[name]) for name in NAMES]
    popularity = results["twin"].test.popularity
    write_json(
        out / FIGURES,
        {
            "models": [dataclasses.asdict(contender) for contender in contenders],
            "popularity": popularity.to_dict(),
            "settings": {"items": items, "users": users, "epochs": epochs, "seed": seed, "threads": torch.get_num_threads()},
        },
    )  # fmt: skip
    plot_comparison(contenders, results, out / "comparison.png")
    console.print(comparison_table(contenders, popularity))
    _show_users(console, models["compressed"], data, training.length)
    console.print(f"plots and runs: {out / 'comparison.png'}, {out / 'twin'}, {out / 'compressed'}")
    console.print("with your own data: cprec prepare FILE --out data; cprec train data --out run")
    return contenders


def _claim(out: Path, overwrite: bool) -> None:
    """Make and mark ``out``, unless it holds something that is not ours to replace."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder with --out")
    contents = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    ours = {"data", *NAMES, FIGURES, "comparison.png", MARKER}
    leftovers = {name for name in contents if is_leftover(name, ours)}
    if foreign := sorted(contents - ours - leftovers):
        raise FileExistsError(f"{out} holds {foreign[0]}, which is not of a demo; choose another folder with --out")
    if contents - leftovers and MARKER not in contents:
        raise FileExistsError(
            f"{out} holds {min(contents - leftovers)} but no {MARKER}, so it is not a folder that a demo made; "
            "choose another one with --out"
        )
    if (name := _data_name(out / "data")) not in (None, "synthetic"):
        raise FileExistsError(
            f"{out / 'data'} holds the prepared data {name!r}, which is not of a demo; "
            "move it away, or choose another folder with --out"
        )
    if FIGURES in contents and not overwrite:
        raise FileExistsError(
            f"{out} holds a demo from before (its figures are in {out / FIGURES}); "
            "pass --overwrite to run it again, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"written by": "cprec demo"})
    for name in leftovers:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def _data_name(folder: Path) -> str | None:
    """The name in a prepared folder; None where there is none to read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(folder / "meta.json", "prepared data")["name"])
    return None


def measure_latency(
    models: dict[str, NextItNet], data: PreparedData, length: int, rounds: int = 30
) -> dict[str, list[float]]:
    """Milliseconds of a top-10 over the whole catalogue for one history, models taking turns."""
    windows = EvaluationWindows(data.evaluation("test"), length, data.num_items)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(-3, rounds):  # the first turns warm up
            history = windows[turn % len(windows)][0][None]
            for name, model in models.items():
                start = time.perf_counter()
                model.topk(history, TOP)
                if turn >= 0:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _contender(name: str, result: RunResult, latency_ms: Sequence[float]) -> Contender:
    p20, p80 = (statistics.quantiles(latency_ms, n=5)[i] for i in (0, 3))
    metrics = result.test.model
    # The first epoch pays for warming up; with three or more the median leaves it out.
    epoch_seconds = statistics.median(record.seconds for record in result.history)
    return Contender(
        name, result.parameters, epoch_seconds, metrics.hr[TOP], metrics.ndcg[TOP], metrics.mrr[TOP],
        statistics.median(latency_ms), p20, p80,
    )  # fmt: skip


def comparison_table(contenders: Sequence[Contender], popularity: Metrics) -> Table:
    """The models side by side, with the popularity baseline's metrics last."""
    from rich import box
    from rich.table import Table

    table = Table(title="test set, all items ranked", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in (*(contender.name for contender in contenders), "popularity"):
        table.add_column(heading, justify="right")
    largest = max(contender.parameters for contender in contenders)
    table.add_row("parameters", *(f"{c.parameters:,}" for c in contenders), "-")
    table.add_row("compression", *(f"{largest / c.parameters:.2f}x" for c in contenders), "-")
    table.add_row("seconds per epoch", *(f"{c.epoch_seconds:.1f}" for c in contenders), "-")
    latencies = (f"{c.latency_ms:.2f} ({c.latency_p20_ms:.2f}-{c.latency_p80_ms:.2f})" for c in contenders)
    table.add_row(f"top-{TOP} of one history, ms (p20-p80)", *latencies, "-")
    table.add_row(f"HR@{TOP}", *(f"{c.hr:.4f}" for c in contenders), f"{popularity.hr[TOP]:.4f}")
    table.add_row(f"NDCG@{TOP}", *(f"{c.ndcg:.4f}" for c in contenders), f"{popularity.ndcg[TOP]:.4f}")
    table.add_row(f"MRR@{TOP}", *(f"{c.mrr:.4f}" for c in contenders), f"{popularity.mrr[TOP]:.4f}")
    return table


def _show_users(console: Console, model: NextItNet, data: PreparedData, length: int, count: int = 3) -> None:
    """Histories of a few users, what the model recommends, and whether the hidden item is among it."""
    split = data.evaluation("test")
    histories = [split.histories[i].tolist() for i in range(min(count, len(split)))]
    best = top_items(model, histories, TOP, length=length, popularity=torch.zeros(data.num_items))
    for i, (history, top) in enumerate(zip(histories, best, strict=True)):
        hidden = int(split.targets[i])
        seen = " ".join(data.catalogue.decode(history[-8:]))
        marked = [
            f"[bold green]{name}[/]" if item == hidden else name
            for item, name in zip(top.items, data.catalogue.decode(top.items), strict=True)
        ]
        console.print(f"user {split.user_ids[i]}: ... {seen}")
        console.print(f"  top {TOP}: {' '.join(marked)}   (next was {data.catalogue.decode([hidden])[0]})")


def plot_comparison(contenders: Sequence[Contender], results: dict[str, RunResult], path: Path) -> None:
    """Bars for parameters, epoch time and latency, and validation NDCG@10 by epoch, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    bars: list[tuple[str, list[float]]] = [
        ("parameters (million)", [c.parameters / 1e6 for c in contenders]),
        ("seconds per epoch", [c.epoch_seconds for c in contenders]),
        (f"top-{TOP} for one history (ms)", [c.latency_ms for c in contenders]),
    ]
    colors = ("tab:gray", "tab:blue")
    for axis, (title, values) in zip(axes[:3], bars, strict=True):
        drawn = axis.bar([c.name for c in contenders], values, color=colors)
        axis.bar_label(drawn, fmt="%.3g")
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
    for (name, result), color in zip(results.items(), colors, strict=True):
        metric = [record.validation[f"ndcg@{TOP}"] for record in result.history]
        axes[3].plot(range(1, len(metric) + 1), metric, "o-", label=name, color=color)
    axes[3].set_title(f"validation NDCG@{TOP} by epoch", fontsize=10)
    best = max(record.validation[f"ndcg@{TOP}"] for result in results.values() for record in result.history)
    axes[3].set_ylim(0, 1.1 * best or 1)
    axes[3].xaxis.get_major_locator().set_params(integer=True)
    axes[3].legend(frameon=False)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
