"""Builds the native libraries by running CMake with ninja; CPREC_BUILD=auto|cpu|cuda|none says what to build.

auto  CPU kernels where there is a C++ compiler, csrc/cuda where there is nvcc; a pure-Python package otherwise
cpu   CPU kernels, an error without a compiler
cuda  CPU and CUDA kernels, an error without nvcc or with a torch that has no CUDA
none  a pure-Python package: every op runs through cprec_kernels/reference
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "none")
LIBRARIES = ("_C*.so", "libcprec_serving.so")  # what a native build puts into the package


def find_compiler() -> str | None:
    """Path of the C++ compiler: CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, CUDA_HOME, PATH, the usual place."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for place in places if (path := shutil.which(place))), None)


def missing_tool(mode: str) -> str:
    """One sentence on what a native build lacks here, or ""."""
    if find_compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} is not an executable" if named else "no C++ compiler was found"
        return f"{what}; install g++ or clang++, or name one with CXX, and build again"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed here; `pip install {module}`, then build with --no-build-isolation"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"{tool} was not found; `pip install {tool}` and build again"
    if mode == "cuda":
        import torch

        if find_nvcc() is None:
            return "CPREC_BUILD=cuda needs nvcc; install the CUDA toolkit, or name nvcc with CUDACXX or CUDA_HOME"
        if torch.version.cuda is None:
            return (
                f"CPREC_BUILD=cuda needs a torch with CUDA, and torch {torch.__version__} has none; install one first"
            )
    return ""


def find_tool(name: str) -> str | None:
    """A build tool beside this Python (where pip puts it) or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def libraries(package: Path) -> list[Path]:
    """What a native build has put into a package's folder."""
    return [path for pattern in LIBRARIES for path in package.glob(pattern)]


def remove_libraries(package: Path) -> None:
    """Remove what an earlier build left."""
    for stale in libraries(package):
        stale.unlink()


class CMakeBuild(build_ext):
    """Runs CMake and records beside the package what was built, for cprec_kernels._native to read."""

    def run(self) -> None:
        mode = os.environ.get("CPREC_BUILD", "auto") or "auto"
        if mode not in MODES:
            raise SetupError(f"CPREC_BUILD={mode} is not one of {', '.join(MODES)}")
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "cprec_kernels"
        package.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"mode": mode, "native": False}
        reason = "the package was built with CPREC_BUILD=none" if mode == "none" else missing_tool(mode)
        if not reason:
            # The usual way first; what auto mode tries when the toolchain is broken, after it.
            for with_cuda in {"cpu": [False], "cuda": [True], "auto": [find_nvcc() is not None, False]}[mode]:
                try:
                    info.update(self.build_native(with_cuda, package), native=True)
                    break
                except subprocess.CalledProcessError as error:
                    step = "configuring" if "-S" in error.cmd else "compiling"
                    what = "the CUDA kernels" if with_cuda else "the C++ kernels"
                    reason = f"{step} {what} failed (the messages are above); mend the toolchain and build again"
                    print(f"cprec-kernels: {reason}", file=sys.stderr)
        if not info["native"]:
            if mode not in ("auto", "none"):
                raise SetupError(reason)
            info["reason"] = reason
            print(f"cprec-kernels: pure-Python build: {reason}", file=sys.stderr)
            remove_libraries(package)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def build_native(self, with_cuda: bool, package: Path) -> dict[str, object]:
        """Configure, build and install the libraries into ``package``; returns what to record.

        Raises:
            subprocess.CalledProcessError: CMake or the compiler failed; what was there before is untouched.
        """
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        nvcc = find_nvcc() if with_cuda else None
        link_cuda = nvcc is not None and torch.version.cuda is not None
        # One build folder per Python and torch: their flags differ, and a second run is incremental.
        variant = "cuda" if nvcc else "cpu"
        # An editable build keeps its objects, so that the next one is incremental.
        base = ROOT / "build" if self.inplace or self.editable_mode else Path(self.build_temp).resolve()
        build = base / f"native-{variant}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = str(find_tool("cmake")), str(find_tool("ninja"))
        library_dir = Path(torch.__file__).parent / "lib"
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CXX_COMPILER": find_compiler(),
            "CMAKE_INSTALL_PREFIX": package,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIR": library_dir,
            "TORCH_VERSION": torch.__version__,
            "CPREC_WERROR": "ON" if os.environ.get("CPREC_WERROR") else "OFF",
            "CPREC_COMPILE_CUDA": "ON" if nvcc else "OFF",
            "CPREC_LINK_CUDA": "ON" if link_cuda else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        try:
            subprocess.run([*configure, *(f"-D{name}={value}" for name, value in options.items())], check=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(build)  # what CMake remembers of a broken compiler would spoil the next configuration
            raise
        subprocess.run([cmake, "--build", str(build)], check=True)
        remove_libraries(package)
        subprocess.run([cmake, "--install", str(build)], check=True)
        return {"torch": torch.__version__, "cuda": torch.version.cuda if link_cuda else None}

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "cprec_kernels"
        return [str(path) for path in (*libraries(package), package / "_build_info.json") if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


if __name__ == "__main__":
    app = find_packages("python", include=["cprec", "cprec.*"])
    setup(
        packages=[*find_packages(include=["cprec_kernels", "cprec_kernels.*"]), *app],
        package_dir={name: f"python/{name.replace('.', '/')}" for name in app},
        package_data={"cprec_kernels": ["py.typed"], "cprec": ["py.typed"]},
        ext_modules=[Extension("cprec_kernels._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
