"""What the Triton kernels share: constants, padded ranks, precision of fp32 products, and the one way to launch."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 512
# The K of a matrix instruction: narrower operands are padded with zeros in registers, never in memory.
MIN_BLOCK_D = 16
TYPE_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
# Products of fp32 operands, as torch.get_float32_matmul_precision asks for them.
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Where a kernel's operands are long: the exact "ieee" keeps them whole in registers and runs on the ordinary pipes. Three
# tf32 products of a split operand keep 22 bits, and serve "highest" as well up to this rank; above, they spill.
LONG_PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}
MAX_SPLIT_RANK = 128


def padded_rank(rank: int) -> int:
    """Width in which kernels hold rows of ``rank`` columns: a power of two from 16 on."""
    return max(MIN_BLOCK_D, 1 << (rank - 1).bit_length())


def dot_precision(dtype: torch.dtype, rank: int | None = None) -> str:
    """``input_precision`` of tl.dot, which only fp32 operands care for; with a ``rank``, for operands of that length."""
    if dtype != torch.float32:
        return "ieee"
    if rank is None:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    precision = LONG_PRECISIONS[torch.get_float32_matmul_precision()]
    return "ieee" if precision == "tf32x3" and rank > MAX_SPLIT_RANK else precision


def probability_shift(dtype: torch.dtype) -> int:
    """Power of two that probabilities are scaled by as operands: fp16 loses everything below 6e-8, the others nothing."""
    return 12 if dtype == torch.float16 else 0


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` (2-D) summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, None or a list of them in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return None if value is None else [cast(item, dtype) for item in value]


@functools.cache
def _device_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90; off a device, where only the interpreter runs kernels, 90."""
    return _device_facts(device.index)[0] if device.type == "cuda" and device.index is not None else 90


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device; a small odd number for the interpreter."""
    return _device_facts(device.index)[1] if device.type == "cuda" and device.index is not None else 3


class Launch(NamedTuple):
    """A launch that was asked for: a kernel, its arguments, its constants and compile options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


_rehearsal: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def rehearse() -> Iterator[list[Launch]]:
    """Inside, this thread's launches are listed and not run: with fake tensors, what a call would compile."""
    launches: list[Launch] = []
    token = _rehearsal.set(launches)
    try:
        yield launches
    finally:
        _rehearsal.reset(token)


def is_rehearsal() -> bool:
    """Whether this thread's launches are only listed at the moment."""
    return _rehearsal.get() is not None


def row_sums(rank: int) -> dict[str, bool]:
    """Options of kernels that sum a row's products across threads and use the sum in several.

    Rows of an odd rank are loaded element by element. Up to 32 columns a thread then holds one product, which fuses with the
    first addition across threads: threads that hold the same sum would differ in its last bit (as racecheck once found).
    """
    return {"enable_fp_fusion": rank % 2 == 0 or rank > 32}


def launch(kernel: Any, grid: int | tuple[int, ...], anchor: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on the device of ``anchor``, whichever device is current. The one way to run one."""
    options = {"enable_fp_fusion": True} | options  # its default changes in Triton 3.10
    launches = _rehearsal.get()
    if launches is not None:
        launches.append(Launch(kernel, args, options))
        return
    grid = grid if isinstance(grid, tuple) else (grid,)
    if not anchor.is_cuda:
        kernel[grid](*args, **options)  # the interpreter
    elif torch.cuda.current_device() == anchor.get_device():
        _launch_again(kernel, grid, anchor.get_device(), args, options)
    else:
        with torch.cuda.device(anchor.device):
            _launch_again(kernel, grid, anchor.get_device(), args, options)


_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}


def _launch_again(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch on the current device, without asking Triton what to run when it was asked before.

    Triton looks at every argument to find what it has compiled, and a step of training is bound by that where batches are
    small. What it looks for are types, alignments of pointers and widths of integers, whose values no kernel here is
    specialised on; so the same can be told from less.
    """
    key = (kernel, device, *options, *options.values(), *[_trait(arg) for arg in args])
    found = _compiled.get(key)
    if found is None or kernel.pre_run_hooks:
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, constants = found
    compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _trait(value: Any) -> Any:
    """What a kernel is compiled for, of an argument."""
    kind = type(value)
    if kind is int:
        return -2147483648 <= value < 2147483648
    if kind is tuple:
        return tuple([_trait(item) for item in value])
    return (value.dtype,) if value.data_ptr() & 15 else value.dtype


class AotCase(NamedTuple):
    """A kernel as the tables would have it compiled, for compilation without a device."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool


def aot_case(
    name: str,
    kernel: Any,
    types: dict[str, Any],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    enable_fp_fusion: bool = True,
) -> AotCase:
    """An :class:`AotCase` with the signature in the order of the kernel's arguments."""
    signature = {arg: "constexpr" if arg in constexprs else types[arg] for arg in kernel.arg_names}
    return AotCase(name, kernel, signature, constexprs, num_warps, num_stages, enable_fp_fusion)


AotCases = Iterator[AotCase]


@triton.jit
def load_rows(p, rows, o_d, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a contiguous (n, D) matrix as (rows, BLOCK_D), zero beyond column D and, if MASKED, outside ``m_rows``."""
    pointers = p + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    if MASKED:
        if BLOCK_D == D:
            block = tl.load(pointers, mask=m_rows[:, None], other=0.0)
        else:
            block = tl.load(pointers, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(o_d < D)[None, :], other=0.0)
    return block


@triton.jit
def store_rows(p, rows, o_d, m_rows, values, D: tl.constexpr):
    """Store (rows, BLOCK_D) into a contiguous (n, D) matrix of any dtype."""
    pointers = p + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(pointers, values.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_d < D)[None, :])


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0 without cancellation: the series below 1/64, where its remainder is under 2^-30 of it."""
    series = x * (1.0 - x * (0.5 - x * (0.16666667 - x * 0.041666668)))
    return tl.where(x < 0.015625, series, 1.0 - tl.exp2(-x * LOG2E))
