"""How kernels are launched a second time: by what they are compiled for, which is less than Triton looks at."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

triton = pytest.importorskip("triton")
common = importlib.import_module("cprec_kernels._triton.common")


class Compiled:
    """Stands in for what Triton returns; remembers its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands in for a jitted kernel of two arguments, one number and two constants."""

    arg_names = ("p_x", "p_y", "count", "D", "BLOCK")
    pre_run_hooks: tuple = ()

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compiled.append((grid, args, options))
            self.last = Compiled()
            return self.last

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(common, "CompiledKernel", Compiled)
    monkeypatch.setattr(common, "_compiled", {})
    return Kernel()


OPTIONS = {"D": 8, "BLOCK": 64, "num_warps": 4, "num_stages": 1}


def again(kernel, *args, grid=(3,), device=0, **changes):
    common._launch_again(kernel, grid, device, args, OPTIONS | changes)


def test_the_second_launch_asks_triton_no_more(kernel):
    x, y = torch.zeros(8), torch.zeros(8)
    again(kernel, x, y, 5)
    again(kernel, y, x, 2**31 - 1, grid=(7, 2))
    assert kernel.compiled == [((3,), (x, y, 5), OPTIONS)]
    ((grid, args),) = kernel.last.launches
    assert grid == (7, 2, 1)
    assert args[0] is y
    assert args[1] is x
    assert args[2:] == (2**31 - 1, 8, 64)  # constants in the kernel's order


@pytest.mark.parametrize(
    "change",
    [
        {"args": lambda x: (x.double(), x, 5)},
        {"args": lambda x: (x[1:], x, 5)},
        {"args": lambda x: (x, x, 2**31)},
        {"args": lambda x: ((x, x), x, 5)},
        {"D": 16},
        {"num_warps": 8},
        {"device": 1},
    ],
    ids=["type", "alignment", "width", "tuple", "constant", "option", "device"],
)
def test_whatever_is_compiled_for_is_told_apart(kernel, change):
    x = torch.zeros(8)
    args = change.pop("args")(x) if "args" in change else (x, x, 5)
    again(kernel, x, x, 5)
    again(kernel, *args, **change)
    again(kernel, *args, **change)
    assert len(kernel.compiled) == 2
    assert len(kernel.last.launches) == 1


def test_hooks_before_a_launch_are_heard(kernel):
    x = torch.zeros(8)
    kernel.pre_run_hooks = (lambda *args, **options: None,)
    for _ in range(2):
        again(kernel, x, x, 5)
    assert len(kernel.compiled) == 2


def test_what_is_not_compiled_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(common, "CompiledKernel", int)
    for _ in range(2):
        again(kernel, torch.zeros(8), torch.zeros(8), 5)
    assert len(kernel.compiled) == 2


def test_no_kernel_is_specialised_on_the_value_of_a_number():
    """What `_trait` relies on, and what spares a compilation per catalogue."""
    package = importlib.import_module("cprec_kernels._triton")
    found = set()
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for kernel in vars(module).values():
            if not isinstance(kernel, triton.JITFunction) or not kernel.__name__.endswith("_kernel"):
                continue
            for parameter in kernel.params:
                if not parameter.is_constexpr and not parameter.name.startswith("p_"):
                    assert parameter.do_not_specialize, f"{kernel.__name__}: {parameter.name}"
            found.add(kernel.__name__)
    assert len(found) > 20
