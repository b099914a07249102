"""Items come and go, and new counts sort them anew, while the optimizer goes on."""

import torch

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

torch.manual_seed(0)
partition = Partition(1_000, cutoffs=[100, 300], ranks=[32, 8, 4], embedding_dim=32)
embedding = BlockEmbedding(partition.with_padding(), padding_idx=-1)  # 1,000 pads
softmax = ClusteredSoftmaxWithLoss(32, partition, head_bias=True, tail_bias=True)
optimizer = torch.optim.AdamW([*embedding.parameters(), *softmax.parameters()], lr=1e-2)


def train_step(items):
    """One step of a model that would have more between its two ends."""
    optimizer.zero_grad()
    loss = softmax(embedding(items[:-1]), items[1:]).loss
    loss.backward()
    optimizer.step()
    return loss


train_step(torch.randint(1_000, (500,)))

# 50 new items: ids 1,000..1,049, in the last cluster; the padding's row moves behind them.
for module in (embedding, softmax):
    module.extend(50, optimizer=optimizer)
print(embedding.padding_idx)

# Three items go; new_ids says what became of each former id. Data, and whatever else knows ids, is to be mapped by it.
for module in (embedding, softmax):
    change = module.remove([3, 500, 1_020], optimizer=optimizer)
items = torch.randint(1_050, (500,))
items = change.new_ids[items]
train_step(items[items >= 0])

# New counts, and wider tails for what became popular; hidden states make the best of what no linear function can keep.
counts = torch.rand(1_047)
wider = Partition(1_047, cutoffs=[150, 400], ranks=[32, 12, 4], embedding_dim=32)
moved = embedding.repartition(counts, wider, optimizer=optimizer)
change = softmax.repartition(counts, wider, inputs=torch.randn(2_000, 32), optimizer=optimizer)
assert torch.equal(moved.new_ids, change.new_ids)
print(f"embedding lost {moved.errors[1]:.3f} and {moved.errors[2]:.3f} of its tails' norms")
train_step(change.new_ids[items[items >= 0]])
