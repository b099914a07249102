"""Repairs of Triton's interpreter that the suite needs (seen in 3.6.0 and 3.9.0).

The interpreter keeps bf16 as the 16 bits in a uint16 array, and its dot product multiplies those bits as if they were
numbers. :func:`repair_bf16_dot` widens such operands to fp32 first, which is exact, as are their products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(handle: Any) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def repair_bf16_dot() -> None:
    """Replace the interpreter's dot product by one that knows what its bf16 is."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype != tl.bfloat16:
            return original(self, a, b, d, *options)
        product = np.matmul(_widen(a), _widen(b))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def shuffle_programs(kernel: Any, order: list[int]) -> Any:
    """``kernel`` with the programs of its one-dimensional grid run in another order."""

    class Shuffled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **options: Any) -> None:
                place = interpreter.interpreter_builder.set_grid_idx
                sequence = [i for i in order if i < grid[0]] + [i for i in range(grid[0]) if i not in order]
                interpreter.interpreter_builder.set_grid_idx = lambda x, y, z: place(sequence[x], y, z)
                try:
                    kernel[grid](*args, **options)
                finally:
                    del interpreter.interpreter_builder.set_grid_idx

            return run

    return Shuffled()
