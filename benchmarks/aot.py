"""``python -m benchmarks.aot``: every Triton kernel compiled ahead of time and held to limits, without a GPU.

A module of ``cprec_kernels._triton`` that defines ``aot_cases(arch)`` takes part; it yields (name, kernel, signature,
constexprs, num_warps, num_stages, enable_fp_fusion). Results are recorded per version of Triton, because another compiler
writes other code.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import sass
from benchmarks.errors import BenchmarkError
from benchmarks.results import write_text

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "gpu" / "aot.json"
PAGE = ROOT / "docs" / "gpu-kernels.md"
PACKAGE = "cprec_kernels._triton"
SCHEMA = 1

ARCHES = (80, 90)
STACK_LIMIT = 64
# Bytes of shared memory that one block can have (CUDA programming guide, by compute capability).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
GROWTH_LIMIT = 1.15
# fp16 has the tiles of bf16, and ranks between others have tiles between theirs.
COARSE = re.compile(r"^(?!.*(fp16|/(32|64|256)$))")
TOGETHER = 8  # kernels that one process compiles before it has them disassembled


@dataclasses.dataclass(frozen=True)
class Row:
    """One case on one architecture. ``error`` is set, and the counts are 0, where it did not compile.

    Attributes:
        dot: it multiplies matrices of a 16-bit type. matrix: matrix instructions in its code.
        shared: bytes per block. stack: bytes per thread. spills: loads and stores of them in innermost loops.
        hot: instructions of the hot loop. per_logit: these per logit of a tile of BLOCK_T x BLOCK_V, in one lane.
    """

    name: str
    arch: int
    warps: int
    stages: int
    error: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    spills: int = 0
    dot: bool = False
    matrix: int = 0
    instructions: int = 0
    hot: int = 0
    per_logit: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.arch


@dataclasses.dataclass(frozen=True)
class Record:
    """What one version of Triton made of the cases. sources: :func:`sources` of the kernels, "" in older records."""

    triton: str
    ptxas: str
    date: str
    rows: list[Row]
    sources: str = ""


def problems(row: Row, recorded: Row | None) -> list[str]:
    """Everything that is wrong with a row; ``recorded`` is what the same version of Triton gave earlier."""
    if row.error:
        return [f"does not compile: {row.error}"]
    found = []
    if row.spills:
        found.append(f"{row.spills} loads and stores of spilled registers in innermost loops")
    if row.stack > STACK_LIMIT:
        found.append(f"stack of {row.stack} bytes per thread, over {STACK_LIMIT}")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, over the {SHARED_LIMIT[row.arch]} of sm_{row.arch}")
    if row.dot and not row.matrix:
        found.append("a product of 16-bit matrices without matrix instructions")
    if recorded is not None and not recorded.error:
        unit, now, before = "per logit", row.per_logit, recorded.per_logit
        if now is None or before is None:
            unit, now, before = "in the hot loop", row.hot, recorded.hot
        if now > GROWTH_LIMIT * before + 1e-9:
            found.append(f"{now:g} instructions {unit}, over {GROWTH_LIMIT} times the recorded {before:g}")
    return found


# Compiling


def modules() -> list[str]:
    """Names of the kernel modules that have cases."""
    package = importlib.import_module(PACKAGE)
    names = [info.name for info in pkgutil.iter_modules(package.__path__, f"{PACKAGE}.")]
    return [name for name in names if hasattr(importlib.import_module(name), "aot_cases")]


def sources(folder: Path) -> str:
    """A digest of a package's code: its syntax trees, so that comments and line numbers do not count.

    Python's minor versions write trees differently: by another one than the record's everything is taken for changed.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(f"{path.name}\n{ast.dump(ast.parse(path.read_bytes()))}\n".encode())
    return digest.hexdigest()


def package_sources() -> str:
    """:func:`sources` of the kernels."""
    return sources(Path(importlib.import_module(PACKAGE).__path__[0]))


def cases(
    names: Sequence[str], arches: Sequence[int], pattern: str = "", coarse: bool = False
) -> list[tuple[str, int, str]]:
    """Module, architecture and name of every case whose name matches."""
    found = [
        (module, arch, case[0])
        for module in names
        for arch in arches
        for case in importlib.import_module(module).aot_cases(arch)
        if re.search(pattern, case[0]) and (not coarse or COARSE.search(case[0]))
    ]
    keys = [(name, arch) for _, arch, name in found]
    twice = sorted({name for name, arch in keys if keys.count((name, arch)) > 1})
    if twice:
        raise BenchmarkError(f"several cases are named {', '.join(twice)}")
    return found


def _aligned(signature: Sequence[Any], path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Places of all pointers, also those in tuples: torch's allocations begin at multiples of 16 bytes."""
    for index, kind in enumerate(signature):
        if isinstance(kind, tuple):
            yield from _aligned(kind, (*path, index))
        elif kind.startswith("*"):
            yield (*path, index)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A row without the counts of its code, that code, and the logits of its tile, 0 where it has none."""

    row: Row
    code: bytes = b""
    tile: int = 0


def compile_case(module: str, arch: int, name: str) -> Compiled:
    """Compile one case. Never raises: what went wrong is the row's error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (case,) = (c for c in importlib.import_module(module).aot_cases(arch) if c[0] == name)
    _, kernel, signature, constexprs, warps, stages, fusion = case
    row = Row(name, arch, warps, stages)
    try:
        attributes = {path: [["tt.divisibility", 16]] for path in _aligned(list(signature.values()))}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        used, code = sass.usage(compiled.asm["cubin"]), sass.machine_code(compiled.asm["cubin"])
    except Exception as error:
        return Compiled(_failed(row, error))
    row = dataclasses.replace(
        row,
        registers=used.registers,
        stack=used.stack,
        shared=compiled.metadata.shared,
        dot=bool(re.search(r"\btt\.dot\b[^\n]*x(bf16|f16)>", compiled.asm["ttir"])),
    )
    return Compiled(row, code, constexprs.get("BLOCK_T", 0) * constexprs.get("BLOCK_V", 0))


def _failed(row: Row, error: Exception) -> Row:
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    return dataclasses.replace(row, error=f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])


def compile_cases(jobs: Sequence[tuple[str, int, str]]) -> list[Row]:
    """Rows of jobs of one architecture. Never raises."""
    compiled = [compile_case(*job) for job in jobs]
    codes = [each.code for each in compiled if each.code]
    try:
        counts = iter(sass.disassemble(codes, jobs[0][1]) if codes else [])
    except Exception as error:
        return [each.row if each.row.error else _failed(each.row, error) for each in compiled]
    return [_counted(each, next(counts)) if each.code else each.row for each in compiled]


def _counted(compiled: Compiled, code: sass.Code) -> Row:
    row, tile = compiled.row, compiled.tile
    per_logit = round(code.hot * row.warps * 32 / tile, 2) if tile else None
    return dataclasses.replace(row, **dataclasses.asdict(code), per_logit=per_logit)


def compile_all(jobs: Sequence[tuple[str, int, str]], processes: int, show: Callable[[Row], None]) -> list[Row]:
    """Rows of all jobs, in their order."""
    context = multiprocessing.get_context("spawn")
    same = [list(group) for _, group in itertools.groupby(sorted(jobs, key=lambda job: job[1]), lambda job: job[1])]
    parts = [group[at : at + TOGETHER] for group in same for at in range(0, len(group), TOGETHER)]
    rows = {}
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        running = {pool.submit(compile_cases, part): part for part in parts}
        for future in concurrent.futures.as_completed(running):
            for job, row in zip(running[future], future.result(), strict=True):
                rows[job] = row
                show(row)
    return [rows[job] for job in jobs]


def _ptxas() -> str:
    said = subprocess.run([sass.tools() / "ptxas", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V([\d.]+)", said)
    return found.group(1) if found else "unknown"


# The record and the page


def read_record(path: Path) -> dict[str, Record]:
    """Recorded results by Triton's version; none when there is no file.

    Raises:
        BenchmarkError: not a file of ours.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != SCHEMA:
            raise BenchmarkError(f"{path} has schema {values['schema']}, this version reads {SCHEMA}")
        records = [Record(**record | {"rows": [Row(**row) for row in record["rows"]]}) for record in values["records"]]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"{path} was not written by `python -m benchmarks.aot --record`: {error}") from None
    return {record.triton: record for record in records}


def write_record(path: Path, records: dict[str, Record]) -> None:
    """Write the record, atomically."""
    ordered = [dataclasses.asdict(records[version]) for version in sorted(records, key=_version)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"schema": SCHEMA, "records": ordered}, indent=1) + "\n")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


PAGE_HEAD = """\
# GPU kernels, as compiled

<!-- Generated by `python -m benchmarks.aot --record`; edit benchmarks/aot.py, not this page. -->

Every Triton kernel is compiled ahead of time for sm_80 (A100) and sm_90 (H100, H200), which needs no GPU, and its machine
code is read. Nothing on this page was timed. A kernel fails when it does not compile, spills registers in an innermost loop,
has more than 64 bytes of stack per thread or more shared memory than the architecture gives a block, multiplies 16-bit
matrices without matrix instructions, or when its hot loop grows beyond 1.15 times the instructions recorded here for the
same Triton.

Registers and stack are per thread, shared memory is per block. "Hot loop" counts the instructions of the innermost loop with
most matrix instructions (without any: of the longest one; without a loop: of the kernel), "per logit" divides them by a
lane's logits in a tile.
"""
COLUMNS = (
    "kernel",
    "sm",
    "warps",
    "registers",
    "stack",
    "shared KB",
    "matrix instr.",
    "hot loop",
    "per logit",
    "limits",
)


def page(records: dict[str, Record]) -> str:
    """``docs/gpu-kernels.md``: the newest Triton's table, and what the others say in a line each."""
    parts = [PAGE_HEAD]
    versions = sorted(records, key=_version, reverse=True)
    for index, version in enumerate(versions):
        record = records[version]
        failing = [(row, found) for row in record.rows if (found := problems(row, None))]
        parts.append(
            f"## Triton {version}\n\n{len(record.rows)} compilations with ptxas {record.ptxas}, {record.date}; "
            f"{len(failing)} outside the limits.\n"
        )
        if index == 0:
            parts.append(_table(record.rows))
        parts.extend(f"- `{row.name}`, sm_{row.arch}: {'; '.join(found)}\n" for row, found in failing)
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * 2 + "---:|" * (len(COLUMNS) - 3) + "---|"]
    for row in rows:
        cells = [f"`{row.name}`", row.arch, row.warps, row.registers, row.stack, f"{row.shared / 1024:.1f}"]
        cells += [row.matrix, row.hot, "" if row.per_logit is None else row.per_logit]
        lines.append(
            f"| {' | '.join(str(cell) for cell in cells)} | {'outside' if problems(row, None) else 'within'} |"
        )
    return "\n".join(lines) + "\n"


# The command


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda row: bar.update(task, advance=1, description=f"{row.name} sm_{row.arch}")


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def aot(
    arch: Annotated[list[int] | None, typer.Option(help="80, 90; repeat it. Default: both.")] = None,
    kernels: Annotated[str, typer.Option(help="Only cases whose name this regular expression finds.")] = "",
    coarse: Annotated[bool, typer.Option(help="Every kernel, not every tile: no fp16, some ranks left out.")] = False,
    changed: Annotated[
        bool, typer.Option(help="Every tile if a kernel's code is not what was recorded, otherwise as --coarse.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Kernels compiled at a time.")] = 2,
    record: Annotated[bool, typer.Option(help="Make the results the recorded ones, and write the page.")] = False,
    record_file: Annotated[Path, typer.Option(help="The record.", show_default=False)] = RECORD,
    page_file: Annotated[Path, typer.Option(help="The page that --record writes.", show_default=False)] = PAGE,
) -> None:
    """Compile every Triton kernel for sm_80 and sm_90 and fail where it spills, outgrows the chip or gets slower code.

    Needs no GPU: Triton's wheel carries the assembler and the disassembler. About a second per kernel and architecture.

    A kernel takes part when its module in cprec_kernels/_triton defines [bold]aot_cases(arch)[/]. After a change for the
    better, or with a new kernel, [bold]--record[/] keeps the new numbers; commit them with docs/gpu-kernels.md.

    Exit codes: 0 all within the limits, 1 some not, 2 wrong usage.

    Example: [bold]python -m benchmarks.aot --arch 90 --kernels embedding[/]
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BenchmarkError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    wrong = [number for number in arch or ARCHES if number not in SHARED_LIMIT]
    if wrong:
        raise BenchmarkError(f"--arch {wrong[0]} is not one of {', '.join(map(str, SHARED_LIMIT))}")
    if coarse and changed:
        raise BenchmarkError("--coarse and --changed exclude one another: --changed is --coarse where it may be")
    if record and (kernels or arch or coarse or changed):
        raise BenchmarkError("--record keeps whole runs: leave out --arch, --kernels, --coarse and --changed")
    try:
        import triton
    except ImportError:
        raise BenchmarkError("Triton is not installed here: pip install triton") from None
    try:
        re.compile(kernels)
    except re.error as error:
        raise BenchmarkError(f"--kernels {kernels} is not a regular expression: {error}") from None
    records = read_record(record_file)
    earlier = records.get(triton.__version__)
    now = package_sources()
    if changed:
        recorded = earlier.sources if earlier else ""
        coarse = recorded == now
        state = {now: "is of this code", "": "does not say of what"}.get(recorded, "is of other code")
        typer.echo(
            f"the record of Triton {triton.__version__} {state}: {'some tiles' if coarse else 'every tile'} of every kernel"
        )
    jobs = cases(modules(), arch or ARCHES, kernels, coarse)
    if not jobs:
        raise BenchmarkError(f"no case matches --kernels {kernels}" if kernels else f"{PACKAGE} has no kernels")
    with _progress(len(jobs)) as show:
        rows = compile_all(jobs, processes, show)
    before = {row.key: row for row in earlier.rows} if earlier else {}
    failures = 0
    for row in rows:
        found = problems(row, None if record else before.get(row.key))
        failures += bool(found)
        work = f"{row.per_logit} per logit" if row.per_logit is not None else f"hot loop {row.hot}"
        typer.echo(
            f"{'FAIL' if found else 'ok  '} {row.name} sm_{row.arch}: {row.registers} registers, stack {row.stack}, "
            f"shared {row.shared}, matrix {row.matrix}, {work}" + "".join(f"\n     {text}" for text in found)
        )
    known = "" if earlier else f"; nothing is recorded for Triton {triton.__version__}, so growth was not checked"
    typer.echo(f"Triton {triton.__version__}: {len(rows) - failures} of {len(rows)} within the limits{known}")
    if failures:
        if record:
            typer.echo("nothing was recorded: a record holds what is within the limits")
        raise typer.Exit(1)
    if record:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        records[triton.__version__] = Record(triton.__version__, _ptxas(), today, rows, now)
        write_record(record_file, records)
        write_text(page_file, page(records))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong usage is one line and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m benchmarks.aot")
    except BenchmarkError as error:
        sys.stderr.write(f"benchmarks.aot: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
