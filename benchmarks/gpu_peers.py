"""Other ways to compute a full or an adaptive softmax loss on a device: torch's own, and packages that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cprec_kernels import BackendError

if TYPE_CHECKING:
    from cprec_kernels import Partition

Loss = Callable[[Tensor, Tensor], Tensor]
MAX_LIGER_CHUNKS = 1000  # it splits a batch into num_items / width chunks: seconds per step from here on
Peer = tuple[Loss, list[Tensor]]  # loss(hidden, target), and the leaves that it has besides hidden


def peers(partition: Partition, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Name and maker of every loss that can run here. Makers allocate; a full table may be too much for the device."""
    width, items = partition.embedding_dim, partition.num_items

    def table() -> Tensor:
        full = torch.empty(items, width, device=device, dtype=dtype).normal_(std=0.02)
        return full.requires_grad_()

    def adaptive() -> Peer:
        module = nn.AdaptiveLogSoftmaxWithLoss(width, items, list(partition.cutoffs), device=device, dtype=dtype)
        return lambda hidden, target: module(hidden, target).loss, list(module.parameters())

    def linear() -> Peer:
        full = table()
        return lambda hidden, target: nn.functional.cross_entropy(hidden @ full.T, target), [full]

    def fused_linear() -> Peer:
        full = table()
        fused = nn.functional.linear_cross_entropy
        return lambda hidden, target: fused(hidden, full, target), [full]

    def cut() -> Peer:
        from cut_cross_entropy import linear_cross_entropy

        full = table()
        return lambda hidden, target: linear_cross_entropy(hidden, full, target), [full]

    def liger() -> Peer:
        if items > MAX_LIGER_CHUNKS * width:
            raise BackendError(f"it would pass over the table {-(-items // width):,} times, once per chunk of tokens")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        full, fused = table(), LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, target: fused(full, hidden, target), [full]

    if len(partition.cutoffs):
        yield "torch-adaptive", adaptive
    yield "torch-linear", linear
    if hasattr(nn.functional, "linear_cross_entropy"):
        yield "torch-linear-cross-entropy", fused_linear
    if device != "cuda":
        return  # the rest is written in Triton
    if importlib.util.find_spec("cut_cross_entropy") is not None and dtype != torch.float32:
        yield "cut-cross-entropy", cut  # for 16-bit operands
    if importlib.util.find_spec("liger_kernel") is not None:
        yield "liger", liger
