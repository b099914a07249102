"""What tuning left: the tiles that won, beside those of the tables."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def read_tiles(folder: Path) -> list[dict[str, Any]]:
    """The tiles that won, and whether the tables' ones did; none where nothing was tuned."""
    path = folder / "triton-tiles.json"
    if not path.exists():
        return []
    configs = importlib.import_module("cprec_kernels._triton.configs")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    found = []
    for winner in json.loads(path.read_bytes())["winners"]:
        key, tile = winner["key"], winner["tile"]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[key["dtype"]]
        usual = configs.tile_for(key["kernel"], key["rank"], dtype, 10 * capability[0] + capability[1])
        found.append({"kernel": key["kernel"], "rank": key["rank"], "dtype": key["dtype"], "tile": tile})
        found[-1]["kept"] = tile == dataclasses.asdict(usual)
    return found


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables inside a ``with`` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
