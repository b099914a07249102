"""Tiles chosen by timing, on request: ``CPREC_AUTOTUNE=1``. Without it the tables of configs.py decide, and nothing is timed.

The first call with a kernel, padded rank and dtype that no one has timed on this kind of device runs the table's tile and at
most four alternatives on the call's own inputs, and waits for the device. Results are overwritten by every run, so nothing
has to be restored. The fastest is kept in a file, for all processes after this one.

Another tile sums in another order: with tuning on, bits repeat only as long as the file stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from . import configs
from .common import TYPE_NAMES, architecture, is_rehearsal, padded_rank
from .configs import Tile

FILE = "triton-tiles.json"
FORMAT = 1
MAX_ALTERNATIVES = 4
REPEATS = 7
# An alternative must win by more than runs differ, or the file would hold the noise of one afternoon.
MARGIN = 0.98


class Key(NamedTuple):
    """What a winner depends on; the sizes of catalogue and batch are left to the first call that meets the key."""

    device: str
    triton: str
    kernel: str
    rank: int
    dtype: str


_winners: dict[Key, Tile] = {}
_read: set[Path] = set()  # files whose winners are known
_broken: set[Path] = set()  # files that are not ours to write
_lock = threading.RLock()


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether tuning was asked for. Raises ValueError for a value of CPREC_AUTOTUNE that is neither 0 nor 1."""
    value = environ.get("CPREC_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"CPREC_AUTOTUNE={value} is neither 0 nor 1; set it to 1 to tune, or unset it")
    return value == "1"


def cache_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where winners are kept: in ``$CPREC_CACHE_DIR``, else in ``$XDG_CACHE_HOME/cprec_kernels``, else under ``~/.cache``."""
    if environ.get("CPREC_CACHE_DIR"):
        return Path(environ["CPREC_CACHE_DIR"]) / FILE
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache"
    return Path(base) / "cprec_kernels" / FILE


def alternatives(kernel: str, tile: Tile) -> list[Tile]:
    """What is timed beside an entry of the tables: smaller tiles, other numbers of warps and stages, the other orientation.

    None is larger than the entry, which holds as much as registers and shared memory allow; one that does not fit a device
    all the same is passed over. A matrix instruction of sm_90 wants 64 tokens, so no tile is cut below that.
    """
    changes: list[dict[str, Any]] = []
    if kernel in ("weight", "weight_unbiased"):
        changes.append({"transposed": not tile.transposed})
    if tile.block_v >= 64:
        changes.append({"block_v": tile.block_v // 2})
    if tile.block_t >= 128:
        changes.append({"block_t": tile.block_t // 2})
    changes.append({"num_warps": 4 if tile.num_warps == 8 else 8})
    if tile.num_stages > 1:
        changes.append({"num_stages": tile.num_stages - 1})
    return [dataclasses.replace(tile, **change) for change in changes[:MAX_ALTERNATIVES]]


def best_tile(kernel: str, rank: int, anchor: Tensor, run: Callable[[Tile], Any]) -> Tile:
    """The tile to run a kernel with on tensors like ``anchor``; ``run(tile)`` does the work of this call with one."""
    tile = configs.tile_for(kernel, rank, anchor.dtype, architecture(anchor.device))
    if not enabled() or configs.is_overridden(kernel):
        return tile
    key = Key(device_name(anchor.device), triton.__version__, kernel, padded_rank(rank), TYPE_NAMES[anchor.dtype])
    known = (tile, *alternatives(kernel, tile))
    with _lock:
        path = cache_file()
        if path not in _read:
            _read.add(path)
            _winners.update(_load(path))
        # A winner that is no candidate any more is of another version of the tables.
        if _winners.get(key) in known:
            return _winners[key]
        if not can_time(anchor.device):
            return tile
        _winners[key] = _fastest(known, run, anchor.device)
        _save(path)
        return _winners[key]


def can_time(device: torch.device) -> bool:
    """Whether a call may wait for its device: on a CUDA device, and not while a graph is captured or a call rehearsed."""
    return device.type == "cuda" and not is_rehearsal() and not torch.cuda.is_current_stream_capturing()


def device_name(device: torch.device) -> str:
    """The device's name as its driver gives it; kinds of device share their winners."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def time_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of ``run`` on the current stream of a device, compiled and warm."""
    with torch.cuda.device(device):
        run()
        samples: list[float] = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def _fastest(candidates: tuple[Tile, ...], run: Callable[[Tile], Any], device: torch.device) -> Tile:
    best, best_ms = candidates[0], time_ms(functools.partial(run, candidates[0]), device)
    for tile in candidates[1:]:
        try:
            ms = time_ms(functools.partial(run, tile), device)
        except (TritonError, RuntimeError):
            continue  # it does not compile, or not fit
        if ms < best_ms * MARGIN:
            best, best_ms = tile, ms
    return best


# The file


def _load(path: Path) -> dict[Key, Tile]:
    """A file's winners; none, with a warning, when it is not one that this version wrote."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        _give_up(path, str(error))
        return {}
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, not {FORMAT}")
        return dict(_entry(entry) for entry in values["winners"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _give_up(path, f"{type(error).__name__}: {error}")
        return {}


def _entry(entry: dict[str, Any]) -> tuple[Key, Tile]:
    key, tile = Key(**entry["key"]), Tile(**entry["tile"])
    for name, value in (key._asdict() | dataclasses.asdict(tile)).items():
        wanted = {"transposed": bool, "device": str, "triton": str, "kernel": str, "dtype": str}.get(name, int)
        if type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}")
    return key, tile


def _give_up(path: Path, reason: str) -> None:
    _broken.add(path)
    warnings.warn(
        f"{path} is no file of tuned tiles that can be used ({reason}). It is ignored and left as it is, and tiles are tuned "
        "for this process alone: delete it, or name another folder in CPREC_CACHE_DIR",
        RuntimeWarning,
        stacklevel=4,
    )


def _save(path: Path) -> None:
    """Add this process's winners to the file, which is replaced as a whole."""
    if path in _broken:
        return
    merged = _load(path) | _winners
    if path in _broken:
        return
    entries = [{"key": key._asdict(), "tile": dataclasses.asdict(tile)} for key, tile in sorted(merged.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"format": FORMAT, "winners": entries}, stream, indent=1)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        _give_up(path, str(error))
