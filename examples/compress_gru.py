"""A dense GRU with a linear classifier: compressed in place, saved, and loaded into a fresh model."""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import cprec_kernels
from cprec_kernels import Partition
from cprec_kernels.convert import CompressionPlan

ITEMS, WIDTH = 3_000, 32


class GRU4Rec(nn.Module):
    """Item ids 0..ITEMS-1 in any order, ITEMS pads; one output per item."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=ITEMS)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, ITEMS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, ITEMS) of histories (B, L)."""
        return self.out(self.gru(self.embedding(ids))[0])


torch.manual_seed(0)
model = GRU4Rec()  # trained
popularity = 1 / torch.arange(1.0, ITEMS + 1)[torch.randperm(ITEMS)]
histories = torch.multinomial(popularity, 64 * 20, replacement=True).reshape(64, 20)
counts = torch.bincount(histories.flatten(), minlength=ITEMS + 1)

partition = Partition(ITEMS, cutoffs=[300, 1_000], ranks=[32, 8, 2], embedding_dim=WIDTH)
report = cprec_kernels.compress(model, counts, partition=partition)
print(report)

# The old loop still runs: log-probabilities are logits of themselves. model.out.loss(hidden, target) is the fast way.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss = nn.functional.cross_entropy(model(histories[:, :-1]).flatten(0, 1), histories[:, 1:].flatten())
loss.backward()
optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "plan.json").write_text(json.dumps(report.plan.to_dict()))
    torch.save(model.state_dict(), Path(folder, "weights.pt"))

    fresh = GRU4Rec()  # in another process: the dense model, then the plan, then the weights
    CompressionPlan.from_dict(json.loads(Path(folder, "plan.json").read_text())).apply(fresh)
    fresh.load_state_dict(torch.load(Path(folder, "weights.pt"), weights_only=True))
torch.testing.assert_close(fresh(histories), model(histories))
