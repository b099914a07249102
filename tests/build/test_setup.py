"""setup.py: what CPREC_BUILD builds, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

ROOT = Path(__file__).parents[2]


def build(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build command into ``out``, away from the source tree."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(out / "base"), "--build-lib", str(out / "lib")],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def info_in(out: Path) -> dict:
    return json.loads((out / "lib" / "cprec_kernels" / "_build_info.json").read_text(encoding="utf-8"))


def test_none_makes_a_pure_python_package(tmp_path):
    result = build(tmp_path, CPREC_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert info_in(tmp_path)["native"] is False
    assert not list((tmp_path / "lib").rglob("*.so"))
    # Every package and the typing markers are in it.
    wanted = [*find_packages(str(ROOT), include=["cprec_kernels*"]), *find_packages(str(ROOT / "python"))]
    for package in wanted:
        assert (tmp_path / "lib" / package.replace(".", "/") / "__init__.py").exists(), package
    assert (tmp_path / "lib" / "cprec_kernels" / "py.typed").exists()
    assert (tmp_path / "lib" / "cprec" / "py.typed").exists()


def test_auto_without_a_compiler_says_so_and_goes_on(tmp_path):
    result = build(tmp_path, CPREC_BUILD="auto", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "CXX=no-such-compiler is not an executable; install g++ or clang++" in result.stderr
    assert "install g++" in info_in(tmp_path)["reason"]


def test_cpu_without_a_compiler_is_an_error(tmp_path):
    result = build(tmp_path, CPREC_BUILD="cpu", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "CXX=no-such-compiler is not an executable; install g++ or clang++" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: nothing is missing")
def test_cuda_without_its_parts_is_an_error(tmp_path):
    result = build(tmp_path, CPREC_BUILD="cuda", CUDACXX="no-such-nvcc")
    assert result.returncode != 0
    assert "CPREC_BUILD=cuda needs nvcc; install the CUDA toolkit" in result.stderr
    result = build(tmp_path, CPREC_BUILD="cuda", CUDACXX=sys.executable)
    assert result.returncode != 0
    assert f"CPREC_BUILD=cuda needs a torch with CUDA, and torch {torch.__version__} has none" in result.stderr


def test_an_unknown_mode_is_an_error(tmp_path):
    result = build(tmp_path, CPREC_BUILD="gpu")
    assert result.returncode != 0
    assert "CPREC_BUILD=gpu is not one of auto, cpu, cuda, none" in result.stderr


def test_cuda_sources_were_compiled_where_nvcc_is():
    """The nvcc path is real on machines without a GPU too: CI has nvcc and must have used it."""
    from cprec_kernels import _native

    config = _native.STATUS.module.build_config()
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    if setup.find_nvcc() is None:
        assert config["cuda_compiler"] == ""
    else:
        assert config["cuda_compiler"].startswith("nvcc ")
        assert config["cuda_architectures"] == "80-real,90"
