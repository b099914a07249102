"""The parts of training that Lightning drives: module, training states, progress. Importing this imports Lightning."""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from cprec.batches import ResumableBatches, ordered_batches
from cprec.cuda_graph import GraphedLoss
from cprec.evaluation import TOPN, metrics_of_ranks
from cprec.files import atomic_write
from cprec.optim import build_optimizer, clip_gradients, finish_steps, prepare_step, warmup_factor
from cprec.training import MONITOR, EpochRecord, NonFiniteLossError, TrainingConfig, TrainingStateError

if TYPE_CHECKING:
    from cprec.data import PreparedData
    from cprec.model import NextItNet

LOG_STEPS = 10  # logging at every step costs as much as a small model's step
LOSS_CHECK_STEPS = 50  # on an accelerator, where reading the loss waits for the device


class SafeCheckpointIO(TorchCheckpointIO):
    """Training states on disk: written atomically, read without unpickling anything but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_state(Path(path))


def load_state(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A training state, on the CPU; with ``mmap``, tensors are read when they are used, and checked by nobody.

    Raises:
        TrainingStateError: the file is damaged or holds more than tensors and plain values.
    """
    try:
        if not mmap:  # torch.load compares no checksum
            with zipfile.ZipFile(path) as parts:
                if (damaged := parts.testzip()) is not None:
                    raise zipfile.BadZipFile(f"its checksum says so of {damaged}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise TrainingStateError(
            f"{path} is not a training state that can be read safely ({type(error).__name__}): it is damaged or "
            "was not written by cprec. Start the run again with overwrite"
        ) from error
    return state


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers (dropout) of one optimiser step of one process.

    Drawing every step's numbers from (seed, step) makes them part of the step: a resumed run needs no stored generator
    states, on any number of devices.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def pins_memory(device: torch.device, workers: int, graphed: tuple[int, int] | None) -> bool:
    """Whether batches are pinned. With workers that takes a thread, whose calls of CUDA could meet the capture of a graph."""
    return device.type == "cuda" and not (workers and graphed)


class TrainingModule(pl.LightningModule):
    """NextItNet under Lightning: loss, validation by full ranking, optimiser, and what has to survive a kill."""

    def __init__(
        self,
        model: NextItNet,
        data: PreparedData,
        config: TrainingConfig,
        announce: Callable[[EpochRecord], None] | None = None,
    ) -> None:
        super().__init__()
        self.announce = announce
        self.model = model
        self.data = data
        self.config = config
        self.history: list[EpochRecord] = []
        self.best = -1.0
        self._ranks: list[Tensor] = []
        self._validation: dict[str, float] = {}
        self._loss: GraphedLoss | None = None
        self._clock: float | None = None
        self._session_tokens = self._session_seconds = 0.0
        self._reset_epoch()

    def _reset_epoch(self) -> None:
        self._loss_sum: Tensor | float = 0.0
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._first_bad: Tensor | None = None

    # Loaders

    def train_dataloader(self) -> ResumableBatches:
        from cprec.data import TrainingWindows

        config = self.config
        return ResumableBatches(
            TrainingWindows(self.data.train, config.length, self.data.num_items),
            config.batch_size,
            config.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=config.workers,
            pin_memory=pins_memory(self.trainer.strategy.root_device, config.workers, self._graphed_shape()),
        )

    def val_dataloader(self) -> Any:
        from cprec.data import EvaluationWindows

        return ordered_batches(
            EvaluationWindows(self.data.evaluation("valid"), self.config.length, self.data.num_items),
            self.config.evaluation_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.config.workers,
        )

    # Optimisation

    def setup(self, stage: str) -> None:
        if self.model.config.sparse_embedding and self.trainer.world_size > 1:
            raise ValueError(
                f"sparse_embedding trains on one device, not {self.trainer.world_size}: torch's DDP takes sparse gradients "
                "from nn.Embedding alone. Pass devices 1, or turn sparse_embedding off"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.config.learning_rate, self.config.weight_decay)
        warmup = self.config.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_factor(step, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # not Lightning's own: that takes no sparse gradients, and no fused optimiser under autocast
        if gradient_clip_val:
            clip_gradients(self.parameters(), gradient_clip_val)

    # Training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:  # counted on the host: no wait for the device
            pad = self.data.num_items
            self._batch_tokens = int(((batch[:, 1:] != pad) & (batch[:, :-1] != pad)).sum())
        return batch

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.config.seed, self.global_step, self.global_rank))
        if self._clock is None:
            self._clock = time.perf_counter()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        prepare_step(self.trainer.optimizers[0], self.model.embedding, batch[:, :-1])
        if self._loss is None:
            self._loss = GraphedLoss(self.model, self._graphed_shape())
        loss = self._loss(batch)
        self._watch(loss.detach())
        self._tokens += self._batch_tokens
        self._session_tokens += self._batch_tokens
        return loss

    def _graphed_shape(self) -> tuple[int, int] | None:
        """Of batches whose steps may be replayed from graphs; None under DDP, on a single device too."""
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy):
            return None
        return self.config.batch_size, self.config.length + 1

    def on_train_end(self) -> None:
        self._loss = None  # with the graphs' memory, which the final evaluation may need

    def _watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss is not finite; on a CPU, stop there and then."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        newly_bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad = torch.where(newly_bad, self.global_step, self._first_bad)
        self._loss_sum = self._loss_sum + loss.double()
        self._steps += 1
        if loss.device.type == "cpu" or self._steps % LOSS_CHECK_STEPS == 0:
            self.check_loss()

    def check_loss(self) -> None:
        """Raise NonFiniteLossError if a loss of this epoch was not finite."""
        if self._first_bad is None or (step := int(self._first_bad)) < 0:
            return
        raise self._diverged("the loss is", "at", step)

    def check_parameters(self) -> None:
        """Raise NonFiniteLossError if the last step, whose own loss was still finite, ruined the parameters."""
        if not bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()):
            raise self._diverged("the parameters are", "after", self.global_step - 1)

    def _diverged(self, what: str, when: str, step: int) -> NonFiniteLossError:
        config = self.config
        rate = config.learning_rate * warmup_factor(step, config.warmup_steps)
        advice = ["a lower learning rate"]
        if not config.warmup_steps:
            advice.append("warm-up steps (now none)")
        advice.append(f"gradient clipping (now {config.gradient_clip or 'off'})")
        if config.precision != "32-true":
            advice.append(f"precision 32-true (now {config.precision})")
        return NonFiniteLossError(
            f"{what} not finite {when} step {step} (epoch {self.current_epoch + 1}, learning rate {rate:g}). "
            f"Try {', '.join(advice)}",
            step,
        )

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self._tick()
        if self.global_step % LOG_STEPS:
            return
        self.log("loss", outputs["loss"].detach(), prog_bar=True)
        self.log("tokens/s", self._session_tokens / max(self._session_seconds, 1e-9), prog_bar=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def _tick(self) -> None:
        if self._clock is not None:
            now = time.perf_counter()
            self._seconds += now - self._clock
            self._session_seconds += now - self._clock
            self._clock = now

    # Validation

    def on_validation_epoch_start(self) -> None:
        self.check_loss()
        # once an epoch, always at the same step: states saved within an epoch keep what is pending
        finish_steps(self.trainer.optimizers[0])
        self.check_parameters()
        self._clock = None  # validation is not training time
        self._ranks = []

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        history, target, _ = batch
        with torch.autocast(history.device.type, enabled=False):  # bf16 scores would tie
            try:
                self._ranks.append(self.model.rank(history, target))
            except ValueError as error:
                # finite parameters may be so large that the hidden states, which rank refuses then, are not finite
                if bool(self.model(history).isfinite().all()):
                    raise
                step = self.global_step - 1
                raise self._diverged("the model's hidden states are", "after", step) from error

    def on_validation_epoch_end(self) -> None:
        ranks = torch.cat(self._ranks).cpu().numpy() if self._ranks else np.zeros(0, dtype=np.int64)
        self._ranks = []
        mine = metrics_of_ranks(ranks, TOPN)
        *sums, count = self._over_processes([mean * mine.count for mean in mine.to_dict().values()] + [mine.count])
        self._validation = dict(zip(mine.to_dict(), (value / max(count, 1.0) for value in sums), strict=True))
        for name, mean in self._validation.items():
            self.log(name, mean, prog_bar=name == MONITOR)

    def _over_processes(self, values: list[float]) -> list[float]:
        """Sums over all processes of a run."""
        if self.trainer.world_size == 1:
            return values
        mine = torch.tensor(values, dtype=torch.float64, device=self.trainer.strategy.root_device)
        sums: list[float] = self.trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        return sums

    def on_train_epoch_end(self) -> None:
        self.check_loss()
        loss_sum, steps, tokens = self._over_processes([float(self._loss_sum), self._steps, self._tokens])
        self.history.append(
            EpochRecord(
                epoch=self.current_epoch,
                steps=self.global_step,
                train_loss=loss_sum / max(steps, 1),
                validation=self._validation,
                seconds=self._seconds,
                tokens_per_second=tokens / max(self._seconds, 1e-9),
            )
        )
        self.log("epoch_loss", self.history[-1].train_loss)
        if self.announce is not None and self.trainer.is_global_zero:
            self.announce(self.history[-1])
        self._reset_epoch()

    # State

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tick()
        checkpoint["cprec"] = {
            "history": [record.to_dict() for record in self.history],
            "best": self.best,
            "loss_sum": float(self._loss_sum),
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "world_size": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["cprec"]
        if state["world_size"] != self.trainer.world_size:
            raise ValueError(
                f"the run was trained on {state['world_size']} devices and cannot go on with {self.trainer.world_size}"
                ": the order of the batches would change. Pass the same devices"
            )
        self.history = [EpochRecord.from_dict(record) for record in state["history"]]
        self.best = state["best"]
        self._loss_sum = state["loss_sum"]
        self._steps, self._tokens, self._seconds = state["steps"], state["tokens"], state["seconds"]


class TrainingStates(Checkpoint):
    """Saves the whole training state within and after every epoch, and the weights whenever validation improves."""

    def __init__(
        self, state: Path, every: int, save_best: Callable[[NextItNet], None], after_save: Callable[[], None]
    ) -> None:
        self.state, self.every, self.save_best, self.after_save = state, every, save_best, after_save

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        # the last batch belongs to the save after validation
        inside = batch_idx + 1 < trainer.num_training_batches
        if self.every and inside and trainer.global_step % self.every == 0:
            pl_module.check_loss()
            pl_module.check_parameters()
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        score = pl_module.history[-1].validation[MONITOR]
        if score > pl_module.best:
            pl_module.best = score
            if trainer.is_global_zero:
                self.save_best(pl_module.model)
            trainer.strategy.barrier("best weights")
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.state)
        if trainer.is_global_zero:
            self.after_save()


class TrainingBar(TQDMProgressBar):
    """Lightning's bar on standard error, without the loggers' version number."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        if "tokens/s" in metrics:
            metrics["tokens/s"] = f"{float(metrics['tokens/s']):,.0f}"
        return metrics

    def _on_stderr(self, description: str, position: int, leave: bool) -> Tqdm:
        return Tqdm(
            desc=description,
            position=position,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def init_train_tqdm(self) -> Tqdm:
        return self._on_stderr(self.train_description, 0, True)

    def init_validation_tqdm(self) -> Tqdm:
        return self._on_stderr(self.validation_description, 1, False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # a run resumed within an epoch sees no start of that epoch
        self.train_progress_bar.total = self.total_train_batches
        self._describe(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self._describe(trainer)

    def _describe(self, trainer: pl.Trainer) -> None:
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


class Patience(EarlyStopping):
    """Stops when validation NDCG@10 has not improved for ``patience`` epochs, this run's figure also after a resume."""

    def __init__(self, patience: int) -> None:
        super().__init__(monitor=MONITOR, mode="max", patience=patience, verbose=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the run's history, whatever patience it began with: a run without any keeps no state of this."""
        assert isinstance(pl_module, TrainingModule)
        scores = [record.validation[MONITOR] for record in pl_module.history]
        if scores:
            self.best_score = torch.tensor(max(scores), dtype=torch.float32)
            self.wait_count = len(scores) - 1 - scores.index(max(scores))


def progress_callbacks(show: bool) -> list[Callback]:
    """A progress bar, where standard error is a terminal."""
    return [TrainingBar(refresh_rate=LOG_STEPS)] if show and sys.stderr.isatty() else []


def announce_epoch(epochs: int, record: EpochRecord) -> None:
    """Print a line on an epoch to standard error, for logs and pipes."""
    print(
        f"epoch {record.epoch + 1}/{epochs}: loss {record.train_loss:.4f}, "
        f"{MONITOR} {record.validation[MONITOR]:.4f}, {record.tokens_per_second:,.0f} tokens/s, "
        f"{record.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
