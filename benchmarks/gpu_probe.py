"""A kernel that takes nothing but powers of two: the rate that bounds the tails of a softmax."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def exp2_kernel(p_out, count, WIDTH: tl.constexpr):
    """``count`` powers of two per element of out (programs * WIDTH,), each of a number that depends on the last."""
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    x = place.to(tl.float32) * 1e-9 - 1.0
    for _ in tl.range(0, count):
        x = tl.exp2(x) - 1.5
    tl.store(p_out + place, x)
