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
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
            matches = values["schema"] == SCHEMA and values["settings"] == json.loads(json.dumps(settings))
            result: dict[str, Any] = values["result"]
        except (ValueError, KeyError, TypeError):
            raise BenchmarkError(f"{path} is not a result of benchmarks.paper: delete it to run it again") from None
        if not matches:
            raise BenchmarkError(f"{path} holds other settings than its name says: delete it to run it again")
        return result

    def get_or_run(self, kind: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result that is there, or that of ``run``, which is then kept."""
        found = self.get(kind, settings)
        if found is not None:
            return found
        result = run()
        path = self.path(kind, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "schema": SCHEMA, "kind": kind, "settings": settings, "result": result,
            "provenance": dataclasses.asdict(Provenance.here()),
        }  # fmt: skip
        write_text(path, json.dumps(values, indent=1) + "\n")
        return result
