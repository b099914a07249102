"""Training batches in an order that depends on (seed, epoch) alone, so that a run can go on from the middle of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler


class BatchedDataset(Protocol):
    """What the loaders need of a dataset: a length, and several examples at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __getitems__(self, indices: list[int], /) -> Any: ...


def _loader(dataset: BatchedDataset, batches: Sampler[list[int]], workers: int, pin_memory: bool) -> DataLoader[Any]:
    from cprec.data import collate  # here: evaluation and serving are imported without polars

    # a generator of its own keeps the loader from drawing from (and so moving) the global random state
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
        pin_memory=pin_memory,
    )


class EpochBatches(Sampler[list[int]]):
    """Shuffled indices of one epoch, cut into batches and dealt out to the processes of a run.

    Every process gets the same number of batches; where the examples do not fill the last one for all processes, the
    epoch's first examples are used again. With one process the last batch is simply smaller.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return math.ceil(self.size / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        if self.world_size > 1:
            order = np.resize(order, math.ceil(self.size / self.world_size) * self.world_size)
        share = order[self.rank :: self.world_size]
        for batch in range(self.start, len(self)):
            yield share[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class ResumableBatches:
    """The training loader: iterates over one epoch, knows how far it has come, and starts from there when restored.

    Lightning calls ``sampler.set_epoch`` and the pair ``state_dict`` / ``load_state_dict``.
    """

    def __init__(
        self,
        dataset: BatchedDataset,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.workers, self.pin_memory = dataset, workers, pin_memory
        self.batches = EpochBatches(len(dataset), batch_size, seed, rank, world_size)
        self.done = 0
        self._resume_at = 0

    @property
    def sampler(self) -> ResumableBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        # A generator: nothing below runs before the first batch is asked for, when the epoch has been set.
        self.batches.start = self.done = self._resume_at
        self._resume_at = 0
        for batch in _loader(self.dataset, self.batches, self.workers, self.pin_memory):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batches.epoch, "batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.epoch, self._resume_at = state["epoch"], state["batches"]


class _InOrder(Sampler[list[int]]):
    def __init__(self, indices: Sequence[int], batch_size: int) -> None:
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


def ordered_batches(
    dataset: BatchedDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Every example once, in order; process ``rank`` of ``world_size`` gets every ``world_size``-th one."""
    return _loader(dataset, _InOrder(range(rank, len(dataset), world_size), batch_size), workers, pin_memory)
