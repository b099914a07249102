"""``cprec::topk_index``: the best items, found in weights that were packed once for search on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from ..reference import topk_index as ref
from ._library import define, fake, implement
from .clustered_softmax import NATIVE_DTYPES
from .clustered_topk import Exclude, check_choice, check_choice_values, choice_of_rows

# Schema

TOPK_INDEX = define(
    "topk_index(Tensor input, int k, int[] sizes, Tensor[] groups, Tensor[] scales, Tensor[] exact, Tensor[] biases,"
    " Tensor[] projections, Tensor[] ids, Tensor[] leaves, Tensor[] leaf_stats, Tensor[] leaf_bases, Tensor bounds,"
    " Tensor parents, Tensor parent_bias, Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates, bool early_termination)"
    " -> (Tensor scores, Tensor items, Tensor counters)"
)
GROUP, LEAF = ref.GROUP, ref.LEAF
NUM_BOUNDS = 6
LISTS = slice(1, 10)  # fields of IndexArrays with an entry per level
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
IN_LARGE_PAGES = _backend.native("in_large_pages", "cpu", STORED_DTYPES)


class IndexArrays(NamedTuple):
    """The arrays of a packed index, in the order in which the op takes them; all contiguous.

    Lists have one entry per level, of k_j items and rank r_j; an absent entry is a tensor without elements. Items stand
    in groups of 32, G_j = ceil(k_j / 32), and leaves of 64, L_j = ceil(k_j / 64), both consecutive in packed order.
    "Weights" below are those whose order counts: fp32 where they are kept, else the stored ones.

    sizes: k_j; the head's without parent labels.
    groups: (G_j, r_j, 32): [g, c, i] is column c of packed item 32 g + i; 0 behind the last item. One dtype for all
        levels: float32, float16, bfloat16 or int8.
    scales: (G_j,) float32, for int8 only: a weight is scale * int8.
    exact: (G_j, r_j, 32) float32: the same items unrounded, where ``groups`` is narrower and the ids are to be exact.
    biases: (32 G_j,) float32 in packed order, 0 behind the last item. Absent without a bias.
    projections: Q_j (r_j, d) float32. Absent where r_j = d.
    ids: (32 G_j,) int32: item of every packed position, -1 behind the last. Absent where the order is that of the ids.
    leaves: (ceil(L_j / 32), 3, r_j, 32) float32, leaf l at [l // 32, :, :, l % 32]: mean of the weights, centre and
        half-width of their bounding box, the last rounded up, all in the basis below. Absent for the head and
        for tails that are searched without.
    leaf_stats: (ceil(L_j / 32), 4, 32) float32: largest |weight - mean| rounded up, log2 of the number of items (-1e30
        behind the last leaf), largest bias, mean bias. Absent with ``leaves``.
    leaf_bases: A_j (r_j, r_j) float32, invertible: leaves hold A_j^-T w of a weight w and take A_j z of a row z, which
        leaves their inner product as it is. Absent with ``leaves``.
    bounds: (n, 6) float64, rounded up: largest |weight - stored weight|, largest |weight|, fp32 or stored, largest
        |weight - mean of the level|, largest bias - mean bias, largest |bias|, largest |weight| in the leaves' basis.
    parents: (n - 1, r_0) float32, the rows of the parent labels. parent_bias: (n - 1,) float32, or absent.
    """

    sizes: Sequence[int]
    groups: Sequence[Tensor]
    scales: Sequence[Tensor]
    exact: Sequence[Tensor]
    biases: Sequence[Tensor]
    projections: Sequence[Tensor]
    ids: Sequence[Tensor]
    leaves: Sequence[Tensor]
    leaf_stats: Sequence[Tensor]
    leaf_bases: Sequence[Tensor]
    bounds: Tensor
    parents: Tensor
    parent_bias: Tensor

    @property
    def num_items(self) -> int:
        """K."""
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """Model width d: that of a projection, or the head's rank, which is d where the head has none."""
        return int((self.projections[0] if self.projections[0].numel() > 0 else self.groups[0]).shape[1])

    @classmethod
    def absent(cls, sizes: Sequence[int], rank: int) -> IndexArrays:
        """An index of levels of these sizes in which nothing is there yet; ``rank`` is the head's."""
        lists = [
            [torch.empty(0, dtype=torch.int32 if name == "ids" else torch.float32, device="cpu") for _ in sizes]
            for name in cls._fields[LISTS]
        ]
        bounds, parents, parent_bias = (
            torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((0,), (0, rank), (0,))
        )
        return cls._make([list(sizes), *lists, bounds, parents, parent_bias])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every array with its name, ``groups.0`` for entry 0 of the list ``groups``, level by level."""
        for j in range(len(self.sizes)):
            for name, entries in zip(self._fields[LISTS], self[LISTS], strict=True):
                yield f"{name}.{j}", entries[j]
        yield from zip(self._fields[LISTS.stop :], self[LISTS.stop :], strict=True)

    def in_large_pages(self) -> IndexArrays:
        """The same, the packed items copied to large pages where module and system have them: fewer address misses."""
        if IN_LARGE_PAGES.available():
            return self
        return self._replace(groups=[IN_LARGE_PAGES.call(group) for group in self.groups])

    def args(self) -> tuple[list[int] | list[Tensor] | Tensor, ...]:
        """As the op takes them."""
        return (list(self.sizes), *map(list, self[1:10]), *self[10:])  # LISTS, as types go


# Implementations


def _expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    # Plain branches here and below: an index's own sizes are never symbolic, and a search of microseconds runs this
    # over every array.
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}; build the index again")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}; build the index again")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {shape} must be contiguous; build the index again")


def _expect_absent(tensor: Tensor, name: str, why: str) -> None:
    if tensor.numel() > 0:
        raise ValueError(f"{name} must be absent, {why}, got {tuple(tensor.shape)}; build the index again")


def check_arrays(arrays: IndexArrays) -> None:
    """Check shapes and dtypes of all arrays against each other.

    Raises:
        TypeError: a wrong dtype.
        ValueError: an array that is missing, should be absent, or has another shape than the others ask for.
    """
    sizes, groups = arrays.sizes, arrays.groups
    levels = len(sizes)
    if levels == 0:
        raise ValueError("an index must have at least one level; build it again")
    for name, entries in zip(IndexArrays._fields[LISTS], arrays[LISTS], strict=True):
        if len(entries) != levels:
            raise ValueError(f"{name} has {len(entries)} entries for {levels} levels; build the index again")
    for j, (size, group) in enumerate(zip(sizes, groups, strict=True)):
        if size < 1:
            raise ValueError(f"sizes[{j}] = {size} must be at least 1; build the index again")
        if group.dim() != 3:
            raise ValueError(f"groups[{j}] must be (groups, rank, {GROUP}), got {tuple(group.shape)}")
    projection = arrays.projections[0]
    if projection.numel() > 0 and projection.dim() != 2:
        raise ValueError(f"projections[0] must be (rank, width), got {tuple(projection.shape)}")
    stored, width = groups[0].dtype, arrays.width
    if stored not in STORED_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORED_DTYPES)
        raise TypeError(f"groups[0] must be one of {names}, got {stored}; build the index again")
    with_exact = arrays.exact[0].numel() > 0
    if with_exact and stored == torch.float32:
        raise ValueError("exact[0] must be absent: the groups are float32; build the index again")
    for j, size in enumerate(sizes):
        rank = int(groups[j].shape[1])
        if not 1 <= rank <= width:
            raise ValueError(f"groups[{j}] has rank {rank}, outside 1..{width} (the model width)")
        num_groups, num_leaves = -(-size // GROUP), -(-size // LEAF)
        packed, columns = (num_groups, rank, GROUP), (num_groups * GROUP,)
        _expect(groups[j], packed, stored, f"groups[{j}]")
        if stored == torch.int8:
            _expect(arrays.scales[j], (num_groups,), torch.float32, f"scales[{j}]")
        else:
            _expect_absent(arrays.scales[j], f"scales[{j}]", f"they belong to int8, not {stored}")
        if with_exact:
            _expect(arrays.exact[j], packed, torch.float32, f"exact[{j}]")
        else:
            _expect_absent(arrays.exact[j], f"exact[{j}]", "as exact[0] is")
        if rank < width:
            _expect(arrays.projections[j], (rank, width), torch.float32, f"projections[{j}]")
        else:
            _expect_absent(arrays.projections[j], f"projections[{j}]", f"the rank is the width {width}")
        if arrays.biases[j].numel() > 0:
            _expect(arrays.biases[j], columns, torch.float32, f"biases[{j}]")
        if arrays.ids[j].numel() > 0:
            _expect(arrays.ids[j], columns, torch.int32, f"ids[{j}]")
        if j == 0:
            _expect_absent(arrays.leaves[j], "leaves[0]", "the head has none")
            _expect_absent(arrays.leaf_stats[j], "leaf_stats[0]", "the head has no leaves")
            _expect_absent(arrays.leaf_bases[j], "leaf_bases[0]", "the head has no leaves")
        elif any(of[j].numel() > 0 for of in (arrays.leaves, arrays.leaf_stats, arrays.leaf_bases)):
            _expect(arrays.leaves[j], (-(-num_leaves // GROUP), 3, rank, GROUP), torch.float32, f"leaves[{j}]")
            _expect(arrays.leaf_stats[j], (-(-num_leaves // GROUP), 4, GROUP), torch.float32, f"leaf_stats[{j}]")
            _expect(arrays.leaf_bases[j], (rank, rank), torch.float32, f"leaf_bases[{j}]")
    _expect(arrays.bounds, (levels, NUM_BOUNDS), torch.float64, "bounds")
    _expect(arrays.parents, (levels - 1, groups[0].shape[1]), torch.float32, "parents")
    if arrays.parent_bias.numel() > 0:
        _expect(arrays.parent_bias, (levels - 1,), torch.float32, "parent_bias")


def _check_query(
    input: Tensor,
    k: int,
    arrays: IndexArrays,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    candidates: Tensor | None,
) -> None:
    """Check what is asked of arrays that fit together."""
    torch._check_type(
        input.dtype in NATIVE_DTYPES,
        lambda: f"input must be float32, float16 or bfloat16, got {input.dtype}; convert it with input.float()",
    )
    torch._check_value(
        input.device == arrays.bounds.device,
        lambda: f"input is on {input.device}, the index on {arrays.bounds.device}; move the input",
    )
    width = arrays.width
    torch._check_value(
        input.dim() == 2 and input.shape[1] == width,
        lambda: f"input must be (..., {width}), as wide as the index, got {tuple(input.shape)}",
    )
    check_choice(input, k, arrays.num_items, exclude, exclude_offsets, candidates)


def _check(input: Tensor, k: int, *args: Any) -> None:
    *packed, exclude, exclude_offsets, candidates, _early_termination = args
    arrays = IndexArrays(*packed)
    check_arrays(arrays)
    _check_query(input, k, arrays, exclude, exclude_offsets, candidates)


def _check_values(input: Tensor, k: int, *args: Any) -> None:
    sizes, *_, exclude, exclude_offsets, candidates, _early_termination = args
    check_choice_values(input, sum(sizes), exclude, exclude_offsets, candidates)


_NATIVE = _backend.native(TOPK_INDEX, "cpu", NATIVE_DTYPES)
_backend.register(TOPK_INDEX, _NATIVE, _backend.reference(ref.topk_index))
implement(TOPK_INDEX, _check, _check_values, anchor=0)

# Fake


def _fake(input: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(input, k, *args)
    rows = input.shape[0]
    return (
        input.new_empty((rows, k), dtype=torch.float32),
        input.new_empty((rows, k), dtype=torch.int64),
        input.new_empty((rows, 3), dtype=torch.int64),
    )


fake(TOPK_INDEX, _fake)

# Autocast: none. The index has its own number format, and scores are fp32 whatever the input is.

# Public


def topk_index(
    input: Tensor,
    k: int,
    arrays: IndexArrays,
    *,
    exclude: Exclude | None = None,
    candidates: Tensor | None = None,
    early_termination: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable items of every row, from an index.

    Up to the rounding of a score, which two sums may leave on either side of a tie, the ids are those of
    :func:`cprec_kernels.functional.clustered_topk` on the index's fp32 weights where it keeps them,
    else on the stored ones. Item ids inside ``arrays`` are trusted; :class:`cprec_kernels.nn.TopKIndex` checks those it
    reads from a file.

    Args:
        input: (..., d) hidden states, float32, float16 or bfloat16.
        k: 0..num_items.
        arrays: the packed weights; see :class:`IndexArrays`.
        exclude: items never to return, per row: padded (..., m) int64 whose negative entries are skipped, or
            ``(offsets, items)`` in CSR form, offsets (rows + 1,) ascending from 0, rows numbered as in the flattened
            input.
        candidates: (c,) int64, the only items to choose from.
        early_termination: False scans every level of every row whole, for comparison: the same ids, and the same scores
            up to the rounding of a narrow storage.

    Returns:
        scores (..., k) fp32 log-probabilities and items (..., k) int64, best first, ties by smaller id; -inf and -1
        where fewer than k items are left. counters (..., 3) int64, the work done: levels normalised, leaves of 64 items
        of which any was scored, inner products with items.

    Raises:
        IndexError: an excluded or candidate item out of range.
        TypeError: k not an int, exclude neither a tensor nor a pair, no tensors, ids not int64, an input of another
            dtype.
        ValueError: k out of range, shapes that do not fit, NaN or inf in the input, NaN scores.
    """
    rows, excluded, offsets = choice_of_rows(input, k, exclude, candidates)
    with torch.no_grad():
        found = torch.ops.cprec.topk_index(rows, k, *arrays.args(), excluded, offsets, candidates, early_termination)
    return _with_leading(found, input)


class CheckedIndex:
    """:func:`topk_index` on arrays that are checked once: to check forty of them again takes longer than a search.

    Raises:
        TypeError, ValueError: as :func:`check_arrays`.
    """

    def __init__(self, arrays: IndexArrays) -> None:
        check_arrays(arrays)
        self.arrays = arrays
        self._args = arrays.args()
        self._width, self._num_items = arrays.width, arrays.num_items
        self._native: Callable[..., tuple[Tensor, ...]] | None = None
        if arrays.bounds.device.type == "cpu" and not _NATIVE.available():
            # The kernel's own form of the arrays, which searches share: it also checks them, and keeps them alive.
            self._native = torch.classes.cprec_native.PackedIndex(*self._args, self._width).search

    def __call__(
        self,
        input: Tensor,
        k: int,
        *,
        exclude: Exclude | None = None,
        candidates: Tensor | None = None,
        early_termination: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`topk_index`."""
        plain = type(input) is Tensor and input.device.type == "cpu"
        if torch.compiler.is_compiling() or not plain:
            return topk_index(
                input, k, self.arrays, exclude=exclude, candidates=candidates, early_termination=early_termination
            )
        rows, excluded, offsets = choice_of_rows(input, k, exclude, candidates)
        # The plain query of a server: what would be checked, without the calls that word a complaint.
        fits = rows.dtype in NATIVE_DTYPES and rows.shape[1] == self._width and 0 <= k <= self._num_items
        if not fits or excluded is not None or candidates is not None:
            _check_query(rows, k, self.arrays, excluded, offsets, candidates)
        check_choice_values(rows, self._num_items, excluded, offsets, candidates)
        search = _backend.dispatch(TOPK_INDEX, rows)
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            if search is _NATIVE.call and self._native is not None:
                found = self._native(rows, k, excluded, offsets, candidates, early_termination)
            else:
                found = search(rows, k, *self._args, excluded, offsets, candidates, early_termination)
        return _with_leading(found, input)


def _with_leading(found: tuple[Tensor, ...], input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores, items, counters = found
    if input.dim() == 2:
        return scores, items, counters
    return tuple(part.reshape(*input.shape[:-1], part.shape[-1]) for part in found)  # type: ignore[return-value]
