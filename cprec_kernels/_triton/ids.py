"""Ids checked on their device: one launch that stops the stream at an id out of range, and nothing for the host to wait for."""

import triton
import triton.language as tl
from torch import Tensor

from .common import AotCases, aot_case, launch, num_processors

BLOCK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["count", "num_items", "allowed"], debug=True)  # without it assertions compile to nothing
def ids_kernel(p_ids, count, num_items, allowed, MESSAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Assert that every id (count,) is in 0..num_items - 1 or ``allowed``."""
    for i in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        o = tl.full((BLOCK,), i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ids = tl.load(p_ids + o, mask=o < count, other=0)
        tl.device_assert(((ids >= 0) & (ids < num_items)) | (ids == allowed), MESSAGE)


def message(name: str) -> str:
    """What a failed assertion says; a constant of the kernel, so without numbers."""
    return f"{name} holds an id outside 0..num_items - 1"


def check(ids: Tensor, num_items: int, name: str, allowed: int | None) -> None:
    """Queue the assertion for ids of any shape, int64, at least one."""
    count = ids.numel()
    programs = min(triton.cdiv(count, BLOCK), num_processors(ids.device) * 8)
    launch(
        ids_kernel, programs, ids, ids.contiguous(), count, num_items, 0 if allowed is None else allowed,
        MESSAGE=message(name), BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip


def aot_cases(arch: int) -> AotCases:
    """What the ahead-of-time gate compiles."""
    types = {"p_ids": "*i64", "count": "i32", "num_items": "i32", "allowed": "i32"}
    yield aot_case("ids", ids_kernel, types, {"MESSAGE": message("ids"), "BLOCK": BLOCK}, NUM_WARPS, 1)
