"""Modules as folders with config.json and model.safetensors."""

import json
import tempfile
from pathlib import Path

import torch

from cprec_kernels import Partition
from cprec_kernels.nn import TiedBlocks

blocks = TiedBlocks(Partition(1_000, cutoffs=[100, 300], ranks=[32, 8, 4], embedding_dim=32), padding=True)
with tempfile.TemporaryDirectory() as folder:
    blocks.save_pretrained(folder)
    print(json.loads(Path(folder, "config.json").read_text())["partition"])
    loaded = TiedBlocks.from_pretrained(folder)
hidden = torch.randn(4, 32)
assert torch.equal(loaded.log_prob(hidden), blocks.log_prob(hidden))
