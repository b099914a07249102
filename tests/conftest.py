"""Fixtures shared by all tests."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from cprec_kernels import _backend, available_cpu_isas, set_cpu_isa, use_backend
from cprec_kernels.testing import CASES

pytest.register_assert_rewrite("tests.ops.index_checks")
settings.register_profile("cprec", deadline=None)  # nothing is timed in tests
settings.load_profile("cprec")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Every test starts from the same seed; none may leave torch's global switches changed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    after = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_default_dtype(before[0])  # for the tests that come after a guilty one
    torch.use_deterministic_algorithms(before[1])
    torch.set_num_threads(before[2])
    assert after == before


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty, in Python and in C++, comes filled with NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest):
    return request.param


def native_isas() -> list[str]:
    """Instruction sets that the CPU kernels can be forced to here."""
    return available_cpu_isas()


def backends() -> list[str]:
    """Every way to run an op on this machine's CPU: the reference and the native kernels per instruction set."""
    return ["reference", *(f"native-{isa}" for isa in native_isas())]


@pytest.fixture(params=native_isas())
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native CPU kernels forced to one instruction set."""
    set_cpu_isa(request.param)
    yield request.param
    set_cpu_isa(os.environ.get("CPREC_CPU_ISA") or "auto")


@pytest.fixture(params=backends())
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops that have the backend run through it; the rest of the pipeline stays on its default."""
    name, _, isa = request.param.partition("-")
    if name == "native":
        set_cpu_isa(isa)
    with use_backend("reference" if name == "reference" else "auto"):
        yield request.param
    if name == "native":
        set_cpu_isa(os.environ.get("CPREC_CPU_ISA") or "auto")


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of the ops on the CPU go to the Triton kernels, as those on a device do: interpreted, or only listed."""
    for op in _backend.ops():
        *_, reference = _backend._OPS[op]
        for found in (i for i in _backend._OPS[op] if i.backend == "triton"):
            monkeypatch.setitem(
                _backend._OPS, op, (dataclasses.replace(found, device_types=("cpu", "cuda")), reference)
            )
    monkeypatch.setattr("cprec_kernels.ops.clustered_softmax.KEEPING_DEVICES", ("cpu",))
    _backend._choose_cached.cache_clear()
    yield
    _backend._choose_cached.cache_clear()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files end at 4 KB, as on a disk that is full: to write on is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
