"""Adaptive inputs and softmaxes of fairseq and Transformer-XL checkpoints, read from their state_dicts."""

import torch

from cprec_kernels.convert import (
    from_fairseq_adaptive_input,
    from_fairseq_adaptive_softmax,
    from_transformer_xl_embedding,
    from_transformer_xl_softmax,
)
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

# Stand-ins for torch.load(path, weights_only=True)["model"]: 1,000 words in bands of 100, 300 and 600, width 64.
sizes, ranks = (100, 300, 600), (64, 16, 4)
fairseq = {"decoder.adaptive_softmax.version": torch.tensor([1])}
fairseq["decoder.adaptive_softmax.head.weight"] = torch.randn(100 + 2, 64)
for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
    fairseq[f"decoder.embed_tokens.embeddings.{i}.0.weight"] = torch.randn(size, rank)
    fairseq[f"decoder.embed_tokens.embeddings.{i}.1.weight"] = torch.randn(64, rank)
    if i:
        fairseq[f"decoder.adaptive_softmax.tail.{i - 1}.0.weight"] = torch.randn(rank, 64)
        fairseq[f"decoder.adaptive_softmax.tail.{i - 1}.2.weight"] = torch.randn(size, rank)

embedding = BlockEmbedding.from_factors(*from_fairseq_adaptive_input(fairseq, "decoder.embed_tokens."), padding_idx=1)
softmax = ClusteredSoftmaxWithLoss.from_factors(*from_fairseq_adaptive_softmax(fairseq, "decoder.adaptive_softmax."))
print(embedding.partition)

xl = {"crit.cluster_weight": torch.randn(2, 64), "crit.cluster_bias": torch.randn(2)}
for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
    xl[f"word_emb.emb_layers.{i}.weight"] = torch.randn(size, rank)
    xl[f"word_emb.emb_projs.{i}"] = torch.randn(64, rank)
    xl[f"crit.out_layers.{i}.weight"] = torch.randn(size, rank)
    xl[f"crit.out_layers.{i}.bias"] = torch.randn(size)
    xl[f"crit.out_projs.{i}"] = torch.randn(64, rank)

# The sqrt(d) that Transformer-XL multiplies by is in the parameters then. "forward" is the order of parent labels in
# Hugging Face's models; the original code's is "reversed", and nothing in a checkpoint shows which it is.
embedding = BlockEmbedding.from_factors(*from_transformer_xl_embedding(xl, "word_emb."))
softmax = ClusteredSoftmaxWithLoss.from_factors(*from_transformer_xl_softmax(xl, "crit.", parents="forward"))
print(softmax.log_prob(embedding(torch.tensor([0, 999]))).exp().sum(-1))
