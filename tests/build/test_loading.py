"""What happens when the native module is missing, foreign or broken: one sentence, a working import, working ops."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cprec_kernels
from cprec_kernels import _backend, _native, backend_of, use_backend
from cprec_kernels.__main__ import report
from cprec_kernels._backend import BackendError


def broken(_name):
    raise ImportError("undefined symbol: _ZN3c10")


def test_never_built():
    status = _native.load(None)
    assert status.module is None
    assert not status.intended
    assert "was never built here; build it with `pip install --no-build-isolation" in status.reason


def test_built_without_native_code_on_purpose():
    status = _native.load({"mode": "none", "native": False, "reason": "built with CPREC_BUILD=none"})
    assert status.intended
    assert status.reason == "built with CPREC_BUILD=none"


def test_built_without_a_compiler():
    status = _native.load({"mode": "auto", "native": False, "reason": "no C++ compiler was found; install g++"})
    assert not status.intended
    assert "install g++" in status.reason


@pytest.mark.parametrize("built_for", ["2.4.1", "1.13.0+cu117", "3.0.0", "", "nonsense"])
def test_built_for_another_torch(built_for):
    status = _native.load({"mode": "auto", "native": True, "torch": built_for}, import_module=broken)
    assert status.module is None
    assert f"_C was built for torch {built_for}, this is torch {torch.__version__}; rebuild it with" in status.reason


def test_does_not_load():
    status = _native.load({"mode": "auto", "native": True, "torch": torch.__version__}, import_module=broken)
    assert status.module is None
    assert "undefined symbol" in status.reason
    assert "rebuild it with" in status.reason


def test_build_info_that_is_not_json_counts_as_never_built(tmp_path):
    (tmp_path / "_build_info.json").write_text("{", encoding="utf-8")
    assert _native.build_info(tmp_path) is None
    (tmp_path / "_build_info.json").write_text("[1]", encoding="utf-8")
    assert _native.build_info(tmp_path) is None


def test_importing_the_package_a_second_time_is_refused_clearly():
    loaded = "[name for name in sys.modules if name.startswith('cprec_kernels')]"
    code = f"import sys, cprec_kernels\nfor name in {loaded}: del sys.modules[name]\nimport cprec_kernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "do not reload it or remove it from sys.modules; restart Python" in result.stderr


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    """The package's Python files alone, as a source tree that was never built."""
    source = Path(cprec_kernels.__file__).parent
    shutil.copytree(
        source, tmp_path / "cprec_kernels", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    return tmp_path


WORK = """
import torch
import cprec_kernels
from cprec_kernels import Partition, nn, backend_of
partition = Partition(100, [10, 50], [8, 4, 2], 8)
embedding, head = nn.BlockEmbedding(partition), nn.ClusteredSoftmaxWithLoss(8, partition)
ids = torch.arange(0, 100, 7)
for _ in range(2):
    head(embedding(ids), ids).loss.backward()
assert head.topk(embedding(ids), 3)[1].shape == (15, 3)
assert head.rank(embedding(ids), ids).shape == (15,)
print(backend_of("block_embedding", torch.ones(1)))
try:
    cprec_kernels.set_cpu_isa("scalar")
except RuntimeError as error:
    assert "no CPU kernels to choose among" in str(error)
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("info", "warnings"),
    [
        (None, 1),
        ({"mode": "none", "native": False, "reason": "built with CPREC_BUILD=none"}, 0),
        ({"mode": "auto", "native": True, "torch": "2.4.0"}, 1),
        ({"mode": "auto", "native": True, "torch": torch.__version__}, 1),  # the file _C is cut short
    ],
)
def test_every_op_works_without_the_native_module(copy_of_the_package, info, warnings):
    if info is not None:
        (copy_of_the_package / "cprec_kernels" / "_build_info.json").write_text(json.dumps(info), encoding="utf-8")
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        (copy_of_the_package / "cprec_kernels" / f"_C{suffix}").write_bytes(b"\x7fELF")
    result = run(copy_of_the_package, "-c", WORK)
    assert result.stdout.split() == ["reference"], result.stderr
    assert result.stderr.count("runs without its compiled kernels") == warnings
    told = run(copy_of_the_package, "-m", "cprec_kernels")
    assert told.returncode == 0
    assert "native module  absent: " in told.stdout


def test_a_backend_asked_for_by_name_must_serve(copy_of_the_package):
    result = run(copy_of_the_package, "-c", WORK, CPREC_BACKEND="native")
    assert result.returncode != 0
    assert (
        "backend 'native' was asked for and cannot run block_embedding on cpu: the C++ module was never built"
        in result.stderr
    )
    assert run(copy_of_the_package, "-c", "import cprec_kernels", CPREC_BACKEND="nonsense").returncode == 0
    assert (
        "CPREC_BACKEND=nonsense is not one of auto, native, triton, reference"
        in run(copy_of_the_package, "-c", WORK, CPREC_BACKEND="nonsense").stderr
    )


FLOAT32_ALONE = ("conv_norm_relu", "conv_norm_relu_backward", "dropout", "residual_stack")
NATIVE = pytest.mark.skipif(_native.STATUS.intended, reason="this package was built with CPREC_BUILD=none")


@NATIVE
def test_backend_of_answers_and_requests_are_scoped():
    ones = torch.ones(1)
    asked_for = cprec_kernels.get_backend()  # the suite may run under CPREC_BACKEND
    try:
        cprec_kernels.set_backend("auto")
        check_backend_of(ones)
    finally:
        cprec_kernels.set_backend(asked_for)


def check_backend_of(ones):
    for op in _backend.ops():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            has_kernel = op not in FLOAT32_ALONE or dtype == torch.float32
            assert backend_of(op, ones.to(dtype)) == ("native" if has_kernel else "reference"), (op, dtype)
        assert backend_of(op, ones.double()) == "reference"
    with use_backend("reference"):
        assert backend_of("block_embedding", ones) == "reference"
    assert cprec_kernels.get_backend() == "auto"
    with use_backend("triton"), pytest.raises(BackendError, match="no triton implementation"):
        backend_of("clustered_topk", ones)
    with pytest.raises(ValueError, match="backend 'cuda' is not one of auto, native"):
        cprec_kernels.set_backend("cuda")
    with pytest.raises(KeyError, match="no op 'nothing'"):
        backend_of("nothing", ones)


@NATIVE
def test_the_report_names_every_op_and_its_reason():
    with use_backend("auto"):
        text = report()
    for op in _backend.ops():
        assert text.count(f"  {op} ") >= 2
    assert f"torch          {torch.__version__}" in text
    assert "CPU kernels    " in text
    assert "native serves float32, bfloat16, float16, not float64" in text
