"""Named cases: catalogue size, width and batch, and the inputs that follow from the name alone.

``1m-d128-t512`` is a catalogue of 10^6 items, width 128 and 512 tokens (``b512``: rows, for searches). Cutoffs are K/50
and K/5, ranks d, d/4 and d/16, as a recommender with a long tail would choose them. ``tiny`` is K = 1,000. A name without
a width means width 128: ``1m-b1`` is ``1m-d128-b1``, and that is what its results are called.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from cprec_kernels import Partition

TARGETS = ("zipf", "uniform")
SIZES = {"tiny": 1_000, "100k": 100_000, "1m": 1_000_000, "10m": 10_000_000}
DEFAULT_WIDTH = 128
# The gate compares against fp64 on a case of the same shape, this much smaller, within these bounds.
GATE_SHRINK, GATE_MIN_ITEMS, GATE_MAX_ITEMS, GATE_MAX_TOKENS = 50, 2_000, 20_000, 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: K = ``num_items``, d = ``width``, T = ``tokens``."""

    name: str
    num_items: int
    width: int
    tokens: int

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of a name such as ``100k-d64-t512``, or ``100k-t512`` for width 128.

        Raises:
            BenchmarkError: the name does not follow the pattern, or its numbers make no partition.
        """
        match = re.fullmatch(r"(tiny|(\d+)([km]?))(?:-d(\d+))?-([tb])(\d+)", name)
        if match is None:
            raise BenchmarkError(
                f"unknown case {name!r}; a name is SIZE-dWIDTH-tTOKENS with SIZE {', '.join(SIZES)} or any such number, "
                f"e.g. 1m-d128-t512 (bROWS instead of tTOKENS for searches; without -dWIDTH it is {DEFAULT_WIDTH}: 1m-b1)"
            )
        size, digits, unit, width, letter, tokens = match.groups(str(DEFAULT_WIDTH))
        num_items = SIZES["tiny"] if size == "tiny" else int(digits) * {"": 1, "k": 1_000, "m": 1_000_000}[unit]
        # One name per shape: results of 1m-b1 and 1m-d128-b1 belong to the same setting.
        case = cls(f"{size}-d{width}-{letter}{tokens}", num_items, int(width), int(tokens))
        if num_items < 100 or case.width < 16 or case.tokens < 1:
            raise BenchmarkError(f"case {name!r} needs at least 100 items, width 16 and one token")
        return case

    @property
    def partition(self) -> Partition:
        items, width = self.num_items, self.width
        return Partition(items, [items // 50, items // 5], [width, width // 4, width // 16], width)

    def scaled_down(self) -> Case:
        """The case of the same shape that outputs are compared with fp64 on."""
        items = min(max(self.num_items // GATE_SHRINK, GATE_MIN_ITEMS), GATE_MAX_ITEMS, self.num_items)
        return Case(f"{self.name} scaled down", items, self.width, min(self.tokens, GATE_MAX_TOKENS))


def draw_items(num_items: int, count: int, targets: str, seed: int) -> Tensor:
    """(count,) int64 items, Zipf(1.0) (P(item i) proportional to 1 / (i + 1)) or uniform."""
    generator = torch.Generator().manual_seed(seed)
    if targets == "uniform":
        return torch.randint(num_items, (count,), generator=generator)
    weights = torch.arange(1, num_items + 1, dtype=torch.float64).reciprocal_().cumsum_(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * weights[-1]
    return torch.searchsorted(weights, drawn).clamp_(max=num_items - 1)


def normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """A fp32 tensor with entries N(0, std^2)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(std)


def fill_normal(parameters: Iterable[nn.Parameter], seed: int, fan_dim: int | None = None) -> None:
    """Fill parameters with N(0, 1 / size of ``fan_dim``), N(0, 1) without one; the j-th from ``seed + j``."""
    with torch.no_grad():
        for j, parameter in enumerate(parameters):
            std = 1.0 if fan_dim is None else parameter.shape[fan_dim] ** -0.5
            parameter.copy_(normal(tuple(parameter.shape), std, seed + j))


def tokens_per_cluster(partition: Partition, items: Tensor) -> list[int]:
    """How many of the items lie in every cluster."""
    bounds = torch.tensor(partition.offsets[1:-1], dtype=torch.int64)
    return torch.bincount(torch.bucketize(items, bounds, right=True), minlength=partition.num_clusters).tolist()
