"""One set of blocks for the input table and the softmax."""

import torch

from cprec_kernels import Partition
from cprec_kernels.nn import TiedBlocks

partition = Partition(10_000, cutoffs=[500, 2_000], ranks=[64, 16, 4], embedding_dim=64)
blocks = TiedBlocks(partition, padding=True, head_bias=True)  # input id 10,000 pads

items = torch.randint(10_000, (8, 20))
hidden = blocks.embedding(items)  # your sequence model goes here
loss = blocks(hidden[:, :-1], items[:, 1:]).loss
loss.backward()  # every table gets the sum of both uses' gradients
scores, best = blocks.topk(hidden[:, -1], k=10, exclude=items)

count = sum(parameter.numel() for parameter in blocks.parameters())
print(f"{count:,} parameters instead of {2 * 10_000 * 64:,}")
