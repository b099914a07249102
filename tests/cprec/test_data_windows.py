"""Windows: every transition is trained exactly once, and padding is on the left only."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cprec.data import EvaluationWindows, Sequences, TrainingWindows, collate, prepare
from cprec.data.sequences import EvaluationSplit

PAD = 1000


def make(lengths, gap=0):
    """Sequences of distinct items, with ``gap`` foreign items between them."""
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths + gap)])[:-1].astype(np.int64)
    return Sequences.view(np.arange((lengths + gap).sum(), dtype=np.int32), starts, starts + lengths)


@given(st.lists(st.integers(0, 23), max_size=12), st.integers(1, 9), st.integers(0, 2))
def test_every_transition_exactly_once(lengths, length, gap):
    sequences = make(lengths, gap)
    windows = TrainingWindows(sequences, length, PAD)
    batch = windows.__getitems__(list(range(len(windows))))
    assert batch.shape == (len(windows), length + 1)
    assert batch.dtype == torch.int64
    inputs, targets = batch[:, :-1].flatten().tolist(), batch[:, 1:].flatten().tolist()
    seen = Counter((a, b) for a, b in zip(inputs, targets, strict=True) if PAD not in (a, b))
    wanted = Counter(pair for row in sequences for pair in itertools.pairwise(row.tolist()))
    assert seen == wanted
    padding = batch == PAD
    assert not (padding[:, 1:] & ~padding[:, :-1]).any()  # on the left only
    assert not padding[:, -2:].any()  # and never so much that no transition is left
    assert len(windows) == sum(-(-(n - 1) // length) for n in lengths if n > 1)


def test_windows_by_hand():
    windows = TrainingWindows(make([7, 1, 2]), 3, PAD)
    assert [window.tolist() for window in windows.__getitems__([0, 1, 2])] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [PAD, PAD, 8, 9],
    ]
    assert windows[1].tolist() == [3, 4, 5, 6]
    assert windows.__getitems__([2, 0])[1].tolist() == [0, 1, 2, 3]
    assert windows.__getitems__([]).shape == (0, 4)
    for bad in (3, -1):
        with pytest.raises(IndexError, match=f"window {bad} of 3"):
            windows[bad]
    with pytest.raises(ValueError, match="length must be at least 1"):
        TrainingWindows(make([3]), 0, PAD)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=8), st.integers(1, 9))
def test_evaluation_windows_show_the_latest_items(tmp_path_factory, lengths, length):
    histories = make(lengths)
    targets = np.arange(len(lengths), dtype=np.int64) + 500
    split = EvaluationSplit("test", histories, targets, np.arange(len(lengths)), None)
    windows = EvaluationWindows(split, length, PAD)
    order = list(reversed(range(len(windows))))
    batch, target, index = windows.__getitems__(order)
    assert index.tolist() == order
    assert target.tolist() == targets[order].tolist()
    for row, number in zip(batch.tolist(), order, strict=True):
        items = histories[number][-length:].tolist()
        assert row == [PAD] * (length - len(items)) + items
    single = windows[0]
    assert [part.tolist() for part in single] == [batch[-1].tolist(), 500, 0]
    with pytest.raises(IndexError):
        windows[len(lengths)]


def test_loader_with_workers_reads_the_memory_map(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(" ".join(str((7 * row + step) % 40) for step in range(9)) + "\n" for row in range(60)))
    data = prepare(path, tmp_path / "out")
    windows = TrainingWindows(data.train, 4, data.num_items)
    assert len(pickle.dumps(windows)) < 20_000
    whole = windows.__getitems__(list(range(len(windows))))
    for workers, context in ((0, None), (1, "spawn")):
        loader = DataLoader(windows, 32, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), whole)
    valid = EvaluationWindows(data.evaluation("valid"), 5, data.num_items)
    histories, targets, index = pickle.loads(pickle.dumps(valid)).__getitems__([3, 1])
    assert histories.shape == (2, 5)
    assert index.tolist() == [3, 1]
    assert targets.tolist() == data.evaluation("valid").targets[[3, 1]].tolist()
