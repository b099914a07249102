"""What ``python -m benchmarks.gpu`` does, a stage per process: a device that faulted serves nobody until its process ends."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_floors import Rates, kernel_rows
from benchmarks.gpu_gate import Inputs, problem
from benchmarks.gpu_peers import Peer, peers
from benchmarks.gpu_timing import extra_mb, graph_ms, launches, timed
from benchmarks.gpu_tuning import environment, read_tiles
from benchmarks.results import write_text
from cprec_kernels import BackendError, Partition, functional, use_backend
from cprec_kernels.testing import (
    assert_accurate,
    copy_weights,
    make_embedding,
    make_hidden,
    make_ids,
    make_softmax,
    make_targets,
    relative_error,
)

BACKENDS = ("native", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STAGES = ("machine", "check", "execution", "bench", "kernels", "tune")
Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """A catalogue with one batch, by name."""

    name: str
    partition: Partition
    tokens: int


def _size(name: str, items: int, width: int, ranks: tuple[int, ...], tokens: int) -> Size:
    return Size(name, Partition.from_fractions(items, (0.02, 0.2), ranks, width), tokens)


TINY = _size("tiny", 600, 32, (32, 8, 4), 90)
CHECK = (_size("20k-d128", 20_000, 128, (128, 32, 8), 2_000), _size("30k-d200", 30_000, 200, (200, 51, 13), 1_500))
BENCH = (
    _size("100k-d256", 100_000, 256, (256, 64, 16), 25_600),
    _size("1m-d128", 1_000_000, 128, (128, 32, 8), 12_800),
    _size("10m-d256", 10_000_000, 256, (256, 64, 16), 8_192),
)
NOT_CAPTURED = ("reference", "torch-adaptive", "cut-cross-entropy", "liger")  # they read from the device, or tune
MAX_REFERENCE_ITEMS = 200_000  # with more, plain torch takes seconds per call
EXPS = 512  # powers of two per element that the probe takes, one after another


# Operations: outputs and gradients by name


def embed(size: Size, dtype: torch.dtype, device: str, sparse: bool = False) -> dict[str, Tensor]:
    narrow = [[t.to(device) for t in group] for group in make_embedding(size.partition, _drawn(dtype))]
    leaves = [[t.to(dtype).requires_grad_() for t in group] for group in narrow]
    ids = make_ids(size.partition, (size.tokens,)).to(device)
    upstream = make_hidden(size.partition, (size.tokens,), _drawn(dtype)).to(device, dtype)
    out = functional.block_embedding(ids, *leaves, padding_idx=1, sparse=sparse)
    out.backward(upstream)
    found = {"output": out.detach()}
    for name, group in zip(("d_table", "d_projection"), leaves, strict=True):
        for j, leaf in enumerate(group):
            assert leaf.grad is not None
            found[f"{name}{j}"] = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
    return found


def loss(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    drawn = make_softmax(size.partition, _drawn(dtype))
    weights = copy_weights(drawn, dtype, device, requires_grad=True)
    hidden = make_hidden(size.partition, (size.tokens,), _drawn(dtype)).to(device, dtype).requires_grad_()
    target = make_targets(size.partition, (size.tokens,)).to(device)
    value = functional.clustered_cross_entropy(hidden, target, weights)
    value.backward()
    assert hidden.grad is not None
    assert weights.head_bias is not None
    assert weights.head_bias.grad is not None
    found = {"loss": value.detach(), "d_input": hidden.grad, "d_head_bias": weights.head_bias.grad}
    groups = (
        ("d_weight", weights.weights),
        ("d_projection", weights.projections),
        ("d_tail_bias", weights.tail_biases),
    )
    for name, group in groups:
        found |= {f"{name}{j}": leaf.grad for j, leaf in enumerate(group) if leaf.grad is not None}
    return found


def searched(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, functional.Weights]:
    """Rows to search for, and the weights."""
    weights = copy_weights(make_softmax(size.partition, _drawn(dtype)), dtype, device)
    return make_hidden(size.partition, (64,), _drawn(dtype)).to(device, dtype), weights


def topk(size: Size, dtype: torch.dtype, device: str, narrowed: bool = False) -> dict[str, Tensor]:
    hidden, weights = searched(size, dtype, device)
    if not narrowed:
        found = {k: functional.clustered_topk(hidden, k, weights) for k in (1, 10, 200)}
    else:
        exclude = make_ids(size.partition, (64, 50)).to(device)
        candidates = torch.arange(0, size.partition.num_items, 3, device=device)
        found = {10: functional.clustered_topk(hidden, 10, weights, exclude=exclude, candidates=candidates)}
    exact_hidden, exact_weights = searched(size, torch.float64, device)
    parts: dict[str, Tensor] = {}
    for k, (scores, items) in found.items():
        # Near ties trade places when logits are rounded: an item is right if its own score is.
        with use_backend("reference"):
            parts |= {f"scores{k}": scores, f"own{k}": functional.clustered_score(exact_hidden, items, exact_weights)}
    return parts


def rank(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    hidden, weights = searched(size, dtype, device)
    # Near ties trade places when logits are rounded: the logarithm of a place is as good as a score.
    return {"log_rank": functional.clustered_rank(hidden, make_ids(size.partition, (64,)).to(device), weights).log1p()}


def score(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    hidden, weights = searched(size, dtype, device)
    return {"scores": functional.clustered_score(hidden, make_ids(size.partition, (64, 50)).to(device), weights)}


OPERATIONS: dict[str, Callable[[Size, torch.dtype, str], dict[str, Tensor]]] = {
    "block_embedding": embed,
    "block_embedding sparse": lambda size, dtype, device: embed(size, dtype, device, sparse=True),
    "clustered_cross_entropy": loss,
    "clustered_topk": topk,
    "clustered_topk narrowed": lambda size, dtype, device: topk(size, dtype, device, narrowed=True),
    "clustered_rank": rank,
    "clustered_score": score,
}
SANITIZERS = ("memcheck", "racecheck")
_drawing: list[torch.dtype] = []


def _drawn(dtype: torch.dtype) -> torch.dtype:
    """Values are drawn in the dtype under test, also for the truth in fp64."""
    return _drawing[-1] if _drawing else dtype


# Stages


def machine(device: str, sizes: tuple[Size, ...], emit: Emit) -> None:
    """Versions, the rate of a copy and of a product of bf16 matrices."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "processors": properties.multi_processor_count}
        facts["memory_gb"] = properties.total_memory / 1e9
    emit({"kind": "versions", **facts})
    count, side = (2**29, 8192) if device == "cuda" else (2**20, 256)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    emit({"kind": "copy", "gb_per_s": 8 * count / timed(lambda: target.copy_(source), device)[0] / 1e6})
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    emit({"kind": "bf16 product", "tflops": 2 * side**3 / timed(lambda: a @ b, device)[0] / 1e9})
    if device == "cuda":
        emit({"kind": "exp2", "g_per_s": exp2_rate()})


def exp2_rate() -> float:
    """Powers of two per second, in units of 10^9, that the special function units give."""
    from benchmarks.gpu_probe import exp2_kernel

    programs, width = 4096, 1024
    out = torch.empty(programs * width, device="cuda")
    median = timed(lambda: exp2_kernel[(programs,)](out, EXPS, WIDTH=width, num_warps=4), "cuda")[0]
    return programs * width * EXPS / median / 1e6


def check(device: str, sizes: tuple[Size, ...], emit: Emit) -> None:
    """Every op, backend and dtype against fp64 on the device, by the tolerance rule."""
    for size in sizes:
        for name, operation in OPERATIONS.items():
            for dtype in DTYPES:
                _drawing[:] = [dtype]
                with use_backend("reference"):
                    truth, base = operation(size, torch.float64, device), operation(size, dtype, device)
                for backend in BACKENDS:
                    row = {"kind": "check", "op": name, "size": size.name, "dtype": _name(dtype), "backend": backend}
                    emit(row | _verdict(operation, size, dtype, device, backend, truth, base))
                _drawing.clear()


def _verdict(
    operation: Callable[..., dict[str, Tensor]], size: Size, dtype: torch.dtype, device: str, backend: str,
    truth: dict[str, Tensor], base: dict[str, Tensor],
) -> dict[str, Any]:  # fmt: skip
    try:
        with use_backend(backend):
            ours, again = operation(size, dtype, device), operation(size, dtype, device)
        wrong = []
        for part, value in ours.items():
            try:
                assert_accurate(value, base[part], truth[part], dtype, part)
            except AssertionError as error:
                wrong.append(str(error))
        errors = {part: relative_error(value, truth[part]) for part, value in ours.items()}
        repeats = all(torch.equal(value, again[part]) for part, value in ours.items())
        return {"correct": not wrong, "wrong": wrong, "errors": errors, "repeats": repeats}
    except BackendError as error:
        return {"skipped": str(error)}
    except Exception as error:
        return {"correct": False, "wrong": [f"{type(error).__name__}: {str(error)[:300]}"]}


def bench(device: str, sizes: tuple[Size, ...], emit: Emit) -> None:
    """Medians of every op and backend, once what they return has passed the gate, and of torch's own ways to do the like."""
    for dtype in (torch.bfloat16, torch.float32):
        for size in sizes:
            given = Inputs.of(size.partition, size.tokens, dtype, device)
            for op, name, make in _providers(given, device):
                row: dict[str, Any] = {
                    "kind": "bench",
                    "op": op,
                    "size": size.name,
                    "dtype": _name(dtype),
                    "provider": name,
                }
                try:
                    with use_backend(name if name in BACKENDS else "auto"):
                        call = make()
                        if name in BACKENDS:
                            row |= _gate(op, given, call)
                            if row.get("correct") is False:
                                emit(row)
                                continue
                        median, p20, p80 = timed(call, device)
                        found = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "extra_mb": extra_mb(call, device)}
                        if device == "cuda" and name not in NOT_CAPTURED:
                            found["graph_ms"] = graph_ms(call)
                        emit(row | found)
                except BackendError as error:
                    emit(row | {"skipped": str(error)})
                except torch.OutOfMemoryError:
                    emit(row | {"skipped": "out of memory"})
                except Exception as error:
                    emit(row | {"error": f"{type(error).__name__}: {str(error)[:300]}"})


def _gate(op: str, given: Inputs, call: Callable[[], object]) -> dict[str, Any]:
    results = call()
    try:
        wrong = problem(op, given, results)
    except torch.OutOfMemoryError:
        return {"note": "not compared with fp64, for which there is no memory"}
    return {"correct": False, "wrong": [wrong]} if wrong else {"correct": True}


Make = Callable[[], Callable[[], object]]


def _providers(given: Inputs, device: str) -> Iterator[tuple[str, str, Make]]:
    partition, dtype = given.partition, given.dtype
    ids, target, hidden, weights = given.ids, given.target, given.hidden, given.weights
    rows = given.searched

    def step(value: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor | None) -> Make:
        return lambda: lambda: torch.autograd.grad(value(), leaves, gradient)

    def embedding() -> Tensor:
        return functional.block_embedding(ids, given.tables, given.projections)

    def cross_entropy() -> Tensor:
        return functional.clustered_cross_entropy(hidden, target, weights)

    @torch.no_grad()
    def scores() -> Tensor:
        return functional.clustered_score(rows, given.negatives, weights)

    for backend in BACKENDS:
        if backend == "reference" and partition.num_items > MAX_REFERENCE_ITEMS:
            continue
        yield "block_embedding fwd", backend, lambda: embedding
        yield "block_embedding fwd+bwd", backend, step(embedding, [*given.tables, *given.projections], given.upstream)
        leaves = [hidden, *weights.weights, *weights.projections]
        yield "clustered_cross_entropy fwd+bwd", backend, step(cross_entropy, leaves, None)
        yield "clustered_topk", backend, lambda: lambda: functional.clustered_topk(rows, 10, weights)
        yield "clustered_rank", backend, lambda: lambda: functional.clustered_rank(rows, target[: len(rows)], weights)
        yield "clustered_score", backend, lambda: scores

    def table() -> Callable[[], object]:
        full = torch.randn(partition.num_items, partition.embedding_dim, device=device, dtype=dtype, requires_grad=True)
        return step(lambda: nn.functional.embedding(ids, full), [full], given.upstream)()

    def full_loss(maker: Callable[[], Peer]) -> Make:
        def make() -> Callable[[], object]:
            value, leaves = maker()
            return step(lambda: value(hidden, target), [hidden, *leaves], None)()

        return make

    def brute_force() -> Callable[[], object]:
        full = torch.randn(partition.num_items, partition.embedding_dim, device=device, dtype=dtype)
        return lambda: (rows @ full.T).topk(10)

    yield "block_embedding fwd+bwd", "torch-embedding", table
    for name, maker in peers(partition, dtype, device):
        yield "clustered_cross_entropy fwd+bwd", name, full_loss(maker)
    yield "clustered_topk", "torch-full-topk", brute_force


def execution(device: str, sizes: tuple[Size, ...], emit: Emit) -> None:
    """``pytest -m gpu`` (graphs, compilation, streams, waiting for the device, repeated bits), then compute-sanitizer."""
    root = Path(__file__).parents[1]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes to compilers
        tests += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    tests.append("tests/gpu")
    tiny = [sys.executable, "-m", "benchmarks.gpu_sanitized"]
    commands = {"pytest": tests} | {tool: ["compute-sanitizer", "--tool", tool, *tiny] for tool in SANITIZERS}
    for name, command in commands.items():
        row = {"kind": "execution", "op": name}
        if shutil.which(command[0]) is None:
            emit(row | {"skipped": f"{command[0]} is not installed"})
            continue
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        tail = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()][-30:]
        emit(row | {"correct": done.returncode == 0, "wrong": [] if done.returncode == 0 else tail, "last": tail[-1:]})


def loss_step(size: Size, dtype: torch.dtype, device: str, target: Tensor) -> Callable[[], object]:
    """Forward and backward pass of the loss for given targets (T,); its inputs live as long as it does."""
    weights = copy_weights(make_softmax(size.partition, dtype, bias=False), device=device, requires_grad=True)
    hidden = make_hidden(size.partition, (size.tokens,), dtype).to(device).requires_grad_()
    there, leaves = target.to(device), [hidden, *weights.weights, *weights.projections]
    return lambda: torch.autograd.grad(functional.clustered_cross_entropy(hidden, there, weights), leaves)


def kernels(device: str, sizes: tuple[Size, ...], emit: Emit, rates: Rates | None = None) -> None:
    """Times of the single kernels of a training step of the loss in bf16, beside what they cannot be faster than.

    Then, of every op: how many kernels it takes, what they take together, and what the call takes.
    """
    for size in sizes:
        for op, name, make in _providers(Inputs.of(size.partition, size.tokens, torch.bfloat16, device), device):
            if name != ("triton" if device == "cuda" else "reference"):
                continue
            with use_backend(name):
                call = make()
                median = timed(call, device)[0]
                events = launches(call, device)
            row = {"kind": "op", "op": op, "size": size.name, "dtype": "bfloat16", "provider": name, "call_ms": median}
            longest: dict[str, float] = {}
            for kernel, ms in events:
                longest[kernel] = longest.get(kernel, 0.0) + ms
            top = sorted(longest.items(), key=lambda item: -item[1])[:6]
            emit(row | {"kernels": len(events), "device_ms": sum(ms for _, ms in events), "longest": top})
        target = make_ids(size.partition, (size.tokens,), seed=1)
        step = loss_step(size, torch.bfloat16, device, target)
        rounds = [launches(step, device) for _ in range(5 if device == "cuda" else 1)]
        events = [
            (name, statistics.median(times[i][1] for times in rounds if len(times) == len(rounds[0])))
            for i, (name, _) in enumerate(rounds[0])
        ]
        for row in kernel_rows(events, size.partition, target.tolist(), rates):
            emit({"kind": "kernel", "size": size.name, **row})


def tune(device: str, sizes: tuple[Size, ...], emit: Emit, folder: Path) -> None:
    """The loss with the tables' tiles and with the fastest of their alternatives, which are kept in ``folder``."""
    winners: set[str] = set()
    for size in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            step = loss_step(size, dtype, device, make_ids(size.partition, (size.tokens,), seed=1))
            times = {}
            for name, enabled in (("table_ms", "0"), ("tuned_ms", "1")):
                with environment(CPREC_AUTOTUNE=enabled, CPREC_CACHE_DIR=str(folder)):
                    times[name] = timed(step, device)[0]
            row = {"kind": "tune", "op": "clustered_cross_entropy fwd+bwd", "size": size.name, "dtype": _name(dtype)}
            emit(row | times)
            for found in read_tiles(folder):
                if (text := json.dumps(found)) not in winners:
                    winners.add(text)
                    emit({"kind": "tile", **found})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_stage(stage: str, path: Path, device: str = "cuda", sizes: tuple[Size, ...] | None = None) -> None:
    """Run a stage; ``path`` holds the rows so far after each of them."""
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        write_text(path, json.dumps({"stage": stage, "rows": rows}, indent=1) + "\n")

    beside = path.parent / "machine.json"
    rates = Rates.from_rows(json.loads(beside.read_bytes())["rows"]) if beside.exists() else None
    stages: dict[str, tuple[Callable[..., None], tuple[Size, ...]]] = {
        "machine": (machine, ()), "check": (check, CHECK), "execution": (execution, ()), "bench": (bench, BENCH),
        "kernels": (functools.partial(kernels, rates=rates), BENCH),
        "tune": (functools.partial(tune, folder=path.parent), BENCH),
    }  # fmt: skip
    run, usual = stages[stage]
    run(device, usual if sizes is None else sizes, emit)


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]))
