"""A whole model with its search, exported and compiled ahead of time, run in a fresh process."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from cprec_kernels import Partition
from cprec_kernels.nn import TiedBlocks


class Recommender(nn.Module):
    """The ten best unseen items of histories (B, L)."""

    def __init__(self):
        super().__init__()
        self.blocks = TiedBlocks(Partition(1_000, cutoffs=[100, 300], ranks=[32, 8, 4], embedding_dim=32))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and items (B, 10)."""
        return self.blocks.topk(self.blocks.embedding(ids).mean(1), 10, exclude=ids)


model = Recommender().eval()
histories = torch.randint(1_000, (4, 20))
batch = torch.export.Dim("batch", min=1, max=1_024)
program = torch.export.export(model, (histories,), dynamic_shapes=({0: batch},))

SERVE = """
import sys, torch
import cprec_kernels  # registers the ops: the one thing that a server in Python has to do
folder = sys.argv[1]
histories = torch.load(f"{folder}/histories.pt")
program = torch.export.load(f"{folder}/program.pt2").module()
package = torch._inductor.aoti_load_package(f"{folder}/package.pt2")
torch.save([program(histories)[1], package(histories)[1]], f"{folder}/items.pt")
"""
with tempfile.TemporaryDirectory() as folder:
    torch.export.save(program, f"{folder}/program.pt2")
    torch._inductor.aoti_compile_and_package(  # needs a C++ compiler
        program,
        package_path=f"{folder}/package.pt2",
        inductor_configs={"aot_inductor.metadata": {"length": "20"}},  # for who serves it; see serve.cpp
    )
    torch.save(histories, f"{folder}/histories.pt")
    subprocess.run([sys.executable, "-c", SERVE, folder], check=True, cwd=Path(folder).parent)
    for items in torch.load(f"{folder}/items.pt"):
        assert torch.equal(items, model(histories)[1])
print("the same items in another process, from the exported program and from the compiled package")
