"""Registration helpers shared by the ops: the library, the dispatch to implementations, autocast, value checks."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

from .. import _backend

NAMESPACE = "cprec"
if hasattr(torch.ops.cprec, "block_embedding"):
    raise ImportError(
        "the ops of cprec_kernels are registered in this process already, and torch takes them once: do not load "
        "libcprec_serving.so where Python imports cprec_kernels, and do not reload it or remove it from sys.modules; "
        "restart Python to pick up a change"
    )
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def is_eager(*tensors: Tensor) -> bool:
    """Whether plain tensors came, and neither torch.compile nor torch.jit.trace looks on: an op may then be called without
    the way through its registration."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


def without_autocast() -> Any:
    """A context in which no op narrows its inputs."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def define(schema: str) -> str:
    """Define an op from its schema; returns its name."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return schema.split("(", 1)[0]


def implement(op: str, check: Callable[..., None], check_values: Callable[..., None], anchor: int) -> None:
    """Run ``op`` by the implementation that fits the tensor (or list of tensors) at argument ``anchor``.

    Every argument is checked first: ``check`` looks at shapes and dtypes, ``check_values`` at the data.
    """
    arguments = getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments
    lists = [place for place, argument in enumerate(arguments) if isinstance(argument.type, torch.ListType)]

    def run(*args: Any) -> Any:
        # A package of AOTInductor passes None for a list without elements.
        if any(args[place] is None for place in lists):
            args = tuple([] if place in lists and arg is None else arg for place, arg in enumerate(args))
        check(*args)
        check_values(*args)
        tensor = args[anchor] if isinstance(args[anchor], Tensor) else args[anchor][0]
        # A backward called inside an autocast region must not have its inner products narrowed.
        with without_autocast():
            return _backend.dispatch(op, tensor)(*args)

    LIBRARY.impl(op, run, "CompositeExplicitAutograd")


def fake(op: str, function: Callable[..., Any]) -> None:
    """Register the shapes and dtypes of an op's results."""
    torch.library.register_fake(f"{NAMESPACE}::{op}", function, lib=LIBRARY)


def autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register an op's derivative."""
    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup_context, lib=LIBRARY)


def not_twice_differentiable(op: str) -> None:
    """Make differentiating a backward op a clear error; without this it would give a wrong graph or none."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op.partition('_backward')[0]} is not twice differentiable: its backward has no derivative"
        )

    autograd(op, backward, lambda ctx, inputs, output: None)


def autocast(op: str, rule: Callable[..., Any]) -> None:
    """Register ``rule(overload, dtype, *args)`` at the autocast keys; ``overload`` then runs without autocast."""
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args: Any, _device_type: str = device_type) -> Any:
            with without_autocast():
                return rule(overload, torch.get_autocast_dtype(_device_type), *args)

        LIBRARY.impl(op, kernel, key)


def cast_floating(value: Any, dtype: torch.dtype | None) -> Any:
    """``value`` with every floating tensor narrower than fp64 in ``dtype``; lists are walked, the rest passes through.

    With a ``dtype`` of None, ``value`` as it is.
    """
    if dtype is None:
        return value
    if isinstance(value, Tensor):
        eligible = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value
    if isinstance(value, (list, tuple)):
        return [cast_floating(item, dtype) for item in value]
    return value


_IN_PLACE = "_cprec_accumulate_in_place"


def accumulate_in_place(parameters: Iterable[Tensor], enabled: bool = True) -> None:
    """Let backward add the gradients of large tables straight into existing ``.grad`` storage.

    Autograd writes a gradient of its own and then adds it to ``.grad``: at 10^7 items that is one more pass over
    gigabytes and twice the memory. For the tables among ``parameters`` (dense gradients of a block embedding, weights of
    a clustered softmax) our backward does the addition itself, once all tables of a call have a contiguous ``.grad``
    of their dtype; ``optimizer.zero_grad(set_to_none=False)`` keeps them from step to step. Everything else goes the
    usual way.

    What differs: autograd sees no gradient for such a table, so DDP does not either. Tables with hooks of their own go the
    usual way, and so does a backward that is asked for other gradients, by ``torch.autograd.grad`` or ``inputs=``, which
    leaves ``.grad`` as it is. ``torch.compile`` ignores the request.

    Args:
        parameters: leaf tensors, e.g. ``module.parameters()``.
        enabled: False takes the request back.
    """
    for parameter in parameters:
        if not parameter.is_leaf:
            raise ValueError("only leaf tensors, such as parameters, have a .grad to accumulate into")
        setattr(parameter, _IN_PLACE, enabled)


def asked_in_place(tables: Sequence[Tensor]) -> bool:
    """Whether all tables asked for :func:`accumulate_in_place`."""
    return all(getattr(table, _IN_PLACE, False) for table in tables)


# Held while a backward adds to .grad itself: those of several threads may add to the same.
ADDING_IN_PLACE = threading.Lock()


def gradients_in_place(tables: Sequence[Tensor]) -> list[Tensor] | None:
    """The ``.grad`` of every table, when all of them asked for :func:`accumulate_in_place`, have one that fits and no hook
    that waits for a gradient, and the backward that runs is to fill it, with numbers and not with a graph."""
    if torch.is_grad_enabled():  # in a backward with create_graph=True alone
        return None
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # which takes seconds to import
    if torch.compiler.is_compiling() or getattr(compiled, "in_compiled_autograd_region", False):
        return None
    if not asked_in_place(tables) or any(map(_hooked, tables)) or not all(map(_accumulates, tables)):
        return None
    gradients = []
    for table in tables:
        gradient = table.grad
        if gradient is None or gradient.layout != torch.strided or gradient.dtype != table.dtype:
            return None
        if not gradient.is_contiguous() or gradient.requires_grad:
            return None
        gradients.append(gradient)
    return gradients


def _hooked(leaf: Tensor) -> bool:
    """Whether someone wants to see the leaf's gradients, by register_hook or register_post_accumulate_grad_hook."""
    return bool(leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None))


def _accumulates(leaf: Tensor) -> bool:
    """Whether the running backward adds to the leaf's ``.grad``: one with ``inputs=`` may be after something else."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(leaf).node))
    except RuntimeError:  # torch.autograd.grad captures the leaf's gradient
        return False


def check_ids(ids: Tensor, num_items: int, name: str, allowed: int | None = None) -> None:
    """Raise IndexError for an id outside 0..num_items-1 that is not ``allowed``, with the value and where it is.

    On a device the check is an assertion in the stream: nothing waits for it, and it fails the kernel's stream.
    """
    if ids.numel() == 0:
        return
    # Fake tensors, which have no values, and those of tracing are of other types.
    if type(ids) is Tensor and ids.device.type == "cuda" and _backend.launches_triton():
        importlib.import_module("._triton.ids", __package__.rpartition(".")[0]).check(ids, num_items, name, allowed)
        return
    if ids.device.type != "cpu":
        bad = (ids < 0) | (ids >= num_items)
        if allowed is not None:
            bad = bad & (ids != allowed)
        torch._assert_async(~bad.any(), f"{name} holds an id outside 0..{num_items - 1}")
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < num_items:
        return
    bad = (ids < 0) | (ids >= num_items)
    if allowed is not None:
        bad &= ids != allowed
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        extra = "" if allowed is None else f" (or {allowed}, ignored)"
        raise IndexError(f"{name}{list(place)} = {int(ids[place])} is outside 0..{num_items - 1}{extra}")


def refuse_tangents(op: str, *args: Tensor | Sequence[Tensor] | None) -> None:
    """Raise RuntimeError in forward mode: an op without a rule for it takes its result for a constant, without a word."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", -1) < 0:
        return
    lists = [[arg] if isinstance(arg, Tensor) else arg or [] for arg in args]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensors in lists for tensor in tensors):
        raise RuntimeError(
            f"{op} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad): "
            "differentiate it by backward() or torch.autograd.grad"
        )


def check_integers(ids: Tensor, name: str) -> None:
    """Raise TypeError unless ids are int64."""
    if ids.dtype != torch.int64:  # not torch._check_type: Dynamo takes no message that closes over a tensor
        raise TypeError(f"{name} must be int64, got {ids.dtype}; convert with {name}.long()")


def check_rows(rows: Tensor, input: Tensor, name: str, dim: int) -> None:
    """Check an int64 tensor that has one row (or entry) per row of ``input``."""
    check_integers(rows, name)
    torch._check_value(
        rows.dim() == dim and rows.shape[0] == input.shape[0],
        lambda: (
            f"{name} must have one {'entry' if dim == 1 else 'row'} per row of input, got shapes {tuple(rows.shape)}"
            f" and {tuple(input.shape)}"
        ),
    )
    torch._check_value(rows.device == input.device, lambda: f"{name} is on {rows.device}, input on {input.device}")


def check_factors(tables: Sequence[Tensor], projections: Sequence[Tensor], name: str) -> int:
    """Check tables (k_j, d_j) and the projections (d_j, d) of those narrower than d; returns d.

    Raises:
        ValueError: a wrong number of dimensions, a rank above d, a missing, spare or mis-shaped projection.
        TypeError: differing or unsupported dtypes.
    """
    torch._check_value(len(tables) > 0, lambda: f"{name} must hold at least one table")
    for j, table in enumerate(tables):
        torch._check_value(
            table.dim() == 2, lambda j=j, t=table: f"{name}[{j}] must be 2-D, got shape {tuple(t.shape)}"
        )
    for i, projection in enumerate(projections):
        torch._check_value(
            projection.dim() == 2, lambda i=i, p=projection: f"projections[{i}] must be 2-D, got shape {tuple(p.shape)}"
        )
    width = int((projections[0] if projections else tables[0]).shape[1])
    used = 0
    for j, table in enumerate(tables):
        rank = int(table.shape[1])
        torch._check_value(
            1 <= rank <= width, lambda j=j, r=rank: f"{name}[{j}] has rank {r}, outside 1..{width} (the model width)"
        )
        if rank == width:
            continue
        torch._check_value(
            used < len(projections),
            lambda j=j, r=rank: (
                f"{name}[{j}] has rank {r} below the width {width} and needs a projection; "
                f"{len(projections)} were given, for the narrower tables in order"
            ),
        )
        shape = tuple(projections[used].shape)
        torch._check_value(
            shape == (rank, width),
            lambda j=j, r=rank, i=used, s=shape: (
                f"projections[{i}] belongs to {name}[{j}] and must be ({r}, {width}), got {s}"
            ),
        )
        used += 1
    torch._check_value(
        used == len(projections),
        lambda: (
            f"{len(projections)} projections were given and {used} are needed: a table of the full width {width} has none"
        ),
    )
    check_same_kind([*tables, *projections], name)
    return width


def check_same_kind(tensors: Sequence[Tensor], name: str) -> None:
    """Raise TypeError unless all tensors share one floating dtype, ValueError unless they share one device."""
    dtype, device = tensors[0].dtype, tensors[0].device
    torch._check_type(
        dtype.is_floating_point and dtype.itemsize >= 2, lambda: f"{name} must be floating point, got {dtype}"
    )
    for tensor in tensors[1:]:
        torch._check_type(
            tensor.dtype == dtype,
            lambda t=tensor: (
                f"{name}, projections, biases and input must share one dtype, got {dtype} and {t.dtype}; "
                "convert one, or run under torch.autocast"
            ),
        )
        torch._check_value(
            tensor.device == device,
            lambda t=tensor: (
                f"{name}, projections, biases and input must be on one device, got {device} and {t.device}"
            ),
        )


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError for lists, arrays and numbers, which the dispatcher refuses in words of its own."""
    # What stands for a tensor, such as a proxy of torch.fx, is the dispatcher's business.
    if not isinstance(value, Tensor) and not hasattr(type(value), "__torch_function__"):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")


def as_rows(input: Tensor) -> Tensor:
    """Input (..., d) as (rows, d)."""
    check_tensor(input, "input")
    if input.dim() < 1:
        raise ValueError("input must be (..., d), got a scalar")
    return input.reshape(-1, input.shape[-1])


def check_leading(tensor: Tensor, input: Tensor, name: str, extra: int) -> None:
    """Raise TypeError or ValueError unless ``tensor`` has input's leading dimensions, and ``extra`` more."""
    check_tensor(input, "input")
    check_tensor(tensor, name)
    # A plain branch, not torch._check_value: this runs under Dynamo, which takes no closure over tensors.
    if tensor.dim() != input.dim() - 1 + extra or tensor.shape[: tensor.dim() - extra] != input.shape[:-1]:
        wanted = (*input.shape[:-1], *["c"] * extra)
        raise ValueError(f"{name} must be {wanted} to go with input {tuple(input.shape)}, got {tuple(tensor.shape)}")
