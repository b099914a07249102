"""The machine's roofs, measured once per run, and how near to them a row came.

The least time of a call is ``max(flops / FMA rate + exponentials / exp rate, bytes / bandwidth)``: products and
exponentials share the vector units, memory traffic overlaps with both. ``roofline_fraction`` is that time over the measured
median. The bandwidth is that of the measured working set nearest above the call's bytes: small calls run from caches.
A row in bf16 is held to the rate of bf16 products or of fp32 ones, whichever is higher; exponentials are fp32 in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.registry import Work, forced_isa
from cprec_kernels import available_cpu_isas
from cprec_kernels.testing import roofline as probes

WORKING_SETS = tuple(1 << shift for shift in (18, 20, 22, 24, 26, 28))  # 256 KiB .. 256 MiB


@dataclasses.dataclass(frozen=True)
class Roof:
    """Rates of one instruction set on some threads: 10^9 FLOPs, exponentials and bytes per second.

    read_gbps: (working set in bytes, rate), ascending.
    """

    isa: str
    threads: int
    fma_gflops: float
    bf16_gflops: float
    exp_gexps: float
    read_gbps: tuple[tuple[int, float], ...]

    def bandwidth_gbps(self, working_set_bytes: float) -> float:
        """Rate of the smallest measured working set that holds as many bytes, of the largest when none does."""
        for size, rate in self.read_gbps:
            if size >= working_set_bytes:
                return rate
        return self.read_gbps[-1][1]

    def least_ms(self, work: Work, dtype: str) -> float:
        """The least time that the model allows."""
        product_gflops = max(self.fma_gflops, self.bf16_gflops) if dtype == "bfloat16" else self.fma_gflops
        compute_s = work.flops / (product_gflops * 1e9) + work.exps / (self.exp_gexps * 1e9)
        memory_s = work.bytes / (self.bandwidth_gbps(work.bytes) * 1e9)
        return max(compute_s, memory_s) * 1e3

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Roof:
        return cls(**values | {"read_gbps": tuple((int(size), float(rate)) for size, rate in values["read_gbps"])})


def roof_isa(isa: str) -> str:
    """The instruction set whose roof a provider is held to: its own, or the widest of this machine."""
    available = available_cpu_isas()
    return isa if isa in available else available[-1] if available else ""


def measure(isa: str, threads: int, quick: bool = False) -> Roof:
    """Roofs of one instruction set, in about two seconds; ``quick`` in a tenth, for tests."""
    effort = {"trials": 2, "trial_s": 0.003} if quick else {}
    with forced_isa(isa):
        return Roof(
            isa,
            threads,
            probes.fma_gflops(threads, **effort),  # type: ignore[arg-type]
            probes.bf16_gflops(threads, **effort),  # type: ignore[arg-type]
            probes.exp_gexps(threads, **effort),  # type: ignore[arg-type]
            tuple((size, probes.read_gbps(size, threads, **effort)) for size in WORKING_SETS),  # type: ignore[arg-type]
        )


class Roofs:
    """Measured when first asked for, once per instruction set and number of threads."""

    def __init__(self, quick: bool = False, measure: Callable[[str, int, bool], Roof] = measure) -> None:
        self._quick, self._measure = quick, measure
        self._roofs: dict[tuple[str, int], Roof] = {}

    def prepare(self, isas: Iterable[str], threads: Sequence[int]) -> None:
        """Measure before anything else uses the machine's caches and clock."""
        for isa in sorted({roof_isa(isa) for isa in isas} - {""}):
            for count in threads:
                if (isa, count) not in self._roofs:
                    self._roofs[isa, count] = self._measure(isa, count, self._quick)

    def fraction(self, work: Work, isa: str, threads: int, median_ms: float, dtype: str) -> float | None:
        """``roofline_fraction``, or None where there are no native kernels to measure roofs with."""
        name = roof_isa(isa)
        if not name:
            return None
        self.prepare([name], [threads])
        return self._roofs[name, threads].least_ms(work, dtype) / median_ms

    def to_list(self) -> list[dict[str, Any]]:
        return [roof.to_dict() for _, roof in sorted(self._roofs.items())]
