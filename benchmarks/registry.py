"""What there is to measure: ops, their providers, and what a provider has to say about itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.errors import BenchmarkError, unknown
from cprec_kernels import available_cpu_isas, backend_of, cpu_isa, set_cpu_isa, use_backend

OPS = (
    *("clustered_softmax", "block_embedding", "conv_norm_relu", "train_step"),
    *("clustered_topk", "clustered_rank", "residual_stack"),
)
DTYPES = ("float32", "bfloat16")
Results = dict[str, Tensor]
# (outputs, base, truth, dtype, slack) -> raises AssertionError unless the outputs are right.
Compare = Callable[[Results, Results, Results, torch.dtype, float], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that a row's numbers depend on, but the provider.

    dtype: "float32", or "bfloat16" for fp32 parameters under bf16 autocast.
    """

    op: str
    case: Case
    mode: str
    targets: str = "zipf"
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"

    def scaled_down(self) -> Setting:
        return dataclasses.replace(self, case=self.case.scaled_down())

    def label(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.op} {self.case.name} {self.mode} {self.targets} {self.dtype} {threads}"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call has to do, by a model: see the ops' docstrings.

    flops: floating-point operations of matrix products. exps: exponentials. bytes: memory traffic, every operand once
    per pass that cannot do without it.
    """

    flops: float
    exps: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A provider with its inputs in place.

    call: what is timed. leaves: what it leaves gradients at. results: all outputs of the last call, for the gate. summary:
    few of them, for the comparison at full size. note: what was chosen while preparing, for the row.
    """

    call: Callable[[], Any]
    leaves: Sequence[Tensor]
    results: Callable[[], Results]
    summary: Callable[[], Results]
    note: str = ""

    def reset(self) -> None:
        """Drop gradients: run before every call, untimed.

        No call accumulates into what the one before left; gradients are set to None, as optimizers' zero_grad does, so
        every call allocates its own.
        """
        for leaf in self.leaves:
            leaf.grad = None


def never_missing(_setting: Setting) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        prepare: builds inputs' views and modules from an op's problem; not timed.
        work: the model of one call.
        resident_bytes: parameters and states it keeps beyond those that all providers of the problem share.
        call_bytes: gradients and temporaries that a call allocates, by a model.
        formula: outputs are compared among providers of one formula, and with that formula in fp64.
        isa: whose roofs apply; "" for the widest of this machine (torch chooses its own).
        scope: entered around calls, not timed.
        missing: "" when it can run here, else the reason why not.
        baseline: compared with this provider rather than with the op's baseline.
        dtype: computes in this dtype whatever the setting says; "" for the setting's.
        narrow_only: left out of float32 settings unless named, because another provider is the same there.
        compare: judges its outputs in place of the op's; for what promises less, or something else beside.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    work: Callable[[Any], Work]
    resident_bytes: Callable[[Any], int] = lambda problem: 0
    call_bytes: Callable[[Any], int] = lambda problem: 0
    formula: str = "clustered"
    isa: str = ""
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    missing: Callable[[Setting], str] = never_missing
    baseline: str = ""
    dtype: str = ""
    narrow_only: bool = False
    compare: Compare | None = None

    @property
    def is_ours(self) -> bool:
        """Held to the tolerance rule; everything else is a peer."""
        return self.name.startswith("cprec-") or self.name == "reference"


@dataclasses.dataclass(frozen=True)
class Op:
    """An op with its cases, providers and truth.

    Attributes:
        problem: setting -> inputs and shared parameters; building them is cheap until a provider asks.
        truth: (problem, formula, dtype) -> the formula's outputs by plain torch in "float64", or in a dtype of DTYPES.
        compare: judges a provider's outputs; None for the tolerance rule.
        baseline: provider that ratios refer to.
        referee: (problem, rows) -> (formula, its outputs in fp64 for these rows (R,) of them, at full size), asked when
            providers disagree there.
    """

    name: str
    about: str
    modes: tuple[str, ...]
    cases: tuple[str, ...]
    baseline: str
    providers: tuple[Provider, ...]
    problem: Callable[[Setting], Any]
    truth: Callable[[Any, str, str], Results]
    compare: Compare | None = None
    referee: Callable[[Any, Tensor], tuple[str, Results]] | None = None

    def provider(self, name: str) -> Provider:
        """Raises BenchmarkError for a name that is not among them."""
        for provider in self.providers:
            if provider.name == name:
                return provider
        raise unknown(f"provider of {self.name}", name, [provider.name for provider in self.providers])

    def baseline_of(self, provider: Provider, setting: Setting) -> str:
        """The provider that a row's ratio refers to; in bf16 the baseline still computes in fp32 where it can."""
        name = provider.baseline or self.baseline
        wide = f"{name}-fp32"
        has_wide = any(other.name == wide for other in self.providers)
        return wide if setting.dtype != "float32" and has_wide else name


@functools.cache
def get_op(name: str) -> Op:
    """The op of a name. Raises BenchmarkError."""
    if name not in OPS:
        raise unknown("op", name, OPS)
    op: Op = importlib.import_module(f"benchmarks.ops.bench_{name}").OP
    return op


def choose_providers(op: Op, names: Sequence[str], dtype: str = "float32") -> list[Provider]:
    """The providers of these names in the op's order; without names all that make sense in the dtype."""
    if not names:
        return [provider for provider in op.providers if dtype != "float32" or not provider.narrow_only]
    chosen = {op.provider(name).name for name in names}
    return [provider for provider in op.providers if provider.name in chosen]


def choose_mode(op: Op, name: str | None) -> str:
    """A mode of the op, its first when none is named."""
    if name is None:
        return op.modes[0]
    if name not in op.modes:
        raise unknown(f"mode of {op.name}", name, op.modes)
    return name


def check_device(name: str) -> str:
    """Only the CPU is measured today."""
    if name != "cpu":
        raise BenchmarkError(f"device {name!r} is not measured by these providers yet; there is cpu")
    return name


# Scopes


@contextlib.contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Our CPU kernels in one instruction set."""
    before = cpu_isa()
    set_cpu_isa(name)
    try:
        yield
    finally:
        set_cpu_isa(before)


def missing_isa(name: str, *ops: str) -> Callable[[Setting], str]:
    """Reason why our kernels cannot run in an instruction set; ``ops`` must have kernels of their own."""

    def missing(_setting: Setting) -> str:
        if name not in available_cpu_isas():
            return f"there are no {name} kernels on this machine"
        reason = missing_kernels(*ops)
        return f"{reason}: see the row of reference" if reason else ""

    return missing


def missing_kernels(*ops: str) -> str:
    """Reason why a row would show the reference and not our kernels."""
    without = [op for op in ops if backend_of(op, torch.empty(0)) == "reference"]
    return f"{', '.join(without)} has no native kernel" if without else ""


def missing_package(module: str, package: str) -> Callable[[Setting], str]:
    """Reason why a peer's package cannot be used."""

    def missing(_setting: Setting) -> str:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{package} is not importable ({error}); pip install {package}"
        return ""

    return missing


def reference_backend() -> contextlib.AbstractContextManager[None]:
    return use_backend("reference")


ISAS = ("avx512_bf16", "avx512", "avx2", "scalar")


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The region in which a setting's forward runs."""
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
