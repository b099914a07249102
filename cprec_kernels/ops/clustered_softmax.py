"""``cprec::clustered_softmax`` (log-probability of targets), ``clustered_log_prob`` and ``clustered_score``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from ..reference import clustered_softmax as ref
from ..reference.common import accumulate_dtype
from ._library import (
    ADDING_IN_PLACE,
    LIBRARY,
    as_rows,
    autocast,
    autograd,
    cast_floating,
    check_factors,
    check_ids,
    check_leading,
    check_rows,
    check_same_kind,
    define,
    fake,
    gradients_in_place,
    implement,
    not_twice_differentiable,
    refuse_tangents,
)
from ._reduction import reduce_loss
from .block_embedding import keep

# Schema

WEIGHTS = "Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases"
FORWARD = define(
    f"clustered_softmax(Tensor input, Tensor target, {WEIGHTS}, int ignore_index, bool smooth, ScalarType? arithmetic,"
    " bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
BACKWARD = define(
    f"clustered_softmax_backward(Tensor grad_log_prob, Tensor? grad_uniform, Tensor input, Tensor target, {WEIGHTS},"
    " Tensor lse_head, Tensor lse_tail, Tensor[] kept, int ignore_index, ScalarType? arithmetic, bool[5] output_mask)"
    " -> (Tensor, Tensor[], Tensor[], Tensor, Tensor[])"
)
BACKWARD_INTO = define(
    f"clustered_softmax_backward_into(Tensor grad_log_prob, Tensor? grad_uniform, Tensor input, Tensor target, {WEIGHTS},"
    " Tensor lse_head, Tensor lse_tail, Tensor[] kept, int ignore_index, ScalarType? arithmetic,"
    " Tensor(a!)[] d_weights, bool[5] output_mask) -> (Tensor, Tensor[], Tensor, Tensor[])"
)
LOG_PROB = define(f"clustered_log_prob(Tensor input, {WEIGHTS}) -> Tensor")
SCORE = define(f"clustered_score(Tensor input, Tensor items, {WEIGHTS}) -> Tensor")


class Weights(NamedTuple):
    """The parameters of a clustered softmax, in the order in which every op takes them.

    weights: W_0 (k_0 + n - 1, d_0), the items of cluster 0 and then one parent label per tail, and W_j (k_j, d_j).
    projections: Q_j (d_j, d) for the clusters with d_j < d, in order.
    head_bias: (k_0 + n - 1,) or None. tail_biases: one (k_j,) per tail, or empty.
    """

    weights: Sequence[Tensor]
    projections: Sequence[Tensor] = ()
    head_bias: Tensor | None = None
    tail_biases: Sequence[Tensor] = ()

    @property
    def num_items(self) -> int:
        """K: all rows but the parent labels."""
        return int(sum(weight.shape[0] for weight in self.weights)) - len(self.weights) + 1

    def args(self) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]]:
        """As the ops take them."""
        return list(self.weights), list(self.projections), self.head_bias, list(self.tail_biases)


# Implementations


def check_weights(input: Tensor, weights: Weights) -> None:
    """Check shapes, dtypes and devices of an input (T, d) and the parameters of a clustered softmax."""
    width = check_factors(weights.weights, weights.projections, "weights")
    torch._check_value(
        input.dim() == 2 and input.shape[1] == width,
        lambda: f"input must be (..., {width}), as wide as the weights, got {tuple(input.shape)}",
    )
    num_tails = len(weights.weights) - 1
    torch._check_value(
        weights.weights[0].shape[0] > num_tails,
        lambda: (
            f"weights[0] has {weights.weights[0].shape[0]} rows: {num_tails} parent labels leave no item in the head"
        ),
    )
    biases = list(weights.tail_biases)
    torch._check_value(
        len(biases) in (0, num_tails), lambda: f"{len(biases)} tail biases were given for {num_tails} tail clusters"
    )
    named = [(f"tail_biases[{j}]", bias, weights.weights[j + 1]) for j, bias in enumerate(biases)]
    if weights.head_bias is not None:
        named.insert(0, ("head_bias", weights.head_bias, weights.weights[0]))
    for name, bias, weight in named:
        torch._check_value(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda n=name, b=bias, w=weight: f"{n} must be ({w.shape[0]},), got {tuple(b.shape)}",
        )
    check_same_kind([weights.weights[0], input, *(bias for _, bias, _ in named)], "weights")


def _check(input: Tensor, target: Tensor, *args: Any) -> None:
    *weights, _ignore_index, _smooth, _arithmetic, _keep = args
    check_weights(input, Weights(*weights))
    check_rows(target, input, "target", dim=1)


def _check_values(input: Tensor, target: Tensor, *args: Any) -> None:
    *weights, ignore_index, _smooth, _arithmetic, _keep = args
    check_ids(target, Weights(*weights).num_items, "target", allowed=ignore_index)


def _check_score(input: Tensor, items: Tensor, *weights: Any) -> None:
    check_weights(input, Weights(*weights))
    check_rows(items, input, "items", dim=2)


def _unchecked(*args: Any) -> None:
    """For what only a checked forward can call."""


def _reference(input: Tensor, target: Tensor, *args: Any) -> tuple[Any, ...]:
    *weights, ignore_index, smooth, arithmetic, _ = args
    hidden, *factors = cast_floating([input, *weights], arithmetic)
    log_prob, uniform, lse_head, lse_tail = ref.clustered_softmax(hidden, target, *Weights(*factors), ignore_index)
    uniform = uniform if smooth else torch.zeros_like(uniform)
    return log_prob, uniform, lse_head.double(), lse_tail.double(), _reference_kept(input, target, *args)


def _reference_kept(input: Tensor, target: Tensor, *args: Any) -> list[Tensor]:
    """What the op keeps for its backward pass: descents (T, d_j) of every level, and the batch in the order of its
    targets, ignored ones last: places (T,) int64 and targets (T,) int32."""
    *weights, ignore_index, _smooth, arithmetic, wanted = args
    if not wanted:
        return []
    hidden, *factors = cast_floating([input, *weights], arithmetic)
    keys = torch.where(target == ignore_index, torch.iinfo(torch.int32).max, target).to(torch.int32)
    ids, order = torch.sort(keys, stable=True)
    return [*ref.clustered_softmax_descents(hidden, target, *Weights(*factors), ignore_index), order, ids]


def _reference_backward(
    grad_log_prob: Tensor, grad_uniform: Tensor | None, input: Tensor, target: Tensor, *args: Any
) -> tuple[Any, ...]:
    *weights, lse_head, lse_tail, _kept, ignore_index, arithmetic, output_mask = args
    grad_uniform = torch.zeros_like(grad_log_prob) if grad_uniform is None else grad_uniform
    hidden, *factors = cast_floating([input, *weights], arithmetic)
    wide = accumulate_dtype(hidden.dtype)
    gradients = ref.clustered_softmax_backward(
        grad_log_prob, grad_uniform, hidden, target, *Weights(*factors), lse_head.to(wide), lse_tail.to(wide),
        ignore_index, output_mask,
    )  # fmt: skip
    return tuple(cast_floating(gradients, input.dtype))


def _reference_backward_into(*args: Any) -> tuple[Any, ...]:
    *before, d_weights, output_mask = args
    d_input, computed, *rest = _reference_backward(*before, output_mask)
    for gradient, own in zip(d_weights, computed, strict=True):
        gradient.add_(own)
    return d_input, *rest


# The CPU's kernels have no use for what is kept: their backward pass has the logits of a block at hand for all gradients.
def _native(*args: Any) -> tuple[Any, ...]:
    return *torch.ops.cprec_native.clustered_softmax(*args[:-1]), _reference_kept(*args)


def _native_backward(op: str, grad_log_prob: Tensor, grad_uniform: Tensor | None, *args: Any) -> Any:
    grad_uniform = torch.zeros_like(grad_log_prob) if grad_uniform is None else grad_uniform
    return getattr(torch.ops.cprec_native, op)(grad_log_prob, grad_uniform, *args[:8], *args[9:])


# Half precision is multiplied as it is (on the CPU, fp16 widened) and summed in fp32.
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
for _op, _compiled, _plain in (
    (FORWARD, _native, _reference),
    (BACKWARD, functools.partial(_native_backward, BACKWARD), _reference_backward),
    (BACKWARD_INTO, functools.partial(_native_backward, BACKWARD_INTO), _reference_backward_into),
):
    _backend.register(
        _op,
        dataclasses.replace(_backend.native(_op, "cpu", NATIVE_DTYPES), call=_compiled),
        _backend.triton("clustered_softmax_backward" if "backward" in _op else FORWARD, _op, NATIVE_DTYPES, _plain),
        _backend.reference(_plain),
    )
_backend.register(
    SCORE,
    _backend.native(SCORE, "cpu", NATIVE_DTYPES),
    _backend.triton("clustered_rank", SCORE, NATIVE_DTYPES, ref.clustered_score),
    _backend.reference(ref.clustered_score),
)
implement(FORWARD, _check, _check_values, anchor=0)
implement(BACKWARD, _unchecked, _unchecked, anchor=2)
implement(BACKWARD_INTO, _unchecked, _unchecked, anchor=2)
implement(
    SCORE,
    _check_score,
    lambda input, items, *weights: check_ids(items, Weights(*weights).num_items, "items"),
    anchor=0,
)


def _log_prob(input: Tensor, *weights: Any) -> Tensor:
    check_weights(input, Weights(*weights))
    return ref.clustered_log_prob(input, *weights)


# It materialises (T, K) by definition and is made of torch's own ops: they bring derivative and fake along.
LIBRARY.impl(LOG_PROB, _log_prob, "CompositeImplicitAutograd")

# Fake


def _fake(input: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    _check(input, target, *args)
    weights, *_, arithmetic, keep = args
    wide = accumulate_dtype(input.dtype)
    log_prob, uniform, lse_head, lse_tail = (
        torch.empty_like(target, dtype=dtype, memory_format=torch.contiguous_format)
        for dtype in (wide, wide, torch.float64, torch.float64)
    )
    own = input.dtype if input.dtype == torch.float64 else arithmetic
    kept = [input.new_empty(input.shape[0], weight.shape[1], dtype=own) for weight in weights if keep]
    if keep:
        kept += [
            torch.empty_like(target, memory_format=torch.contiguous_format),
            target.new_empty(target.shape, dtype=torch.int32),
        ]
    return log_prob, uniform, lse_head, lse_tail, kept


def _fake_backward(
    grad_log_prob: Tensor, grad_uniform: Tensor | None, input: Tensor, target: Tensor, *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    weights, projections, head_bias, tail_biases, *_, output_mask = args
    want_input, want_weights, want_projections, want_head_bias, want_tail_biases = output_mask

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return input.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        like(input, want_input),
        [like(weight, True) for weight in weights] if want_weights else [],
        [like(projection, True) for projection in projections] if want_projections else [],
        like(head_bias, want_head_bias),
        [like(bias, True) for bias in tail_biases] if want_tail_biases else [],
    )


def _fake_backward_into(*args: Any) -> tuple[Any, ...]:
    *before, _, output_mask = args
    d_input, _, *rest = _fake_backward(*before, output_mask)
    return d_input, *rest


def _fake_score(input: Tensor, items: Tensor, *weights: Any) -> Tensor:
    _check_score(input, items, *weights)
    return torch.empty_like(items, dtype=accumulate_dtype(input.dtype), memory_format=torch.contiguous_format)


fake(FORWARD, _fake)
fake(BACKWARD, _fake_backward)
fake(BACKWARD_INTO, _fake_backward_into)
fake(SCORE, _fake_score)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, weights, projections, head_bias, tail_biases, ctx.ignore_index, smooth, ctx.arithmetic, _ = inputs
    _, uniform, lse_head, lse_tail, kept = output
    ctx.mark_non_differentiable(*([] if smooth else [uniform]), lse_head, lse_tail, *kept)  # constant 0 if not smooth
    ctx.set_materialize_grads(False)  # zeros for what is kept would be written for nobody
    ctx.counts = len(weights), len(projections), len(tail_biases)
    ctx.save_for_backward(*inputs[:2], lse_head, lse_tail, head_bias, *weights, *projections, *tail_biases, *kept)


def _backward(ctx: Any, grad_log_prob: Tensor | None, grad_uniform: Tensor | None, *_: Any) -> tuple[Any, ...]:
    input, target, lse_head, lse_tail, head_bias, *rest = ctx.saved_tensors
    rest = iter(rest)
    weights, projections, tail_biases = (list(itertools.islice(rest, count)) for count in ctx.counts)
    if grad_log_prob is None:
        grad_log_prob = torch.zeros_like(lse_head, dtype=accumulate_dtype(input.dtype))
    need_input, _, need_weights, need_projections, need_head_bias, need_tail_biases, *_ = ctx.needs_input_grad
    args = (
        grad_log_prob, grad_uniform, input, target, weights, projections, head_bias, tail_biases,
        lse_head, lse_tail, list(rest), ctx.ignore_index, ctx.arithmetic,
    )  # fmt: skip
    mask = [need_input, any(need_weights), any(need_projections), need_head_bias, any(need_tail_biases)]
    in_place = gradients_in_place(weights) if all(need_weights) else None
    if in_place is not None:
        with ADDING_IN_PLACE:
            d_input, *others = torch.ops.cprec.clustered_softmax_backward_into(*args, in_place, mask)
        found = (d_input, [], *others)
    else:
        found = torch.ops.cprec.clustered_softmax_backward(*args, mask)
    d_input, d_weights, d_projections, d_head_bias, d_tail_biases = found
    return (
        d_input if need_input else None,
        None,
        keep(d_weights, need_weights),
        keep(d_projections, need_projections),
        d_head_bias if need_head_bias else None,
        keep(d_tail_biases, need_tail_biases),
        None,
        None,
        None,
        None,
    )


autograd(FORWARD, _backward, _setup_context)
not_twice_differentiable(BACKWARD)

# Autocast


def _autocast_forward(overload: Any, dtype: torch.dtype, input: Tensor, target: Tensor, *args: Any) -> Any:
    # The weights stay as they are, and so do their gradients: narrow copies of large tables would cost more than they
    # save, and the kernels narrow a block at a time. Results stay in fp32.
    weights, *rest, _, keep = args
    own = weights[0].dtype
    return overload(input.to(own), target, *cast_floating([weights, *rest], own), dtype, keep)


def _autocast(overload: Any, dtype: torch.dtype, *args: Any) -> Any:
    # Results stay in fp32: the op sums in fp32 whatever the inputs are.
    return overload(*[cast_floating(arg, dtype) for arg in args])


autocast(FORWARD, _autocast_forward)
autocast(LOG_PROB, _autocast)
autocast(SCORE, _autocast)

# Public


# Devices whose kernels get the descents almost for nothing, and spare the backward pass a scan of the weights with them.
KEEPING_DEVICES = ("cuda",)


def wants_kept(input: Tensor, weights: Weights) -> bool:
    """Whether the forward pass had better keep descents and order: dz will be asked for, and Triton is to serve.

    Decided here, where grad mode is known, from what torch.compile can follow. Every implementation obeys: where another
    one serves after all, it computes them and its backward pass does without.
    """
    needed = input.requires_grad or any(projection.requires_grad for projection in weights.projections)
    served = input.device.type in KEEPING_DEVICES and weights.weights[0].dtype in NATIVE_DTYPES
    return torch.is_grad_enabled() and needed and served and _backend.get_backend() in ("auto", "triton")


def clustered_target_log_prob(
    input: Tensor, target: Tensor, weights: Weights, *, ignore_index: int = -100, smooth: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, and the term that label smoothing mixes in; both (...) in fp32 or wider.

    The second is the sum over the token's levels (the head; the target's tail, if it has one) of the mean
    log-probability of the level's entries, or 0 with ``smooth=False``. Ignored tokens give 0 in both. Arguments as
    :func:`clustered_cross_entropy`.
    """
    check_leading(target, input, "target", 0)
    refuse_tangents("clustered_softmax", input, *weights.args())
    log_prob, uniform, *_ = torch.ops.cprec.clustered_softmax(
        as_rows(input), target.reshape(-1), *weights.args(), ignore_index, smooth, None, wants_kept(input, weights)
    )
    return log_prob.reshape(target.shape), uniform.reshape(target.shape)


def clustered_cross_entropy(
    input: Tensor,
    target: Tensor,
    weights: Weights,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of a two-level clustered softmax (CpRec, arXiv 2004.13139, eq. 6-8).

    Evaluates the head for every counted token and, for a token whose target lies in a tail, that tail alone.

    Args:
        input: (..., d) hidden states h, in the dtype of the weights (any mix under autocast).
        target: (...) int64, each in 0..num_items-1 or ``ignore_index``.
        weights: the parameters; see :class:`Weights`.
        ignore_index: targets of this value count for nothing.
        reduction: "none" gives (...), "sum" a scalar, "mean" the sum over the number of counted tokens (0 when there
            are none).
        label_smoothing: epsilon in [0, 1], applied at each level on its own: the level's target distribution is
            (1 - epsilon) onehot + epsilon / C over its C entries, so that the loss of a tail token is smoothed in the
            head (k_0 + n - 1 entries) and in its tail (k_j entries), that of a head token in the head.

    Returns:
        The loss, in fp32 (fp64 for fp64).

    Raises:
        IndexError: a target out of range, with its place.
        TypeError: target not int64, mixed dtypes. RuntimeError: in forward mode, which has no rule.
        ValueError: shapes that do not fit together, an unknown reduction, smoothing outside [0, 1].
    """
    log_prob, uniform = clustered_target_log_prob(
        input, target, weights, ignore_index=ignore_index, smooth=label_smoothing > 0
    )
    return reduce_loss(log_prob, uniform, target, ignore_index, reduction, label_smoothing)


def clustered_log_prob(input: Tensor, weights: Weights) -> Tensor:
    """Log-probabilities of all items: (..., num_items) for input (..., d), in fp32 or wider. Differentiable.

    This is the one function that holds a row of the whole catalogue per input row; for the best items use
    :func:`clustered_topk`, for given ones :func:`clustered_score`.
    """
    out: Tensor = torch.ops.cprec.clustered_log_prob(as_rows(input), *weights.args())
    return out.reshape(*input.shape[:-1], weights.num_items)


def clustered_score(input: Tensor, items: Tensor, weights: Weights) -> Tensor:
    """Log-probabilities of given items, for re-ranking: (..., c) for input (..., d) and items (..., c) int64.

    Reads a tail only for rows that name one of its items. Not differentiable.

    Raises:
        IndexError: an item out of range, with its place.
        TypeError: items not int64, mixed dtypes.
        ValueError: shapes that do not fit together.
    """
    check_leading(items, input, "items", 1)
    rows = as_rows(input)
    with torch.no_grad():
        out: Tensor = torch.ops.cprec.clustered_score(
            rows, items.reshape(rows.shape[0], items.shape[-1]), *weights.args()
        )
    return out.reshape(items.shape)
