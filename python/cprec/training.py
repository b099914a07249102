"""Training runs: configuration, run folders that resume, and the final figures. Lightning drives the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cprec import checkpoint
from cprec.evaluation import EvaluationReport, evaluate
from cprec.files import read_json, write_json
from cprec.run_folder import RunConfig, RunFolder, versions
from cprec.training_config import TrainingConfig

if TYPE_CHECKING:
    from cprec.data import PreparedData
    from cprec.model import NextItNetConfig

__all__ = [
    "MONITOR",
    "EpochRecord",
    "NonFiniteLossError",
    "RunResult",
    "TrainingConfig",
    "TrainingStateError",
    "best_epoch",
    "is_finished",
    "train",
]

MONITOR = "ndcg@10"


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number. ``step`` is the optimiser step, counted from 0."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class TrainingStateError(ValueError):
    """A training state on disk that cannot be read safely."""


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One epoch: number from 0, optimiser steps so far, mean training loss in nats, validation metrics by name
    ("ndcg@10", ...), seconds of training without validation, and predicted items per second over all devices.
    """

    epoch: int
    steps: int
    train_loss: float
    validation: dict[str, float]
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochRecord:
        return cls(**values)


def best_epoch(history: Sequence[EpochRecord]) -> int:
    """Index of the epoch with the highest validation NDCG@10, the first of equals."""
    return max(range(len(history)), key=lambda index: history[index].validation[MONITOR])


def is_finished(history: Sequence[EpochRecord], config: TrainingConfig) -> bool:
    """Whether a run with this history is over: by its epochs, or by its patience."""
    if len(history) >= config.epochs:
        return True
    return bool(history and config.patience) and len(history) - 1 - best_epoch(history) >= config.patience


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run. ``validation`` and ``test`` are those of the best epoch's weights, which the folder holds."""

    folder: Path
    history: tuple[EpochRecord, ...]
    best_epoch: int
    parameters: int
    validation: EvaluationReport
    test: EvaluationReport

    @property
    def epoch_seconds(self) -> float:
        """Mean training time of an epoch."""
        return sum(record.seconds for record in self.history) / len(self.history)

    def to_dict(self) -> dict[str, Any]:
        """The contents of metrics.json."""
        seconds = [record.seconds for record in self.history]
        tokens = sum(record.seconds * record.tokens_per_second for record in self.history)
        return {
            "parameters": self.parameters,
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "epoch_seconds": self.epoch_seconds,
            "tokens_per_second": tokens / max(sum(seconds), 1e-9),
            "validation": self.validation.to_dict(),
            "test": self.test.to_dict(),
            "history": [record.to_dict() for record in self.history],
        }

    @classmethod
    def read(cls, folder: Path | str) -> RunResult:
        """From the metrics.json of a finished run. Raises FileNotFoundError when there is none, ValueError for another."""
        path = Path(folder) / "metrics.json"
        values = read_json(path, "a finished run")
        try:
            return cls(
                Path(folder),
                tuple(EpochRecord.from_dict(record) for record in values["history"]),
                values["best_epoch"],
                values["parameters"],
                EvaluationReport.from_dict(values["validation"]),
                EvaluationReport.from_dict(values["test"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not that of a finished run, or was changed ({type(error).__name__}: {error}); delete it and "
                "go on with --resume to have it written anew"
            ) from None


def train(
    data: PreparedData,
    model_config: NextItNetConfig,
    config: TrainingConfig,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> RunResult:
    """Train a NextItNet and leave a run folder.

    The folder holds config.json, weights.safetensors (of the best epoch by validation NDCG@10), last/state.ckpt (for
    resuming), logs/ (CSV and TensorBoard) and, once finished, metrics.json and curve.png. Every file appears whole.
    On a CPU a run that was killed and resumed ends with the very same weights as one that was not.

    Args:
        out: the run folder. Must not exist, unless ``resume`` or ``overwrite``.
        resume: go on from the last saved state; a finished run is returned as it is, unless ``config`` allows more
            epochs.
        overwrite: replace an earlier run there; a folder that is not a run is refused all the same. The earlier run goes
            when the new one saves its first state, and stays if that does not come about.
        progress: show a bar (on a terminal) or a line per epoch (elsewhere) on standard error.

    Returns:
        The finished run. In the other processes of a multi-process run this function does not return (they exit).

    Raises:
        BlockingIOError: another run is going on in ``out``.
        FileExistsError: ``out`` exists; FileNotFoundError: nothing to resume.
        ValueError: the model is for another catalogue; accelerator, devices or strategy are not to be had here; on
            resuming, data or configuration differ from the run's; what it is to start from does not fit.
        NonFiniteLossError: the loss became infinite or NaN; the last sound state stays, or nothing if there was none.
        TrainingStateError: the state to resume from is damaged.
        KeyboardInterrupt, SystemExit: on SIGINT, and on SIGTERM with code 143. The last saved state stays.
    """
    if model_config.num_items != data.num_items:
        raise ValueError(
            f"the model is for {model_config.num_items:,} items but {data.folder} holds {data.num_items:,}; "
            "make its configuration from this data"
        )
    run_config = RunConfig.of(data, model_config, config)
    folder = RunFolder(Path(out))
    if str(folder.path.resolve()) == run_config.training.start_from:
        raise ValueError(f"{out} is the run to start from, and would be replaced: choose another folder")
    with contextlib.ExitStack() as lock, _quiet_lightning(), _kept_random_state():
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        # Processes launched for other devices come through here too.
        main = getattr(rank_zero_only, "rank", 0) in (None, 0)
        if main:
            lock.enter_context(folder.held())
            folder.begin(run_config, resume=resume, overwrite=overwrite)
        # Those that torchrun starts do not wait for the main one, and may find the run that it is about to replace.
        goes_on = main or resume
        history = folder.history() if goes_on else []
        if is_finished(history, config):
            if main and folder.metrics.is_file():
                return RunResult.read(folder.path)
            device = torch.device("cpu")
        else:
            if main:
                folder.metrics.unlink(missing_ok=True)  # of a shorter run that is being extended
            try:
                device = _fit(data, run_config, folder, progress, main, goes_on)
            except BaseException:
                if main:
                    folder.drop_if_empty()
                raise
            history = folder.history()
        if not main:
            raise SystemExit(0)
        return _finish(data, config, folder, history, device, progress)


def _fit(
    data: PreparedData, run: RunConfig, folder: RunFolder, progress: bool, main: bool, goes_on: bool
) -> torch.device:
    """Run Lightning's loop to the end, from the folder's state if ``goes_on`` and there is one; the outcome is in the folder.

    Returns:
        The main device.
    """
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from cprec import item_factors, warm_start
    from cprec.lightning_module import (
        LOG_STEPS,
        Patience,
        SafeCheckpointIO,
        TrainingModule,
        TrainingStates,
        announce_epoch,
        progress_callbacks,
    )
    from cprec.model import NextItNet

    config = run.training
    torch.manual_seed(config.seed)
    bars = progress_callbacks(progress)
    announce = functools.partial(announce_epoch, config.epochs) if progress and not bars else None
    model = NextItNet(run.model)
    state = folder.state if goes_on and folder.state.is_file() else None
    if state is None:
        if config.init == "als" and main:  # the others get its parameters before their first step
            item_factors.initialise(model, data, seed=config.seed, progress=progress)
        if config.start_from is not None:
            carried = warm_start.initialise(model, data, config.start_from, length=config.length)
            if progress and main:
                print(f"started from {config.start_from}: {carried}", file=sys.stderr)
    module = TrainingModule(model, data, config, announce)
    states = TrainingStates(
        folder.state, config.checkpoint_every, functools.partial(folder.save_weights, run), folder.forget_replaced
    )
    callbacks: list[Any] = [states, *bars]
    if config.patience:
        callbacks.append(Patience(config.patience))
    try:
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy=config.strategy,
            precision=config.precision,
            max_epochs=config.epochs,
            gradient_clip_val=config.gradient_clip or None,
            logger=[
                CSVLogger(folder.path / "logs", name="csv"),
                TensorBoardLogger(folder.path / "logs", name="tensorboard"),
            ],
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            enable_progress_bar=bool(bars),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=LOG_STEPS,
            default_root_dir=folder.path,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(
            f"accelerator {config.accelerator!r} with devices {config.devices!r} and strategy {config.strategy!r} "
            f"cannot be used here: {' '.join(str(error).split()).rstrip('.!')}. "
            "Choose others: accelerator 'cpu', devices 1 and strategy 'auto' work everywhere"
        ) from error
    with _stopped_by_signals(folder, trainer):
        trainer.fit(module, ckpt_path=state)
    return torch.device(trainer.strategy.root_device)


@contextlib.contextmanager
def _stopped_by_signals(folder: RunFolder, trainer: Any) -> Iterator[None]:
    """Tell people and callers that a signal stopped the loop: Lightning exits with 0 on SIGTERM and with 1 on SIGINT."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    report = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Ctrl-C in a destructor that joins workers, where Python drops it: once more, and the main thread is woken.
            threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        else:
            report(unraisable)

    sys.unraisablehook = again
    try:
        yield
    except (SystemExit, RuntimeError) as stop:  # torch's writer turns a Ctrl-C into the latter
        terminated = isinstance(stop, SIGTERMException)
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if not terminated and cause is None:
            raise
        if trainer.is_global_zero:
            saved = folder.state.is_file()
            print("stopped; go on with --resume" if saved else "stopped before a state was saved", file=sys.stderr)
        raise SystemExit(143) if terminated else KeyboardInterrupt from None
    finally:
        sys.unraisablehook = report


def _finish(
    data: PreparedData,
    config: TrainingConfig,
    folder: RunFolder,
    history: Sequence[EpochRecord],
    device: torch.device,
    progress: bool,
) -> RunResult:
    """Evaluate the best weights; write the curve and, last of all, metrics.json, which marks the run as finished."""
    from cprec.plots import plot_curve

    model = checkpoint.load(folder.path)
    reports = [
        evaluate(
            model,
            data,
            split,
            length=config.length,
            batch_size=config.evaluation_batch_size,
            device=device,
            progress=progress,
        )
        for split in ("valid", "test")
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = RunResult(folder.path, tuple(history), best_epoch(history), parameters, *reports)
    plot_curve(history, folder.path / "curve.png", MONITOR)
    write_json(folder.metrics, {**result.to_dict(), "versions": versions()})
    return result


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's tips, device lists and advice on settings that are chosen here."""
    import lightning.pytorch  # noqa: F401  # sets the level of its loggers when first imported

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", module="torch.utils._pytree", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Training seeds torch's generator at every step; the caller's goes on as if nothing had happened."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
