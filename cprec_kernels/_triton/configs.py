"""Tile shapes of every kernel: data, keyed by kernel, padded rank, bytes of an operand and architecture.

Where a number comes from is said beside it. Those of the loss for 16-bit operands were timed; all others were chosen by
what ptxas made of them (registers, spills, shared memory and instructions per logit, with bias), most of them for sm_90.
:func:`override` is the door for experiments and for tests, tuning.py times alternatives on request.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .common import padded_rank

ARCHITECTURES = (80, 86, 90, 100)
# No wgmma, as sm_80, and 99 KiB of shared memory per block (CUDA programming guide): the cards that are not for data centres.
LIKE_86 = (86, 89, 120, 121)
BLOCK_DS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    block_t, block_v: tokens and entries (rows of the weight) per tile.
    transposed: logits as (entries, tokens), so that probabilities are the register operand of the weight's gradient.
    blocks_per_sm: programs of a persistent grid per multiprocessor, as registers and shared memory allow.
    """

    block_t: int
    block_v: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int = 1
    transposed: bool = False


Key = tuple[str, int, int]  # kernel, padded rank, bytes per element

# 16-bit operands, ranks 16 to 256: of 25 tiles (8 for scan_lse) timed on an H200 in bf16, without bias, the fastest that the
# gate of benchmarks/aot.py passes with one under every Triton, or one within 4% of it that leaves registers free. 8 warps at
# rank 256: 4 spill. 16-bit tiles of 32 tokens miss wgmma on sm_90: they are for rank 512 alone, where 64 tokens spill.
_SCAN_LSE = {
    16: Tile(64, 128, 4, 2, 4), 32: Tile(64, 128, 4, 2, 4), 64: Tile(64, 128, 4, 2, 4),
    128: Tile(128, 128, 8, 2, 2), 256: Tile(128, 128, 8, 2, 1), 512: Tile(64, 64, 8, 2, 1),
}  # fmt: skip
# The expected row holds block_t x rank accumulators beside the logits: registers, not shared memory, bound these tiles.
_SCAN_ROWS = {
    16: Tile(64, 128, 4, 2, 3), 32: Tile(64, 128, 4, 3, 3), 64: Tile(64, 128, 4, 3, 2),
    128: Tile(64, 128, 4, 2, 2), 256: Tile(128, 64, 8, 3, 1), 512: Tile(32, 64, 8, 2, 1),
}  # fmt: skip
_WEIGHT_UNBIASED = {
    16: Tile(64, 128, 4, 3, 2), 32: Tile(64, 128, 4, 3, 2), 64: Tile(64, 64, 4, 3, 3),
    128: Tile(64, 64, 4, 3, 2), 256: Tile(128, 64, 8, 2, 1), 512: Tile(32, 64, 8, 2, 1),
}  # fmt: skip
# The gradient of the bias wants another row of registers, for which these tiles spill: untimed ones, transposed from rank 64
# on. Below it the log-sum-exps along columns cost more registers than the transpose saves.
_WEIGHT = {
    16: Tile(128, 64, 4, 3, 3), 32: Tile(64, 64, 4, 3, 3), 64: Tile(64, 128, 8, 3, 1, True),
    128: Tile(64, 64, 4, 2, 2, True), 256: Tile(32, 128, 8, 2, 1, True), 512: Tile(32, 64, 8, 2, 1),
}  # fmt: skip
# fp32 operands take twice the memory, and a product split into three keeps three copies in registers: small tiles. From
# rank 256 on products are exact ones on the ordinary pipes (common.MAX_SPLIT_RANK), which larger tiles spill by thousands.
_SCAN_LSE_FP32 = {
    16: Tile(64, 64, 4, 2, 3), 32: Tile(64, 64, 4, 2, 3), 64: Tile(64, 64, 8, 2, 1),
    128: Tile(64, 32, 4, 2, 2), 256: Tile(32, 32, 8, 1, 3), 512: Tile(32, 32, 8, 1, 1),
}  # fmt: skip
_SCAN_ROWS_FP32 = {
    16: Tile(64, 64, 4, 2, 2), 32: Tile(64, 64, 4, 2, 2), 64: Tile(64, 32, 4, 2, 2),
    128: Tile(32, 32, 8, 1, 1), 256: Tile(16, 32, 8, 1, 3), 512: Tile(16, 32, 8, 1, 2),
}  # fmt: skip
_WEIGHT_FP32 = {
    16: Tile(64, 64, 4, 2, 2), 32: Tile(32, 64, 4, 2, 3, True), 64: Tile(32, 64, 4, 2, 2, True),
    128: Tile(32, 32, 4, 1, 2), 256: Tile(32, 16, 8, 1, 2), 512: Tile(16, 16, 8, 1, 2),
}  # fmt: skip
# Per-token kernels read a few rows per token: latency, not tiles, is what they wait for.
_TOKEN = {d: Tile(16, 0, 4 if d < 512 else 8, 1, 4) for d in BLOCK_DS}
# The bound of a search holds three arrays of a tile's size beside the logits, and its append pass a branch with 64-bit keys:
# 64 x 64 logits for 4 warps fill their registers, and from rank 256 on there is no room for the hidden states beside them.
# fp32 at rank 128 spills in every tile tried while products are split: clustered_topk_scan.MAX_SPLIT_RANK.
_TOPK_BOUND = {
    16: Tile(64, 64, 4, 3, 2), 32: Tile(64, 64, 4, 3, 2), 64: Tile(64, 64, 4, 3, 2),
    128: Tile(64, 64, 4, 3, 2), 256: Tile(64, 64, 8, 2, 1), 512: Tile(64, 32, 8, 2, 1),
}  # fmt: skip
# Tiles of 64 x 64 fit under Triton 3.9 alone: 3.6 spills hundreds of bytes in the branch that appends.
_TOPK_APPEND = {
    16: Tile(64, 32, 4, 2, 2), 32: Tile(64, 32, 4, 2, 2), 64: Tile(64, 32, 4, 2, 2),
    128: Tile(64, 32, 4, 2, 2), 256: Tile(64, 32, 8, 2, 1), 512: Tile(32, 32, 4, 2, 1),
}  # fmt: skip
_TOPK_FP32 = {
    16: Tile(64, 32, 4, 2, 2), 32: Tile(64, 32, 4, 2, 2), 64: Tile(64, 32, 4, 2, 2),
    128: Tile(32, 32, 8, 1, 3), 256: Tile(32, 32, 8, 1, 3), 512: Tile(32, 32, 8, 1, 1),
}  # fmt: skip
# One row at a time, a block of weights in registers: block_t is not used.
_TOPK_ROW = {d: Tile(16, max(8, 4096 // d), 4, 1, 2) for d in BLOCK_DS}

TABLE: dict[Key, Tile] = {
    (kernel, block_d, itemsize): tile
    for kernel, by_itemsize in {
        "scan_lse": {2: _SCAN_LSE, 4: _SCAN_LSE_FP32},
        "scan_rows": {2: _SCAN_ROWS, 4: _SCAN_ROWS_FP32},
        "weight": {2: _WEIGHT, 4: _WEIGHT_FP32},
        "weight_unbiased": {2: _WEIGHT_UNBIASED, 4: _WEIGHT_FP32},
        "token": {2: _TOKEN, 4: _TOKEN},
        "topk_bound": {2: _TOPK_BOUND, 4: _TOPK_FP32},
        "topk_append": {2: _TOPK_APPEND, 4: _TOPK_FP32},
        "topk_exhaustive": {2: _TOPK_ROW, 4: _TOPK_ROW},
        "rank_count": {2: _TOPK_BOUND, 4: _TOPK_FP32},
        "score": {2: _TOPK_ROW, 4: _TOPK_ROW},
    }.items()
    for itemsize, tiles in by_itemsize.items()
    for block_d, tile in tiles.items()
}
# Where an architecture needs another tile than TABLE's: sm_80 has 163 KiB of shared memory per block, sm_90 227.
BY_ARCHITECTURE: dict[tuple[int, Key], Tile] = {
    # The tiles of sm_80 come from what ptxas made of them alone.
    **{(80, ("scan_lse", rank, 2)): Tile(128, 128, 8, 3, 2) for rank in (16, 32, 64)},
    (80, ("scan_lse", 128, 2)): Tile(128, 128, 8, 2, 1),
    (80, ("scan_lse", 256, 2)): Tile(128, 64, 8, 2, 1),
    (80, ("scan_lse", 512, 2)): Tile(64, 32, 8, 2, 1),  # 192 KiB at 64 entries
    # Without wgmma the operands of these products are in registers, and larger tiles spill.
    (80, ("scan_lse", 64, 4)): Tile(32, 64, 4, 2, 3),
    (80, ("scan_lse", 128, 4)): Tile(32, 64, 8, 2, 1),
    (80, ("scan_rows", 64, 4)): Tile(32, 64, 4, 2, 2),
    (80, ("scan_rows", 16, 2)): Tile(64, 128, 4, 3, 2),
    **{(80, ("scan_rows", rank, 2)): Tile(64, 64, 4, 3, 3) for rank in (32, 64)},
    (80, ("scan_rows", 128, 2)): Tile(128, 64, 8, 2, 1),
    (80, ("scan_rows", 256, 2)): Tile(64, 64, 8, 2, 1),
    **{
        (80, (kernel, rank, itemsize)): tile
        for kernel in ("weight", "weight_unbiased")
        for rank, itemsize, tile in ((64, 4, Tile(32, 32, 4, 2, 2, True)), (256, 2, Tile(64, 64, 8, 2, 1, True)))
    },
    **{(80, ("weight_unbiased", rank, 2)): _WEIGHT[rank] for rank in (16, 32, 64, 128)},
    # Without wgmma both operands pass through registers.
    **{
        (80, (kernel, rank, 2)): tile
        for kernel in ("topk_bound", "rank_count")
        for rank, tile in (
            (128, Tile(64, 64, 8, 2, 1)),
            (256, Tile(64, 32, 8, 2, 1)),
            (512, Tile(32, 32, 8, 2, 1)),
        )
    },
    (80, ("topk_bound", 64, 2)): Tile(64, 32, 4, 2, 2),
    (80, ("topk_append", 16, 2)): Tile(64, 32, 8, 2, 2),
    (80, ("topk_append", 32, 2)): Tile(32, 64, 4, 2, 2),
    (80, ("topk_append", 64, 2)): Tile(32, 32, 4, 2, 2),
    (80, ("topk_append", 128, 2)): Tile(64, 32, 8, 2, 1),
    (80, ("topk_append", 512, 2)): Tile(32, 32, 8, 2, 1),
    (80, ("topk_append", 32, 4)): Tile(32, 64, 4, 2, 2),
    (80, ("topk_append", 64, 4)): Tile(32, 64, 8, 2, 1),
    (80, ("topk_bound", 64, 4)): Tile(32, 64, 8, 2, 1),
    (80, ("topk_bound", 512, 4)): Tile(16, 32, 8, 1, 1),
    (80, ("score", 64, 4)): Tile(16, 32, 4, 1, 2),  # a spilled register in the loop under Triton 3.9
    (80, ("rank_count", 64, 4)): Tile(32, 32, 4, 2, 3),  # targets' logits, 64 x 64, spill
    # Those of sm_80 that are over 99 KiB.
    (86, ("scan_lse", 256, 2)): Tile(64, 64, 8, 1, 1),
    (86, ("scan_lse", 512, 2)): Tile(32, 32, 8, 1, 1),
    (86, ("scan_rows", 256, 2)): Tile(64, 64, 8, 1, 1),
    (86, ("scan_rows", 512, 2)): Tile(32, 32, 8, 1, 1),
    **{(86, (kernel, 512, 2)): Tile(32, 32, 8, 1, 1) for kernel in ("weight", "weight_unbiased")},
    (86, ("scan_lse", 512, 4)): Tile(16, 16, 8, 1, 1),
    **{(86, (kernel, 512, 4)): Tile(16, 16, 8, 1, 1) for kernel in ("rank_count", "topk_append", "topk_bound")},
}
_OVERRIDES: dict[str, Tile] = {}


def tile_for(kernel: str, rank: int, dtype: torch.dtype, architecture: int) -> Tile:
    """The tile of a kernel for rows of ``rank`` columns; of an architecture without one, that of its ancestors."""
    if kernel in _OVERRIDES:
        return _OVERRIDES[kernel]
    key = kernel, padded_rank(rank), dtype.itemsize
    found = (BY_ARCHITECTURE.get((ancestor, key)) for ancestor in _ancestors(architecture))
    return next((tile for tile in found if tile is not None), TABLE[key])


def _ancestors(architecture: int) -> tuple[int, ...]:
    """The architectures whose tiles one takes, the nearest first: a newer one those of the newest that is known."""
    if architecture in LIKE_86:
        return 86, 80
    return (max((known for known in ARCHITECTURES if known <= architecture and known not in LIKE_86), default=80),)


def is_overridden(kernel: str) -> bool:
    """Whether :func:`override` decides a kernel's tile at the moment."""
    return kernel in _OVERRIDES


@contextlib.contextmanager
def override(**tiles: Tile) -> Iterator[None]:
    """Use other tiles inside a ``with`` block, by kernel: for tuning runs and for tests with tiny tiles."""
    before = dict(_OVERRIDES)
    _OVERRIDES.update(tiles)
    try:
        yield
    finally:
        _OVERRIDES.clear()
        _OVERRIDES.update(before)
