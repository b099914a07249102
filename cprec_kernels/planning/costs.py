"""What a partition costs: parameters, time of a training step and time of a search, by a model of work.

A level of the softmax has C entries of rank r and n tokens, the head all of them, a tail those whose target it holds. As in
``benchmarks/ops/bench_clustered_softmax.py``, a step makes four products of 2 C r n FLOPs (logits twice, both gradients)
and 2 C n exponentials, reads the weight twice and writes its gradient. A projection adds 6 r d n FLOPs. The embedding's
clusters gather, project and write a dense gradient. AdamW reads and writes seven numbers per parameter. A search scans
every level once for every row; that a tail may often be skipped is not counted, so its time is one that is kept.

Time of a level: ``max(FLOPs / rate + exponentials / rate, bytes / bandwidth) / efficiency``, and a fixed cost. Where
exponentials have units of their own they overlap with products.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cprec_kernels.planning.counts import FloatArray

FLOAT_BYTES = 4
ADAM_NUMBERS = 7  # read weight, gradient and two moments; write weight and moments


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates that turn work into time.

    Args:
        name: how the machine is called.
        flops, exps, bytes: per second. efficiency: share of them that the kernels reach.
        level_ms: fixed cost of a level: launching it, or waking threads for it.
        rank_step: ranks are padded to a multiple of this.
        exps_overlap: exponentials run beside products, not between them.
    """

    name: str
    flops: float
    exps: float
    bytes: float
    efficiency: float
    level_ms: float
    rank_step: int = 1
    exps_overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("flops", "exps", "bytes", "efficiency", "rank_step"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} of the machine must be a finite number above 0, got {getattr(self, name)}")
        if not 0 <= self.level_ms < float("inf"):
            raise ValueError(f"level_ms of the machine must be a finite number of at least 0, got {self.level_ms}")

    def padded(self, rank: FloatArray) -> FloatArray:
        """Ranks as the kernels multiply them."""
        steps: FloatArray = np.ceil(rank / self.rank_step) * self.rank_step
        return steps

    def time_ms(self, flops: FloatArray, exps: FloatArray, numbers: FloatArray) -> FloatArray:
        """Milliseconds, without the fixed cost."""
        products, exponentials = flops / self.flops, exps / self.exps
        compute = np.maximum(products, exponentials) if self.exps_overlap else products + exponentials
        seconds: FloatArray = np.maximum(compute, FLOAT_BYTES * numbers / self.bytes) / self.efficiency
        return 1e3 * seconds


# Measured on two threads of an AMD EPYC of family 26, whose 512-bit units are whole: the roofs in benchmarks/results/*.json
# (fma 498..528 GFLOP/s, exp 33.5..35.2 G/s, read 38..87 GB/s beyond the caches, mostly near 40); efficiency: the "of roof"
# column of docs/performance.md, 61% to 88% for the loss in fp32; level_ms: a whole search for one row among 10^5 items
# takes 0.31 ms in three levels, a tenth of which is what its work would need from caches; the rest is rounded down.
CPU = Machine("cpu", flops=514e9, exps=34.4e9, bytes=42e9, efficiency=0.72, level_ms=0.08)
# Not measured here: an H100's rates as the kernels were designed for (bf16 products, one ex2 per 0.27 ps of the chip, HBM
# at 3 TB/s), 1.45 times their floor, and three launches of 15 us per level from Python. Triton pads ranks to 16.
GPU = Machine(
    "gpu", flops=800e12, exps=3.7e12, bytes=3.0e12, efficiency=0.69, level_ms=0.045, rank_step=16, exps_overlap=True
)
MACHINES = {machine.name: machine for machine in (CPU, GPU)}


def softmax_step_ms(
    machine: Machine, entries: FloatArray, rank: FloatArray, tokens: FloatArray, width: int
) -> FloatArray:
    """Forward and backward pass of a level for ``tokens`` tokens of the ``width``; arguments broadcast."""
    logits, projected = entries * tokens, rank < width
    flops = 8.0 * machine.padded(rank) * logits + projected * 6.0 * rank * width * tokens
    numbers = 3.0 * (entries * rank + tokens * (width + rank * projected) + rank * width * projected)
    return machine.time_ms(flops, 2.0 * logits, numbers) + machine.level_ms


def embedding_step_ms(
    machine: Machine, rows: FloatArray, rank: FloatArray, tokens: FloatArray, width: int
) -> FloatArray:
    """Forward and backward pass of an embedding's cluster with dense gradients; arguments broadcast."""
    projected = rank < width
    flops = projected * 6.0 * rank * width * tokens
    numbers = rows * rank + 3.0 * (tokens * (width + rank * projected) + rank * width * projected)
    return machine.time_ms(flops, np.zeros(1), numbers)


def optimizer_ms(machine: Machine, parameters: FloatArray) -> FloatArray:
    """A step of AdamW on dense gradients."""
    return machine.time_ms(np.zeros(1), np.zeros(1), ADAM_NUMBERS * parameters)


def search_ms(machine: Machine, entries: FloatArray, rank: FloatArray, rows: int, width: int) -> FloatArray:
    """Scan of a level for ``rows`` hidden states; arguments broadcast."""
    projected = rank < width
    flops = rows * (2.0 * machine.padded(rank) * entries + projected * 2.0 * rank * width)
    numbers = entries * rank + rank * width * projected + rows * width
    return machine.time_ms(flops, entries * float(rows), numbers) + machine.level_ms
