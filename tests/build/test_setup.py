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

from cprec_kernels import _native

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
    package = tmp_path / "lib" / "cprec_kernels"
    package.mkdir(parents=True)
    for left in ("_C.cpython-311.so", "libcprec_serving.so"):  # by an earlier, native build
        (package / left).touch()
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


def test_auto_survives_a_broken_nvcc_and_a_broken_compiler(tmp_path):
    """A toolchain that is there and does not work: first without CUDA, then without native code."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    result = build(tmp_path, CPREC_BUILD="auto", CXX=str(broken), CUDACXX=str(broken))
    assert result.returncode == 0, result.stderr
    assert "configuring the CUDA kernels failed" in result.stderr
    assert "configuring the C++ kernels failed" in info_in(tmp_path)["reason"]
    result = build(tmp_path, CPREC_BUILD="cpu", CXX=str(broken))
    assert result.returncode != 0
    assert "configuring the C++ kernels failed (the messages are above)" in result.stderr


def test_a_source_distribution_holds_the_sources(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)], cwd=ROOT, check=True)
    listed = next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text(encoding="utf-8").split()
    for path in [*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt", ROOT / "setup.py"]:
        assert path.relative_to(ROOT).as_posix() in listed


def test_an_unknown_mode_is_an_error(tmp_path):
    result = build(tmp_path, CPREC_BUILD="gpu")
    assert result.returncode != 0
    assert "CPREC_BUILD=gpu is not one of auto, cpu, cuda, none" in result.stderr


@pytest.mark.skipif(_native.STATUS.intended, reason="this package was built with CPREC_BUILD=none")
def test_cuda_sources_were_compiled_where_nvcc_is():
    """The nvcc path is real on machines without a GPU too: CI has nvcc and must have used it."""
    config = _native.STATUS.module.build_config()
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    if setup.find_nvcc() is None:
        assert config["cuda_compiler"] == ""
    else:
        assert config["cuda_compiler"].startswith("nvcc ")
        assert config["cuda_architectures"] == "80,90"
