"""What the suite changes in Triton's interpreter (seen in 3.6.0 and 3.9.0).

It keeps bf16 as the 16 bits in a uint16 array, and its dot product multiplies those bits as if they were numbers.
:func:`repair_bf16_dot` widens such operands to fp32 first, which is exact, as are their products.

Half of its time goes into what it has done already. :func:`exchange_once`, :func:`remember_dtypes` and
:func:`check_integers_in_numpy` spare it that, with the same results and the same refusals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


def exchange_once() -> None:
    """Have a launch exchange the language's functions, and the device functions that it calls find them exchanged.

    As it is, every call of one walks all names of ``triton.language`` for those that are left.
    """
    original = interpreter._patch_lang
    exchanged: set[int] = set()  # modules, while a launch runs

    def patch_lang(fn: Any) -> Any:
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= exchanged:
            return interpreter._LangPatchScope()
        scope = original(fn)
        added = modules - exchanged
        exchanged.update(added)
        restore = scope.restore

        def restore_all() -> None:
            restore()
            exchanged.difference_update(added)

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def remember_dtypes() -> None:
    """Look numpy's dtypes up by name; the interpreter builds a dictionary of all of them for every operation."""
    original = interpreter._get_np_dtype
    found: dict[str, np.dtype[Any]] = {}

    def get_np_dtype(dtype: Any) -> np.dtype[Any]:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return original(dtype)
        if scalar.name not in found:
            found[scalar.name] = original(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def check_integers_in_numpy() -> None:
    """Look for overflowing integers with three of numpy's operations instead of seven of the interpreter's."""
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        assert kind == rhs.type.scalar
        assert kind.is_int()
        wide = exact[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if (wide < kind.get_int_min_value()).any() or (wide > kind.get_int_max_value()).any():
            raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


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
