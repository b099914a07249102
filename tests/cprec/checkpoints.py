"""Models, and what is done to their files, for the tests of checkpoints."""

import json
import struct

import torch

from cprec.model import NextItNet, NextItNetConfig


def make(seed=0, **options):
    torch.manual_seed(seed)
    options = {"dilations": [1, 2], "head_bias": True, "tail_bias": True, **options}
    return NextItNet(NextItNetConfig.from_plan(60, 8, [7, 20], [8, 4, 2], **options))


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **others}
