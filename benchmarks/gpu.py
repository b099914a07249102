"""``python -m benchmarks.gpu``: what a machine with a GPU is asked first, in one command that leaves JSON whatever fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.errors import BenchmarkError, unknown
from benchmarks.gpu_stages import STAGES

ROOT = Path(__file__).parents[1]
PLANS = {
    "check": ("machine", "check", "execution"),
    "bench": ("machine", "bench", "kernels"),
    "tune": ("machine", "tune"),
    "all": STAGES,
}

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def run_in_child(stage: str, path: Path, timeout_s: float) -> str:
    """Run a stage in a process of its own; "" or, in a line, how it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu_stages", stage, str(path.resolve())]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a stage left; none if it left nothing."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
    return rows


def is_bad(row: dict[str, Any]) -> bool:
    """A wrong result, an error, or bits that change from run to run; plain torch on a device promises none."""
    changing = row.get("repeats") is False and row.get("backend") != "reference"
    return row.get("correct") is False or changing or "error" in row


def describe(row: dict[str, Any]) -> str:
    """A row in a line."""
    place = " ".join(str(row[key]) for key in ("op", "size", "dtype", "backend", "provider") if key in row)
    if "skipped" in row:
        return f"skip  {place}: {row['skipped']}"
    if row["kind"] == "check":
        repeats = "" if row.get("repeats", True) else ", NOT REPEATED bit for bit"
        return f"{'ok   ' if row['correct'] else 'WRONG'} {place}{repeats}" + "".join(
            f"\n      {w}" for w in row["wrong"]
        )
    if row["kind"] == "execution":
        return f"{'ok   ' if row['correct'] else 'WRONG'} {place}: {' '.join(row['wrong'] or row['last'])}"
    if row["kind"] == "bench" and ("error" in row or "wrong" in row):
        return f"{place}: {row['error']}" if "error" in row else f"WRONG {place}: {' '.join(row['wrong'])}"
    if row["kind"] == "bench":
        memory = "" if row.get("extra_mb") is None else f", {row['extra_mb']:,.0f} MB beside its inputs"
        graph = f" ({row['graph_ms']:.3f} ms from a CUDA graph)" if "graph_ms" in row else ""
        note = f"; {row['note']}" if "note" in row else ""
        return f"{place}: {row['median_ms']:.3f} ms{graph}{memory}{note}"
    if row["kind"] == "tune":
        return f"{place}: {row['table_ms']:.3f} ms with the tables' tiles, {row['tuned_ms']:.3f} ms with the fastest"
    if row["kind"] == "tile":
        place = f"{row['kernel']} rank {row['rank']} {row['dtype']}"
        return f"{place}: the table's tile" if row["kept"] else f"{place}: {row['tile']}"
    if row["kind"] == "op":
        longest = ", ".join(f"{kernel[:40]} {ms:.3f}" for kernel, ms in row["longest"][:3])
        return f"{place}: {row['call_ms']:.3f} ms, {row['kernels']} kernels {row['device_ms']:.3f} ms ({longest})"
    if row["kind"] == "kernel":
        floor = f", {row['over_floor']:.2f} times its floor" if "over_floor" in row else ""
        return f"{place}: {row['kernel']} {row['launch']}: {row['ms']:.3f} ms{floor}"
    return ", ".join(f"{key} {value}" for key, value in row.items())


@app.command()
def gpu(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for a JSON file per stage.")],
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all stages together.")] = 540.0,
    stage: Annotated[
        str, typer.Option(help="check, bench, tune or all; each begins with the machine's own rates.")
    ] = "all",
) -> None:
    """Look at a machine with a GPU: versions and rates, every op against fp64, how they run, then times against peers.

    The check runs every op against fp64, then `pytest -m gpu` (CUDA graphs, compilation, streams, waiting for the device,
    repeated bits) and compute-sanitizer where that is installed. The bench times every op beside torch's ways to do the
    like, with the memory each takes, and the kernels of a training step beside the least time that arithmetic allows; what
    ours return is compared with fp64 first, in part. The tuning times a few tiles beside each of the tables' and leaves the
    fastest in triton-tiles.json, in the folder.

    Every stage is a process of its own, gets what is left of the budget, and writes its rows one by one: a fault or the
    end of the budget costs only what was not reached. The first run compiles, which takes a minute or two.

    Exit codes: 0 all well, 1 a stage failed or a result is wrong, 2 wrong usage or no CUDA device.

    Example: [bold]python -m benchmarks.gpu --out gpu-run --stage check[/]
    """
    if stage not in PLANS:
        raise unknown("--stage", stage, PLANS)
    if not torch.cuda.is_available():
        raise BenchmarkError(f"there is no CUDA device here (torch {torch.__version__}); nothing was run")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    bad = 0
    for name in PLANS[stage]:
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)
        failure = run_in_child(name, path, max(1.0, end - time.monotonic()))
        rows = read_rows(path)
        for row in rows:
            typer.echo(describe(row))
        wrong = sum(is_bad(row) for row in rows)
        bad += wrong + bool(failure)
        typer.echo(f"{name}: {len(rows)} rows, {wrong} bad" + (f"; the stage failed: {failure}" if failure else ""))
    typer.echo(f"results are in {out}")
    if bad:
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong usage, or no device, is one line and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m benchmarks.gpu")
    except BenchmarkError as error:
        sys.stderr.write(f"benchmarks.gpu: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
