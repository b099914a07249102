"""Fixed-length batches cut from sequences, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from .sequences import EvaluationSplit, IntArray, Sequences

Batch = TypeVar("Batch")


def collate(batch: Batch) -> Batch:
    """The ``collate_fn`` for a DataLoader over these datasets, which return whole batches already."""
    return batch


def _gather(items: npt.NDArray[np.integer], starts: IntArray, ends: IntArray, width: int, pad: int) -> torch.Tensor:
    """The last ``width`` items before ``ends``, from ``starts`` on, padded on the left: (B, width) int64."""
    positions = ends[:, None] + np.arange(-width, 0)
    inside = positions >= starts[:, None]
    found = items[np.where(inside, positions, ends[:, None] - 1)]
    return torch.from_numpy(np.where(inside, found, pad).astype(np.int64, copy=False))


def _checked(indices: Sequence[int], size: int) -> IntArray:
    numbers = np.asarray(indices, dtype=np.int64)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= size):
        raise IndexError(f"window {numbers.max() if numbers.max() >= size else numbers.min()} of {size}")
    return numbers


class TrainingWindows(Dataset[torch.Tensor]):
    """Windows of ``length + 1`` items: ``w[:, :-1]`` are inputs, ``w[:, 1:]`` targets, so a window has ``length`` steps.

    A sequence of n items has n - 1 transitions. It becomes ceil((n - 1) / length) windows that overlap by one item, so
    that every transition is in exactly one; they are cut from the end, and only the earliest may be short and is padded
    on the left. A sequence of one item has no transition and no window.

    Args:
        sequences: item numbers. length: steps per window, at least 1. pad: padding id, usually num_items.
    """

    def __init__(self, sequences: Sequences, length: int, pad: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.sequences, self.length, self.pad = sequences, length, pad
        self._per_sequence = np.maximum(0, -(-(sequences.lengths - 1) // length))
        self._first = np.concatenate([[0], np.cumsum(self._per_sequence)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """One window, (length + 1,) int64."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Windows (B, length + 1), int64."""
        numbers = _checked(indices, len(self))
        rows = np.searchsorted(self._first, numbers, side="right") - 1
        later = self._first[rows + 1] - 1 - numbers  # windows of the same sequence that come after this one
        ends = self.sequences.ends[rows] - later * self.length
        return _gather(self.sequences.items, self.sequences.starts[rows], ends, self.length + 1, self.pad)


class EvaluationWindows(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """The last ``length`` items of every history, and its target.

    Args:
        split: histories and targets. length: items of history a model sees. pad: padding id, usually num_items.
    """

    def __init__(self, split: EvaluationSplit, length: int, pad: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.split, self.length, self.pad = split, length, pad

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """History (length,), target () and index (), int64."""
        history, target, number = self.__getitems__([index])
        return history[0], target[0], number[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Histories (B, length) padded on the left, targets (B,) and indices (B,), int64."""
        numbers = _checked(indices, len(self))
        histories = self.split.histories
        window = _gather(histories.items, histories.starts[numbers], histories.ends[numbers], self.length, self.pad)
        return window, torch.from_numpy(self.split.targets[numbers]), torch.from_numpy(numbers)
