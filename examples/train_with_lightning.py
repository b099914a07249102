"""A PyTorch Lightning module with compressed items: loss, exact ranks as metrics, a row-wise optimizer."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss
from cprec_kernels.optim import RowwiseAdamW

PARTITION = Partition(1_000, cutoffs=[100, 300], ranks=[32, 8, 4], embedding_dim=32)


class NextItem(pl.LightningModule):
    """A GRU between a block embedding and a clustered softmax."""

    def __init__(self):
        super().__init__()
        self.embedding = BlockEmbedding(PARTITION)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.softmax = ClusteredSoftmaxWithLoss(32, PARTITION, label_smoothing=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """States (B, L, d)."""
        return self.gru(self.embedding(ids))[0]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Every position predicts the next item."""
        return self.softmax(self(batch[0][:, :-1]), batch[0][:, 1:]).loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """HR@10 and NDCG@10 over the whole catalogue, without a matrix of scores."""
        rank = self.softmax.rank(self(batch[0][:, :-1])[:, -1], batch[0][:, -1])
        hit = (rank < 10).float()
        self.log_dict({"hr@10": hit.mean(), "ndcg@10": (hit / torch.log2(rank + 2)).mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Dense and sparse gradients alike."""
        return RowwiseAdamW(self.parameters(), lr=1e-2, weight_decay=0.01)


items = DataLoader(TensorDataset(torch.randint(1_000, (256, 20))), batch_size=64)
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(NextItem(), items, items)
print({name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items()})
