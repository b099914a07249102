"""``cprec::clustered_topk`` (the exact best items) and ``cprec::clustered_rank`` (the place of a target)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import clustered_topk as ref
from ..reference.common import accumulate_dtype
from ._library import (
    as_rows,
    autocast,
    cast_floating,
    check_ids,
    check_integers,
    check_leading,
    check_rows,
    check_tensor,
    define,
    fake,
    implement,
)
from .clustered_softmax import NATIVE_DTYPES, WEIGHTS, Weights, check_weights

# Schema

TOPK = define(
    f"clustered_topk(Tensor input, int k, {WEIGHTS}, Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates)"
    " -> (Tensor, Tensor)"
)
RANK = define(f"clustered_rank(Tensor input, Tensor target, {WEIGHTS}) -> Tensor")

# Implementations


def check_choice(
    input: Tensor,
    k: int,
    num_items: int,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    candidates: Tensor | None,
) -> None:
    """Check k and the shapes and dtypes of what narrows a search over rows (T, d): exclusions and candidates."""
    torch._check_value(0 <= k <= num_items, lambda: f"k = {k} is outside 0..{num_items} (num_items)")
    if exclude is not None and exclude_offsets is None:
        check_rows(exclude, input, "exclude", dim=2)
    if exclude_offsets is not None:
        torch._check_value(exclude is not None, lambda: "exclude offsets were given without items")
        assert exclude is not None
        check_integers(exclude, "exclude items")
        check_integers(exclude_offsets, "exclude offsets")
        torch._check_value(
            exclude.dim() == 1 and exclude_offsets.dim() == 1 and exclude_offsets.shape[0] == input.shape[0] + 1,
            lambda: (
                "exclude as (offsets, items) needs 1-D tensors and one offset more than input rows, got "
                f"{tuple(exclude_offsets.shape)} and {tuple(exclude.shape)} for {input.shape[0]} rows"
            ),
        )
    for name, given in (("exclude", exclude), ("exclude offsets", exclude_offsets), ("candidates", candidates)):
        if given is not None and given.device != input.device:
            raise ValueError(f"{name} must be on {input.device}, where input is, not on {given.device}")
    if candidates is not None:
        check_integers(candidates, "candidates")
        torch._check_value(candidates.dim() == 1, lambda: f"candidates must be 1-D, got {tuple(candidates.shape)}")


def check_choice_values(
    input: Tensor, num_items: int, exclude: Tensor | None, exclude_offsets: Tensor | None, candidates: Tensor | None
) -> None:
    """Check the data of what :func:`check_choice` has passed: a finite input, ids in range, offsets that ascend."""
    _check_finite(input)
    if candidates is not None:
        check_ids(candidates, num_items, "candidates")
    if exclude is not None:
        check_ids(exclude.clamp(min=0), num_items, "exclude")
    if exclude is not None and exclude_offsets is not None:
        _check_offsets(exclude_offsets, exclude.shape[0])


def _check_offsets(offsets: Tensor, count: int) -> None:
    """Raise ValueError unless offsets (rows + 1,) ascend from 0 to ``count``; on a device, assert it in the stream."""
    expected = f"exclude offsets must ascend from 0 to the number of items {count}"
    ascending = (offsets.diff() >= 0).all()
    if offsets.device.type != "cpu":
        torch._assert_async((offsets[0] == 0) & (offsets[-1] == count) & ascending, expected)
        return
    ends = int(offsets[0]), int(offsets[-1])
    if ends != (0, count) or not ascending:
        raise ValueError(f"{expected}, got {ends[0]}..{ends[1]}{'' if ascending else ', not ascending'}")


def _check_topk(input: Tensor, k: int, *args: Any) -> None:
    *weights, exclude, exclude_offsets, candidates = args
    packed = Weights(*weights)
    check_weights(input, packed)
    check_choice(input, k, packed.num_items, exclude, exclude_offsets, candidates)


def _check_topk_values(input: Tensor, k: int, *args: Any) -> None:
    *weights, exclude, exclude_offsets, candidates = args
    check_choice_values(input, Weights(*weights).num_items, exclude, exclude_offsets, candidates)


def _check_finite(input: Tensor) -> None:
    if input.device.type != "cpu" or input.numel() == 0:
        return
    # A sum is finite only if all of its terms are, and costs a fifth of looking at each; it may overflow by itself.
    if not math.isfinite(input.sum().item()) and not input.isfinite().all():
        bad = ~input.isfinite().all(1)
        raise ValueError(f"input row {int(bad.nonzero()[0])} holds NaN or inf: scores cannot be ordered")


def _check_rank(input: Tensor, target: Tensor, *weights: Any) -> None:
    check_weights(input, Weights(*weights))
    check_rows(target, input, "target", dim=1)


def _check_rank_values(input: Tensor, target: Tensor, *weights: Any) -> None:
    _check_finite(input)
    check_ids(target, Weights(*weights).num_items, "target")


_backend.register(
    TOPK,
    _backend.native(TOPK, "cpu", NATIVE_DTYPES),
    _backend.triton("clustered_topk", TOPK, NATIVE_DTYPES, ref.clustered_topk),
    _backend.reference(ref.clustered_topk),
)
_backend.register(
    RANK,
    _backend.native(RANK, "cpu", NATIVE_DTYPES),
    _backend.triton("clustered_rank", RANK, NATIVE_DTYPES, ref.clustered_rank),
    _backend.reference(ref.clustered_rank),
)
implement(TOPK, _check_topk, _check_topk_values, anchor=0)
implement(RANK, _check_rank, _check_rank_values, anchor=0)

# Fake


def _fake_topk(input: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor]:
    _check_topk(input, k, *args)
    shape = (input.shape[0], k)
    return input.new_empty(shape, dtype=accumulate_dtype(input.dtype)), input.new_empty(shape, dtype=torch.int64)


def _fake_rank(input: Tensor, target: Tensor, *weights: Any) -> Tensor:
    _check_rank(input, target, *weights)
    return torch.empty_like(target, memory_format=torch.contiguous_format)


fake(TOPK, _fake_topk)
fake(RANK, _fake_rank)

# Autocast


def _autocast(overload: Any, dtype: torch.dtype, *args: Any) -> Any:
    return overload(*[cast_floating(arg, dtype) for arg in args])


autocast(TOPK, _autocast)
autocast(RANK, _autocast)

# Public

Exclude = Tensor | tuple[Tensor, Tensor]


def choice_of_rows(
    input: Tensor, k: int, exclude: Exclude | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows (T, d) of an input (..., d), the exclusions as the ops take them, and their offsets.

    Raises:
        TypeError: k not an int, exclude neither a tensor nor a pair of tensors, input or candidates no tensor.
        ValueError: padded exclusions that do not go with the input.
    """
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {k!r}")
    pair = isinstance(exclude, tuple) and len(exclude) == 2
    if exclude is not None and not isinstance(exclude, Tensor) and not pair:
        raise TypeError(
            "exclude must be an int64 tensor (..., m), negative entries skipped, or a pair (offsets, items)"
        )
    if candidates is not None:
        check_tensor(candidates, "candidates")
    rows = as_rows(input)
    if isinstance(exclude, Tensor):
        check_leading(exclude, input, "exclude", 1)
        # By the number of rows: -1 would be ambiguous for an empty list of exclusions.
        return rows, exclude.reshape(rows.shape[0], exclude.shape[-1]), None
    if exclude is None:
        return rows, None, None
    offsets, items = exclude
    check_tensor(offsets, "offsets of exclude")
    check_tensor(items, "items of exclude")
    return rows, items, offsets


def clustered_topk(
    input: Tensor,
    k: int,
    weights: Weights,
    *,
    exclude: Exclude | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable items of every row, exact: the same ids as sorting the whole log-probability.

    Args:
        input: (..., d) hidden states.
        k: 0..num_items.
        weights: the parameters; see :class:`Weights`.
        exclude: items never to return, per row: padded (..., m) int64 whose negative entries are skipped, or
            ``(offsets, items)`` in CSR form, offsets (rows + 1,) ascending from 0, rows numbered as in the flattened
            input.
        candidates: (c,) int64, the only items to choose from.

    Returns:
        scores (..., k) log-probabilities, descending, in fp32 or wider, and items (..., k) int64; ties by smaller id.
        Where fewer than k items are left, the rest of the row is -inf and -1.

    Raises:
        IndexError: an excluded or candidate item out of range.
        TypeError: k not an int, exclude neither a tensor nor a pair, no tensors, ids not int64, mixed dtypes.
        ValueError: k out of range, shapes that do not fit; on the CPU also NaN or inf in the input and NaN scores. On
            a device, which is not waited for, an item whose score is NaN is not found.
    """
    rows, excluded, offsets = choice_of_rows(input, k, exclude, candidates)
    with torch.no_grad():
        scores, items = torch.ops.cprec.clustered_topk(rows, k, *weights.args(), excluded, offsets, candidates)
    shape = (*input.shape[:-1], k)
    return scores.reshape(shape), items.reshape(shape)


def clustered_rank(input: Tensor, target: Tensor, weights: Weights) -> Tensor:
    """0-based place of every target among all items: how many score higher, or the same with a smaller id.

    HR@N is ``rank < N``, NDCG@N ``1 / log2(rank + 2)`` and MRR@N ``1 / (rank + 1)`` where ``rank < N``. Holds no
    (rows, num_items) tensor.

    Args:
        input: (..., d) hidden states.
        target: (...) int64, each in 0..num_items-1.
        weights: the parameters; see :class:`Weights`.

    Returns:
        (...) int64.

    Raises:
        IndexError: a target out of range, with its place.
        TypeError: no tensors, target not int64, mixed dtypes.
        ValueError: shapes that do not fit together; on the CPU also NaN or inf in the input and NaN scores. On a
            device, which is not waited for, an item whose score is NaN comes last.
    """
    check_leading(target, input, "target", 0)
    with torch.no_grad():
        out: Tensor = torch.ops.cprec.clustered_rank(as_rows(input), target.reshape(-1), *weights.args())
    return out.reshape(target.shape)
