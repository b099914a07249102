"""What the GPU kernels of a training step cannot be faster than, by the rates that the same run measured.

A level of m tokens and k entries has m k logits. The forward pass for training and the weight's gradient each multiply
every logit's operands twice and take one power of two; evaluation multiplies once. Tensor cores and the special function
units work side by side, so a kernel's floor is the larger of the two times. Memory is not in it: a tile of weights serves
64 tokens or more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cprec_kernels import Partition

MIN_RANK = 16  # the depth of a matrix instruction: narrower operands are padded to it
PRODUCTS = {"clustered_softmax_scan_kernel": 2, "clustered_softmax_bwd_weight_kernel": 2}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured: FLOP/s of a product of bf16 matrices, powers of two per second."""

    flops: float
    exps: float

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Rates | None:
        """From what the machine stage left; None where it did not get so far."""
        found = {row["kind"]: row for row in rows}
        if "bf16 product" not in found or "exp2" not in found:
            return None
        return cls(1e12 * found["bf16 product"]["tflops"], 1e9 * found["exp2"]["g_per_s"])


def level_logits(partition: Partition, targets: Sequence[int]) -> list[int]:
    """Logits of every level for a batch with these targets: the head's for all tokens, a tail's for its own."""
    counts = [0] * partition.num_clusters
    for target in targets:
        counts[partition.cluster_of(target)] += 1
    tails = [count * size for count, size in zip(counts[1:], partition.sizes[1:], strict=True)]
    return [len(targets) * partition.head_size, *tails]


def floor_ms(kernel: str, rank: int, logits: int, rates: Rates) -> float:
    """The least time of one launch of a kernel named in :data:`PRODUCTS`, in ms."""
    products = PRODUCTS[kernel] * 2 * max(rank, MIN_RANK) * logits / rates.flops
    return 1e3 * max(products, logits / rates.exps)


def kernel_rows(
    events: Sequence[tuple[str, float]], partition: Partition, targets: Sequence[int], rates: Rates | None
) -> list[dict[str, Any]]:
    """Time per kernel and launch of one step, with floors where there is a model.

    Args:
        events: (name, ms) of the kernels of one training step, in the order in which they ran. A kernel that has a
            model runs once per level, head first.
    """
    logits = level_logits(partition, targets)
    seen: dict[str, int] = {}
    rows = []
    for name, ms in events:
        launch = seen.get(name, 0)
        seen[name] = launch + 1
        row: dict[str, Any] = {"kernel": name, "launch": launch, "ms": ms}
        if name in PRODUCTS and rates is not None and launch < partition.num_clusters and logits[launch]:
            least = floor_ms(name, partition.ranks[launch], logits[launch], rates)
            row |= {"floor_ms": least, "over_floor": ms / least}
        rows.append(row)
    return rows
