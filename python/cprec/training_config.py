"""How a model is trained: the settings of a run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

PRECISIONS = ("32-true", "bf16-mixed")
INITIALISATIONS = ("random", "als")
SHARDED_STRATEGIES = ("fsdp", "deepspeed", "model_parallel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained. The defaults are those of ``cprec train``; that command also gives the model a dropout of
    0.2, where :class:`~cprec.model.NextItNetConfig` has none unless told.

    Args:
        length: items the model sees, L; windows hold L + 1.
        batch_size: windows per step and device.
        epochs: upper limit.
        learning_rate: of AdamW.
        weight_decay: of matrices and item tables; never of biases and normalisation layers.
        warmup_steps: steps of linear warm-up; 0 for none.
        gradient_clip: largest joint 2-norm of all gradients; 0 for no clipping.
        precision: "32-true" or "bf16-mixed" (autocast).
        patience: stop after this many epochs without a better validation NDCG@10; 0 to go through all epochs.
        seed: of initial weights, batch order and dropout.
        init: where item vectors start: "random", or "als", from a factorisation of which training item follows which
            (:mod:`cprec.item_factors`).
        start_from: folder of a run or an export whose weights the model starts from, items matched by their raw ids
            (:mod:`cprec.warm_start`); kept as a str. None for a model that starts anew.
        accelerator, devices, strategy: passed to Lightning.
        workers: processes that assemble batches; 0 does it in the main process.
        checkpoint_every: steps between training states saved within an epoch; 0 saves after every epoch only.
        evaluation_batch_size: histories per validation batch.

    Raises:
        ValueError: a value outside its range. The message names it.
    """

    length: int = 20
    batch_size: int = 128
    epochs: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    patience: int = 3
    seed: int = 0
    init: Literal["random", "als"] = "random"
    start_from: str | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    workers: int = 0
    checkpoint_every: int = 1000
    evaluation_batch_size: int = 512

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "epochs", "evaluation_batch_size"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "patience", "seed", "workers", "checkpoint_every"):
            _check_integer(name, getattr(self, name), 0)
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        for name in ("learning_rate", "weight_decay", "gradient_clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0")
        for name, known in (("precision", PRECISIONS), ("init", INITIALISATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        folder: object = self.start_from
        if isinstance(folder, os.PathLike):
            object.__setattr__(self, "start_from", os.fspath(folder))
        if self.start_from is not None and not (isinstance(self.start_from, str) and self.start_from):
            raise ValueError(f"start_from must be a folder's name or None, got {self.start_from!r}")
        if self.start_from is not None and self.init != "random":
            raise ValueError(
                f"init {self.init!r} and start_from (--init, --from) both say where item vectors start: leave one out"
            )
        if not isinstance(self.strategy, str):
            raise ValueError(f"strategy must be a name, got {self.strategy!r}")
        if self.strategy.startswith(SHARDED_STRATEGIES):
            raise ValueError(
                f"strategy {self.strategy!r} splits the parameters over devices, which ranking needs whole: use ddp"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without ``init`` and ``start_from`` where they are what runs before them were."""
        values = dataclasses.asdict(self)
        for name, usual in (("init", "random"), ("start_from", None)):
            if values[name] == usual:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """From :meth:`to_dict`. Raises ValueError for unknown keys."""
        if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"unknown keys in a training configuration: {', '.join(unknown)}")
        return cls(**values)


# What a resumed run may change without becoming another run.
RESUMABLE_FIELDS = frozenset(
    {"epochs", "patience", "accelerator", "devices", "strategy", "workers", "checkpoint_every", "evaluation_batch_size"}
)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
