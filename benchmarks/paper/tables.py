"""The tables: which models each one trains and measures, and the rows they make."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.paper import recbole
from benchmarks.paper.by_length import from_factors, twice_as_wide, twin_and_compressed
from benchmarks.paper.presets import Preset, Settings
from benchmarks.paper.runs import Trained, columns, trained_on
from benchmarks.paper.speed import measure_models, measure_search, measure_start, missing_for_search
from benchmarks.paper.store import Kept, Store
from benchmarks.paper.table import Row, Table
from benchmarks.run import Provenance
from cprec import checkpoint
from cprec.data import PreparedData
from cprec.evaluation import EvaluationReport
from cprec.model import NextItNet, NextItNetConfig
from cprec.planning import plan_model
from cprec.training import TrainingConfig, train
from cprec_kernels import Partition
from cprec_kernels.planning import Planner

ACCELERATORS = ("cpu", "gpu")  # as Lightning names them
MODEL_SETTINGS = ("dropout", "label_smoothing")  # of what is chosen; the others are of training
BLIND = ((0.05, 0.2), 4)  # cuts at fractions of the catalogue, ranks divided by 4, as one would guess
WIDE, FACTORS = 6, 7  # tables of wider models
ZIPF_INTERACTIONS = 20  # per item, in the catalogues of table 5


class Bench:
    """Runs what the tables ask for, unless it is there already."""

    def __init__(
        self,
        store: Store,
        preset: Preset,
        data: PreparedData | None,
        tell: Callable[[str], None],
        accelerator: str = "cpu",
        times_here: bool = False,
    ) -> None:
        self.store, self.preset, self._data, self.tell, self.accelerator = store, preset, data, tell, accelerator
        self.times_here = times_here
        if accelerator == "gpu" and not torch.cuda.is_available():
            raise BenchmarkError(
                f"there is no CUDA device here (torch {torch.__version__}): train with --accelerator cpu"
            )
        self.device = "CPU" if accelerator == "cpu" else torch.cuda.get_device_name()

    def wide(self) -> Bench:
        """The same for the models of tables 6 and 7."""
        return Bench(self.store, self.preset.wide(), self._data, self.tell, self.accelerator, self.times_here)

    @property
    def data(self) -> PreparedData:
        if self._data is None:
            raise BenchmarkError("this table needs prepared data: pass --data FOLDER, as `cprec prepare` leaves it")
        return self._data

    # Models

    def model(self, partition: Partition | None = None, **options: Any) -> NextItNetConfig:
        """A model of the preset with a partition for both of its tables; uncompressed without one."""
        preset = self.preset
        config = NextItNetConfig.from_plan(
            self.data.num_items, preset.dim, dilations=preset.dilations, repeats=preset.repeats, **options
        )
        if partition is None:
            return config
        return dataclasses.replace(config, input_partition=partition, output_partition=partition)

    def planned(
        self, compression: float | None = None, *, tied: bool = True, sharing: str = "none", **options: Any
    ) -> NextItNetConfig:
        """The model that the planner makes of a compression, by default the preset's; ``tied``: as `cprec train` has it."""
        if compression is None:
            compression = self.preset.compression_for(self.data.num_items)
        # The planner counts against a twin that shares its layers, too; the tables against the one that shares none.
        compression *= self.model(sharing=sharing).num_parameters / self.model().num_parameters
        return plan_model(self.model(tie_tails=tied, sharing=sharing), self.data.counts, compression, **options).config

    def settings(
        self, model: NextItNetConfig, length: int, seed: int, accelerator: str, chosen: Settings
    ) -> tuple[NextItNetConfig, TrainingConfig, dict[str, Any]]:
        """Model, training and name in the store of a run."""
        preset = self.preset
        ours: dict[str, Any] = {name: chosen[name] for name in MODEL_SETTINGS if name in chosen}
        model = dataclasses.replace(model, **ours)
        # Ranks do not depend on it; a GPU would idle over few histories.
        batch: dict[str, Any] = {"evaluation_batch_size": 4096} if accelerator == "gpu" else {}
        training = TrainingConfig(
            length=length, batch_size=preset.batch_size, epochs=preset.epochs, patience=preset.patience, seed=seed,
            accelerator=accelerator, devices=1, **batch,
            **{name: value for name, value in chosen.items() if name not in MODEL_SETTINGS},  # type: ignore[arg-type]
        )  # fmt: skip
        return (
            model,
            training,
            {"data": self.data.fingerprint, "model": model.to_dict(), "training": training.to_dict()},
        )

    def train(self, model: NextItNetConfig, length: int, seed: int, **chosen: float | str) -> Trained:
        """A training run; ``chosen`` are settings of the grid. One that is there already may come from another device."""
        for accelerator in sorted(ACCELERATORS, key=lambda name: name != self.accelerator):
            settings = self.settings(model, length, seed, accelerator, chosen)[2]
            if (found := self.store.get("train", settings)) is not None:
                return Trained(settings, found)
        model, training, settings = self.settings(model, length, seed, self.accelerator, chosen)

        def run() -> dict[str, Any]:
            folder = self.store.work("train", settings)
            self.tell(f"training {model.num_parameters:,} parameters, L = {length}, seed {seed}, {chosen}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            finished = train(
                self.data, model, training, folder, resume=(folder / "config.json").is_file(), progress=False
            )
            shutil.rmtree(folder / "last", ignore_errors=True)  # the state to resume from is three times the weights
            return finished.to_dict() | {"trained_on": self.device}

        return Trained(settings, self.store.get_or_run("train", settings, run))

    def tune(self, model: NextItNetConfig) -> Settings:
        """The settings of the grid with the best validation NDCG@10 at the main length, found one after the other."""
        grid, preset = self.preset.grid, self.preset
        chosen: Settings = {name: values[0] for name, values in grid.items()}
        for name, values in grid.items():
            if len(values) > 1:
                scores = {
                    value: self.train(model, preset.main_length, preset.seeds[0], **chosen | {name: value}).validation
                    for value in values
                }
                chosen[name] = max(scores, key=lambda value: scores[value])
        return chosen

    def load(self, run: Trained) -> NextItNet:
        """The trained model. Raises BenchmarkError when only its figures are left."""
        folder = self.store.work("train", run.settings)
        try:
            return checkpoint.load(folder)
        except (OSError, ValueError) as error:
            path = self.store.path("train", run.settings)
            raise BenchmarkError(
                f"the weights of a finished run cannot be read ({error}); delete {path} and {folder} to train again"
            ) from None

    def row(
        self,
        group: str,
        label: str,
        model: NextItNetConfig,
        length: int,
        chosen: Settings,
        baseline: str = "",
    ) -> tuple[Row, list[Trained]]:
        """A row with the test metrics of all seeds."""
        runs = [self.train(model, length, seed, **chosen) for seed in self.preset.seeds]
        row = Row(group, label, baseline, model.num_parameters, len(runs))
        row.metrics = columns([run.result["test"]["model"] for run in runs])
        row.figures = {
            "compression": self.model().num_parameters / model.num_parameters,
            "middle_parameters": float(model.backbone_parameters),
            "epochs": float(np.mean([run.result["epochs"] for run in runs])),
        }
        inputs, outputs = model.input_partition, model.output_partition
        row.settings = {"cutoffs": list(inputs.cutoffs), "ranks": list(inputs.ranks)}
        if model.tie_tails:
            row.settings["tails"] = "tied"
        row.settings |= chosen
        row.settings |= trained_on([run.result for run in runs])
        if outputs != inputs:
            row.settings |= {"softmax_cutoffs": list(outputs.cutoffs), "softmax_ranks": list(outputs.ranks)}
        return row, runs

    def recbole(self, group: str, length: int) -> Row:
        """RecBole's NextItNet with its own settings, of the first seed; without figures where its package is not to be had."""
        preset, seed = self.preset, self.preset.seeds[0]
        settings = {
            "data": self.data.fingerprint, "length": length, "seed": seed, "epochs": preset.epochs,
            "patience": preset.patience,
        }  # fmt: skip
        row = Row(group, "RecBole NextItNet", "twin")
        if self.store.get("recbole", settings) is None and (reason := recbole.missing()) is not None:
            row.settings = {"skipped": reason}
            return row

        def run() -> dict[str, Any]:
            self.tell(f"training RecBole's NextItNet, L = {length}, seed {seed}")
            device = "cuda" if self.accelerator == "gpu" else "cpu"
            trained = recbole.train(self.data, length, seed, preset.epochs, preset.patience, device)
            return trained | {"trained_on": self.device}

        result = self.store.get_or_run("recbole", settings, run)
        row.parameters, row.seeds = result["parameters"], 1
        row.metrics = columns([result["test"]])
        row.figures = {"epochs": float(result["epochs"])}
        row.settings = {"settings": "its own"} | trained_on([result])
        return row

    def popularity(self, group: str, run: Trained) -> Row:
        """The popularity baseline: it ranks every item at its number, the same for every seed."""
        report = EvaluationReport.from_dict(run.result["test"])
        return Row(group, "popularity", metrics=columns([report.popularity.to_dict()]))

    def speed(self, twin: Trained, models: dict[str, Trained], length: int) -> list[Kept]:
        """Times of steps and searches by machine, see :func:`benchmarks.paper.speed.measure_models`."""
        preset = self.preset
        settings = {
            "twin": twin.settings, "models": {label: run.settings for label, run in models.items()},
            "rounds": preset.rounds, "search_rounds": preset.search_rounds,
        }  # fmt: skip

        def run() -> dict[str, Any]:
            self.tell(f"timing steps and searches, L = {length}")
            loaded = {label: self.load(run) for label, run in models.items()}
            if (self.store.work("train", twin.settings) / "weights.safetensors").is_file():
                own = self.load(twin)
            else:  # trained elsewhere; its times are the same with any weights, as nothing is left out by their values
                own = NextItNet(NextItNetConfig.from_dict(twin.settings["model"]))
            return measure_models(
                own, loaded, self.data, length, preset.batch_size, preset.rounds, preset.search_rounds
            )

        return self.store.by_machine("speed", settings, run, self.times_here)

    def start(self, model: NextItNetConfig) -> list[Kept]:
        """How long it takes to have a model start from factors, by machine."""
        settings = {"data": self.data.fingerprint, "model": model.to_dict()}

        def run() -> dict[str, Any]:
            self.tell("timing the factorisation")
            return measure_start(NextItNet(model), self.data)

        return self.store.by_machine("start", settings, run, self.times_here)


# Tables: each adds rows one by one and says after every one that there is more to keep


def sharing_schemes(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 2: every sharing scheme, on compressed tables and, where the preset says so, on plain ones."""
    bases = {"compressed": bench.planned()}
    if bench.preset.both_tables:
        bases = {"twin": bench.model(), **bases}
    for name, base in bases.items():
        chosen = bench.tune(base)
        for sharing in bench.preset.sharings:
            model = dataclasses.replace(base, sharing=sharing)  # type: ignore[arg-type]
            baseline = "none" if sharing != "none" else ""
            add(bench.row(f"{name} tables", sharing, model, bench.preset.main_length, chosen, baseline)[0])


def clusters_and_ranks(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 3: planned as usual, for other compressions, for loss alone with at most so many clusters; cut blindly."""
    group, length = f"L = {bench.preset.main_length}", bench.preset.main_length
    chosen = bench.tune(bench.planned())
    add(bench.row(group, "twin", bench.model(), length, bench.tune(bench.model()))[0])
    others = bench.preset.other_compressions_for(bench.data.num_items)
    variants: list[tuple[str, dict[str, Any]]] = [
        ("planned", {}),
        ("tails apart", {"tied": False}),
        *((f"planned, {compression:g}x", {"compression": compression}) for compression in others),
        *((f"tails apart, {compression:g}x", {"compression": compression, "tied": False}) for compression in others),
        *((f"at most {count}, by loss", {"max_clusters": count, "objective": "quality"}) for count in bench.preset.clusters),
    ]  # fmt: skip
    for label, options in variants:
        add(bench.row(group, label, bench.planned(**options), length, chosen, "twin")[0])
    fractions, divisor = BLIND
    ranks = [max(1, bench.preset.dim // divisor**j) for j in range(len(fractions) + 1)]
    blind = Partition.from_fractions(bench.data.num_items, fractions, ranks, bench.preset.dim)
    label = f"cut at {' and '.join(f'{fraction:.0%}' for fraction in fractions)}"
    add(bench.row(group, label, bench.model(blind), length, chosen, "twin")[0])


def tables_compressed(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 4: neither table, the embedding, the softmax, both; tails apart, so that one side alone can be compressed."""
    group, length = f"L = {bench.preset.main_length}", bench.preset.main_length
    plain, planned = bench.model(), bench.planned(tied=False)
    models = {
        "neither": plain,
        "embedding": dataclasses.replace(plain, input_partition=planned.input_partition),
        "softmax": dataclasses.replace(plain, output_partition=planned.output_partition),
        "both": planned,
    }
    tuned = {label: bench.tune(model) for label, model in (("neither", plain), ("both", planned))}
    for label, model in models.items():
        chosen = tuned["neither" if label == "neither" else "both"]
        add(bench.row(group, label, model, length, chosen, "neither" if label != "neither" else "")[0])


def search_by_size(bench: Bench, add: Callable[[Row], None]) -> None:
    """Table 5: top-10 of one row over generated catalogues with Zipf counts, planned for the preset's compression."""
    preset = bench.preset
    for size in preset.sizes:
        counts = np.floor(ZIPF_INTERACTIONS * size / np.log(size) / np.arange(1, size + 1))
        plan = Planner(counts, preset.dim).plan(compression=preset.compression)
        settings = {"partition": plan.partition.to_dict(), "rounds": preset.search_rounds}
        row = Row(f"{size:,} items", "compressed", parameters=plan.prediction.parameters)
        row.settings = {"cutoffs": list(plan.partition.cutoffs), "ranks": list(plan.partition.ranks)}
        row.figures = {"items": float(size), "compression": plan.compression}
        if bench.store.get("search", settings) is None and (reason := missing_for_search(size, preset.dim)):
            row.settings["skipped"] = reason
        else:
            bench.tell(f"searching {size:,} generated items")
            timings = bench.store.by_machine(
                "search", settings, lambda plan=plan: measure_search(plan.partition, preset.search_rounds)  # type: ignore[misc]
            )  # fmt: skip
            for kept in timings:
                row.times.append(
                    {**kept.provenance, **{f"{name}_ms": timing["median_ms"] for name, timing in kept.result.items()}}
                )
            row.figures |= {name: value for name, value in row.times[0].items() if name.endswith("_ms")}
        add(row)


TABLES = {
    1: twin_and_compressed,
    2: sharing_schemes,
    3: clusters_and_ranks,
    4: tables_compressed,
    5: search_by_size,
    WIDE: twice_as_wide,
    FACTORS: from_factors,
}
GENERATED = frozenset({5})  # tables that need no data


def run_table(
    number: int,
    store: Store,
    preset: Preset,
    data: PreparedData | None,
    tell: Callable[[str], None],
    accelerator: str = "cpu",
    times_here: bool = False,
) -> Table:
    """Make one table; its file is rewritten after every row.

    Args:
        accelerator: "cpu" or "gpu", for training alone.
        times_here: time models on this machine too, where others have.
    """
    bench = Bench(store, preset, None if number in GENERATED else data, tell, accelerator, times_here)
    about: dict[str, Any] = {}
    asked = preset.compression
    if number not in GENERATED:
        asked = preset.compression_for(bench.data.num_items)
        sizes = bench.data.meta["sizes"]
        about = {
            "name": bench.data.name, "fingerprint": bench.data.fingerprint, "users": sizes["users"],
            "items": sizes["items"], "interactions": sizes["train_interactions"],
        }  # fmt: skip
    described = (preset.wide() if number in (WIDE, FACTORS) else preset).to_dict() | {"compression": asked}
    table = Table(number, about, described, dataclasses.asdict(Provenance.here()))

    def add(row: Row) -> None:
        table.rows.append(row)
        table.write(store.folder)

    TABLES[number](bench, add)
    table.complete = True
    table.write(store.folder)
    return table
