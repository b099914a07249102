"""Finished work on disk: one JSON file per run, found again by its settings, so that a table goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.results import write_text
from benchmarks.run import Provenance

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Kept:
    """A result and where it is from: a :class:`benchmarks.run.Provenance` as plain values."""

    result: dict[str, Any]
    provenance: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder of a paper's results. Files are named by kind and by a digest of the settings."""

    folder: Path

    def key(self, kind: str, settings: dict[str, Any]) -> str:
        """The name of a file, without its ending."""
        text = json.dumps([kind, settings], sort_keys=True)
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def path(self, kind: str, settings: dict[str, Any]) -> Path:
        return self.folder / "finished" / f"{self.key(kind, settings)}.json"

    def work(self, kind: str, settings: dict[str, Any]) -> Path:
        """A folder for what a run leaves besides its figures."""
        return self.folder / "runs" / self.key(kind, settings)

    def get(self, kind: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result for these settings; None when there is none yet.

        Raises:
            BenchmarkError: the file is damaged, or holds other settings than its name says.
        """
        path = self.path(kind, settings)
        return self._read(path, settings).result if path.is_file() else None

    def get_or_run(self, kind: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result that is there, or that of ``run``, which is then kept."""
        found = self.get(kind, settings)
        if found is None:
            found = run()
            self._write(self.path(kind, settings), kind, settings, found)
        return found

    def by_machine(
        self, kind: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]], here_too: bool = False
    ) -> list[Kept]:
        """What machines gave for these settings, the first one first; that of ``run`` where none has.

        Args:
            here_too: run on this machine, unless one of those that are there is from it, and keep that beside them.
        """
        path = self.path(kind, settings)
        self.get_or_run(kind, settings, run)
        others = sorted(path.parent.glob(f"{path.stem}-*.json"))
        kept = [self._read(file, settings) for file in (path, *others)]
        here = Provenance.here()
        if here_too and here.machine not in {each.provenance["machine"] for each in kept}:
            digest = hashlib.sha256(here.machine.encode()).hexdigest()[:8]
            beside = path.with_name(f"{path.stem}-{digest}.json")
            self._write(beside, kind, settings, run())
            kept.append(self._read(beside, settings))
        return [kept[0], *sorted(kept[1:], key=lambda each: str(each.provenance["machine"]))]

    def _read(self, path: Path, settings: dict[str, Any]) -> Kept:
        try:
            values = json.loads(path.read_bytes())
            matches = values["schema"] == SCHEMA and values["settings"] == json.loads(json.dumps(settings))
            kept = Kept(values["result"], values["provenance"])
        except (ValueError, KeyError, TypeError):
            raise BenchmarkError(f"{path} is not a result of benchmarks.paper: delete it to run it again") from None
        if not matches:
            raise BenchmarkError(f"{path} holds other settings than its name says: delete it to run it again")
        return kept

    def _write(self, path: Path, kind: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "schema": SCHEMA, "kind": kind, "settings": settings, "result": result,
            "provenance": dataclasses.asdict(Provenance.here()),
        }  # fmt: skip
        write_text(path, json.dumps(values, indent=1) + "\n")
