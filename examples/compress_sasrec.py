"""A dense SASRec-like model that scores by its item table: compressed in place, fine-tuned, searched."""

import torch
from torch import Tensor, nn

import cprec_kernels
from cprec_kernels import Partition

ITEMS, WIDTH = 3_000, 32


class SASRec(nn.Module):
    """Self-attention over items 1..ITEMS in no order; 0 pads. The classifier is the item table."""

    def __init__(self):
        super().__init__()
        self.item_emb = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        with torch.no_grad():
            self.item_emb.weight *= WIDTH**-0.5
        self.position_emb = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def hidden(self, ids: Tensor) -> Tensor:
        """States (B, L, d) of histories (B, L)."""
        length = ids.shape[1]
        x = self.item_emb(ids) * WIDTH**0.5 + self.position_emb.weight[:length]
        return self.norm(self.encoder(x, mask=torch.ones(length, length, dtype=torch.bool).triu(1)))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of every id (B, L, ITEMS + 1)."""
        return self.hidden(ids) @ self.item_emb.weight.T


torch.manual_seed(0)
model = SASRec()  # trained; histories and counts are those of the training data
popularity = torch.cat([torch.zeros(1), 1 / torch.arange(1.0, ITEMS + 1)[torch.randperm(ITEMS)]])
histories = torch.multinomial(popularity, 64 * 20, replacement=True).reshape(64, 20)
counts = torch.bincount(histories.flatten(), minlength=ITEMS + 1)

with torch.no_grad():
    sample = model.hidden(histories).flatten(0, 1)  # a sample of states, to fit parent labels and biases to
partition = Partition(ITEMS, cutoffs=[300, 1_000], ranks=[32, 8, 2], embedding_dim=WIDTH)
report = cprec_kernels.compress(model, counts, partition=partition, classifier="tied", inputs=sample)
print(report)

assert model(histories).shape == (64, 20, ITEMS + 1)  # the same ids in, the same ids out, as before

# Fine-tune for an epoch or two. softmax.loss reads the head and the targets' tails alone; 0, the padding, is ignored.
softmax = report.softmax
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(5):
    optimizer.zero_grad()
    loss = softmax.loss(model.hidden(histories[:, :-1]), histories[:, 1:])
    loss.backward()
    optimizer.step()

scores, items = softmax.topk(model.hidden(histories)[:, -1], k=10, exclude=histories)  # unseen items, exact
print(f"loss {loss:.3f}; recommended to the first user: {items[0].tolist()}")
