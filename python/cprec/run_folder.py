"""The folder of a training run: what is in it, who may write to it, and how it is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    import fcntl
except ImportError:  # where there is no flock, two runs in one folder are not told from one
    fcntl = None  # type: ignore[assignment]

from cprec import checkpoint
from cprec.files import is_leftover, write_json

if TYPE_CHECKING:
    from cprec.data import PreparedData
    from cprec.model import NextItNet, NextItNetConfig
    from cprec.training import EpochRecord, TrainingConfig

OWN_NAMES = {"config.json", "weights.safetensors", "last", "metrics.json", "curve.png", "logs"}
KILLED_WORKERS = 10.0  # seconds: workers of a killed run hold its lock until they notice, every five
REPLACED = ".replaced-run"  # holds an earlier run until the one that replaces it has a state


def versions() -> dict[str, str]:
    """Versions of what decides the figures of a run."""
    found = {"python": platform.python_version(), "torch": torch.__version__}  # with its build, as in 2.13.0+cpu
    for name in ("cprec-kernels", "lightning", "numpy", "polars"):
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
        if training.start_from is not None:  # as the data: a resumed run may be in another working directory
            training = dataclasses.replace(training, start_from=str(Path(training.start_from).resolve()))
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
        if "training" not in sections and "export" in sections:
            raise ValueError(
                f"{path} is that of an exported model: give the run it was exported from, or use "
                f"cprec.load({os.fspath(folder)!r}).recommend(histories, k) in Python"
            )
        try:
            data = sections["data"]
            training = TrainingConfig.from_dict(sections["training"])
            values = data["folder"], data["name"], data["fingerprint"]
            if not all(isinstance(value, str) for value in values):
                raise TypeError(f"its section data holds {', '.join(map(repr, values))}: names are expected")
            return cls(model, training, *values)
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
        parts: list[tuple[str, Any, Any]] = [
            ("model", self.model, other.model),
            ("training", self.training, other.training),
        ]
        pairs = [
            (f"{part}.{field.name}", getattr(ours, field.name), getattr(theirs, field.name))
            for part, ours, theirs in parts
            for field in dataclasses.fields(ours)
            if part == "model" or field.name not in free
        ]
        return [f"{name}: {value!r} in the run, {given!r} now" for name, value, given in pairs if value != given]


class RunFolder:
    """Paths and writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.json"
        self.state = path / "last" / "state.ckpt"
        self.weights = path / checkpoint.WEIGHTS_NAME
        self.resumed = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made for that and goes again if nothing is put into it.

        The lock is the system's, on the folder itself: it leaves no file, and ends with the process.

        Raises:
            BlockingIOError: a run is going on there.
        """
        made = not self.path.exists()
        if made:
            self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None or not self.path.is_dir():
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            deadline = time.monotonic() + KILLED_WORKERS
            while not _locked(handle):
                if time.monotonic() >= deadline:
                    raise BlockingIOError(
                        f"{self.path}: another run is going on in there: wait for it, stop it, or choose another folder"
                    )
                time.sleep(0.1)
            yield
        finally:
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # there is a run in it now
                    self.path.rmdir()

    def begin(self, run: RunConfig, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take over an earlier one as asked; config.json is in it afterwards.

        Raises:
            FileExistsError, FileNotFoundError, ValueError: as :func:`cprec.training.train`.
        """
        from cprec.training_config import RESUMABLE_FIELDS

        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        self.resumed = resume
        if resume:
            self._settle()
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
            self._check_state(run)
        elif self.path.exists():
            self._check_replaceable(overwrite)
        if overwrite:
            self._set_aside()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            write_json(self.config, run.to_dict())
        except BaseException:
            self.drop_if_empty()
            raise

    def _check_state(self, run: RunConfig) -> None:
        """Raise FileNotFoundError where weights are there, but no state to go on from: training anew would replace them."""
        from cprec.training import is_finished

        if self.weights.is_file() and not self.state.is_file() and not is_finished(self.history(), run.training):
            raise FileNotFoundError(
                f"{self.state}: no such file, and without it the run in {self.path}, whose weights are there, cannot go "
                "on: put it back, or start the run again with overwrite"
            )

    def _check_replaceable(self, overwrite: bool) -> None:
        """Raise FileExistsError unless the folder is empty, or may be overwritten and holds nothing but a run."""
        contents = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else {"a file"}
        if not overwrite and contents:
            raise FileExistsError(f"{self.path} exists: resume it, overwrite it, or choose another folder")
        contents = {name for name in contents if not self._is_leftover(name)}
        if self._has_replaced():
            contents.remove(REPLACED)
        if contents:
            try:
                RunConfig.read(self.path)
            except ValueError as error:
                # a run that was killed while it was set aside or put back has its config.json in either place
                if not self._has_replaced():
                    raise FileExistsError(f"{self.path} is not a run and is not overwritten: {error}") from error
            if foreign := sorted(contents - OWN_NAMES):
                raise FileExistsError(
                    f"{self.path} holds files that are not of a run ({', '.join(foreign[:3])}): "
                    "it is not overwritten; move them or choose another folder"
                )

    def _is_leftover(self, name: str) -> bool:
        return is_leftover(name, {*OWN_NAMES, self.path.resolve().name})  # checkpoint.save stages by the folder's name

    def _remove_leftovers(self) -> None:
        """Delete the temporaries of writes that were killed, and nothing else."""
        found = [entry for entry in self.path.iterdir() if self._is_leftover(entry.name)]
        if self.state.parent.is_dir():
            found += [entry for entry in self.state.parent.iterdir() if is_leftover(entry.name, [self.state.name])]
        for entry in found:
            _remove(entry)

    # Replacing an earlier run. It is moved into a hidden folder within its own: no name beside the run folder is needed
    # and the folder itself may be a mount point, a link or the working directory. The order of the moves tells, after
    # a kill, how far they came: REPLACED holds a config.json exactly while the earlier run is in there as a whole.

    def _has_replaced(self) -> bool:
        place = self.path / REPLACED
        return place.is_dir() and not place.is_symlink() and {entry.name for entry in place.iterdir()} <= OWN_NAMES

    def _settle(self) -> None:
        """Finish what a kill cut short: forgetting the earlier run, moving it away or putting it back."""
        if not self._has_replaced():
            return
        if self.state.is_file():
            self.forget_replaced()
        elif not (self.path / REPLACED / self.config.name).is_file() or not self.config.is_file():
            self._put_back()

    def _set_aside(self) -> None:
        """Move an earlier run out of the way. One that is there already is kept, not a successor without a state."""
        self._settle()
        if self._has_replaced():
            self._put_back()
        if not self.config.is_file():
            return
        place = self.path / REPLACED
        place.mkdir()
        try:
            for name in sorted(OWN_NAMES, key=lambda name: (name == self.config.name, name != "last")):
                if (self.path / name).exists():
                    (self.path / name).rename(place / name)
        except BaseException:
            self._put_back()
            raise

    def _put_back(self) -> None:
        """Undo :meth:`_set_aside`, whatever came of the new run."""
        place = self.path / REPLACED
        if (place / self.config.name).is_file():
            for name in OWN_NAMES:
                _remove(self.path / name)
        for name in sorted(OWN_NAMES, key=lambda name: (name != self.config.name, name == "last")):
            if (place / name).exists():
                (place / name).rename(self.path / name)
        place.rmdir()

    def forget_replaced(self) -> None:
        """Delete the run that this one replaces: from now on there is something to resume here."""
        if self._has_replaced():
            shutil.rmtree(self.path / REPLACED)

    def drop_if_empty(self) -> None:
        """When training failed before there was anything to resume or use: remove what it wrote, and only that.

        A run that was to be overwritten is there again afterwards.
        """
        if self.state.is_file() or self.resumed or not self.path.is_dir():
            return
        if self._has_replaced():
            self._put_back()
            return
        for name in OWN_NAMES:
            _remove(self.path / name)
        self._remove_leftovers()
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.path.rmdir()

    def history(self) -> list[EpochRecord]:
        """Epochs of the last saved state, or of a finished run that has none any more; empty without either."""
        from cprec.training import EpochRecord, RunResult

        if not self.state.is_file():
            return list(RunResult.read(self.path).history) if self.metrics.is_file() else []
        from cprec.lightning_module import load_state

        return [EpochRecord.from_dict(record) for record in load_state(self.state, mmap=True)["cprec"]["history"]]

    def save_weights(self, run: RunConfig, model: NextItNet) -> None:
        """Write weights.safetensors, atomically."""
        checkpoint.save(self.path, model, extra=run.sections())


def _locked(handle: int) -> bool:
    """Lock an open folder for as long as it is open, unless another has; file systems without locks take every one."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
