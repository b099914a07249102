"""The folder of a training run: what is in it, who may write to it, and how it is read back."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec import checkpoint
from cprec.files import write_json

if TYPE_CHECKING:
    from cprec.data import PreparedData
    from cprec.model import NextItNet, NextItNetConfig
    from cprec.training import EpochRecord, TrainingConfig

OWN_NAMES = {"config.json", "weights.safetensors", "last", "metrics.json", "curve.png", "logs"}


def versions() -> dict[str, str]:
    """Versions of what decides the figures of a run."""
    found = {"python": platform.python_version()}
    for name in ("cprec-kernels", "torch", "lightning", "numpy", "polars"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run was started with; config.json holds it."""

    model: NextItNetConfig
    training: TrainingConfig
    data_folder: str
    data_name: str
    data_fingerprint: str

    @classmethod
    def of(cls, data: PreparedData, model: NextItNetConfig, training: TrainingConfig) -> RunConfig:
        return cls(model, training, str(Path(data.folder).resolve()), data.name, data.fingerprint)

    def sections(self) -> dict[str, dict[str, Any]]:
        """What config.json holds beside the model."""
        return {
            "training": self.training.to_dict(),
            "data": {"folder": self.data_folder, "name": self.data_name, "fingerprint": self.data_fingerprint},
            "versions": versions(),
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole config.json: that of a checkpoint, with the sections of a run."""
        return {
            "format": checkpoint.FORMAT,
            "format_version": checkpoint.FORMAT_VERSION,
            "model": self.model.to_dict(),
            **self.sections(),
        }

    @classmethod
    def read(cls, folder: Path | str | os.PathLike[str]) -> RunConfig:
        """The configuration of a run folder.

        Raises:
            CheckpointError: no config.json, or not one that this version reads; ValueError: it is not that of a run.
        """
        from cprec.training import TrainingConfig

        path = Path(folder) / checkpoint.CONFIG_NAME
        model, sections = checkpoint.read_config(folder)
        try:
            data = sections["data"]
            training = TrainingConfig.from_dict(sections["training"])
            return cls(model, training, data["folder"], data["name"], data["fingerprint"])
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: it is not that of a training run, or was changed") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def check_data(self, data: PreparedData) -> None:
        """Raise ValueError unless ``data`` is what the run was trained on."""
        if data.fingerprint != self.data_fingerprint:
            raise ValueError(
                f"{data.folder} is not the data of this run: its fingerprint is {data.fingerprint}, the run was "
                f"trained on {self.data_name!r} with {self.data_fingerprint} (then in {self.data_folder}). "
                "Item numbers would not agree; pass the folder the run was trained on"
            )

    def open_data(self, folder: Path | str | os.PathLike[str] | None = None) -> PreparedData:
        """The prepared data of the run, from where it was or from ``folder``; checked by fingerprint.

        Raises:
            FileNotFoundError: it is no longer there; ValueError: it is other data.
        """
        from cprec.data import PreparedData

        place = Path(self.data_folder if folder is None else folder)
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: the run's prepared data is not there; pass the folder where it is now")
        data = PreparedData.open(place)
        self.check_data(data)
        return data

    def differences(self, other: RunConfig, free: frozenset[str]) -> list[str]:
        """Where ``other`` departs from this run, ``free`` training fields aside, as "name: here, there"."""
        pairs = [
            (f"{part}.{name}", value, theirs.get(name))
            for part, ours, theirs in (
                ("model", self.model.to_dict(), other.model.to_dict()),
                ("training", self.training.to_dict(), other.training.to_dict()),
            )
            for name, value in ours.items()
            if part == "model" or name not in free
        ]
        return [f"{name}: {value!r} in the run, {given!r} now" for name, value, given in pairs if value != given]


class RunFolder:
    """Paths and writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.json"
        self.state = path / "last" / "state.ckpt"

    def begin(self, run: RunConfig, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take over an earlier one as asked; config.json is in it afterwards.

        Raises:
            FileExistsError, FileNotFoundError, ValueError: as :func:`cprec.training.train`.
        """
        from cprec.training import RESUMABLE_FIELDS

        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if resume:
            if not self.config.is_file():
                raise FileNotFoundError(f"{self.path}: no run to resume there; start it without resume")
            earlier = RunConfig.read(self.path)
            if run.data_fingerprint != earlier.data_fingerprint:
                raise ValueError(
                    f"{run.data_folder} (fingerprint {run.data_fingerprint}) is not the data that the run in "
                    f"{self.path} was started on ({earlier.data_folder}, fingerprint {earlier.data_fingerprint}): "
                    "resume with that, or start another run"
                )
            if changed := earlier.differences(run, RESUMABLE_FIELDS):
                raise ValueError(
                    f"the run in {self.path} cannot go on with another configuration: {'; '.join(changed)}. "
                    "Pass the same values, or start another run"
                )
        elif self.path.exists():
            contents = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else {"a file"}
            if not overwrite and contents:
                raise FileExistsError(f"{self.path} exists: resume it, overwrite it, or choose another folder")
            contents = {name for name in contents if not name.startswith(".")}  # left by a write that was killed
            if contents:
                try:
                    RunConfig.read(self.path)
                except ValueError as error:
                    raise FileExistsError(f"{self.path} is not a run and is not overwritten: {error}") from error
                if foreign := sorted(contents - OWN_NAMES):
                    raise FileExistsError(
                        f"{self.path} holds files that are not of a run ({', '.join(foreign[:3])}): "
                        "it is not overwritten; move them or choose another folder"
                    )
                shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for place in (self.path, self.state.parent):
            for leftover in place.glob(".*.*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_json(self.config, run.to_dict())

    def drop_if_empty(self) -> None:
        """Remove the folder when training failed before there was anything to resume or use."""
        if not self.state.is_file():
            shutil.rmtree(self.path, ignore_errors=True)

    def history(self) -> list[EpochRecord]:
        """Epochs of the last saved state; empty without one."""
        from cprec.training import EpochRecord

        if not self.state.is_file():
            return []
        from cprec.lightning_module import load_state

        return [EpochRecord.from_dict(record) for record in load_state(self.state, mmap=True)["cprec"]["history"]]

    def save_weights(self, run: RunConfig, model: NextItNet) -> None:
        """Write weights.safetensors, atomically."""
        checkpoint.save(self.path, model, extra=run.sections())
