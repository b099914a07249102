"""Finished training runs, and what several of them say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cprec.training import MONITOR


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training run: its settings and what :meth:`cprec.training.RunResult.to_dict` said."""

    settings: dict[str, Any]
    result: dict[str, Any]

    @property
    def validation(self) -> float:
        return float(self.result["validation"]["model"][MONITOR])


def trained_on(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """A setting that names the devices of runs, unless they were CPUs, as most are."""
    devices = sorted({str(result.get("trained_on", "CPU")) for result in results})
    return {} if devices == ["CPU"] else {"trained_on": devices}


def columns(results: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Metric -> one value per result."""
    return {name: [result[name] for result in results] for name in results[0]}


def epochs_to_reach(goals: Sequence[Trained], runs: Sequence[Trained]) -> float | None:
    """Mean number of epochs until a run's validation reaches the best of the goal of its seed; None if one never does."""
    needed = []
    for goal, run in zip(goals, runs, strict=True):
        best = max(record["validation"][MONITOR] for record in goal.result["history"])
        reached = [record["epoch"] + 1 for record in run.result["history"] if record["validation"][MONITOR] >= best]
        if not reached:
            return None
        needed.append(reached[0])
    return float(np.mean(needed))
