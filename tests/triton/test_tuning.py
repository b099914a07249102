"""Tuning on request, with a timer that is told what to say."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch
import triton

from cprec_kernels import Partition, functional
from cprec_kernels._triton import common, configs, tuning
from cprec_kernels._triton.configs import Tile
from cprec_kernels.testing import copy_weights, make_hidden, make_softmax, make_targets, weight_tensors

SMALL = Partition(100, [10, 50], [8, 4, 2], 8)
Z = torch.zeros(3, 8)


class Timer:
    """Times by tile: those in ``fast`` win, those in ``broken`` fail. Everything timed is run."""

    def __init__(self, fast=(), broken=()):
        self.fast, self.broken, self.timed = fast, broken, []

    def __call__(self, run, device):
        (tile,) = run.args
        self.timed.append(tile)
        if tile in self.broken:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        run()
        return 1.0 if tile in self.fast else 2.0


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Tuning is on, the device may be waited for, and nothing is known."""
    path = tmp_path / "cache" / tuning.FILE
    monkeypatch.setattr(tuning, "enabled", lambda: True)
    monkeypatch.setattr(tuning, "cache_file", lambda: path)
    monkeypatch.setattr(tuning, "can_time", lambda device: not common.is_rehearsal())
    forget(monkeypatch)
    return path


def forget(monkeypatch):
    """As in a new process."""
    for name, empty in (("_winners", {}), ("_read", set()), ("_broken", set())):
        monkeypatch.setattr(tuning, name, empty)


def use(monkeypatch, **options):
    timer = Timer(**options)
    monkeypatch.setattr(tuning, "time_ms", timer)
    return timer


def entry():
    return configs.tile_for("weight", 8, torch.float32, 90)


def best(kernel="weight", rank=8):
    return tuning.best_tile(kernel, rank, Z, lambda tile: None)


def test_off_unless_asked_for():
    assert not tuning.enabled({})
    assert not tuning.enabled({"CPREC_AUTOTUNE": "0"})
    assert tuning.enabled({"CPREC_AUTOTUNE": "1"})
    with pytest.raises(ValueError, match="CPREC_AUTOTUNE=yes is neither 0 nor 1; set it to 1"):
        tuning.enabled({"CPREC_AUTOTUNE": "yes"})
    assert not tuning.can_time(torch.device("cpu"))


def test_off_nothing_is_timed_or_written(path, monkeypatch):
    monkeypatch.setattr(tuning, "enabled", lambda: False)
    timer = use(monkeypatch)
    assert best() == entry()
    assert not timer.timed
    assert not path.parent.exists()


def test_where_the_file_lies():
    assert str(tuning.cache_file({"CPREC_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"})) == f"/a/{tuning.FILE}"
    assert str(tuning.cache_file({"XDG_CACHE_HOME": "/b", "HOME": "/c"})) == f"/b/cprec_kernels/{tuning.FILE}"
    assert str(tuning.cache_file({"HOME": "/c"})) == f"/c/.cache/cprec_kernels/{tuning.FILE}"


def test_every_entry_has_at_most_four_alternatives_none_larger():
    for (kernel, *_), tile in configs.TABLE.items():
        others = tuning.alternatives(kernel, tile)
        assert len({tile, *others}) == 1 + len(others) <= 5
        for other in others:
            assert other.block_t * other.block_v * other.num_stages <= tile.block_t * tile.block_v * tile.num_stages
            assert other.block_t == tile.block_t or other.block_t >= 64


def test_a_key_is_timed_once_and_the_fastest_is_kept(path, monkeypatch):
    third = tuning.alternatives("weight", entry())[2]
    timer = use(monkeypatch, fast=[third])
    assert best() == best() == third
    assert timer.timed == [entry(), *tuning.alternatives("weight", entry())]
    best(rank=9)  # the same padded rank
    assert len(timer.timed) == 5
    best("scan_lse")
    best(rank=17)
    tuning.best_tile("weight", 8, Z.bfloat16(), lambda tile: None)
    assert len(tuning._winners) == 4
    # Another process finds all that in the file.
    forget(monkeypatch)
    timer = use(monkeypatch)
    assert best() == third
    assert not timer.timed
    assert [file.name for file in path.parent.iterdir()] == [tuning.FILE]
    (first, *_) = json.loads(path.read_text())["winners"]
    assert set(first["key"]) == {"device", "triton", "kernel", "rank", "dtype"}


def test_noise_does_not_unseat_the_entry(path, monkeypatch):
    monkeypatch.setattr(tuning, "time_ms", lambda run, device: 1.0 if run.args[0] == entry() else 0.99)
    assert best() == entry()


def test_an_alternative_that_does_not_fit_is_passed_over(path, monkeypatch):
    others = tuning.alternatives("weight", entry())
    use(monkeypatch, fast=[others[1]], broken=[others[0], *others[2:]])
    assert best() == others[1]


def test_an_entry_that_does_not_run_is_an_error(path, monkeypatch):
    use(monkeypatch, broken=[entry()])
    with pytest.raises(triton.runtime.errors.OutOfResources):
        best()


def test_nothing_is_timed_in_a_rehearsal_or_under_an_override(path, monkeypatch):
    timer = use(monkeypatch)
    with common.rehearse():
        assert best() == entry()
    tile = Tile(16, 16, 4, 1)
    with configs.override(weight=tile):
        assert best() == tile
    assert not timer.timed
    assert not path.exists()


def test_a_winner_that_is_no_candidate_is_timed_again(path, monkeypatch):
    use(monkeypatch)
    best()
    values = json.loads(path.read_text())
    values["winners"][0]["tile"]["block_t"] = 4096
    path.write_text(json.dumps(values))
    forget(monkeypatch)
    timer = use(monkeypatch)
    assert best() == entry()
    assert len(timer.timed) == 5


DAMAGED = {
    "empty": "",
    "cut": '{"format": 1, "winners": [{"key"',
    "binary": "\x00\x01",
    "list": "[1, 2]",
    "foreign": '{"name": "something else"}',
    "newer": '{"format": 2, "winners": []}',
    "no winners": '{"format": 1, "winners": 3}',
    "odd key": '{"format": 1, "winners": [{"key": {"device": 1}, "tile": {}}]}',
    "odd tile": '{"format": 1, "winners": [{"key": {"device": "a", "triton": "3", "kernel": "weight", "rank": 16, '
    '"dtype": "fp32"}, "tile": {"block_t": "64", "block_v": 64, "num_warps": 4, "num_stages": 1}}]}',
    "null entry": '{"format": 1, "winners": [null]}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_reported_once_and_left_alone(text, path, monkeypatch):
    path.parent.mkdir()
    path.write_text(text)
    third = tuning.alternatives("weight", entry())[2]
    timer = use(monkeypatch, fast=[third])
    with pytest.warns(RuntimeWarning, match=r"is no file of tuned tiles that can be used.*delete it, or name another"):
        assert best() == third
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert best() == third
        best(rank=17)
    assert len(timer.timed) == 10
    assert path.read_text() == text


def test_a_folder_that_cannot_be_made_is_reported_once(path, monkeypatch):
    path.parent.write_text("a file where the folder should be")
    use(monkeypatch)
    with pytest.warns(RuntimeWarning, match="tiles are tuned for this process alone"):
        best()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best(rank=17)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    use(monkeypatch)
    best()
    before = path.read_bytes()
    monkeypatch.setattr(tuning.json, "dump", lambda *args, **options: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(RuntimeWarning, match="disk full"):
        best(rank=17)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [tuning.FILE]


def test_winners_of_another_process_are_kept(path, monkeypatch):
    use(monkeypatch)
    best()
    forget(monkeypatch)
    monkeypatch.setattr(tuning, "_read", {path})  # a process that looked before the other one wrote
    best(rank=17)
    assert [winner["key"]["rank"] for winner in json.loads(path.read_text())["winners"]] == [16, 32]


def test_threads_that_meet_a_key_together_time_it_once(path, monkeypatch):
    timer = use(monkeypatch)
    threads = [threading.Thread(target=best) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timer.timed) == 5


def test_a_training_step_with_tuned_tiles(path, monkeypatch, through_triton):
    """Every alternative of every kernel on a step's own inputs; whichever wins, the results are those of the reference."""
    weights = copy_weights(make_softmax(SMALL), requires_grad=True)
    hidden, target = make_hidden(SMALL, (40,)).requires_grad_(), make_targets(SMALL, (40,))
    leaves = [hidden, *weight_tensors(weights)]

    def step():
        loss = functional.clustered_cross_entropy(hidden, target, weights)
        return loss, *torch.autograd.grad(loss, leaves)

    monkeypatch.setattr(tuning, "enabled", lambda: False)
    expected = step()
    monkeypatch.setattr(tuning, "enabled", lambda: True)
    for place in range(4):
        forget(monkeypatch)
        path.unlink(missing_ok=True)
        entries = [configs.tile_for(kernel, 8, torch.float32, 90) for kernel in ("weight", "scan_rows")]
        others = [tuning.alternatives(*pair) for pair in zip(("weight", "scan_rows"), entries, strict=True)]
        fast = [tiles[min(place, len(tiles) - 1)] for tiles in others]
        timer = use(monkeypatch, fast=fast)
        for a, b in zip(step(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert timer.timed == [entries[1], *others[1], entries[0], *others[0]]  # one padded rank, two kernels
        assert len(tuning._winners) == 2
        assert set(tuning._winners.values()) <= set(fast)
