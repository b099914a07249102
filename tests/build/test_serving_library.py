"""libcprec_serving.so: the ops without Python, in a C++ program and beside torch alone."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cprec_kernels
from cprec_kernels import Partition, _native, use_backend
from cprec_kernels import functional as F
from cprec_kernels.nn import TiedBlocks

ROOT = Path(__file__).parents[2]
NATIVE = pytest.mark.skipif(_native.STATUS.intended, reason="this package was built with CPREC_BUILD=none")
OPS = ("block_embedding", "clustered_topk", "clustered_rank", "clustered_score", "clustered_softmax")
ITEMS, LENGTH = 300, 6


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process that has torch and, if the code loads it, the library."""
    command = [sys.executable, "-c", f"import sys, torch\n{code}", str(cprec_kernels.serving_library())]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_without_native_code_there_is_no_library(monkeypatch):
    monkeypatch.setattr(_native, "STATUS", _native.load({"mode": "none", "native": False, "reason": "built with none"}))
    with pytest.raises(RuntimeError, match=r"there is no libcprec_serving\.so: built with none"):
        cprec_kernels.serving_library()


@NATIVE
def test_a_library_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    with pytest.raises(RuntimeError, match=r"libcprec_serving\.so is not beside _C; rebuild it with"):
        cprec_kernels.serving_library()


@NATIVE
def test_the_schemas_are_those_that_python_defines():
    code = "torch.ops.load_library(sys.argv[1])\nfor op in sys.argv[2:]: print(getattr(torch.ops.cprec, op).default._schema)"
    result = run_python(code, *OPS)
    assert result.stdout.splitlines() == [str(getattr(torch.ops.cprec, op).default._schema) for op in OPS], (
        result.stderr
    )


@NATIVE
def test_python_package_and_library_exclude_each_other():
    result = run_python("torch.ops.load_library(sys.argv[1])\nimport cprec_kernels")
    assert result.returncode == 1
    assert "do not load libcprec_serving.so where Python imports cprec_kernels" in result.stderr
    result = run_python("import cprec_kernels\ntorch.ops.load_library(sys.argv[1])")
    assert result.returncode < 0
    assert "load it only where Python has not imported cprec_kernels" in result.stderr


# Run by both processes: what every call gives, or which error it raises.
CALLS = """
ops = torch.ops.cprec
torch.manual_seed(0)
tables, projections = [torch.randn(4, 8), torch.randn(6, 4), torch.randn(20, 2)], [torch.randn(4, 8), torch.randn(2, 8)]
weights = [torch.randn(6, 8), *tables[1:]], projections, torch.randn(6), [torch.randn(6), torch.randn(20)]
plain = [torch.randn(6, 8), *tables[1:]], projections, None, []
hidden, ids, seen = torch.randn(5, 8), torch.tensor([0, 29, 7, 3, 12]), torch.tensor([[0, 1, -1]] * 5)
nan, choice = hidden.clone().index_fill_(0, torch.tensor(3), float("nan")), (None, None, None)
softmax = -100, True, None, False
offsets = torch.tensor([0, 1, 1, 2, 2, 2])
calls = {
    "embedding": lambda: ops.block_embedding(ids, tables, projections, None, False),
    "embedding of a grid": lambda: ops.block_embedding(ids.reshape(5, 1).expand(5, 3), tables, projections, 2, False),
    "embedding in bf16": lambda: ops.block_embedding(ids, *([t.bfloat16() for t in ts] for ts in (tables, projections)), None, False),
    "embedding of nothing": lambda: ops.block_embedding(ids[:0], tables, projections, None, False),
    "an id too large": lambda: ops.block_embedding(ids + 1, tables, projections, None, False),
    "a negative id": lambda: ops.block_embedding(ids - 1, tables, projections, None, False),
    "ids in int32": lambda: ops.block_embedding(ids.int(), tables, projections, None, False),
    "padding beyond the tables": lambda: ops.block_embedding(ids, tables, projections, 30, False),
    "a projection is missing": lambda: ops.block_embedding(ids, tables, projections[:1], None, False),
    "topk": lambda: ops.clustered_topk(hidden, 7, *weights, *choice),
    "topk without biases": lambda: ops.clustered_topk(hidden, 7, *plain, *choice),
    "topk without rows": lambda: ops.clustered_topk(hidden[:0], 7, *weights, *choice),
    "topk, seen": lambda: ops.clustered_topk(hidden, 7, *weights, seen, None, None),
    "topk, seen in CSR form": lambda: ops.clustered_topk(hidden, 7, *weights, torch.tensor([3, 9]), offsets, None),
    "topk among candidates": lambda: ops.clustered_topk(hidden, 7, *weights, seen, None, torch.tensor([1, 2, 29])),
    "offsets of nothing": lambda: ops.clustered_topk(hidden, 7, *weights, None, offsets, None),
    "whole numbers for states": lambda: ops.clustered_topk(hidden.long(), 7, *weights, *choice),
    "whole numbers for biases": lambda: ops.clustered_topk(hidden, 7, *weights[:2], weights[2].long(), [], *choice),
    "a projection too many": lambda: ops.clustered_topk(hidden, 7, weights[0], [*projections, projections[0]], None, [], *choice),
    "k too large": lambda: ops.clustered_topk(hidden, 31, *weights, *choice),
    "k below 0": lambda: ops.clustered_topk(hidden, -1, *weights, *choice),
    "NaN in a search": lambda: ops.clustered_topk(nan, 7, *weights, *choice),
    "inf in a search": lambda: ops.clustered_topk(nan.nan_to_num(float("inf")), 7, *weights, *choice),
    "seen too large": lambda: ops.clustered_topk(hidden, 7, *weights, seen + 29, None, None),
    "seen of too few rows": lambda: ops.clustered_topk(hidden, 7, *weights, seen[:3], None, None),
    "seen in int32": lambda: ops.clustered_topk(hidden, 7, *weights, seen.int(), None, None),
    "offsets fall": lambda: ops.clustered_topk(hidden, 7, *weights, torch.tensor([3, 9]), offsets.flip(0), None),
    "a candidate too large": lambda: ops.clustered_topk(hidden, 7, *weights, None, None, torch.tensor([1, 30])),
    "a negative candidate": lambda: ops.clustered_topk(hidden, 7, *weights, None, None, torch.tensor([-1])),
    "input too narrow": lambda: ops.clustered_topk(hidden[:, :7], 7, *weights, *choice),
    "input of three dimensions": lambda: ops.clustered_topk(hidden[None], 7, *weights, *choice),
    "mixed dtypes": lambda: ops.clustered_topk(hidden.half(), 7, *weights, *choice),
    "rank": lambda: ops.clustered_rank(hidden, ids, *weights),
    "rank of a target too large": lambda: ops.clustered_rank(hidden, ids + 1, *weights),
    "NaN in a rank": lambda: ops.clustered_rank(nan, ids, *weights),
    "targets of too few rows": lambda: ops.clustered_rank(hidden, ids[:3], *weights),
    "score": lambda: ops.clustered_score(hidden, seen.clamp(min=0), *weights),
    "score of a negative item": lambda: ops.clustered_score(hidden, seen, *weights),
    "softmax": lambda: ops.clustered_softmax(hidden, ids, *weights, *softmax),
    "softmax, one ignored": lambda: ops.clustered_softmax(hidden, ids.masked_fill(ids == 7, -100), *plain, *softmax),
    "softmax of a target too large": lambda: ops.clustered_softmax(hidden, ids + 1, *weights, *softmax),
}
def outcome(call):
    try:
        found = call()
    except Exception as error:
        return type(error).__name__
    return [found] if isinstance(found, torch.Tensor) else [*found]
outcomes = {name: outcome(call) for name, call in calls.items()}
"""
WITH_LIBRARY = """
torch.ops.load_library(sys.argv[1])
{calls}
def message(call):
    try:
        call()
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
double = [table.double() for table in tables], [projection.double() for projection in projections]
meta = [table.to("meta") for table in tables], [projection.to("meta") for projection in projections]
messages = [
    message(calls["an id too large"]), message(calls["seen too large"]), message(calls["NaN in a search"]),
    message(lambda: ops.block_embedding(ids, *double, None, False)),
    message(lambda: ops.block_embedding(ids.to("meta"), *meta, None, False)),
    message(lambda: ops.clustered_softmax(hidden, ids, *weights, -100, True, None, True)),
]
torch.save((outcomes, messages), sys.argv[2])
"""


@NATIVE
def test_results_and_errors_are_those_of_the_python_package(tmp_path):
    result = run_python(WITH_LIBRARY.format(calls=CALLS), tmp_path / "outcomes.pt")
    assert result.returncode == 0, result.stderr
    outcomes, messages = torch.load(tmp_path / "outcomes.pt")
    here: dict[str, Any] = {"torch": torch}
    with torch.no_grad(), use_backend("auto"):  # the suite may run under CPREC_BACKEND
        exec(CALLS, here)
    for name, expected in here["outcomes"].items():
        if isinstance(expected, str):
            assert outcomes[name] == expected, name
        else:
            torch.testing.assert_close(
                outcomes[name], expected, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert sum(isinstance(expected, str) for expected in here["outcomes"].values()) == 27
    for message, pattern in zip(
        messages,
        [
            r"IndexError: ids\[1\] \(flattened\) = 30 is outside 0\.\.29",
            r"IndexError: exclude\[1\] \(flattened\) = 30 is outside 0\.\.29",
            r"ValueError: input row 3 holds NaN or inf",
            r"TypeError: cprec::block_embedding has kernels for float32, bfloat16 and float16, not for Double",
            r"ValueError: cprec::block_embedding runs on the CPU here, got a tensor on meta",
            r"NotImplementedError: what a backward pass needs is for training",
        ],
        strict=True,
    ):
        assert re.match(pattern, message), message


class Model(nn.Module):
    """Every op of an inference graph; what examples/serve.cpp prints comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = TiedBlocks(Partition(ITEMS, cutoffs=[30, 100], ranks=[16, 8, 4], embedding_dim=16))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        hidden, target, weights = self.blocks.embedding(ids).mean(1), ids[:, -1], self.blocks.packed_weights()
        scores, items = self.blocks.topk(hidden, 10, exclude=ids)
        log_prob, uniform = F.clustered_target_log_prob(hidden, target, weights)
        return scores, items, self.blocks.rank(hidden, target), self.blocks.score(hidden, items), log_prob, uniform


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A package, the program of examples/serve.cpp, and what Python makes of some histories."""

    package: Path
    program: Path
    histories: Tensor
    outputs: tuple[Tensor, ...]

    def serve(self, text: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.program), str(self.package), str(cprec_kernels.serving_library())]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def lines(histories: Tensor) -> str:
    return "".join(" ".join(map(str, history)) + "\n" for history in histories.tolist())


def deploy(folder: Path) -> Deployed:
    """Compile the package, and the program by the command of docs/drop-in.md."""
    page = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    (build,) = re.findall(r"^g\+\+ .*$", page, re.MULTILINE)
    shutil.copy(ROOT / "examples" / "serve.cpp", folder)
    environment = {**os.environ, "TORCH": str(Path(torch.__file__).parent)}
    with subprocess.Popen(build, shell=True, cwd=folder, env=environment) as compiling:
        model = Model().eval()
        example, histories = torch.randint(ITEMS, (2, LENGTH)), torch.randint(ITEMS, (5, LENGTH))
        batch = torch.export.Dim("batch", min=1, max=1_024)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        package = folder / "package.pt2"
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs={
                "aot_inductor.metadata": {"length": str(LENGTH)},
                "aot_inductor.compile_wrapper_opt_level": "O0",
            },
        )
        with torch.no_grad(), use_backend("auto"):
            outputs = model(histories)
    assert compiling.returncode == 0
    return Deployed(package, folder / "serve", histories, outputs)


@NATIVE
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor and the example compile with g++")
def test_a_package_runs_without_the_python_package(tmp_path):
    """One test, because what all of it needs takes long to compile."""
    deployed = deploy(tmp_path)
    check_results_in_cpp(deployed)
    check_errors_in_cpp(deployed)
    check_results_beside_torch_alone(deployed, tmp_path)


def check_results_in_cpp(deployed: Deployed) -> None:
    result = deployed.serve(lines(deployed.histories))
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()
    pairs = [[pair.split(":") for pair in row.split()] for row in rows]
    scores, items, *_ = deployed.outputs
    assert [[int(item) for item, _ in row] for row in pairs] == items.tolist()
    torch.testing.assert_close(torch.tensor([[float(score) for _, score in row] for row in pairs]), scores)
    assert deployed.serve(lines(deployed.histories[:1])).stdout.splitlines() == rows[:1]
    none = deployed.serve("")
    assert (none.returncode, none.stdout) == (0, ""), none.stderr


def check_errors_in_cpp(deployed: Deployed) -> None:
    histories = deployed.histories.clone()
    for bad in (ITEMS, -1):
        histories[1, 2] = bad
        result = deployed.serve(lines(histories))
        assert (result.returncode, result.stdout) == (1, "")
        assert f"serve: ids[{LENGTH + 2}] (flattened) = {bad} is outside 0..{ITEMS - 1}" in result.stderr
    result = deployed.serve(lines(deployed.histories[:, :-1]))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"serve: line 1: not {LENGTH} item ids" in result.stderr


def check_results_beside_torch_alone(deployed: Deployed, folder: Path) -> None:
    torch.save(deployed.histories, folder / "histories.pt")
    code = (
        "torch.ops.load_library(sys.argv[1])\n"
        "outputs = torch._inductor.aoti_load_package(sys.argv[2])(torch.load(sys.argv[3]))\n"
        "assert 'cprec_kernels' not in sys.modules\n"
        "torch.save(outputs, sys.argv[4])"
    )
    result = run_python(code, deployed.package, folder / "histories.pt", folder / "outputs.pt")
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(folder / "outputs.pt"), deployed.outputs)
