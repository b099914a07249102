"""Item vectors that exist already, as a compressed model's start."""

import torch

from cprec_kernels import Partition
from cprec_kernels.convert import set_item_vectors
from cprec_kernels.nn import TiedBlocks

partition = Partition(10_000, cutoffs=[500, 2_000], ranks=[64, 16, 4], embedding_dim=64)
counts = 1_000_000 // torch.arange(1, 10_001)  # how often each item occurs
vectors = torch.randn(10_000, 32) @ torch.randn(32, 64) / 32  # of texts or images, say, mapped to the model's width

blocks = TiedBlocks(partition, padding=True)
lost = set_item_vectors(blocks, counts, inputs=vectors)
print("lost per cluster:", ", ".join(f"{part:.0%}" for part in lost))  # 0%, then what 16 and 4 columns cannot hold

similar = blocks.topk(vectors[:3], k=5)  # the next items of a hidden state that equals an item's vector
print(similar[1])
