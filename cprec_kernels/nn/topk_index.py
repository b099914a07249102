"""Weights of a clustered softmax, packed once for search on the CPU."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..ops.clustered_topk import Exclude
from ..ops.topk_index import CheckedIndex, IndexArrays
from ..partition import Partition
from .block_embedding import describe
from .index_file import bytes_of, read_index, write_index
from .index_packing import BLOCKS, STORAGES, pack

if TYPE_CHECKING:
    from .softmax_base import ClusteredSoftmaxBase

MAX_ITEMS = 2**31 - 1  # ids are int32 in the arrays


class TopKResult(tuple[Tensor, Tensor]):
    """What :meth:`TopKIndex.topk` gives: unpacks as (scores, items).

    Attributes:
        scores: (..., k) fp32 log-probabilities, descending.
        items: (..., k) int64.
        counters: (..., 3) int64, the work done per row: levels normalised, leaves of 64 items of which any was scored,
            inner products with items.
    """

    counters: Tensor

    def __new__(cls, scores: Tensor, items: Tensor, counters: Tensor) -> TopKResult:
        result = super().__new__(cls, (scores, items))
        result.counters = counters
        return result

    @property
    def scores(self) -> Tensor:
        return self[0]

    @property
    def items(self) -> Tensor:
        return self[1]

    def __getnewargs__(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[0], self[1], self.counters

    def __repr__(self) -> str:
        return f"TopKResult(scores={self.scores}, items={self.items}, counters={self.counters})"


class TopKIndex:
    """The best items of many queries, from weights packed for it: exact like the module's own ``topk``, and faster.

    Made by :meth:`build` or :meth:`load`; nothing about it changes afterwards, and any number of threads may search it.
    An index is a copy: one whose module has been trained on, or moved, is stale and refuses to search. Changes that
    torch does not count are not seen: through ``parameter.data``, and of a module made in inference mode.

    Example:
        >>> head = ClusteredSoftmaxWithLoss(64, Partition(1000, [50, 200], [64, 16, 4], 64))
        >>> index = TopKIndex.build(head, storage="float16")
        >>> scores, items = index.topk(torch.randn(8, 64), k=10)
    """

    def __init__(
        self,
        arrays: IndexArrays,
        partition: Partition,
        *,
        storage: str,
        exact: bool,
        blocks: str | None,
        fingerprint: str,
        module: ClusteredSoftmaxBase | None = None,
        built_from: list[tuple[Any, ...]] | None = None,
    ) -> None:
        """For :meth:`build` and :meth:`load`, which check what they pass: ``built_from`` is the module's state as it was
        before they first read its parameters."""
        self._arrays = arrays
        self._search = CheckedIndex(arrays)
        self._partition = partition
        self._storage = storage
        self._exact = exact
        self._blocks = blocks
        self._fingerprint = fingerprint
        self._module = None if module is None else weakref.ref(module)
        self._built_from = built_from
        # A weak reference keeps a freed storage's identity from being given to a new one, as its address may be.
        self._storages = [] if module is None else [StorageWeakRef(p.untyped_storage()) for p in module.parameters()]

    @classmethod
    def build(
        cls,
        module: ClusteredSoftmaxBase,
        storage: str = "float32",
        *,
        exact: bool = True,
        blocks: str | None = "auto",
    ) -> TopKIndex:
        """Pack a module's parameters.

        Args:
            module: on the CPU, in float32, float16 or bfloat16.
            storage: "float32", "float16", "bfloat16" or "int8" (with a scale per 32 items): what items are scored in.
                A narrower storage is faster, and its scores carry its rounding.
            exact: ids are those of the fp32 weights; a narrow storage then keeps these beside it, and reads few of
                them. False keeps none: ids are those of the rounded weights.
            blocks: "kd" reorders the items of large tails so that neighbours stand together and most of them can be
                passed over; None keeps the order by id. "auto" takes for every tail the one that promises the faster
                search, by a try with items of the head (docs/topk.md, (c)).

        Raises:
            RuntimeError: something else wrote to the module meanwhile, in the first try and in a second.
            TypeError: not a ClusteredSoftmaxWithLoss, a module in float64.
            ValueError: an unknown storage or order, a module elsewhere than on the CPU, NaN or inf in a parameter, a
                weight that the storage cannot hold.
        """
        if torch.compiler.is_compiling():  # nothing in packing is to be compiled, and tracing it fails
            return _build_untraced(module, storage, exact, blocks)
        _check_module(module)
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(map(repr, STORAGES))}, got {storage!r}")
        if blocks not in BLOCKS:
            raise ValueError(f"blocks must be 'auto', 'kd' or None, got {blocks!r}")
        if module.partition.num_items > MAX_ITEMS:
            raise ValueError(f"an index holds at most {MAX_ITEMS} items, the module has {module.partition.num_items}")
        _watch_fused_optimizers()  # before the state is taken: steps from here on count
        for _ in range(2):
            state = _state(module)
            with torch.no_grad():
                arrays = pack(module.packed_weights(), storage, exact, blocks).in_large_pages()
            fingerprint = _fingerprint(module)
            if _state(module) == state:
                break
        else:
            raise RuntimeError(
                "the module was written to while its index was built: build it when no other thread trains it, or of a "
                "copy that none trains (copy.deepcopy); a parametrization that updates itself needs module.eval() first"
            )
        return cls(
            arrays,
            module.partition,
            storage=storage,
            exact=exact or storage == "float32",
            blocks=blocks,
            fingerprint=fingerprint,
            module=module,
            built_from=state,
        )

    def topk(
        self,
        input: Tensor,
        k: int,
        exclude: Exclude | None = None,
        candidates: Tensor | None = None,
        *,
        early_termination: bool = True,
    ) -> TopKResult:
        """The k most probable items of every row.

        Args:
            input: (..., d) hidden states, float32, float16 or bfloat16.
            k: 0..num_items.
            exclude: items never to return, per row: padded (..., m) int64 whose negative entries are skipped, or
                ``(offsets, items)`` in CSR form, offsets (rows + 1,) ascending from 0.
            candidates: (c,) int64, the only items to choose from.
            early_termination: False scans every level of every row whole, for comparison: the same ids, and the same scores
                up to the rounding of a narrow storage.

        Returns:
            scores (..., k) fp32 log-probabilities and items (..., k) int64, best first, ties by smaller id; -inf and -1
            where fewer than k items are left.

        Raises:
            IndexError: an excluded or candidate item out of range.
            RuntimeError: the index is stale.
            TypeError: k not an int, exclude neither a tensor nor a pair, ids not int64, an input of another dtype.
            ValueError: k out of range, shapes that do not fit, NaN or inf in the input, NaN scores.
        """
        if self.is_stale:
            raise RuntimeError(
                "the module's parameters have changed since this index was built: build it again "
                "(module.build_index(...)), or search with module.topk(..., storage=...), which rebuilds by itself"
            )
        return self._topk(input, k, exclude, candidates, early_termination)

    def _topk(
        self,
        input: Tensor,
        k: int,
        exclude: Exclude | None = None,
        candidates: Tensor | None = None,
        early_termination: bool = True,
    ) -> TopKResult:
        """:meth:`topk` for those who have just looked whether the index is stale."""
        return TopKResult(
            *self._search(input, k, exclude=exclude, candidates=candidates, early_termination=early_termination)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file, whole or not at all: beside its place first, then renamed.

        A stale index is saved as what it is, that of the parameters it was built from.

        Raises:
            OSError: the file cannot be written.
        """
        about = {
            "partition": self._partition.to_dict(),
            "storage": self._storage,
            "exact": self._exact,
            "blocks": self._blocks,
            "parameters": self._fingerprint,
        }
        write_index(path, about, self._arrays)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        module: ClusteredSoftmaxBase | None = None,
        mmap: bool = True,
        verify: bool = True,
    ) -> TopKIndex:
        """Read an index that :meth:`save` wrote.

        Args:
            module: the module that the index should be of: its parameters are compared with those the index was built
                from, and later changes make the index stale. Without it an index is never stale.
            mmap: map the file instead of reading it: what no search touches is never read, and processes share the
                rest. The file must not be written to while it is mapped; :meth:`save` replaces files, and is safe.
            verify: compare checksums and check item ids, which reads the whole file once. False trusts the arrays.

        Raises:
            OSError: the file cannot be read.
            TypeError: module is not a ClusteredSoftmaxWithLoss.
            ValueError: the file is not an index, is truncated or damaged, is of another version or was built from
                other parameters than the module's.
        """
        if module is not None:
            _check_module(module)
        about, partition, arrays = read_index(path, mmap=mmap, verify=verify)
        state = None
        if module is not None:
            _watch_fused_optimizers()
            state = _state(module)
            if partition != module.partition:
                raise ValueError(
                    f"{os.fspath(path)} is an index of {describe(partition)}; the module has {describe(module.partition)}"
                )
            if about["parameters"] != _fingerprint(module):
                raise ValueError(
                    f"{os.fspath(path)} was built from other parameters than the module's: load the parameters it was "
                    "built from, or build the index again"
                )
        return cls(
            arrays,
            partition,
            storage=about["storage"],
            exact=about["exact"],
            blocks=about["blocks"],
            fingerprint=about["parameters"],
            module=module,
            built_from=state,
        )

    @property
    def storage(self) -> str:
        """Number format of the items that searches read."""
        return self._storage

    @property
    def exact(self) -> bool:
        """Whether ids are those of the fp32 weights."""
        return self._exact

    @property
    def blocks(self) -> str | None:
        """How large tails were reordered: "kd", "auto" for those where it promised to pay, None for none."""
        return self._blocks

    @property
    def partition(self) -> Partition:
        """The clusters."""
        return self._partition

    @property
    def num_items(self) -> int:
        """K."""
        return self._partition.num_items

    @property
    def nbytes(self) -> int:
        """Bytes that searches read: all arrays but the fp32 items beside a narrow storage."""
        return sum(array.nbytes for name, array in self._arrays.named() if not name.startswith("exact"))

    @property
    def nbytes_exact(self) -> int:
        """Bytes of the fp32 items beside a narrow storage, of which a search reads a few; 0 without them."""
        return sum(array.nbytes for array in self._arrays.exact)

    @property
    def is_stale(self) -> bool:
        """Whether the module's parameters have changed since; False when the module is gone or was never known."""
        module = None if self._module is None else self._module()
        return module is not None and _state(module) != self._built_from

    def __reduce__(self) -> Any:
        raise TypeError(
            "a TopKIndex is neither pickled nor deep-copied: save(path) it and load(path) it where it is needed, or "
            "build it again from the copied module"
        )

    def __repr__(self) -> str:
        sizes = f"{self.nbytes / 2**20:.1f} MiB"
        if self.nbytes_exact:
            sizes += f" + {self.nbytes_exact / 2**20:.1f} MiB exact"
        parts = [describe(self._partition), f"storage={self._storage!r}", f"exact={self._exact}"]
        parts += [f"blocks={self._blocks!r}", sizes, *(["stale"] if self.is_stale else [])]
        return f"TopKIndex({', '.join(parts)})"


@_disable_dynamo  # torch.compiler.disable would import the compiler, which takes seconds
def _build_untraced(module: ClusteredSoftmaxBase, storage: str, exact: bool, blocks: str | None) -> TopKIndex:
    return TopKIndex.build(module, storage, exact=exact, blocks=blocks)


def _check_module(module: ClusteredSoftmaxBase) -> None:
    # Not at the top: that module imports this one.
    from .softmax_base import ClusteredSoftmaxBase

    if not isinstance(module, ClusteredSoftmaxBase):
        raise TypeError(
            f"an index is of a ClusteredSoftmaxWithLoss, got {type(module).__name__}; pass the model's softmax"
        )
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is on {parameter.device}: an index serves from the CPU; move the module with module.cpu()"
            )
        if parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name} is {parameter.dtype}: an index keeps at most fp32; convert the module with module.float()"
            )


def _state(module: ClusteredSoftmaxBase) -> list[tuple[Any, ...]]:
    """What changes when a tensor of the module is written to, moved or replaced."""
    return [
        (
            tensor.untyped_storage()._cdata,
            tensor.data_ptr(),
            # Inference tensors have no counter.
            0 if tensor.is_inference() else tensor._version,
        )
        for tensor in _tensors(module)
    ]


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers (a parametrization's mask is one), shared ones each time: every search asks, and torch's own
    iterators take three times as long."""
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


@functools.cache
def _watch_fused_optimizers() -> None:
    """From now on let steps of torch's fused optimizers count as writes, which torch 2.13 forgets on the CPU."""
    # Called, not traced: compiled, it would count nothing.
    register_optimizer_step_post_hook(_disable_dynamo(_count_fused_step))


def _count_fused_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            # All that may have had a gradient: other hooks may have cleared it by now.
            torch.autograd.graph.increment_version(
                [param for param in group["params"] if param.requires_grad or param.grad is not None]
            )


def _fingerprint(module: ClusteredSoftmaxBase) -> str:
    """SHA-256 of the module's parameters, and of buffers if it was given any: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(bytes_of(tensor.detach().contiguous()))
    return digest.hexdigest()
